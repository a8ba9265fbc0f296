"""What an epoch passes over, and what a batch is made of."""

import types

import numpy as np
import pytest

from mmm_jax import errors, sampling, streams
from mmm_jax.datasets import splits
import toy

PAD = sampling.PAD


@pytest.fixture(scope="module")
def run():
  config = toy.get_config(num_categories=0)
  return toy.make_run(config, toy.random_data(40, 60))


@pytest.fixture(scope="module")
def epoch(run):
  return toy.draw_epoch(run)


def real(batches, name):
  found = np.concatenate([batch[name].ravel() for batch in batches])
  return found[found != PAD].tolist()


def test_an_epoch_passes_once_over_interactions_items_and_users(run, epoch):
  pairs = list(zip(real(epoch, "user"), real(epoch, "item")))
  assert len(pairs) == run.sizes.num_train
  data = run.dataset
  assert sorted(pairs) == sorted(zip(data.user.tolist(), data.item.tolist()))
  assert sorted(real(epoch, "stream_item")) == list(range(60))
  assert sorted(real(epoch, "stream_user")) == list(range(40))


def test_only_the_last_step_is_short(run, epoch):
  size, steps = run.config.batch_size, run.sizes.steps
  filled = [int((batch["user"] != PAD).sum()) for batch in epoch]
  assert filled[:-1] == [size] * (steps - 1)
  assert filled[-1] == run.sizes.num_train - size * (steps - 1)


def test_epochs_differ_and_repeat(run, epoch):
  other = toy.draw_epoch(run, epoch=1)
  assert real(other, "user") != real(epoch, "user")
  assert real(toy.draw_epoch(run), "user") == real(epoch, "user")


def test_batches_do_not_depend_on_who_holds_the_shards(run, epoch):
  halves = [
    toy.draw_epoch(run, shards=slice(start, start + 4)) for start in (0, 4)
  ]
  names = ("user", "item", "negatives", "history")
  names += ("stream_user", "stream_item")
  for step, whole in enumerate(epoch):
    for name in names:
      parts = [half[step][name] for half in halves]
      np.testing.assert_array_equal(np.concatenate(parts), whole[name])
    for name, found in whole["neighbours"].items():
      parts = [half[step]["neighbours"][name] for half in halves]
      np.testing.assert_array_equal(np.concatenate(parts), found)


def test_texts_of_like_length_share_a_bin():
  # 60 items on 8 shards in 10 steps: 1 place a shard and step is enough, in 5
  # steps 2 are; so bins of 30 items each, the shorter ones first.
  data = toy.random_data(40, 60)
  lengths = (data.tokens > 0).sum(1)
  data.tokens[np.argsort(lengths)[:30], 3:] = 0
  run = toy.make_run(toy.get_config(batch_size=32), data)
  assert run.sizes.steps == 5
  assert run.sizes.item_bins == ((0, 4, 1, 3), (4, 4, 1, 5))
  shorter = set(np.flatnonzero((data.tokens[:, 3:] == 0).all(1)).tolist())
  items = run.shards.items.ids["item"]
  first = items[:, :4]
  assert set(first[first != PAD].tolist()) <= shorter
  assert sorted(items[items != PAD].tolist()) == list(range(60))
  assert (run.shards.items.count == 4).sum() == 12  # 30 = 6 * 4 + 2 * 3, twice
  batches = toy.draw_epoch(run)
  assert sorted(real(batches, "stream_item")) == list(range(60))


def test_every_word_of_a_text_is_in_its_batch():
  data = toy.random_data(40, 60)
  run = toy.make_run(toy.get_config(batch_size=32), data)
  found = {}
  for batch in toy.draw_epoch(run, tokens=data.tokens):
    item = batch["stream_item"]
    for at, tokens in enumerate(batch["tokens"]):  # a bin a place, here
      for j, words in zip(item[:, at].tolist(), tokens[:, 0]):
        found[j] = words[words != PAD].tolist()
  found.pop(PAD, None)
  assert found == {
    j: row[row > 0].tolist() for j, row in enumerate(data.tokens)
  }


def test_history_is_the_user_s_other_items(run, epoch):
  pairs = set(zip(run.dataset.user.tolist(), run.dataset.item.tolist()))
  for batch in epoch:
    for user, item, history in zip(
      batch["user"], batch["item"], batch["history"]
    ):
      drawn = history[history != PAD].tolist()
      assert item not in drawn and len(set(drawn)) == len(drawn)
      own = {j for i, j in pairs if i == user} - {item}
      # A window of 4 may hold the item itself.
      assert set(drawn) <= own and len(drawn) >= min(len(own), 3)


