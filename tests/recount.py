"""Recounts `full` test metrics of a run from two of its files alone.

  python tests/recount.py WORKDIR LISTS.parquet

LISTS.parquet is what `recommend --k=40` wrote. Uses nothing of mmm_jax: plain
Python sets and sums, so that it can disagree. Prints the largest difference
from result.json and exits with 1 if it exceeds 2e-4.
"""

import collections
import json
import math
import pathlib
import sys

import pyarrow.parquet as parquet

CUTOFFS = (10, 20, 30, 40)
TOLERANCE = 2e-4


def read(path, *columns):
  table = parquet.read_table(path, columns=list(columns))
  return zip(*(table[name].to_pylist() for name in columns), strict=True)


def recount(split_path, lists_path) -> dict[str, float]:
  """{metric@k: mean over users with a test item}."""
  relevant = collections.defaultdict(set)
  for user, item, part in read(split_path, "user", "item", "part"):
    if part == "test":
      relevant[user].add(item)
  lists = collections.defaultdict(dict)
  for user, item, rank in read(lists_path, "user", "item", "rank"):
    lists[user][rank] = item
  sums = collections.Counter()
  for user, wanted in relevant.items():
    ranked = [lists[user][rank] for rank in sorted(lists[user])]
    hits = [item in wanted for item in ranked]
    for k in CUTOFFS:
      best = min(k, len(wanted))
      at = [rank for rank, hit in enumerate(hits[:k], start=1) if hit]
      gain = sum(1 / math.log2(rank + 1) for rank in at)
      ideal = sum(1 / math.log2(rank + 1) for rank in range(1, best + 1))
      sums[f"precision@{k}"] += len(at) / k
      sums[f"recall@{k}"] += len(at) / len(wanted)
      sums[f"hit_rate@{k}"] += bool(at)
      sums[f"ndcg@{k}"] += gain / ideal
      sums[f"mrr@{k}"] += 1 / at[0] if at else 0
      sums[f"map@{k}"] += sum(n / rank for n, rank in enumerate(at, 1)) / best
  return {name: total / len(relevant) for name, total in sums.items()}


def main(workdir, lists_path):
  workdir = pathlib.Path(workdir)
  counted = recount(workdir / "split.parquet", lists_path)
  claimed = json.loads((workdir / "result.json").read_text())["full"]["test"]
  worst = max(abs(counted[name] - claimed[name]) for name in counted)
  print(f"{len(counted)} metrics, largest difference {worst:.2e}")
  sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
  main(*sys.argv[1:])
