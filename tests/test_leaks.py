"""Nothing that training sees may depend on validation or test."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from mmm_jax import assemble, train
from mmm_jax.datasets import base, simulated, splits
import runs

NUM_USERS, NUM_ITEMS = 40, 60
SECRET = "secret"  # in every tag of a held-out pair, and nowhere else
# The paper's model, and ours, whose users hold neighbours and their history.
MODELS = ("tiny", "best,tiny")


def config_of(variants, folder):
  config = runs.config(variants)
  config.dataset.data_dir = str(folder)
  config.dataset.core = 0
  config.parallel.devices = 1
  config.log.tensorboard = False
  config.eval.protocols = ("full",)
  if "best" in variants:
    config.remedies.history_in_user = 1.0
    config.remedies.history_around = True
    config.remedies.ema_decay = 0.5
  return config


def replace_data(monkeypatch, make_raw):
  """`make_raw(options)` stands for the embedded set."""
  monkeypatch.setattr(simulated, "parse", lambda _, options: make_raw(options))


# --- the canary ---------------------------------------------------------------


def with_items_redrawn(raw, rng):
  """Every interaction's item is drawn anew: no one prefers anything."""
  redrawn = [
    rng.choice(len(raw.item_ids), len(items), replace=False).astype(np.int32)
    for items in raw.user_items
  ]
  return dataclasses.replace(raw, user_items=redrawn)


