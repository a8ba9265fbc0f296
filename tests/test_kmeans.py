"""K-means against a NumPy Lloyd, and comparisons against arithmetic."""

import math

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from mmm_jax import clustering, errors, kmeans

# Every new shape or block is compiled anew: they come from short lists.
few = hypothesis.settings(max_examples=25, deadline=None)


def numpy_lloyd(points, centroids, iterations):
  """Textbook Lloyd in float64; the empty take the farthest, one by one."""
  points, centroids = points.astype(np.float64), centroids.astype(np.float64)
  for _ in range(iterations):
    square = ((points[:, None] - centroids[None]) ** 2).sum(axis=2)
    assignment, distance = square.argmin(axis=1), square.min(axis=1)
    for cluster in range(len(centroids)):
      if cluster in assignment:
        continue
      shared = np.isin(assignment, np.flatnonzero(np.bincount(assignment) > 1))
      far = max(np.flatnonzero(shared), key=lambda i: (distance[i], -i))
      assignment[far] = cluster
      to_far = ((points - points[far]) ** 2).sum(axis=1)
      distance = np.minimum(distance, to_far)
    centroids = np.stack(
      [points[assignment == c].mean(axis=0) for c in range(len(centroids))]
    )
  inertia = ((points - centroids[assignment]) ** 2).sum()
  return assignment, centroids, inertia


def check_consistent(points, clustering):
  """Means of members, no empty cluster, sizes and inertia that belong."""
  assignment = np.asarray(clustering.assignment)
  num_clusters = len(clustering.centroids)
  sizes = np.bincount(assignment, minlength=num_clusters)
  np.testing.assert_array_equal(clustering.sizes, sizes)
  assert sizes.min() >= 1
  for cluster in range(num_clusters):
    mean = points[assignment == cluster].mean(axis=0)
    np.testing.assert_allclose(
      clustering.centroids[cluster], mean, rtol=1e-5, atol=1e-5
    )
  inertia = ((points - np.asarray(clustering.centroids)[assignment]) ** 2).sum()
  np.testing.assert_allclose(clustering.inertia, inertia, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lloyd_is_the_numpy_lloyd(iterations, seed):
  rng = np.random.default_rng(seed)
  points = rng.normal(size=(203, 6)).astype(np.float32)
  start = points[rng.choice(203, size=7, replace=False)]
  found = kmeans.lloyd(points, start, iterations=iterations, block=64)
  assignment, centroids, inertia = numpy_lloyd(points, start, iterations)
  np.testing.assert_array_equal(found.assignment, assignment)
  np.testing.assert_allclose(found.centroids, centroids, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found.inertia, inertia, rtol=1e-5)
  assert found.assignment.dtype == found.sizes.dtype == np.int32
  assert found.centroids.dtype == found.inertia.dtype == np.float32


def test_one_pass_by_hand():
  points = np.array([[0.0], [1.0], [2.0], [10.0]], np.float32)
  start = np.array([[0.0], [2.0]], np.float32)
  found = kmeans.lloyd(points, start, iterations=1, block=4)
  # 1 is as near to 0 as to 2: the lower index wins.
  np.testing.assert_array_equal(found.assignment, [0, 0, 1, 1])
  np.testing.assert_array_equal(found.centroids, [[0.5], [6.0]])
  np.testing.assert_array_equal(found.sizes, [2, 2])
  assert float(found.inertia) == 2 * 0.5**2 + 2 * 4.0**2


def test_several_empty_clusters_take_the_farthest_points():
  points = np.array([[0], [1], [0], [9], [-20], [9]], np.float32)
  start = np.array([[0], [500], [600], [0]], np.float32)
  found = kmeans.lloyd(points, start, iterations=1, block=2)
  # -20 is farthest, then one of the two 9s; the other is then at distance 0,
  # and 1 is the farthest that is left.
  np.testing.assert_array_equal(found.assignment, [0, 3, 0, 2, 1, 0])
  np.testing.assert_array_equal(found.centroids, [[3], [-20], [9], [1]])
  after = kmeans.lloyd(points, found.centroids, iterations=3, block=2)
  np.testing.assert_array_equal(after.centroids, [[0], [-20], [9], [1]])
  assert float(after.inertia) == 0


def test_a_point_alone_is_not_taken_from_its_cluster():
  points = np.array([[0], [1], [100]], np.float32)
  start = np.array([[0], [300], [150]], np.float32)
  found = kmeans.lloyd(points, start, iterations=1, block=3)
  # 100 is farthest from its centroid 150 and the only member there.
  np.testing.assert_array_equal(found.assignment, [0, 1, 2])


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_duplicates_neither_loop_nor_give_nan(distinct):
  points = np.repeat(np.arange(distinct), 4)[:, None].astype(np.float32)
  num_clusters = distinct * 4  # As many clusters as points.
  found = kmeans.fit(
    jax.random.key(0),
    points,
    num_clusters=num_clusters,
    restarts=3,
    iterations=3,
    block=3,
  )
  check_consistent(points, found)
  assert float(found.inertia) == 0
  np.testing.assert_array_equal(found.sizes, np.ones(num_clusters))


@few
@hypothesis.given(
  st.sampled_from([6, 40]),
  st.sampled_from([1, 7, 60]),
  st.integers(0, 10_000),
)
def test_any_block_gives_the_same(num_clusters, block, seed):
  """Whole numbers: every sum is exact, so equality is to the bit."""
  rng = np.random.default_rng(seed)
  points = rng.integers(-4, 5, size=(50, 3)).astype(np.float32)
  start = rng.integers(-4, 5, size=(num_clusters, 3)).astype(np.float32)
  blocked = kmeans.lloyd(points, start, iterations=1, block=block)
  whole = kmeans.lloyd(points, start, iterations=1, block=50)
  for one, other in zip(blocked, whole, strict=True):
    np.testing.assert_array_equal(one, other)
  assignment, centroids, _ = numpy_lloyd(points, start, 1)
  np.testing.assert_array_equal(blocked.assignment, assignment)
  np.testing.assert_allclose(blocked.centroids, centroids, rtol=1e-6)


@few
@hypothesis.given(st.integers(0, 10_000), st.sampled_from([2, 13]))
def test_result_is_consistent_and_no_cluster_is_empty(seed, num_clusters):
  rng = np.random.default_rng(seed)
  points = rng.integers(0, 3, size=(13, 2)).astype(np.float32)
  found = kmeans.fit(
    jax.random.key(seed),
    points,
    num_clusters=num_clusters,
    restarts=2,
    iterations=3,
    block=5,
  )
  check_consistent(points, found)


def test_far_from_the_origin_is_as_precise():
  points = np.array([[0.0], [1.0], [4.0], [5.0]], np.float32) + 2.0**20
  found = kmeans.lloyd(points, points[[0, 3]], iterations=2, block=4)
  np.testing.assert_array_equal(found.assignment, [0, 0, 1, 1])
  assert float(found.inertia) == 4 * 0.5**2


def test_fit_finds_planted_clusters_and_is_a_function_of_the_key():
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 8, size=400)
  points = (10 * np.eye(8)[truth] + rng.normal(size=(400, 8))).astype("f4")
  arguments = dict(num_clusters=8, restarts=5, iterations=8, block=128)
  found = kmeans.fit(jax.random.key(1), points, **arguments)
  again = kmeans.fit(jax.random.key(1), points, **arguments)
  assert kmeans.adjusted_rand_index(found.assignment, truth) == 1
  for one, other in zip(found, again, strict=True):
    np.testing.assert_array_equal(one, other)