def test_shared_negatives_tell_what_the_user_has_seen():
  config = toy.get_config(interaction_loss="softmax", num_categories=0)
  run = toy.make_run(config, toy.random_data(40, 60))
  pairs = set(zip(run.dataset.user.tolist(), run.dataset.item.tolist()))
  for batch in toy.draw_epoch(run):
    expected = [
      [(i, j) in pairs for j in batch["negatives"].tolist()]
      for i in batch["user"].tolist()
    ]
    np.testing.assert_array_equal(batch["seen_negatives"], expected)


def test_negatives_of_a_batch_are_unseen(run, epoch):
  seen = set(zip(run.dataset.user.tolist(), run.dataset.item.tolist()))
  for batch in epoch:
    for user, own in zip(batch["user"], batch["negatives"]):
      if user == PAD:
        assert (own == PAD).all()
      else:
        assert not seen & {(int(user), int(item)) for item in own}


@pytest.mark.parametrize("resample", [True, False])
def test_an_interaction_keeps_its_negatives_unless_they_are_resampled(resample):
  config = toy.get_config("pmf", negatives__resample=resample)
  run = toy.make_run(config, toy.random_data(40, 60))

  def negatives_of(epoch):
    return {
      (int(user), int(item)): tuple(own.tolist())
      for batch in toy.draw_epoch(run, epoch)
      for user, item, own in zip(
        batch["user"], batch["item"], batch["negatives"]
      )
      if user != PAD
    }

  first, second = negatives_of(0), negatives_of(1)
  assert first.keys() == second.keys()
  kept = np.mean([first[pair] == second[pair] for pair in first])
  assert kept < 0.1 if resample else kept == 1


def test_presence_and_membership_follow_the_data(run, epoch):
  for batch in epoch:
    for source, absent in (("visual", [1, 4]), ("text", [2])):
      item = batch["stream_item"]
      expected = (item != PAD) & ~np.isin(item, absent)
      np.testing.assert_array_equal(batch["present"][source], expected)
    user = batch["user"]
    expected = (user != PAD) & (user % 5 != 0)  # every fifth follows nobody
    for network in range(2):
      # A draw of nothing but oneself leaves a user without neighbours, too.
      member = batch["membership"][:, network]
      assert not (member & ~expected).any()


def test_neighbours_are_the_network_s(run, epoch):
  for batch in epoch:
    for name, found in batch["neighbours"].items():
      network = run.dataset.networks[name]
      for user, drawn in zip(batch["stream_user"], found):
        drawn = set(drawn[drawn != PAD].tolist())
        if user == PAD:
          assert not drawn
          continue
        start, end = network.indptr[user : user + 2]
        own = set(network.indices[start:end].tolist())
        assert drawn <= own
        assert len(drawn) == min(len(own), 4)


def test_only_training_interactions_are_used():
  data = toy.random_data(40, 60)
  rng = np.random.default_rng(0)
  part = rng.integers(0, 3, len(data.user))
  data.part = part
  run = toy.make_run(toy.get_config("pmf"), data)
  train = run.split.part == splits.TRAIN
  assert run.sizes.num_train == train.sum()
  batches = toy.draw_epoch(run)
  pairs = set(zip(real(batches, "user"), real(batches, "item")))
  user, item = run.dataset.user[train], run.dataset.item[train]
  assert pairs == set(zip(user.tolist(), item.tolist()))
  indptr, indices = run.shared.seen
  seen = {
    (i, int(j)) for i in range(40) for j in indices[slice(*indptr[i : i + 2])]
  }
  assert seen == pairs


# --- sizes and errors ------------------------------------------------------


def measure(num_train, num_items, num_users, lengths=None, **changes):
  dataset = types.SimpleNamespace(
    name="toy",
    users=range(num_users),
    items=range(num_items),
    user=np.zeros(num_train, int),
  )
  split = splits.Split(np.zeros(num_train, np.int8), "")
  config = toy.get_config(**changes)
  return streams.measure(dataset, split, lengths, config)


