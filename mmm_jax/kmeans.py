"""K-means on the device (Eq. 8-9), and how to compare two clusterings.

Everything above the comparisons is jittable and a pure function of its
arguments: no shape depends on a value, ties go to the lowest index, and means
are sums by matrix product rather than by scatter, whose order of addition is
not fixed on a GPU.

Shapes: N points, d dimensions, C clusters, R restarts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mmm_jax import errors


class Clustering(NamedTuple):
  """Where the points are, and the means of those that are together.

  `centroids[c]` is the mean of exactly the points with `assignment == c`, and
  no cluster is empty; only at a fixed point of Lloyd's algorithm is
  `assignment` also the nearest of these centroids.
  """

  assignment: jax.Array  # [N] int32
  centroids: jax.Array  # [C, d] float32
  inertia: jax.Array  # [] float32, sum of squared distances to the means
  sizes: jax.Array  # [C] int32, at least 1 each


@functools.partial(
  jax.jit, static_argnames=("num_clusters", "restarts", "iterations", "block")
)
def fit(
  rng: jax.Array,
  points: jax.Array,
  *,
  num_clusters: int,
  restarts: int,
  iterations: int,
  block: int,
) -> Clustering:
  """Clusters from scratch: the best of several seeded restarts.

  Args:
    rng: the key; the result is a function of it and of the points.
    points: [N, d].
    num_clusters: C, at most N.
    restarts: R, run side by side; the lowest inertia wins.
    iterations: Lloyd passes a restart, at least 1.
    block: points whose distances to all centroids exist at a time (times R).

  Raises:
    InputError: fewer points than clusters, or a size that is not positive.
  """
  _check(points, num_clusters, restarts=restarts)

  def restart(key: jax.Array) -> Clustering:
    centroids = plus_plus(key, points, num_clusters=num_clusters)
    return lloyd(points, centroids, iterations=iterations, block=block)

  tried = jax.vmap(restart)(jax.random.split(rng, restarts))
  best = jnp.argmin(tried.inertia)
  return jax.tree.map(lambda leaf: leaf[best], tried)


@functools.partial(jax.jit, static_argnames=("num_clusters",))
def plus_plus(
  rng: jax.Array, points: jax.Array, *, num_clusters: int
) -> jax.Array:
  """k-means++ seeds [C, d] (Arthur and Vassilvitskii, 2007).

  Each seed is a point drawn with probability proportional to its squared
  distance from the seeds before it. Once every point is a seed or the copy of
  one, the rest are drawn uniformly.
  """
  _check(points, num_clusters)
  points = points.astype(jnp.float32)
  keys = jax.random.split(rng, num_clusters)

  def draw(distance, key):
    weight = jnp.where(jnp.any(distance > 0), distance, 1.0)
    seed = points[jax.random.categorical(key, jnp.log(weight))]
    return jnp.minimum(distance, _squared_distance(points, seed)), seed

  first = points[jax.random.randint(keys[0], (), 0, len(points))]
  _, rest = lax.scan(draw, _squared_distance(points, first), keys[1:])
  return jnp.concatenate([first[None], rest])


@functools.partial(jax.jit, static_argnames=("iterations", "block"))
def lloyd(
  points: jax.Array, centroids: jax.Array, *, iterations: int, block: int
) -> Clustering:
  """Lloyd passes from given centroids: nearest centroid, then means.

  An empty cluster takes the point that is farthest from every centroid, one
  cluster after the other, so that several get different points, and different
  values as long as there are any. Category c keeps its meaning from one call
  to the next when `centroids` are those of the call before.

  Args:
    points: [N, d].
    centroids: [C, d], C at most N.
    iterations: passes, at least 1.
    block: points whose distances to all centroids exist at a time; the result
      does not depend on it, rounding aside.

  Raises:
    InputError: fewer points than clusters, or a size that is not positive.
  """
  _check(points, len(centroids), iterations=iterations, block=block)
  points = points.astype(jnp.float32)
  num_points, num_clusters = len(points), len(centroids)
  blocks = _blocks(points, min(block, num_points))

  def one_pass(_, state):
    _, centroids, _ = state
    assignment = _nearest(blocks, centroids).reshape(-1)[:num_points]
    assignment, sizes = _fill_empty(points, centroids, assignment)
    return assignment, _means(blocks, assignment, sizes), sizes

  start = (
    jnp.zeros(num_points, jnp.int32),
    centroids.astype(jnp.float32),
    jnp.zeros(num_clusters, jnp.int32),
  )
  assignment, means, sizes = lax.fori_loop(0, iterations, one_pass, start)
  inertia = jnp.sum(_squared_distance(points, means[assignment]))
  return Clustering(assignment, means, inertia, sizes)


@functools.partial(jax.jit, static_argnames=("num_clusters", "block"))
def describe(
  points: jax.Array, assignment: jax.Array, *, num_clusters: int, block: int
) -> Clustering:
  """The clustering in which points [N, d] have a given assignment [N]."""
  points = points.astype(jnp.float32)
  sizes = jnp.bincount(assignment, length=num_clusters).astype(jnp.int32)
  blocks = _blocks(points, min(block, len(points)))
  means = _means(blocks, assignment, jnp.maximum(sizes, 1))
  inertia = jnp.sum(_squared_distance(points, means[assignment]))
  return Clustering(assignment, means, inertia, sizes)


def _check(points: jax.Array, num_clusters: int, **sizes: int) -> None:
  """Shapes and static sizes are known before anything is computed."""
  for name, size in {"num_clusters": num_clusters, **sizes}.items():
    if size < 1:
      raise errors.InputError(
        f"K-means: found {name} = {size}; it must be at least 1."
      )
  if len(points) < num_clusters:
    raise errors.InputError(
      f"K-means: found {len(points)} points for {num_clusters} clusters; "
      f"num_categories must be at most {len(points)}, the number of items."
    )


def _blocks(points: jax.Array, block: int) -> jax.Array:
  """[N, d] -> [ceil(N / block), block, d], padded with zeros."""
  padding = -len(points) % block
  padded = jnp.pad(points, ((0, padding), (0, 0)))
  return padded.reshape(-1, block, points.shape[1])


def _squared_distance(points: jax.Array, other: jax.Array) -> jax.Array:
  """Exact zero for equal points, unlike the expanded square."""
  return jnp.sum(jnp.square(points - other), axis=-1)


def _nearest(blocks: jax.Array, centroids: jax.Array) -> jax.Array:
  """Index of the nearest centroid, [blocks, block] int32 (Eq. 9)."""
  # ||x||^2 is the same for all centroids and drops out. The shift keeps the
  # difference of squares precise for points far from the origin.
  shift = centroids[0]
  centered = centroids - shift
  half_square = jnp.sum(jnp.square(centered), axis=-1) / 2

  def nearest_in_block(block):
    product = jnp.matmul(
      block - shift, centered.T, precision=lax.Precision.HIGHEST
    )
    return jnp.argmin(half_square - product, axis=-1).astype(jnp.int32)

  return lax.map(nearest_in_block, blocks)


def _fill_empty(
  points: jax.Array, centroids: jax.Array, assignment: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Moves one far point into every empty cluster: new assignment and sizes.

  Only clusters with more than one point give one away. With N >= C there is
  such a cluster whenever another is empty, so the loop ends after at most
  C - 1 rounds, whatever the points.
  """
  # Adding integers by scatter is exact in any order.
  sizes = jnp.bincount(assignment, length=len(centroids)).astype(jnp.int32)
  distance = _squared_distance(points, centroids[assignment])

  def fill(state):
    assignment, sizes, distance = state
    empty = jnp.argmin(sizes).astype(jnp.int32)
    movable = sizes[assignment] > 1
    moved = jnp.argmax(jnp.where(movable, distance, -1.0))
    sizes = sizes.at[assignment[moved]].add(-1).at[empty].set(1)
    to_moved = _squared_distance(points, points[moved])
    return (
      assignment.at[moved].set(empty),
      sizes,
      jnp.minimum(distance, to_moved),
    )

  state = (assignment, sizes, distance)
  state = lax.while_loop(lambda state: jnp.any(state[1] == 0), fill, state)
  return state[0], state[1]


