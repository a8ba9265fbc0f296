"""K-means between epochs: items' categories follow their vectors (Eq. 8-9)."""

import jax
import numpy as np

from mmm_jax import assemble, kmeans, parallel, sampling


def make_clustering(run: assemble.Run, engine: parallel.Engine):
  """Functions that seed the categories and that follow them by Lloyd passes.

  Each maps a replicated state to (state, kmeans.Clustering); all devices
  compute the same.
  """
  settings = run.config.kmeans

  def renew(state, found):
    return state.replace(
      categories=state.categories.replace(
        assignment=found.assignment, centroids=found.centroids
      )
    ), found

  def seed(state):
    rng = jax.random.fold_in(jax.random.key(run.config.seed), sampling.PAD - 2)
    found = kmeans.fit(
      jax.random.fold_in(rng, state.step),
      state.tables["item"].rows,
      num_clusters=run.config.num_categories,
      restarts=settings.restarts,
      iterations=settings.seeding_iterations,
      block=settings.block,
    )
    # w starts at its centroid: free vectors soak up the gradient (H4).
    params = {**state.params, "category_vectors": found.centroids}
    return renew(state.replace(params=params), found)

  def follow(state):
    return renew(
      state,
      kmeans.lloyd(
        state.tables["item"].rows,
        state.categories.centroids,
        iterations=settings.iterations,
        block=settings.block,
      ),
    )

  whole = parallel.REPLICATED
  mapped = lambda function: engine.map(
    function, (whole,), (whole, whole), donate=(0,)
  )
  return mapped(seed), mapped(follow)


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