def trained_recall(variants, tmp_path):
  """recall@20 of the whole model on test, and its config.

  With the loss that learns fastest, and for as long as it takes to learn.
  """
  config = config_of(variants, tmp_path / "data")
  config.interaction_loss = "softmax"
  config.losses.softmax.learning_rate = 0.01
  config.epochs = 8
  config.eval.every_epochs = 4
  result = train.train_and_evaluate(config, tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  # It did train, with everything that could leak.
  row = json.loads(lines[-1])
  assert {"content/text", "network_tie/co_like", "kmeans/inertia"} <= set(row)
  return result["full"]["test"]["recall@20"], config


def chance(config):
  """recall@20 of a random scorer, and its standard error.

  It puts each of a user's t test items among the first 20 of c candidates with
  probability 20/c; the number that it finds there is hypergeometric.
  """
  dataset = base.load(config.dataset, config.split)
  part = splits.make(dataset, config.split).part
  count = lambda mask: np.bincount(
    dataset.user[mask], minlength=dataset.num_users
  )
  tests = count(part == splits.TEST)
  candidates = dataset.num_items - count(part != splits.TEST)
  tests, candidates = tests[tests > 0], candidates[tests > 0]
  share = tests / candidates
  variance = 20 * share * (1 - share) * (candidates - 20) / (candidates - 1)
  error = math.sqrt(np.sum(variance / tests**2)) / len(tests)
  return np.mean(20 / candidates), error


@pytest.mark.parametrize("variants", MODELS)
def test_canary(variants, monkeypatch, tmp_path):
  """On choices without reason the whole model is as good as chance."""
  parse = simulated.parse
  rng = np.random.default_rng(0)
  replace_data(
    monkeypatch, lambda options: with_items_redrawn(parse(None, options), rng)
  )
  found, config = trained_recall(variants, tmp_path)
  expected, error = chance(config)
  assert found == pytest.approx(expected, abs=3 * error)


@pytest.mark.parametrize("variants", MODELS)
def test_the_canary_can_die(variants, tmp_path):
  """The same run on choices with reason lies far above the canary's band."""
  found, config = trained_recall(variants, tmp_path)
  expected, error = chance(config)
  assert found > expected + 10 * error


# --- other held-out items -----------------------------------------------------


def make_tagged(rng):
  """Users with eight training items, a validation item and two test items.

  They follow each other, and tag all that they know, which they watched in that
  order and often.
  """
  user_items = [
    rng.choice(NUM_ITEMS, 11, replace=False) for _ in range(NUM_USERS)
  ]
  part = np.array([splits.TRAIN] * 8 + [splits.VALID] + [splits.TEST] * 2)
  return base.RawData(
    user_ids=[f"user{user}" for user in range(NUM_USERS)],
    item_ids=[f"item{item}" for item in range(NUM_ITEMS)],
    user_items=user_items,
    ordered=True,
    counts=[rng.integers(1, 9, 11, np.int32) for _ in range(NUM_USERS)],
    part=[part.astype(np.int8)] * NUM_USERS,
    networks={
      "follow": [
        np.array([(user + 1) % NUM_USERS]) for user in range(NUM_USERS)
      ]
    },
    text=[f"name{item}" for item in range(NUM_ITEMS)],
    user_tags=[
      (items, tags_of(user, part)) for user, items in enumerate(user_items)
    ],
  )


def tags_of(user, part):
  return [
    f"tag{user}x{number}"
    if kind == splits.TRAIN
    else f"{SECRET} {SECRET}{user}"
    for number, kind in enumerate(part)
  ]


def with_other_held_out_items(raw, rng):
  """The held-out items of every user, and their tags, go to other items.

  Each was watched more often.
  """
  changed, counts = [], []
  for items, count, part in zip(
    raw.user_items, raw.counts, raw.part, strict=True
  ):
    items, held_out = items.copy(), part != splits.TRAIN
    others = np.setdiff1d(np.arange(NUM_ITEMS), items)
    items[held_out] = rng.choice(others, held_out.sum(), replace=False)
    changed.append(items)
    counts.append(count + held_out.astype(np.int32))
  tags = [
    (items, texts)
    for items, (_, texts) in zip(changed, raw.user_tags, strict=True)
  ]
  return dataclasses.replace(
    raw, user_items=changed, counts=counts, user_tags=tags
  )


def assemble_raw(raw, variants, monkeypatch, folder):
  replace_data(monkeypatch, lambda options: raw)
  config = config_of(variants, folder)
  if "best" in variants:
    config.remedies.count_power = 1.0
  return assemble.assemble(config)


@pytest.fixture(params=MODELS)
def pair(request, monkeypatch, tmp_path):
  """Two runs whose data differ in what is held out."""
  raw = make_tagged(np.random.default_rng(1))
  other = with_other_held_out_items(raw, np.random.default_rng(2))
  return tuple(
    assemble_raw(each, request.param, monkeypatch, tmp_path / name)
    for name, each in (("one", raw), ("other", other))
  )


def training_view(run):
  """Everything that a step, a start or the K-means may look at."""
  dataset, trained = run.dataset, run.split.part == splits.TRAIN
  return {
    "sizes": run.sizes,
    "shards": run.shards,
    # The networks, what is no negative, and in ours the order and the counts.
    "shared": run.shared,
    "tokens": run.content.tokens,  # the vocabulary, and the texts with tags
    "words": run.words,
    "state": assemble.initial_state(run),
    "popularity": np.bincount(
      dataset.item[trained], minlength=dataset.num_items
    ),
  }


def test_training_does_not_see_what_is_held_out(pair):
  one, other = pair
  held_out = lambda run: {
    (user, item)
    for user, item, part in zip(
      run.dataset.user, run.dataset.item, run.split.part, strict=True
    )
    if part != splits.TRAIN
  }
  assert len(held_out(one)) == 3 * NUM_USERS
  assert not held_out(one) & held_out(other)
  assert set(one.shared.networks) == {"follow", "co_like"}
  jax.tree.map(
    np.testing.assert_array_equal, training_view(one), training_view(other)
  )


def test_words_of_held_out_tags_are_unknown(pair):
  # Names, eight tags a user, padding and the unknown word; not the secrets.
  words = set()
  run = pair[0]
  trained = np.unique(run.dataset.item[run.split.part == splits.TRAIN])
  words |= {f"name{item}" for item in trained}
  words |= {f"tag{u}x{n}" for u in range(NUM_USERS) for n in range(8)}
  assert len(run.words) == len(words) + 2


def test_edges_of_co_like_have_a_common_training_item(pair):
  run = pair[0]
  known = [set() for _ in range(NUM_USERS)]
  for user, item, part in zip(
    run.dataset.user, run.dataset.item, run.split.part, strict=True
  ):
    if part == splits.TRAIN:
      known[user].add(int(item))
  network = run.shared.networks["co_like"]
  linked = [
    set(network.indices[start:end].tolist())
    for start, end in zip(network.indptr, network.indptr[1:])
  ]
  assert sum(map(len, linked)) > 0
  for user, others in enumerate(linked):
    assert user not in others
    assert all(known[user] & known[other] for other in others)


def test_negatives_may_be_held_out_items(pair):
  """Only training items are excluded: what is held out stays unknown."""
  run = pair[0]
  seen = run.shared.seen
  for user in range(NUM_USERS):
    excluded = seen.indices[seen.indptr[user] : seen.indptr[user + 1]]
    mine = run.dataset.user == user
    trained = run.dataset.item[mine & (run.split.part == splits.TRAIN)]
    np.testing.assert_array_equal(excluded, np.sort(trained))
