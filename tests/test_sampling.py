"""Draws on the device: exact against brute force, and honest in the mean."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mmm_jax import sampling

PAD = sampling.PAD
USERS, ITEMS = 4, 10
KEYS = sampling.branches(0)
# With fixed seeds a test either always fails or never; this is how unlikely
# the draws have to be to make it fail.
UNLIKELY = 1e-4


def adjacency(lists, room=None) -> sampling.Adjacency:
  """Sorted lists; `room` is a fixed length, for a single compilation."""
  indices = np.array(sum(map(sorted, lists), []), np.int32)
  if room:
    indices = np.pad(indices, (0, room - len(indices)))
  return sampling.Adjacency(
    jnp.asarray(np.cumsum([0, *map(len, lists)]), jnp.int32),
    jnp.asarray(indices),
  )


def lists_of(matrix):
  return [np.flatnonzero(row).tolist() for row in matrix]


def is_uniform(values, size):
  found = np.bincount(np.ravel(values), minlength=size)
  assert len(found) == size
  return stats.chisquare(found).pvalue > UNLIKELY


# --- bounded ---------------------------------------------------------------

bounded = jax.jit(sampling.bounded)


@given(
  hnp.arrays(np.uint32, 8, elements=st.integers(0, 2**32 - 1)),
  hnp.arrays(np.int32, 8, elements=st.integers(1, 2**31 - 1)),
)
@settings(deadline=None, max_examples=200)
def test_bounded_is_the_upper_half_of_a_64_bit_product(bits, bound):
  expected = [int(b) * int(n) >> 32 for b, n in zip(bits, bound)]
  assert bounded(bits, bound).tolist() == expected


def test_bounded_at_the_edges():
  bits = np.array([0, 2**32 - 1, 2**32 - 1, 2**16, 2**31, 0, 1, 7], np.uint32)
  bound = np.array([1, 1, 2**31 - 1, 2**16, 3, 5, 2**31 - 1, 1], np.int32)
  expected = [0, 0, 2**31 - 2, 1, 1, 0, 0, 0]
  assert bounded(bits, bound).tolist() == expected


# --- unseen items ----------------------------------------------------------

unseen_item = functools.partial(jax.jit, static_argnames="max_seen")(
  sampling.unseen_item
)
interactions = hnp.arrays(bool, (USERS, ITEMS))


def check_unseen(seen_matrix, max_seen):
  rank = jnp.broadcast_to(jnp.arange(ITEMS), (USERS, ITEMS))
  user = jnp.broadcast_to(jnp.arange(USERS)[:, None], (USERS, ITEMS))
  seen = adjacency(lists_of(seen_matrix), room=USERS * ITEMS)
  found = np.asarray(unseen_item(rank, user, seen, max_seen=max_seen))
  for row, own in zip(found, seen_matrix):
    unseen = np.flatnonzero(~own)
    assert row[: len(unseen)].tolist() == unseen.tolist()


@given(interactions)
@settings(deadline=None, max_examples=100)
def test_unseen_item_is_the_rank_th_of_the_rest(seen):
  check_unseen(seen, max_seen=ITEMS)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 7, 8, 9])
def test_unseen_item_needs_no_longer_search_than_the_longest_list(most):
  rng = np.random.default_rng(most)
  seen = np.zeros((USERS, ITEMS), bool)
  seen[0, rng.permutation(ITEMS)[:most]] = True
  seen[1, :most] = True  # the first items
  seen[2, ITEMS - most :] = True  # the last ones
  check_unseen(seen, max_seen=most)


# --- negatives -------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("resample", "count"))
def draw_negatives(user, places, seen, step, *, resample, count):
  return sampling.negatives(
    user,
    places,
    jnp.arange(len(user)),
    seen,
    keys=KEYS,
    step=step,
    count=count,
    num_items=ITEMS,
    max_seen=ITEMS,
    resample=resample,
  )


@pytest.mark.parametrize("resample", [True, False])
@given(seen=interactions, step=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_negatives_are_never_a_training_positive(resample, seen, step):
  seen[0] = True  # has seen all
  seen[1] = np.arange(ITEMS) != 6  # has seen all but one
  user = np.array([[0, 1, 2], [3, PAD, 2]])
  drawn = np.asarray(
    draw_negatives(
      user,
      np.array([[0, 1, 2], [0, -1, 1]]),
      adjacency(lists_of(seen), room=USERS * ITEMS),
      step,
      resample=resample,
      count=4,
    )
  )
  assert drawn.shape == (2, 3, 4)
  for i, negatives in zip(user.ravel(), drawn.reshape(-1, 4)):
    if i == PAD or seen[i].all():
      assert (negatives == PAD).all()
    else:
      assert ((negatives >= 0) & (negatives < ITEMS)).all()
      assert not seen[i, negatives].any()
  assert (drawn[0, 1] == 6).all()


SEEN_BY_ONE = adjacency([[2, 3, 8], [], [], []], room=USERS * ITEMS)


@pytest.mark.parametrize("resample", [True, False])
def test_negatives_are_uniform_over_the_rest(resample):
  user = np.zeros((2, 5000), np.int32)
  places = np.arange(10_000).reshape(2, 5000)
  drawn = draw_negatives(
    user, places, SEEN_BY_ONE, 7, resample=resample, count=5
  )
  unseen = [0, 1, 4, 5, 6, 7, 9]
  assert is_uniform(np.searchsorted(unseen, drawn), 7)
  # Neighbouring draws have nothing to do with each other.
  pairs = np.searchsorted(unseen, drawn[..., :2]) @ [7, 1]
  assert is_uniform(pairs, 49)


def test_the_uniformity_test_can_fail():
  biased = np.random.default_rng(0).integers(0, 7, 50_000)
  biased[:1500] = 3  # 3 % of the draws
  assert not is_uniform(biased, 7)


def test_negatives_are_drawn_once_or_in_each_epoch():
  user = np.zeros((2, 8), np.int32)
  places = np.arange(16).reshape(2, 8)
  draw = lambda step, resample, places=places: np.asarray(
    draw_negatives(user, places, SEEN_BY_ONE, step, resample=resample, count=5)
  )
  assert (draw(3, False) == draw(99, False)).all()
  assert (draw(3, True) != draw(99, True)).any()
  assert (draw(3, True) == draw(3, True)).all()
  # Fixed negatives belong to the example, wherever it stands in the batch.
  moved = draw(3, False, places[:, ::-1])
  assert (moved == draw(3, False)[:, ::-1]).all()
  shards = draw(3, False)
  assert (shards[0] != shards[1]).any()


def test_shared_negatives_are_uniform_and_a_function_of_seed_and_step():
  draw = lambda seed, step: np.asarray(
    sampling.shared_negatives(
      keys=sampling.branches(seed), step=step, count=20_000, num_items=11
    )
  )
  assert is_uniform(draw(0, 5), 11)
  assert (draw(0, 5) == draw(0, 5)).all()
  assert (draw(0, 5) != draw(0, 6)).any()
  assert (draw(0, 5) != draw(1, 5)).any()


def test_shared_negatives_that_a_user_has_seen():
  shared = np.array([4, 2, 4, 0])  # 4 was drawn twice
  own = np.array([[4, 1, PAD], [0, 2, 3], [PAD, PAD, PAD]])
  seen = sampling.seen_among(shared, own, num_items=5)
  np.testing.assert_array_equal(
    seen, [[True, False, True, False], [False, True, False, True], [False] * 4]
  )


# --- streams ---------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 8, 21])
def test_deal_gives_everything_to_one_shard_in_equal_parts(size):
  stream = sampling.deal(0, 4, a=np.arange(size), b=100 + np.arange(size))
  real = stream.ids["a"] != PAD
  assert sorted(stream.ids["a"][real]) == list(range(size))
  assert (stream.ids["b"][real] == 100 + stream.ids["a"][real]).all()
  assert (stream.ids["b"][~real] == PAD).all()
  assert stream.count.tolist() == real.sum(1).tolist()
  assert np.ptp(stream.count) <= 1
  # Real places come first.
  assert (np.sort(~real, axis=1) == ~real).all()


@given(
  hnp.arrays(np.uint32, st.integers(1, 300)),
  st.sampled_from([0, 1, 3, 2**32 - 1]),
)
@settings(deadline=None, max_examples=60)
def test_stable_order_is_a_stable_sort(keys, mask):
  keys &= np.uint32(mask)  # a narrow mask makes many keys the same
  found = np.asarray(sampling.stable_order(jnp.asarray(keys)))
  assert found.tolist() == np.argsort(keys, kind="stable").tolist()


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 2**21 + 1])
def test_stable_order_of_more_places_takes_more_passes(size):
  keys = np.random.default_rng(size).integers(0, 2**32, size, np.uint32)
  keys[::3] = keys[0]
  found = np.asarray(jax.jit(sampling.stable_order)(keys))
  assert (found == np.argsort(keys, kind="stable")).all()


@functools.partial(
  jax.jit, static_argnames=("name", "steps", "width", "packed")
)
def draw_order(stream, shard, *, name=1, keys=KEYS, epoch=3, **settings):
  return sampling.epoch_order(
    stream,
    shard,
    name=name,
    keys=keys,
    epoch=epoch,
    num_shards=4,
    **settings,
  )


def order_of(stream, shard, **settings):
  return np.asarray(draw_order(stream, np.array(shard), **settings))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("size", "steps"), [(21, 3), (24, 6), (5, 4), (23, 7)])
def test_an_epoch_visits_every_place_once(packed, size, steps):
  stream = sampling.deal(0, 4, a=np.arange(size))
  places = -(-size // 4)
  width = -(-places // steps)
  order = order_of(stream, range(4), steps=steps, width=width, packed=packed)
  assert order.shape == (4, steps, width)
  for own, count in zip(order, stream.count):
    assert sorted(own[own >= 0]) == list(range(count))
    filled = (own >= 0).sum(1)
    if packed:  # full steps, one that is short, empty ones
      expected = np.clip(count - width * np.arange(steps), 0, width)
      assert filled.tolist() == expected.tolist()
    else:
      assert np.ptp(filled) <= 1


@pytest.mark.parametrize(("size", "steps"), [(300, 82), (19, 7), (100, 90)])
def test_steps_take_equally_much_from_all_shards_together(size, steps):
  # Fewer places in a shard than steps, and still no step goes without.
  stream = sampling.deal(0, 4, a=np.arange(size))
  width = -(-size // 4 // steps) + 1
  order = order_of(stream, range(4), steps=steps, width=width, packed=False)
  taken = (order >= 0).sum((0, 2))
  assert taken.sum() == size
  # Up to one more or less where shards' runs meet, at each of their ends.
  assert abs(taken - size / steps).max() <= 2
  assert taken.min() >= 1


def test_orders_do_not_depend_on_who_holds_the_shards():
  stream = sampling.deal(0, 4, a=np.arange(30))
  settings = dict(steps=4, width=2, packed=True)
  together = order_of(stream, range(4), **settings)
  for held in ([0, 1], [2, 3], [3]):
    part = jax.tree.map(lambda x, held=held: x[np.array(held)], stream)
    assert (order_of(part, held, **settings) == together[held]).all()


def test_orders_differ_between_shards_epochs_streams_and_seeds():
  stream = sampling.deal(0, 4, a=np.arange(400))
  settings = dict(steps=10, width=10, packed=True)
  first = order_of(stream, range(4), **settings)
  assert (first[0] != first[1]).any()
  others = dict(epoch=4), dict(name=2), dict(keys=sampling.branches(1))
  for changes in others:
    assert (order_of(stream, range(4), **settings | changes) != first).any()
  assert (order_of(stream, range(4), **settings) == first).all()


def test_every_place_comes_first_equally_often():
  stream = sampling.deal(0, 1, a=np.arange(7))
  order = jax.vmap(
    lambda epoch: draw_order(
      stream, np.arange(1), epoch=epoch, steps=1, width=7, packed=True
    )
  )(jnp.arange(3000))
  assert is_uniform(order[:, 0, 0, 0], 7)


def test_take_pads_where_there_is_no_place():
  stream = sampling.Stream({"a": jnp.array([[5, 6, PAD], [7, 8, 9]])}, None)
  found = sampling.take(stream, jnp.array([[1, -1], [-1, 2]]))
  assert found["a"].tolist() == [[6, PAD], [PAD, 9]]


# --- neighbours ------------------------------------------------------------

DEGREES = (0, 3, 5, 6, 40)
LISTS = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(DEGREES)]
CAP = 5


@jax.jit
def draw_neighbours(user, epoch, number=0):
  draw = sampling.window_draws(KEYS, epoch, 2)[number]
  return sampling.neighbours(user, adjacency(LISTS), draw=draw, cap=CAP)


def test_neighbours_are_all_of_them_up_to_the_cap():
  found = np.asarray(draw_neighbours(np.array([0, 1, 2, PAD]), 4))
  for row, expected in zip(found, [[], LISTS[1], LISTS[2], []]):
    assert row.tolist() == expected + [PAD] * (CAP - len(expected))


def test_neighbours_above_the_cap_are_different_ones_of_the_list():
  found = jax.vmap(lambda e: draw_neighbours(np.array([3, 4]), e))(
    jnp.arange(50)
  )
  for row, own in ((0, 3), (1, 4)):
    for drawn in np.asarray(found[:, row]):
      assert len(set(drawn)) == CAP
      assert set(drawn) <= set(LISTS[own])


def test_neighbours_above_the_cap_are_uniform_and_fresh():
  found = jax.vmap(lambda e: draw_neighbours(np.array([4]), e))(
    jnp.arange(8000)
  )
  first = np.asarray(found[:, 0, 0]) - LISTS[4][0]
  assert is_uniform(first, 40)
  changed = np.mean(first[1:] != first[:-1])
  assert abs(changed - 39 / 40) < 4 * np.sqrt(39 / 40 / 40 / 8000)


def test_neighbours_of_different_users_and_networks_are_unrelated():
  users = np.arange(400)
  wide = [list(range(40))] * 400

  def offsets(number):
    draw = sampling.window_draws(KEYS, 2, 2)[number]
    found = sampling.neighbours(users, adjacency(wide), draw=draw, cap=CAP)
    return np.asarray(found[:, 0])

  assert is_uniform(offsets(0), 40)
  assert np.mean(offsets(0) == offsets(1)) < 0.1