def test_more_restarts_are_never_worse():
  points = np.random.default_rng(0).normal(size=(150, 2)).astype(np.float32)
  arguments = dict(num_clusters=9, iterations=2, block=150)
  keys = jax.random.split(jax.random.key(3), 4)
  singles = [
    kmeans.lloyd(
      points,
      kmeans.plus_plus(key, points, num_clusters=9),
      iterations=2,
      block=150,
    ).inertia
    for key in keys
  ]
  best = kmeans.fit(jax.random.key(3), points, restarts=4, **arguments)
  np.testing.assert_allclose(best.inertia, min(singles), rtol=1e-6)


def test_seeds_follow_squared_distance():
  """From {0, 1, 3}: after 0 comes 3 with probability 9 / (1 + 9)."""
  points = np.array([[0.0], [1.0], [3.0]], np.float32)
  keys = jax.random.split(jax.random.key(0), 6000)
  seeds = jax.vmap(
    lambda key: kmeans.plus_plus(key, points, num_clusters=2)[:, 0]
  )(keys)
  first, second = np.asarray(seeds).T
  assert not np.any(first == second)
  share = np.mean(second[first == 0] == 3)
  error = math.sqrt(0.9 * 0.1 / np.sum(first == 0))
  assert abs(share - 0.9) < 4 * error
  assert abs(np.mean(first == 0) - 1 / 3) < 4 * math.sqrt(2 / 9 / 6000)


def test_large_n_never_holds_all_distances():
  """Without blocks the distances alone would be 1,000,000 x 64 floats."""
  shapes = (
    jax.ShapeDtypeStruct((1_000_000, 4), np.float32),
    jax.ShapeDtypeStruct((64, 4), np.float32),
  )
  compiled = kmeans.lloyd.lower(*shapes, iterations=1, block=1000).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 1_000_000 * 64 * 4 / 2


