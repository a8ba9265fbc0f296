"""The made-up set: exact sizes, its signals, and that one can learn from it."""

import dataclasses
import os
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_collections
import numpy as np
from numpy._core._multiarray_umath import __cpu_dispatch__ as CPU_FEATURES
import pytest

from mmm_jax import errors
from mmm_jax.datasets import base, crowds, simulated

SIGNAL = {"text": 0.5, "visual": 0.5, "follow": 0.5}
OPTIONS = {
  "seed": 0,
  "users": 300,
  "items": 1200,
  "interactions": 7500,
  "min_per_user": 5,
  "min_per_item": 5,
  "communities": 6,
  "categories": 8,
  "latent_dim": 8,
  "activity_tail": 1.5,
  "focus": 2.0,
  "taste": 3.0,
  "exposure": 60,
  "home_share": 0.9,
  "visual_dim": 128,
  "words": 400,
  "text_tokens": 8.0,
  "follow_degree": 12.0,
  "absent": 0.03,
  "signal": SIGNAL,
}


def make(**changes):
  return simulated.parse(None, OPTIONS | changes)


def make_signal(source, strength, **changes):
  return make(signal=SIGNAL | {source: strength}, **changes)


def counts(raw):
  """Interactions of every user and of every item."""
  items = np.concatenate(raw.user_items)
  return (
    np.array([len(each) for each in raw.user_items]),
    np.bincount(items, minlength=len(raw.item_ids)),
  )


