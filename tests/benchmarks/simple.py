"""What two simple methods reach, to hold the tuned variants of MMM against.

    python tests/benchmarks/simple.py
        --manual_dir=microlens=DIR,hetrec_lastfm=DIR,tiktok=DIR
        --out=tests/results/simple.json
    python tests/benchmarks/simple.py --table=tests/results/simple.json

Both score items by X W, where X [M, N] says who has which item: W is the cosine
of two items' columns, of each item's nearest ones alone (ItemKNN), or the best
linear one without a diagonal (EASE; Steck, 2019). Their values (neighbours and
shrinkage; penalty) are the best of a grid by validation nDCG@20; then test is
scored once, on the splits that `--sweep=ablation` is run on. Beside FILE.json,
in a folder of its name, lie the users' values, as beside a record. Needs the
extra `test`.
"""

import argparse
import itertools
import json
import pathlib

import numpy as np
from scipy import linalg, sparse
import tqdm

from mmm_jax import (
  errors,
  experiments,
  files,
  metrics,
  significance,
  tabulate,
)
from mmm_jax.datasets import base, splits

K = 20
BLOCK = 2048  # users at a time
HEADS = (
  "set",
  "method",
  "valid nDCG@20",
  "test nDCG@20",
  "MMM's",
  "MMM less it",
  "ratio",
)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--manual_dir", default="", help="the sets' raw files")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--table", type=pathlib.Path, help="JSON file to print")
  flags = parser.parse_args()
  if flags.table:
    print(table(flags.table))
    return
  if not flags.out:
    parser.error("found neither --out nor --table")
  try:
    folders = experiments.read_manual_dirs(flags.manual_dir.split(","))
  except errors.InputError as error:
    parser.error(str(error))
  found = {}
  for name, folder in folders.items():
    found[name] = measure(name, folder)
    for method, value in found[name].items():
      save(users_of(flags.out, name, method), value.pop("users"))
  files.write_json(flags.out, found)
  print(table(flags.out))


def users_of(path, name, method) -> pathlib.Path:
  return path.with_suffix("") / f"{name}_{method.lower()}.npy"


def save(path, values):
  path.parent.mkdir(exist_ok=True)
  np.save(path, values.astype(np.float16))


def measure(name, manual_dir) -> dict[str, dict]:
  """{method: its grid, what that gives, and `users`' test values [U]}."""
  cell = experiments.Cell(0, f"mmm:{name}", name, 0, {})
  config = experiments.read_config(cell)
  config.dataset.manual_dir = manual_dir
  dataset = base.load(config.dataset, config.split)
  part = splits.make(dataset, config.split).part
  shape = dataset.num_users, dataset.num_items
  train, valid, test = (
    sparse.csr_matrix(
      (np.ones(own.sum(), np.float32), (dataset.user[own], dataset.item[own])),
      shape,
    )
    for own in (part == of for of in (splits.TRAIN, splits.VALID, splits.TEST))
  )
  found = {}
  for method, (make, grid) in METHODS.items():
    best, scores = -1.0, {}
    for values in tqdm.tqdm(grid, desc=f"{method} on {name}"):
      weights = make(train, *values)
      score = float(np.mean(ndcg(train, weights, train, valid)))
      scores[", ".join(map(str, values))] = score
      if score > best:
        best, chosen = score, weights
    # What validation took is known by then, but nothing is learnt from it.
    users = ndcg(train, chosen, train + valid, test)
    found[method] = {
      "valid": scores,
      "test": float(np.mean(users)),
      "users": users,
    }
  return found


def item_knn(train, neighbours, shrinkage) -> np.ndarray:
  """Cosines [N, N] to the `neighbours` nearest items; none to itself.

  `shrinkage` beside the lengths' product says how little few users count.
  """
  length = sparse.linalg.norm(train, axis=0).astype(np.float32)
  weights = (train.T @ train).toarray()
  weights /= np.maximum(np.outer(length, length) + shrinkage, 1)
  np.fill_diagonal(weights, 0)
  far = np.argpartition(-weights, neighbours, axis=0)[neighbours:]
  np.put_along_axis(weights, far, 0, axis=0)
  return weights


def ease(train, penalty) -> np.ndarray:
  """I - P diag(1 / diag P) with P = (X' X + penalty I)^-1, [N, N]."""
  gram = (train.T @ train).toarray().astype(np.float64)
  gram[np.diag_indices_from(gram)] += penalty
  inverse = linalg.inv(gram, overwrite_a=True, check_finite=False)
  weights = inverse / -np.diag(inverse)
  np.fill_diagonal(weights, 0)
  return weights.astype(np.float32)


METHODS = {
  "ItemKNN": (
    item_knn,
    list(itertools.product((20, 100, 500), (0, 100, 1000))),
  ),
  "EASE": (ease, [(penalty,) for penalty in (40, 60, 90, 130, 200, 300)]),
}


def ndcg(train, weights, known, wanted) -> np.ndarray:
  """nDCG@20 [U] of the users who want something, in their order.

  What they know is not ranked.
  """
  users, values = np.flatnonzero(np.diff(wanted.indptr)), []
  for start in range(0, len(users), BLOCK):
    block = users[start : start + BLOCK]
    scores = train[block] @ weights
    scores[known[block].nonzero()] = -np.inf
    top = np.argpartition(-scores, K, axis=1)[:, :K]
    order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1)
    top = np.take_along_axis(top, order, 1)
    relevant = wanted[block].toarray() > 0
    hits = np.take_along_axis(relevant, top, 1)
    values.append(metrics.ndcg(hits, relevant.sum(1), k=K))
  return np.concatenate(values)


def table(path) -> str:
  """Beside the records of `ablation`, in Markdown."""
  records, lines = experiments.read_records("ablation"), []
  for name, methods in json.loads(path.read_text()).items():
    runs = variant(records, name)
    for method, found in methods.items():
      value, valid = max(found["valid"].items(), key=lambda pair: pair[1])
      own = np.load(users_of(path, name, method)).astype(np.float64)
      low, high = significance.interval(runs - own, seed=0)
      mean = runs.mean()
      lines.append(
        [
          name,
          f"{method} ({value})",
          f"{valid:.4f}",
          f"{found['test']:.4f}",
          f"{mean:.4f}",
          f"{mean - own.mean():+.4f} ({low:+.4f} to {high:+.4f})",
          f"{mean / own.mean():.2f}",
        ]
      )
  return tabulate.markdown(HEADS, lines)


def variant(records, name) -> np.ndarray:
  """Users' test values of a set's tuned MMM, [seeds, U]."""
  wanted = (name, f"mmm:{name}")
  return np.stack(
    [
      record["per_user"].astype(np.float64)
      for record in records
      if (record["dataset"], record["model"]) == wanted
    ]
  )


if __name__ == "__main__":
  main()