def _means(
  blocks: jax.Array, assignment: jax.Array, sizes: jax.Array
) -> jax.Array:
  """Mean of the members of every cluster, [C, d]."""
  num_blocks, block, _ = blocks.shape
  padding = num_blocks * block - len(assignment)
  # Index C matches no column of the one-hot matrix: padding adds nothing.
  padded = jnp.pad(assignment, (0, padding), constant_values=len(sizes))

  def add_block(total, inputs):
    points, members = inputs
    one_hot = jax.nn.one_hot(members, len(sizes), axis=0)
    return total + jnp.matmul(
      one_hot, points, precision=lax.Precision.HIGHEST
    ), None

  total = jnp.zeros((len(sizes), blocks.shape[2]), jnp.float32)
  total, _ = lax.scan(
    add_block, total, (blocks, padded.reshape(num_blocks, block))
  )
  return total / sizes[:, None]


def adjusted_rand_index(a: np.ndarray, b: np.ndarray) -> float:
  """Agreement of two clusterings corrected for chance (Hubert, Arabie 1985).

  1 for equal partitions whatever the labels, 0 expected for independent ones.
  Like all comparisons here it leaves out items with a label -1 in either, and
  is NaN when nothing is left.
  """
  table = _contingency(a, b)
  if not table.size:
    return float("nan")
  both = _pairs(table)
  in_a, in_b = _pairs(table.sum(axis=1)), _pairs(table.sum(axis=0))
  every = _pairs(table.sum())
  if in_a == in_b and in_a in (0, every):  # All apart or all together in both.
    return 1.0
  expected = in_a * in_b / every
  return float((both - expected) / ((in_a + in_b) / 2 - expected))