@given(
  seed=st.integers(0, 2**32),
  users=st.integers(2, 40),
  items=st.integers(2, 40),
  min_per_user=st.integers(0, 2),
  min_per_item=st.integers(0, 2),
  fullness=st.floats(0, 1),
  communities=st.integers(1, 5),
  exposure=st.integers(1, 30),
  home_share=st.floats(0, 1),
  taste=st.floats(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_size_is_exact(
  users, items, min_per_user, min_per_item, fullness, communities, **others
):
  least = max(min_per_user * users, min_per_item * items)
  interactions = round(least + fullness * (users * items - least))
  raw = make(
    users=users,
    items=items,
    min_per_user=min_per_user,
    min_per_item=min_per_item,
    interactions=interactions,
    communities=min(communities, users),
    follow_degree=min(2.0, users),
    visual_dim=4,
    words=20,
    **others,
  )
  per_user, per_item = counts(raw)
  assert len(raw.user_ids) == users and len(set(raw.user_ids)) == users
  assert len(raw.item_ids) == items and len(set(raw.item_ids)) == items
  assert per_user.sum() == interactions
  assert per_user.min() >= min_per_user and per_item.min() >= min_per_item
  for user, mine in enumerate(raw.user_items):
    assert len(np.unique(mine)) == len(mine)
    assert np.all(np.diff(raw.timestamps[user]) >= 0)
    following = raw.networks["follow"][user]
    assert user not in following and np.all(np.diff(following) > 0)


def test_activity_is_heavy_tailed_and_popularity_flat():
  per_user, per_item = counts(
    make(users=2000, items=4000, interactions=23_000, communities=20)
  )
  assert per_user.max() > 5 * np.median(per_user)
  assert np.median(per_item) <= 6 and per_item.max() <= 20


def test_is_a_function_of_the_seed():
  one, same, other = make(), make(), make(seed=1)
  for field in ("text", "timestamps", "user_items"):
    assert str(getattr(one, field)) == str(getattr(same, field))
    assert str(getattr(one, field)) != str(getattr(other, field))
  # The vectors are drawn anew whenever they are read.
  np.testing.assert_array_equal(vectors(one), vectors(one))
  np.testing.assert_array_equal(vectors(one), vectors(same))


def test_a_knob_moves_its_own_source_only():
  one, other = make(), make_signal("text", 1.0)
  assert one.text != other.text
  assert str(one.user_items) == str(other.user_items)
  assert str(one.networks) == str(other.networks)
  np.testing.assert_array_equal(vectors(one), vectors(other))


def test_something_is_absent_everywhere():
  raw = make()
  following = np.array([len(each) for each in raw.networks["follow"]])
  for missing in (
    np.array([not text for text in raw.text]),
    ~raw.present["visual"],
    following == 0,
  ):
    assert 0 < missing.mean() < 0.1


@pytest.mark.parametrize(
  ("key", "value", "wanted"),
  [
    ("interactions", 5 * 1200 - 1, "6000 to 360000"),
    ("interactions", 300 * 1200 + 1, "6000 to 360000"),
    ("communities", 301, "1 to 300"),
    ("home_share", 1.5, "0 to 1"),
    ("users", 1, "2 or more"),
    ("text_tokens", float("nan"), "1 to 400"),
  ],
)
def test_impossible_values_are_named(key, value, wanted):
  with pytest.raises(errors.InputError) as error:
    make(**{key: value})
  assert f"dataset.simulated.{key}: found {value}" in str(error.value)
  assert wanted in str(error.value)


def test_impossible_signal_is_named():
  with pytest.raises(errors.InputError, match="signal.text: found -0.1"):
    make_signal("text", -0.1)


# ---- What a linear probe recovers.


def vectors(raw):
  return np.stack(list(raw.vectors["visual"]())).astype(np.float64)


def bags_of_words(raw):
  bags = np.zeros((len(raw.text), OPTIONS["words"]))
  for item, text in enumerate(raw.text):
    for word in text.split():
      bags[item, int(word.removeprefix("#word"))] = 1
  return bags


def probe(inputs, latent):
  """R^2 of a ridge regression on the items of the last quarter."""
  train = np.arange(len(inputs)) < 0.75 * len(inputs)
  inputs = inputs - inputs[train].mean(axis=0)
  target = latent - latent[train].mean(axis=0)
  gram = inputs[train].T @ inputs[train] + 10.0 * np.eye(inputs.shape[1])
  weights = np.linalg.solve(gram, inputs[train].T @ target[train])
  error = target[~train] - inputs[~train] @ weights
  return 1 - (error**2).sum() / (target[~train] ** 2).sum()


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_probe_of_visual_vectors_recovers_the_knob(strength):
  raw = make_signal("visual", strength, items=3000, interactions=16_000)
  r_squared = probe(vectors(raw), raw.extra["item_latent"])
  # 128 weights fitted to 2,250 items without any signal cost about .06.
  assert strength - 0.1 < r_squared < strength + 0.05


def test_probe_of_text_recovers_more_at_a_higher_knob():
  found = []
  for strength in (0.0, 0.5, 1.0):
    raw = make_signal("text", strength, items=4000, interactions=21_000)
    here = np.array([bool(text) for text in raw.text])
    latent = raw.extra["item_latent"]
    found.append(probe(bags_of_words(raw)[here], latent[here]))
  assert found[0] < 0.05
  assert 0.25 < found[1] < 0.5
  assert found[2] > 0.75


def likeness(raw, network):
  """Mean cosine of the tastes of users and those they follow."""
  taste = raw.extra["user_taste"]
  taste = taste / np.linalg.norm(taste, axis=1, keepdims=True)
  source = np.repeat(np.arange(len(network)), [len(each) for each in network])
  return (taste[source] * taste[np.concatenate(network)]).sum(axis=1).mean()


def test_follow_network_is_noise_at_0_and_alike_at_1():
  by_knob = {s: make_signal("follow", s) for s in (0.0, 0.5, 1.0)}
  found = {s: likeness(r, r.networks["follow"]) for s, r in by_knob.items()}
  raw = by_knob[0.0]
  everyone = [np.arange(300)] * 300
  chance = likeness(raw, everyone)
  assert abs(found[0.0] - chance) < 0.03
  assert chance + 0.1 < found[0.5] < found[1.0] - 0.05


# ---- That there is something to learn, and how it is made.


def neighbour_recall(user_items, num_items, rng):
  """Recall@20 of cosine item neighbours, 20 % of every user held out."""
  seen = np.zeros((len(user_items), num_items))
  held_out = []
  for user, items in enumerate(user_items):
    items = rng.permutation(items)
    cut = round(0.8 * len(items))
    seen[user, items[:cut]] = 1
    held_out.append(items[cut:])
  likeness = seen.T @ seen
  norm = np.sqrt(np.maximum(np.diag(likeness), 1))
  likeness = likeness / norm / norm[:, None]
  np.fill_diagonal(likeness, 0)
  scores = np.where(seen > 0, -np.inf, seen @ likeness)
  scores = scores + 1e-9 * rng.random(scores.shape)
  top = np.argsort(-scores, axis=1)[:, :20]
  recalls = [
    np.isin(top[user], items).sum() / len(items)
    for user, items in enumerate(held_out)
    if len(items)
  ]
  return np.mean(recalls)


def test_neighbours_recall_several_times_chance():
  rng = np.random.default_rng(0)
  raw = make()
  chance = 20 / 1200
  assert neighbour_recall(raw.user_items, 1200, rng) > 5 * chance
  shuffled = [
    rng.choice(1200, len(items), replace=False) for items in raw.user_items
  ]
  assert neighbour_recall(shuffled, 1200, rng) < 1.5 * chance


def test_choice_is_multinomial_without_replacement():
  rng = np.random.default_rng(0)
  odds = np.array([1.0, 2.0, 3.0, 4.0])
  utility = np.tile(np.log(odds), (20_000, 1))
  ones = np.ones(20_000, int)
  rows, first = crowds.choose(rng, utility, ones)
  np.testing.assert_array_equal(rows, np.arange(20_000))
  share = np.bincount(first) / 20_000
  np.testing.assert_allclose(share, odds / 10, atol=4 * 0.5 / 20_000**0.5)
  # Both of two draws miss option 0: sum over the first of the two draws.
  missed = sum(p / 10 * (1 - 1 / (10 - p)) for p in odds[1:])
  rows, columns = crowds.choose(rng, utility, 2 * ones)
  assert len(columns) == 40_000
  assert abs(1 - (columns == 0).sum() / 20_000 - missed) < 0.015


def test_choice_never_takes_what_is_ruled_out():
  rng = np.random.default_rng(0)
  utility = np.array([[0.0, -np.inf, 0.0], [-np.inf] * 3])
  rows, columns = crowds.choose(rng, utility, np.array([3, 1]))
  assert rows.tolist() == [0, 0] and sorted(columns.tolist()) == [0, 2]


def test_crowd_keeps_its_home_share_and_weights():
  rng = np.random.default_rng(0)
  community = np.array([0, 1, 0, 1])
  weight = np.array([1.0, 1.0, 3.0, 5.0])
  crowd = crowds.Crowd(community, weight, 3)
  home = crowd.draw(rng, np.array([0]), size=20_000, home_share=1.0)
  np.testing.assert_allclose(
    np.bincount(home[0], minlength=4) / 20_000, [0.25, 0, 0.75, 0], atol=0.015
  )
  # Nobody lives in community 2: everyone is drawn from.
  away = crowd.draw(rng, np.array([2]), size=20_000, home_share=1.0)
  np.testing.assert_allclose(
    np.bincount(away[0], minlength=4) / 20_000, weight / 10, atol=0.015
  )


def test_is_prepared_and_read_back(tmp_path):
  config = ml_collections.ConfigDict(
    {
      "name": "simulated",
      "data_dir": str(tmp_path),
      "manual_dir": "",
      "core": 5,
      "simulated": OPTIONS,
    }
  )
  dataset = base.load(config)
  assert (dataset.num_users, dataset.num_items) == (300, 1200)
  assert len(dataset.user) == 7500 and dataset.ordered
  raw = make()
  assert dataset.fingerprint == base.load(config).fingerprint
  np.testing.assert_array_equal(
    dataset.item_source[7]["visual"], vectors(raw)[7].astype(np.float16)
  )
  truth = np.load(dataset.folder / "truth.npz")
  for key, value in raw.extra.items():
    np.testing.assert_array_equal(truth[key], value)
  np.testing.assert_array_equal(truth["item_category"], dataset.category)


FINGERPRINT = """
import sys
import ml_collections
from mmm_jax.datasets import base
config = ml_collections.ConfigDict(eval(sys.argv[1]))
print(base.load(config).fingerprint)
"""


def test_is_the_same_on_an_older_processor(tmp_path):
  """NumPy takes other instructions there, and another order of sums."""
  config = {"name": "simulated", "manual_dir": "", "core": 5}
  config["simulated"] = OPTIONS
  older = os.environ | {
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": " ".join(CPU_FEATURES),
  }
  found = [
    subprocess.run(
      [sys.executable, "-c", FINGERPRINT, repr(config | {"data_dir": folder})],
      env=environment,
      capture_output=True,
      check=True,
      text=True,
    ).stdout
    for folder, environment in (
      (str(tmp_path / "this"), os.environ),
      (str(tmp_path / "older"), older),
    )
  ]
  assert len(found[0]) > 60 and found[0] == found[1]


def test_options_have_no_defaults():
  for field in dataclasses.fields(simulated.Options):
    assert field.default is dataclasses.MISSING
