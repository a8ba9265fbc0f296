"""K-means between epochs: items' categories follow their vectors (Eq. 8-9).

Two controls replace them: random categories of the same sizes, and those of a
K-means on the items' content. They stay as they are once they are seeded.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmm_jax import assemble, errors, kmeans, parallel, sampling

_BLOCK = 4096  # items whose content is read at a time


def make_clustering(run: assemble.Run, engine: parallel.Engine):
  """Functions that seed the categories and that follow them by Lloyd passes.

  Each maps a replicated state, and the first one `key`, to (state,
  kmeans.Clustering); all devices compute the same.
  """
  settings, control = run.config.kmeans, run.config.controls.categories
  num_clusters = run.config.num_categories
  start = dict(
    num_clusters=num_clusters,
    restarts=settings.restarts,
    iterations=settings.seeding_iterations,
    block=settings.block,
  )
  if num_clusters and control == "content":
    rng = jax.random.wrap_key_data(key(run.config))
    content = kmeans.fit(rng, content_vectors(run), **start).assignment

  def renew(state, found):
    return state.replace(
      categories=state.categories.replace(
        assignment=found.assignment, centroids=found.centroids
      )
    ), found

  def seed(state, key):
    rng = jax.random.fold_in(jax.random.wrap_key_data(key), state.step)
    rows = state.tables["item"].rows
    found = kmeans.fit(rng, rows, **start)
    if control == "random":
      found = given(rows, jax.random.permutation(rng, found.assignment))
    if control == "content":
      found = given(rows, content)
    # w starts at its centroid: free vectors soak up the gradient (H4).
    params = {**state.params, "category_vectors": found.centroids}
    return renew(state.replace(params=params), found)

  def given(rows, assignment):
    return kmeans.describe(
      rows, assignment, num_clusters=num_clusters, block=settings.block
    )

  def follow(state):
    if control != "learnt":
      rows, categories = state.tables["item"].rows, state.categories
      return renew(state, given(rows, categories.assignment))
    return renew(
      state,
      kmeans.lloyd(
        state.tables["item"].rows,
        state.categories.centroids,
        iterations=settings.iterations,
        block=settings.block,
      ),
    )

  whole, host = parallel.REPLICATED, parallel.HOST
  mapped = lambda function, *inputs: engine.map(
    function, inputs, (whole, whole), donate=(0,)
  )
  return mapped(seed, whole, host), mapped(follow, whole)


def key(config) -> np.ndarray:
  """What the seeding of categories draws from, [2] uint32 (host)."""
  branch = jax.random.fold_in(jax.random.key(config.seed), sampling.PAD - 2)
  return np.asarray(jax.random.key_data(branch))


def content_vectors(run: assemble.Run) -> jax.Array:
  """What the sources say of every item, each as a unit vector: [N, F].

  A text is the mean of its words' starting vectors.

  Raises:
    errors.InputError: the run reads no content.
  """
  if not run.content.nothing():
    raise errors.InputError(
      "controls.categories: found 'content', but the run has no source"
      " (model.sources); valid without one: learnt, random"
    )
  num_items = run.sizes.num_items
  blocks = np.array_split(np.arange(num_items), -(-num_items // _BLOCK))
  found = [run.content(items) for items in blocks]
  parts = []
  for name in found[0]:
    rows = np.concatenate([block[name] for block in found])
    if name == "text":
      words = np.where((rows > 0)[..., None], run.words[rows], 0)
      rows = words.sum(1)  # its length does not matter
    rows = np.where(run.shared.present[name][:, None], rows, 0)
    rows = rows.astype(np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    parts.append(rows / np.maximum(length, 1e-12))
  return jnp.asarray(np.concatenate(parts, axis=1))


def describe_clusters(found: kmeans.Clustering, before, truth) -> dict:
  """Quality of a clustering for the log."""
  now, sizes = np.asarray(found.assignment), np.asarray(found.sizes)
  row = {
    "kmeans/inertia": float(found.inertia),
    "kmeans/smallest": int(sizes.min()),
    "kmeans/largest": int(sizes.max()),
    "kmeans/sizes": sizes.tolist(),
  }
  if before[0] >= 0:
    row["kmeans/churn"] = kmeans.churn(now, before)
    row["kmeans/ari_before"] = kmeans.adjusted_rand_index(now, before)
  if truth is not None:
    row["kmeans/nmi"] = kmeans.normalised_mutual_information(now, truth)
    row["kmeans/ari"] = kmeans.adjusted_rand_index(now, truth)
    row["kmeans/purity"] = kmeans.purity(now, truth)
  return row
