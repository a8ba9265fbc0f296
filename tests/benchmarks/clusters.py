"""What plain K-means makes of MicroLens, to hold MMM's categories against.

    python tests/benchmarks/clusters.py --manual_dir=DIR
        --out=tests/results/clusters.json
    python tests/benchmarks/clusters.py --table=tests/results/clusters.json

Three kinds of item vectors, none of which has seen a category: the mean of the
GloVe vectors of a title's words, item factors of weighted matrix factorisation
(`implicit`) on the training interactions, and both side by side; each of unit
length. The factorisation's values are the best of a grid by validation nDCG@20.
As many clusters and restarts as MMM's first K-means, over ten seeds.
Needs the extra `test`.
"""

import argparse
import itertools
import json
import pathlib

import implicit
import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
import tqdm

from mmm_jax import (
  assemble,
  clustering,
  evaluate,
  experiments,
  kmeans,
  parallel,
  significance,
  tabulate,
)
from mmm_jax.datasets import splits

SEEDS = 10
FACTORS = 64
ALPHA = 10, 20, 40, 80  # weight of an interaction
REGULARISATION = 1, 10, 100
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
  """{vectors: {"nmi": [seeds], "ari": [seeds]}}, and the grid's nDCG@20."""
  cell = experiments.Cell(0, "mmm:microlens", "microlens", 0, {})
  config = experiments.read_config(cell)
  config.dataset.manual_dir = manual_dir
  run = assemble.assemble(config)
  text = np.asarray(clustering.content_vectors(run))
  seen = training_matrix(run)
  grid = {
    pair: validated(run, factorised(seen, 0, *pair))
    for pair in tqdm.tqdm(list(itertools.product(ALPHA, REGULARISATION)))
  }
  best = max(grid, key=grid.get)
  found = {}
  for seed in tqdm.trange(SEEDS):
    factors = of_unit_length(factorised(seen, seed, *best).item_factors)
    both = np.concatenate([text, factors], axis=1) / np.sqrt(2)
    kinds = {"titles": text, "interactions": factors, "both": both}
    for name, vectors in kinds.items():
      assignment = np.asarray(cluster(vectors, seed, config))
      values = found.setdefault(name, {key: [] for key in LIKENESS})
      for key, compare in LIKENESS.items():
        values[key].append(compare(assignment, run.dataset.category))
  named = {f"alpha={alpha:g} regularisation={weight:g}": ndcg
           for (alpha, weight), ndcg in grid.items()}  # fmt: skip
  return {"clusters": found, "valid_ndcg@20": named}


def training_matrix(run) -> sparse.csr_matrix:
  """Who has which item in training, [M, N]."""
  train = run.split.part == splits.TRAIN
  user, item = run.dataset.user[train], run.dataset.item[train]
  shape = (run.sizes.num_users, run.sizes.num_items)
  return sparse.csr_matrix((np.ones(len(user)), (user, item)), shape)


def factorised(seen, seed, alpha, regularisation):
  """Weighted matrix factorisation (Hu et al., 2008)."""
  model = implicit.als.AlternatingLeastSquares(
    FACTORS,
    alpha=alpha,
    regularization=regularisation,
    random_state=seed,
  )
  model.fit(seen, show_progress=False)
  return model


def validated(run, model) -> float:
  """nDCG@20 of `full` on validation."""
  users, settings = jnp.asarray(model.user_factors), run.config.eval
  scorer = evaluate.Scorer(
    users=lambda user: users[user],
    items=jnp.asarray(model.item_factors),
    score=_products,
    engine=parallel.make_own_engine(run.config),
  )
  result, _ = evaluate.evaluate(
    scorer,
    run.interactions,
    parts=("valid",),
    protocols=("full",),
    cutoffs=(20,),
    seed=settings.seed,
    user_block=settings.user_block,
    item_tile=settings.item_tile,
  )
  return result["full"]["valid"]["ndcg@20"]


def _products(user, item):
  return user @ item.T


def of_unit_length(factors) -> np.ndarray:
  length = np.linalg.norm(factors, axis=1, keepdims=True)
  return np.asarray(factors) / np.maximum(length, 1e-12)


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
  return tabulate.markdown(
    HEADS,
    [
      [name, show(values["nmi"]), show(values["ari"])]
      for name, values in found["clusters"].items()
    ],
  )


if __name__ == "__main__":
  main()