def normalised_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
  """Mutual information over the arithmetic mean of the two entropies.

  In [0, 1]; 1 for equal partitions, also where both are a single cluster.
  """
  table = _contingency(a, b)
  if not table.size:
    return float("nan")
  joint = table / table.sum()
  entropy_a, entropy_b = (
    _entropy(joint.sum(axis=1)),
    _entropy(joint.sum(axis=0)),
  )
  if entropy_a == entropy_b == 0:
    return 1.0
  mutual = entropy_a + entropy_b - _entropy(joint)
  return float(np.clip(2 * mutual / (entropy_a + entropy_b), 0, 1))


def purity(a: np.ndarray, truth: np.ndarray) -> float:
  """Share of items whose true class is the commonest of their cluster."""
  table = _contingency(a, truth)
  if not table.size:
    return float("nan")
  return float(table.max(axis=1).sum() / table.sum())


def churn(a: np.ndarray, b: np.ndarray) -> float:
  """Share of items whose label differs; labels mean the same in both."""
  a, b = _known(a, b)
  return float(np.mean(a != b)) if a.size else float("nan")


def _known(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  a, b = np.asarray(a), np.asarray(b)
  if a.shape != b.shape:
    raise ValueError(f"Clusterings of {a.shape} and {b.shape} items.")
  known = (a >= 0) & (b >= 0)
  return a[known], b[known]


def _contingency(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Items by label in a (rows) and in b (columns), only labels in use."""
  a, b = _known(a, b)
  rows, a = np.unique(a, return_inverse=True)
  columns, b = np.unique(b, return_inverse=True)
  counts = np.bincount(a * len(columns) + b, minlength=len(rows) * len(columns))
  return counts.reshape(len(rows), len(columns))


def _pairs(counts: np.ndarray) -> float:
  """Pairs of items within the same cell: sum of n (n - 1) / 2."""
  counts = np.asarray(counts, np.float64)
  return float(np.sum(counts * (counts - 1) / 2))


def _entropy(probability: np.ndarray) -> float:
  probability = probability[probability > 0]
  return float(-np.sum(probability * np.log(probability)))
