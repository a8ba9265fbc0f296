"""What plain K-means makes of MicroLens, to hold MMM's categories against.

    python tests/benchmarks/clusters.py --manual_dir=DIR
        --out=tests/results/clusters.json
    python tests/benchmarks/clusters.py --table=tests/results/clusters.json

Three kinds of item vectors, none of which has seen a category: the mean of the
GloVe vectors of a title's words, item factors of weighted matrix factorisation
(`implicit`) on the training interactions, and both side by side; each of unit
length. As many clusters and restarts as MMM's first K-means, over ten seeds.
Needs the extra `test`.
"""

import argparse
import json
import pathlib

import implicit
import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from mmm_jax import (
  assemble,
  clustering,
  experiments,
  kmeans,
  significance,
  tabulate,
)
from mmm_jax.datasets import splits

SEEDS = 10
FACTORS = 64
LIKENESS = {
  "nmi": kmeans.normalised_mutual_information,
  "ari": kmeans.adjusted_rand_index,
}
HEADS = ("K-means on", "NMI", "ARI")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--manual_dir", help="the raw files of MicroLens")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--table", type=pathlib.Path, help="JSON file to print")
  flags = parser.parse_args()
  if flags.table:
    print(table(json.loads(flags.table.read_text())))
    return
  found = measure(flags.manual_dir)
  print(table(found))
  if flags.out:
    flags.out.write_text(json.dumps(found, indent=2) + "\n")


def measure(manual_dir) -> dict:
  """{vectors: {"nmi": [seeds], "ari": [seeds]}}."""
  cell = experiments.Cell(0, "mmm:microlens", "microlens", 0, {})
  config = experiments.read_config(cell)
  config.dataset.manual_dir = manual_dir
  run = assemble.assemble(config)
  text = np.asarray(clustering.content_vectors(run))
  found = {}
  for seed in range(SEEDS):
    factors = item_factors(run, seed)
    both = np.concatenate([text, factors], axis=1) / np.sqrt(2)
    kinds = {"titles": text, "interactions": factors, "both": both}
    for name, vectors in kinds.items():
      assignment = np.asarray(cluster(vectors, seed, config))
      values = found.setdefault(name, {key: [] for key in LIKENESS})
      for key, compare in LIKENESS.items():
        values[key].append(compare(assignment, run.dataset.category))
  return found


def item_factors(run, seed) -> np.ndarray:
  """[N, FACTORS] of unit length."""
  train = run.split.part == splits.TRAIN
  user, item = run.dataset.user[train], run.dataset.item[train]
  shape = (run.sizes.num_users, run.sizes.num_items)
  seen = sparse.csr_matrix((np.ones(len(user)), (user, item)), shape)
  model = implicit.als.AlternatingLeastSquares(FACTORS, random_state=seed)
  model.fit(seen, show_progress=False)
  factors = np.asarray(model.item_factors)
  length = np.linalg.norm(factors, axis=1, keepdims=True)
  return factors / np.maximum(length, 1e-12)


def cluster(vectors, seed, config) -> jax.Array:
  settings = config.kmeans
  return kmeans.fit(
    jax.random.key(seed),
    jnp.asarray(vectors, jnp.float32),
    num_clusters=config.num_categories,
    restarts=settings.restarts,
    iterations=settings.seeding_iterations,
    block=settings.block,
  ).assignment


def table(found) -> str:
  """Means over the seeds with their 95 % intervals, in Markdown."""
  show = lambda values: (
    f"{np.mean(values):.3f} ± {significance.half_width(values):.3f}"
  )
  return tabulate.markdown_lines(
    HEADS,
    [[name, show(v["nmi"]), show(v["ari"])] for name, v in found.items()],
  )


if __name__ == "__main__":
  main()