def test_sizes_of_the_paper_s_set():
  sizes = measure(76603, 19058, 9412, batch_size=1024, data_shards=8)
  assert sizes.steps == 75  # 74.8 of 1,024
  assert sizes.interaction_width == 1024 / 8
  # ceil(19058 / 8) = 2383 places a shard, in 75 steps; ceil(9412 / 8) = 1177.
  assert sizes.item_bins == ((0, 2383, 32, 0),) and 31 * 75 < 2383 <= 32 * 75
  assert sizes.user_width == 16 and 15 * 75 < 1177 <= 16 * 75
  assert sizes.max_seen == 76603


def test_nothing_to_train_on():
  with pytest.raises(errors.InputError, match="no training interaction"):
    measure(0, 10, 10)


def choose(**changes):
  data = toy.random_data(40, 60)
  config = toy.get_config(**changes)
  return (
    streams.choose_sources(data.dataset, config),
    tuple(streams.choose_networks(data.dataset, data.split, config)[0]),
  )


def test_a_star_means_all_there_is():
  assert choose() == (("visual", "text"), ("follow", "friend", "co_like"))
  assert choose(model__sources="", model__networks="") == ((), ())
  assert choose(model__sources="text", model__networks="co_like") == (
    ("text",),
    ("co_like",),
  )


@pytest.mark.parametrize(
  ("key", "told"),
  [
    ("model__sources", "no source 'sound' .*has: visual, text"),
    ("model__networks", "no network 'sound' .*has: follow, friend, co_like"),
  ],
)
def test_what_is_named_and_absent_lists_what_is_present(key, told):
  with pytest.raises(errors.InputError, match=told):
    choose(**{key: "sound"})


def test_lists_too_long_for_32_bits_are_refused():
  indptr = np.array([0, 5, 2**31])
  with pytest.raises(errors.InputError, match="2,147,483,648 entries"):
    streams._adjacency(indptr, np.zeros(1, np.int32))


def test_positives_weigh_by_how_often_they_were_watched():
  # User 0 has watched items 0 and 1 once and thrice, and item 3, which is held
  # out, often; user 1 item 2 five times.
  data = toy.Data(
    *(2, 4),
    user=np.array([0, 0, 0, 1]),
    item=np.array([0, 1, 3, 2]),
    part=np.array([0, 0, 2, 0]),
    count=np.array([1, 3, 9, 5]),
  )
  config = toy.get_config("pmf", remedies__count_power=2.0)
  found = {
    item: weight
    for batch in toy.draw_epoch(toy.make_run(config, data))
    for item, weight in zip(batch["item"].tolist(), batch["weight"])
    if item != PAD
  }
  # ln 2 and ln 4 = 2 ln 2, squared, are as 1 and 4: of mean 1, .4 and 1.6.
  assert found == pytest.approx({0: 0.4, 1: 1.6, 2: 1.0}, rel=1e-6)


AROUND = dict(remedies__history_in_user=1.0, remedies__history_around=True)


def test_the_history_around_a_positive_is_the_next_in_time():
  # Users 0 and 1 watch 5 items and 2, the first of user 1 being held out.
  data = toy.Data(
    *(2, 9),
    user=np.array([0, 0, 0, 0, 0, 1, 1]),
    item=np.array([0, 1, 2, 3, 4, 5, 7]),
    part=np.array([0, 0, 0, 0, 0, 1, 0]),
    ordered=True,
  )
  config = toy.get_config("pmf", network__neighbour_cap=3, **AROUND)
  found = {
    item: set(history[history != PAD].tolist())
    for batch in toy.draw_epoch(toy.make_run(config, data))
    for item, history in zip(batch["item"].tolist(), batch["history"])
    if item != PAD
  }
  # Two before and one behind.
  wanted = {0: {1}, 1: {0, 2}, 2: {0, 1, 3}, 3: {1, 2, 4}, 4: {2, 3}, 7: set()}
  assert found == wanted


@pytest.mark.parametrize(
  ("key", "changes"),
  [
    ("count_power", {"remedies__count_power": 1.0}),
    ("history_around", AROUND),
    ("history_around", AROUND | {"remedies__history_in_user": 0.0}),
  ],
)
def test_what_a_set_does_not_tell_is_refused(key, changes):
  config = toy.get_config("pmf", **changes)
  with pytest.raises(errors.InputError, match=f"remedies.{key}.*(toy|is 0)"):
    toy.make_run(config, toy.random_data(5, 9))