@pytest.mark.parametrize("num_clusters", [0, 4])
def test_impossible_number_of_clusters_is_refused(num_clusters):
  points = np.zeros((3, 2), np.float32)
  with pytest.raises(errors.InputError, match=str(num_clusters)):
    kmeans.fit(
      jax.random.key(0),
      points,
      num_clusters=num_clusters,
      restarts=1,
      iterations=1,
      block=3,
    )


def test_adjusted_rand_index_by_arithmetic():
  a, b = [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]
  # Cells 2 1 / 1 2 -> pairs together in both 2; rows 3 + 3, columns 1 + 1 + 1;
  # of 15 pairs.
  expected = 6 * 3 / 15
  value = (2 - expected) / ((6 + 3) / 2 - expected)
  assert kmeans.adjusted_rand_index(a, b) == pytest.approx(value)
  assert kmeans.adjusted_rand_index([0, 0, 1, 1], [0, 1, 0, 1]) == (
    pytest.approx((0 - 2 * 2 / 6) / (2 - 2 * 2 / 6))
  )


def test_normalised_mutual_information_by_arithmetic():
  a, b = [0, 0, 1, 1], [0, 0, 1, 2]
  # b refines a, so the information is a's entropy, log 2; b has 1.5 log 2.
  value = math.log(2) / ((1 + 1.5) * math.log(2) / 2)
  assert kmeans.normalised_mutual_information(a, b) == pytest.approx(value)
  independent = kmeans.normalised_mutual_information([0, 0, 1, 1], [0, 1, 0, 1])
  assert independent == pytest.approx(0, abs=1e-12)


def test_purity_and_churn_by_arithmetic():
  assert kmeans.purity([0, 0, 0, 1, 1], [7, 7, 3, 3, 3]) == 4 / 5
  assert kmeans.churn([0, 0, 1, 2], [0, 1, 1, 0]) == 2 / 4


@pytest.mark.parametrize(
  "compare",
  [kmeans.adjusted_rand_index, kmeans.normalised_mutual_information],
)
def test_trivial_partitions(compare):
  assert compare([0, 0, 0], [5, 5, 5]) == 1
  assert compare([0, 1, 2], [2, 0, 1]) == pytest.approx(1)
  assert compare([0, 0, 0, 0], [0, 0, 1, 1]) == 0
  assert compare([3], [1]) == 1


@pytest.mark.parametrize(
  "compare",
  [
    kmeans.adjusted_rand_index,
    kmeans.normalised_mutual_information,
    kmeans.purity,
    kmeans.churn,
  ],
)
def test_unknown_labels_are_left_out(compare):
  a, truth = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 1, -1, -1])
  assert compare(a, truth) == compare(a[:3], truth[:3])
  assert math.isnan(compare(a, np.full(5, -1)))


@few
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30
  ),
  st.permutations(range(5)),
)
def test_comparisons_do_not_see_labels(pairs, relabelled):
  a, b = np.array(pairs).T
  renamed = np.array(relabelled)[a]
  for compare in (
    kmeans.adjusted_rand_index,
    kmeans.normalised_mutual_information,
    kmeans.purity,
  ):
    assert compare(renamed, b) == pytest.approx(compare(a, b))
    assert compare(renamed, a) == pytest.approx(1)
  assert kmeans.adjusted_rand_index(a, b) == pytest.approx(
    kmeans.adjusted_rand_index(b, a)
  )
  assert 0 <= kmeans.normalised_mutual_information(a, b) <= 1


def test_a_clustering_is_described_against_the_last_and_the_truth():
  found = kmeans.Clustering(
    np.array([0, 0, 1, 1]), np.zeros((2, 3)), np.float32(1.5), np.array([2, 2])
  )
  before, truth = np.array([0, 1, 1, 1]), np.array([1, 1, 0, -1])
  assert clustering.describe_clusters(found, before, truth) == {
    "kmeans/inertia": 1.5,
    "kmeans/smallest": 2,
    "kmeans/largest": 2,
    "kmeans/sizes": [2, 2],
    "kmeans/churn": 1 / 4,
    # Pairs together in both: 1; in one: 2 and 3; of 6. Expected: 1.
    "kmeans/ari_before": (1 - 1) / ((2 + 3) / 2 - 1),
    # Of the three with a label: the same two classes.
    "kmeans/nmi": 1,
    "kmeans/ari": 1,
    "kmeans/purity": 1,
  }
  first = clustering.describe_clusters(found, np.full(4, -1), None)
  assert set(first) == {
    "kmeans/inertia", "kmeans/smallest", "kmeans/largest", "kmeans/sizes",
  }  # fmt: skip
