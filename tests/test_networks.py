"""Derived networks against sets and loops."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np

from mmm_jax.datasets import networks

EDGES = st.sets(
  st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=50
)


def rows(network):
  """{user: list of neighbours}."""
  return [
    network.indices[start:stop].tolist()
    for start, stop in zip(network.indptr[:-1], network.indptr[1:], strict=True)
  ]


def co_like(pairs, degree_cap):
  user, item = np.array(sorted(pairs), np.int32).T
  return networks.co_like(user, item, 10, 8, degree_cap=degree_cap)


def reference_weights(pairs):
  """{(a, b): sum of 1 / ln(1 + n) over common items}."""
  popularity = {i: sum(i == other for _, other in pairs) for _, i in pairs}
  users = {u for u, _ in pairs}
  items = {u: {i for v, i in pairs if v == u} for u in users}
  return {
    (a, b): sum(1 / math.log(1 + popularity[i]) for i in items[a] & items[b])
    for a in users
    for b in users
    if a != b and items[a] & items[b]
  }


def test_rare_items_count_more():
  # User 0 shares item 0 (two users) with 1, and item 1 (four users) with 2-4.
  pairs = {(0, 0), (1, 0), (0, 1), (2, 1), (3, 1), (4, 1)}
  assert rows(co_like(pairs, 1))[0] == [1]
  assert rows(co_like(pairs, 9))[0] == [1, 2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(pairs=EDGES, degree_cap=st.integers(1, 10))
def test_co_like_keeps_the_heaviest(pairs, degree_cap):
  network = co_like(pairs, degree_cap)
  weights = reference_weights(pairs)
  for user, found in enumerate(rows(network)):
    all_of = {b: w for (a, b), w in weights.items() if a == user}
    assert found == sorted(set(found)) and user not in found
    assert set(found) <= set(all_of)
    assert len(found) == min(degree_cap, len(all_of))
    left = [w for b, w in all_of.items() if b not in found]
    if left:  # the weights are rounded to about 1e-5
      assert min(all_of[b] for b in found) >= max(left) - 1e-3


@settings(max_examples=30, deadline=None)
@given(pairs=EDGES, seed=st.integers(0, 9))
def test_co_like_does_not_depend_on_the_order_of_its_input(pairs, seed):
  user, item = np.array(sorted(pairs), np.int32).T
  order = np.random.default_rng(seed).permutation(len(user))
  first = networks.co_like(user, item, 10, 8, degree_cap=2)
  again = networks.co_like(user[order], item[order], 10, 8, degree_cap=2)
  np.testing.assert_array_equal(first.indices, again.indices)
  np.testing.assert_array_equal(first.indptr, again.indptr)


def test_blocks_do_not_show(monkeypatch):
  generator = np.random.default_rng(0)
  user = generator.integers(0, 100, 600)
  item = generator.integers(0, 50, 600)
  whole = networks.co_like(user, item, 100, 50, degree_cap=5)
  monkeypatch.setattr(networks, "_USER_BLOCK", 7)
  monkeypatch.setattr(networks, "_EDGE_BLOCK", 11)
  parts = networks.co_like(user, item, 100, 50, degree_cap=5)
  np.testing.assert_array_equal(whole.indices, parts.indices)
  assert networks.edges_without_common_item(parts, user, item) == 0


@settings(max_examples=60, deadline=None)
@given(
  pairs=EDGES,
  edges=st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30),
)
def test_edges_without_common_item(pairs, edges):
  source, target = np.array(sorted(edges), int).reshape(-1, 2).T
  network = networks.from_edges(source, target, 10)
  user, item = np.array(sorted(pairs)).T
  items = [{i for v, i in pairs if v == u} for u in range(10)]
  wanted = sum(a != b and not items[a] & items[b] for a, b in edges)
  assert networks.edges_without_common_item(network, user, item) == wanted


def test_a_leaked_edge_is_found():
  # The edge 0 - 1 rests on item 1 alone, which user 1 has in test only.
  pairs = {(0, 0), (0, 1), (1, 1), (2, 0)}
  network = co_like(pairs, 5)
  user, item = np.array(sorted(pairs - {(1, 1)})).T
  assert networks.edges_without_common_item(network, user, item) == 2


def test_from_edges_drops_loops_repeats_and_strangers():
  network = networks.from_edges(
    np.array([2, 0, 0, 1, -1, 0]), np.array([0, 2, 2, 1, 0, 1]), 3
  )
  assert rows(network) == [[1, 2], [], [0]]
  assert network.num_edges == 3
  np.testing.assert_array_equal(network.sources, [0, 0, 2])
  assert network.indices.dtype == np.int32


def test_symmetrised():
  network = networks.from_edges(np.array([0, 1, 2]), np.array([1, 0, 1]), 3)
  assert rows(networks.symmetrised(network)) == [[1], [0, 2], [1]]


def test_nobody_shares_anything():
  network = co_like({(0, 0), (1, 1)}, 3)
  assert network.num_edges == 0
  assert (
    networks.edges_without_common_item(network, np.array([0]), np.array([0]))
    == 0
  )


def test_a_rewired_network_keeps_degrees_and_has_other_neighbours():
  rng = np.random.default_rng(0)
  source, target = rng.integers(0, 60, (2, 700))
  network = networks.from_edges(source, target, 60)
  found = networks.rewired(network, 0)
  assert (found.indptr == network.indptr).all()
  degrees = lambda net: np.bincount(net.indices, minlength=60)
  assert (degrees(found) == degrees(network)).all()
  assert (found.sources != found.indices).all()
  pairs = lambda net: set(zip(net.sources.tolist(), net.indices.tolist()))
  assert len(pairs(found)) == network.num_edges
  # By chance an edge is one of the old ones as often as any: 700 of 60 * 59.
  kept = len(pairs(found) & pairs(network)) / network.num_edges
  assert kept < 2 * network.num_edges / (60 * 59)
  assert pairs(networks.rewired(network, 1)) != pairs(found)
