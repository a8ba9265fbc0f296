"""Ranking against brute force, chance, and the promises about candidates."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from mmm_jax import candidates, errors, evaluate, kernels, metrics, ranking
import toy

EVAL = dict(cutoffs=(5, 10), seed=0, user_block=16, item_tile=64)
ALL = dict(parts=("valid", "test"), protocols=evaluate.PROTOCOLS)


def make_interactions(num_users, num_items, per_user, seed=0):
  """`per_user` distinct items each: the last tenths are valid and test."""
  rng = np.random.default_rng(seed)
  item = np.argsort(rng.random((num_users, num_items)))[:, :per_user]
  part = np.zeros_like(item)
  part[:, int(0.6 * per_user) :] = 1
  part[:, int(0.8 * per_user) :] = 2
  user = np.repeat(np.arange(num_users), per_user)
  return evaluate.Interactions(
    user, item.ravel(), part.ravel(), num_users, num_items
  )


def table_scorer(scores):
  """A scorer that looks its scores [M, N] up."""
  scores = jnp.asarray(scores, jnp.float32)
  return evaluate.Scorer(
    users=lambda ids: scores[ids],
    items=jnp.arange(scores.shape[1]),
    score=_look_up,
    engine=toy.make_engine(),
  )


def _look_up(u, v):
  return u[:, v]


def constant_scorer(interactions):
  return table_scorer(
    np.zeros((interactions.num_users, interactions.num_items))
  )


def random_scores(interactions, seed):
  shape = interactions.num_users, interactions.num_items
  return np.random.default_rng(seed).random(shape)


def tie_keys(num_users, num_items, seed):
  users, items = jnp.arange(num_users), jnp.arange(num_items)[None, :]
  return np.asarray(ranking._tie_key(users, items, jnp.uint32(seed)))


def brute_force(scores, users, exclude, k, seed):
  """Sort everything by (score, tie key), drop what is excluded."""
  keys = tie_keys(*scores.shape, seed)
  lists = np.full((len(users), k), -1)
  for row, user in enumerate(users):
    order = np.lexsort((-keys[user], -scores[user]))
    gone = exclude.indices[exclude.indptr[user] : exclude.indptr[user + 1]]
    kept = order[~np.isin(order, gone)][:k]
    lists[row, : len(kept)] = kept
  return lists


@pytest.mark.parametrize("levels", [1, 2, 7, 10**6])
@pytest.mark.parametrize(
  ("block", "tile"), [(1, 7), (8, 37), (5, 10), (4, 999)]
)
def test_rank_is_brute_force_with_any_tile_and_ties(levels, block, tile):
  interactions = make_interactions(13, 37, 8)
  rng = np.random.default_rng(levels)
  scores = rng.integers(-levels, levels, (13, 37)).astype(np.float32)
  exclude = candidates.items_of_users(interactions, ("train", "valid"))
  users = np.array([3, 0, 12, 5, 7, 8, 1])
  items, values = evaluate.rank(
    table_scorer(scores),
    users,
    *exclude,
    num_items=37,
    k=9,
    seed=4,
    user_block=block,
    item_tile=tile,
  )
  expected = brute_force(scores, users, exclude, 9, 4)
  np.testing.assert_array_equal(items, expected)
  np.testing.assert_array_equal(values, scores[users[:, None], expected])


@pytest.mark.parametrize("levels", [2, 10**6])
@pytest.mark.parametrize("way", ["groups", "kernel"])
def test_other_ways_to_the_largest_are_brute_force(levels, way, monkeypatch):
  in_cpp = way == "kernel"
  if in_cpp and not kernels.load(toy.get_config()):
    pytest.skip("there is no C++ compiler")
  if way == "groups":  # as on a GPU
    groups = lambda scores, k, in_cpp: ranking._largest_of_groups(scores, k)
    monkeypatch.setattr(ranking, "_largest", groups)
  size = 50 * ranking._GROUP + 5  # no whole number of groups
  interactions = make_interactions(6, size, 8)
  scores = np.random.default_rng(levels).integers(0, levels, (6, size))
  scores = scores.astype(np.float32)
  exclude = candidates.items_of_users(interactions, ("train", "valid"))
  users = np.arange(6)
  items, _ = evaluate.rank(
    table_scorer(scores)._replace(in_cpp=in_cpp),
    users,
    *exclude,
    num_items=size,
    k=7,
    seed=4,
    user_block=6,
    item_tile=size,
  )
  expected = brute_force(scores, users, exclude, 7, 4)
  np.testing.assert_array_equal(items, expected)


def test_groups_miss_none_of_the_largest():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(4, 900)).astype(np.float32)
  scores[1, :32] += 10  # all of the best in one group
  scores[2] = -np.inf
  scores[2, 5::100] = 1  # fewer than are asked for
  best, at = ranking._largest_of_groups(scores, 20)
  np.testing.assert_array_equal(best, -np.sort(-scores, 1)[:, :20])
  np.testing.assert_array_equal(np.take_along_axis(scores, at, 1), best)


def test_minus_zero_ties_with_zero():
  scores = np.zeros((1, 50), np.float32)
  scores[:, ::2] = -0.0
  nobody = candidates.Csr(np.zeros(2, np.int64), np.zeros(0, np.int32))
  items, _ = evaluate.rank(
    table_scorer(scores),
    np.array([0]),
    *nobody,
    num_items=50,
    k=10,
    seed=1,
    user_block=1,
    item_tile=20,
  )
  expected = brute_force(np.zeros((1, 50)), [0], nobody, 10, 1)
  np.testing.assert_array_equal(items, expected)


@pytest.mark.parametrize("tile", [4, 6, 100])
def test_lists_end_where_the_items_do(tile):
  everything = candidates.Csr(
    np.array([0, 6, 9]), np.array([*range(6), 0, 1, 5])
  )
  items, scores = evaluate.rank(
    table_scorer(np.arange(12.0).reshape(2, 6)),
    np.array([0, 1]),
    *everything,
    num_items=6,
    k=8,
    seed=0,
    user_block=2,
    item_tile=tile,
  )
  np.testing.assert_array_equal(items, [[-1] * 8, [4, 3, 2] + [-1] * 5])
  np.testing.assert_array_equal(scores[1], [10, 9, 8] + [-np.inf] * 5)


def test_any_pytree_and_parametrised_score():
  rng = np.random.default_rng(0)
  u, v = rng.normal(size=(9, 3)), rng.normal(size=(21, 3))
  bias = rng.normal(size=21)
  tables = jax.tree.map(jnp.float32, {"v": v, "bias": bias})

  def score(scale, u, v):
    product = jnp.matmul(u["u"], v["v"].T, precision=lax.Precision.HIGHEST)
    return scale * product + v["bias"][None, :]

  scorer = evaluate.Scorer(
    users=lambda ids: {"u": jnp.float32(u)[ids]},
    items=tables,
    score=jax.tree_util.Partial(score, jnp.float32(2)),
    engine=toy.make_engine(),
  )
  nobody = candidates.Csr(np.zeros(10, np.int64), np.zeros(0, np.int32))
  items, scores = evaluate.rank(
    scorer,
    np.arange(9),
    *nobody,
    num_items=21,
    k=4,
    seed=0,
    user_block=4,
    item_tile=8,
  )
  expected = 2 * u @ v.T + bias
  order = np.argsort(-expected)[:, :4]
  np.testing.assert_array_equal(items, order)
  np.testing.assert_allclose(
    scores, np.take_along_axis(expected, order, 1), rtol=1e-5
  )


@pytest.mark.parametrize(
  ("protocol", "bad"),
  list(zip(evaluate.PROTOCOLS, [np.nan, -np.nan, np.inf])),
)
def test_scores_that_are_not_finite_name_the_user(protocol, bad):
  interactions = make_interactions(20, 40, 10)
  scores = random_scores(interactions, 0)
  scores[7] = bad
  with pytest.raises(FloatingPointError, match="user 7 "):
    evaluate.evaluate(
      table_scorer(scores),
      interactions,
      parts=("test",),
      protocols=(protocol,),
      **EVAL,
    )


def test_score_of_the_wrong_shape_is_an_error():
  scorer = constant_scorer(make_interactions(20, 40, 10))
  scorer = scorer._replace(score=lambda u, v: u[:, v].T)
  with pytest.raises(ValueError, match="must return"):
    evaluate.rank(
      scorer,
      np.arange(3),
      np.zeros(21, np.int64),
      np.zeros(0, np.int32),
      num_items=40,
      k=4,
      seed=0,
      user_block=4,
      item_tile=8,
    )


def test_unknown_names_are_errors():
  interactions = make_interactions(20, 40, 10)
  scorer = constant_scorer(interactions)
  for wrong in ({"protocols": ("fully",)}, {"parts": ("train",)}):
    with pytest.raises(errors.InputError, match="valid"):
      evaluate.evaluate(scorer, interactions, **ALL | wrong, **EVAL)


# One interaction set for chance: lists of 900, of 1,024, and of 101 items.
CHANCE = make_interactions(1500, 1200, 10)


@pytest.mark.parametrize("kind", ["constant", "random"])
@pytest.mark.parametrize(
  ("protocol", "size"),
  # full: the catalogue without 8 known items. pooled_1024: as it says.
  [("full", 1200 - 8), ("pooled_1024", 1024), ("sampled_100", 101)],
)
def test_constant_and_random_scorers_score_chance(protocol, size, kind):
  scorer = constant_scorer(CHANCE)
  if kind == "random":
    scorer = table_scorer(random_scores(CHANCE, 1))
  cutoffs = (10, 40)
  result, per_user = evaluate.evaluate(
    scorer,
    CHANCE,
    parts=("test",),
    protocols=(protocol,),
    cutoffs=cutoffs,
    seed=3,
    user_block=256,
    item_tile=512,
  )
  relevant = 1 if protocol == "sampled_100" else 2
  for k in cutoffs:
    miss = np.prod([(size - k - i) / (size - i) for i in range(relevant)])
    gains = (1 / np.log2(np.arange(2, k + 2))).sum()
    ideal = (1 / np.log2(np.arange(2, relevant + 2))).sum()
    expected = {
      "recall": k / size,
      "precision": relevant / size,
      "hit_rate": 1 - miss,
      "ndcg": relevant / size * gains / ideal,
    }
    for name, value in expected.items():
      values = per_user[f"{name}@{k}"]
      error = values.std() / np.sqrt(len(values))
      mean = result[protocol]["test"][f"{name}@{k}"]
      assert mean == values.mean()
      assert abs(mean - value) < 4 * error, (name, k, mean, value, error)


@pytest.mark.parametrize("protocol", candidates.SIZES)
@settings(max_examples=15, deadline=None)
@given(
  # Few sizes, for each is compiled: nothing unseen, few, and plenty.
  num_items=st.sampled_from([12, 61, 1200]),
  seed=st.integers(0, 2**31),
)
def test_candidates_are_distinct_unseen_and_hold_the_positives(
  protocol, num_items, seed
):
  interactions = make_interactions(7, num_items, 12, seed)
  seen = candidates.items_of_users(interactions, None)
  user, relevant = candidates.lists(
    interactions, protocol=protocol, part="test"
  )
  lists = drawn(interactions, protocol, seed, block=4)
  assert len(lists) == len(user)
  for row, items in enumerate(lists):
    count = relevant.counts[row]
    positives = relevant.indices[relevant.indptr[row] :][:count]
    known = seen.indices[seen.indptr[user[row]] : seen.indptr[user[row] + 1]]
    items = items[items >= 0]
    np.testing.assert_array_equal(items[:count], positives)
    assert len(set(items)) == len(items)
    assert not set(items[count:]) & set(known)
    free = num_items - len(known)
    assert len(items) == min(candidates.SIZES[protocol], count + free)
    assert items.max() < num_items


def drawn(interactions, protocol, seed, block):
  """All candidate lists of the test part, one matrix."""
  blocks = candidates.draw(
    interactions, protocol=protocol, part="test", seed=seed, block=block
  )
  lists = np.concatenate([np.asarray(block.items) for block in blocks])
  user, _ = candidates.lists(interactions, protocol=protocol, part="test")
  return lists[: len(user)]


def test_a_user_with_more_than_a_list_lengthens_no_other_list():
  # User 0 has 1,100 test items, user 1 has 3.
  user = np.repeat([0, 1], [1100, 3])
  item = np.concatenate([np.arange(1100), np.arange(3)])
  interactions = candidates.Interactions(
    user, item, np.full(1103, candidates.PARTS["test"]), 2, 3000
  )
  (block,) = candidates.draw(
    interactions, protocol="pooled_1024", part="test", seed=0, block=2
  )
  listed = (np.asarray(block.items) >= 0).sum(1)
  assert listed.tolist() == [1100, 1024]


@pytest.mark.parametrize("protocol", candidates.SIZES)
def test_candidates_depend_on_seed_and_split_only(protocol):
  interactions = make_interactions(50, 1100, 10)
  first = drawn(interactions, protocol, 1, block=7)
  np.testing.assert_array_equal(first, drawn(interactions, protocol, 1, 50))
  assert (first != drawn(interactions, protocol, 2, 50)).any()
  order = np.random.default_rng(0).permutation(len(interactions.user))
  shuffled = dataclasses.replace(
    interactions,
    user=interactions.user[order],
    item=interactions.item[order],
    part=interactions.part[order],
  )
  np.testing.assert_array_equal(first, drawn(shuffled, protocol, 1, 50))


def test_unseen_items_are_drawn_uniformly():
  interactions = make_interactions(4000, 150, 10)
  lists = drawn(interactions, "sampled_100", 0, block=512)
  taken = np.zeros((len(lists), 150), bool)
  np.put_along_axis(taken, lists[:, 1:], True, axis=1)
  seen = candidates.items_of_users(interactions, None)
  free = np.ones((4000, 150), bool)
  free[np.repeat(np.arange(4000), 10), seen.indices] = False
  free = np.repeat(free, 2, axis=0)  # two lists a user
  share = 100 / 140
  trials = free.sum(0)
  z = (taken.sum(0) - trials * share) / np.sqrt(trials * share * (1 - share))
  assert np.abs(z).max() < 4.5
  # Chi-square of 149 degrees of freedom, six standard deviations wide.
  assert abs((z**2).sum() - 149) < 6 * np.sqrt(2 * 149)


def test_result_is_the_mean_over_users_of_brute_force():
  interactions = make_interactions(30, 60, 10)
  scores = random_scores(interactions, 5).astype(np.float32)
  result, per_user = evaluate.evaluate(
    table_scorer(scores),
    interactions,
    parts=("valid",),
    protocols=("full",),
    **EVAL,
  )
  exclude = candidates.items_of_users(interactions, ("train",))
  lists = brute_force(scores, np.arange(30), exclude, 10, 0)
  wanted = [
    set(interactions.item[(interactions.user == u) & (interactions.part == 1)])
    for u in range(30)
  ]
  hits = np.array([[i in wanted[u] for i in lists[u]] for u in range(30)])
  expected = metrics.ndcg(hits, np.full(30, 2), k=10)
  np.testing.assert_array_equal(per_user["ndcg@10"], expected)
  assert result["full"]["valid"]["ndcg@10"] == expected.mean()
  exposure = np.bincount(lists[:, :5].ravel(), minlength=60)
  assert result["full"]["valid"]["coverage@5"] == (exposure > 0).mean()


def test_sampled_averages_test_items_before_users():
  # User 0 has one test item, on top; user 1 three, at the bottom.
  user = np.array([0, 0, 1, 1, 1, 1])
  item = np.array([0, 1, 0, 2, 3, 4])
  part = np.array([0, 2, 0, 2, 2, 2])
  interactions = evaluate.Interactions(user, item, part, 2, 30)
  scores = np.tile(np.linspace(0, 1, 30), (2, 1))
  scores[0, 1] = 2
  result, per_user = evaluate.evaluate(
    table_scorer(scores),
    interactions,
    parts=("test",),
    protocols=("sampled_100",),
    **EVAL,
  )
  np.testing.assert_array_equal(per_user["recall@5"], [1, 0])
  assert result["sampled_100"]["test"]["recall@5"] == (1 + 0) / 2


def test_strata_partition_users_and_test_items():
  # Users 0 and 1 have 2 and 6 training items; items 0..5 occur once or twice.
  user = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
  item = np.array([0, 1, 6, 0, 1, 2, 3, 4, 5, 7, 8])
  part = np.array([0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 2])
  interactions = evaluate.Interactions(user, item, part, 2, 20)
  scores = np.zeros((2, 20))
  scores[0, 6] = scores[1, 7] = 1
  scores[1, 8] = -1
  result, _ = evaluate.evaluate(
    table_scorer(scores),
    interactions,
    parts=("test",),
    protocols=("full",),
    **EVAL,
  )
  strata = result["strata"]["full"]["test"]
  assert strata["users"]["<=5"]["num_users"] == 1
  assert strata["users"]["<=5"]["recall@5"] == 1
  assert strata["users"]["6-20"]["recall@5"] == 1 / 2
  assert strata["users"][">20"] == {"num_users": 0}
  assert strata["items"]["<=2"]["recall@5"] == (1 + 1 / 2) / 2
  assert strata["items"]["3-10"] == {"num_users": 0}


def test_same_inputs_give_the_same_values_and_complete_tables():
  interactions = make_interactions(40, 70, 10)
  scorer = table_scorer(random_scores(interactions, 0).round(1))
  first, table = evaluate.evaluate(scorer, interactions, **ALL, **EVAL)
  again, _ = evaluate.evaluate(scorer, interactions, **ALL, **EVAL)
  assert first == again
  assert len(first["candidates"]["pooled_1024"]["test"]) == 64
  assert {len(column) for column in table.values()} == {3 * 2 * 40}
  assert list(table)[:4] == ["user", "protocol", "part", "precision@5"]


def test_several_devices_rank_as_one():
  # Three blocks of 16, of which the last is short.
  interactions = make_interactions(40, 70, 10)
  scorer = table_scorer(random_scores(interactions, 0).round(1))
  one, table = evaluate.evaluate(scorer, interactions, **ALL, **EVAL)
  several, same_table = evaluate.evaluate(
    scorer._replace(engine=toy.make_engine(2)), interactions, **ALL, **EVAL
  )
  assert one == several
  for name, column in table.items():
    np.testing.assert_array_equal(column, same_table[name])


@pytest.mark.parametrize("protocol", candidates.SIZES)
@pytest.mark.parametrize("pair_cost", [0, 10**6])
def test_lists_are_ranked_as_brute_force_on_both_paths(
  monkeypatch, protocol, pair_cost
):
  monkeypatch.setattr(ranking, "_PAIR_COST", pair_cost)
  ranking._rank_lists_block.clear_cache()
  ranking._mapped.cache_clear()
  interactions = make_interactions(11, 150, 10)
  scores = random_scores(interactions, 0).round(1).astype(np.float32)
  user, _ = candidates.lists(interactions, protocol=protocol, part="test")
  items, _ = ranking.rank_lists(
    table_scorer(scores),
    user,
    candidates.draw(
      interactions, protocol=protocol, part="test", seed=3, block=8
    ),
    num_items=150,
    k=20,
    seed=3,
    item_tile=64,
  )
  keys = tie_keys(11, 150, 3)
  for row, lists in enumerate(drawn(interactions, protocol, 3, block=8)):
    lists = lists[lists >= 0]
    key, score = keys[user[row], lists], scores[user[row], lists]
    order = np.lexsort((-key, -score))[:20]
    np.testing.assert_array_equal(items[row], lists[order])


def test_a_part_that_nobody_has_is_left_out():
  interactions = make_interactions(20, 40, 10)
  train = np.zeros_like(interactions.part)
  result, table = evaluate.evaluate(
    constant_scorer(interactions),
    dataclasses.replace(interactions, part=train),
    **ALL,
    **EVAL,
  )
  assert result["full"] == {} and result["candidates"]["pooled_1024"] == {}
  assert not len(table["recall@5"])
