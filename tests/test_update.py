"""The step and its chunks: schedule, golden values, failure, learning."""

import math
import types

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmm_jax import command, logs, sampling, train, update
import toy

# Loss of the first two steps; the second depends on every gradient.
GOLDEN = {
  "con": [2.25782, 1.79915],
  "cat": [2.28591, 1.75071],
  "net": [4.39683, 3.40991],
  "pmf": [1.56765, 1.19598],
  "full": [5.81195, 4.5744],
  "paper": [499.199, 385.594],
  "fair": [4.38215, 3.45116],
  "cat-bce": [2.59223, 2.12201],
  "cat-bpr": [2.60089, 2.13099],
  "cat-softmax": [5.70011, 5.00703],
  "best-softmax": [11.0233, 10.7016],
}


def test_gradients_of_terms_on_the_tables():
  """Of |u|^2 / 2, averaged over a batch: u of each of its rows over B."""
  config = toy.get_config("cat", log__gradients=True)
  config.weights.user = 0.5
  run = toy.make_run(config, toy.random_data(40, 60))
  session = toy.Session(run)
  found = session.table_gradients()
  assert set(found) == {"interaction", "user", "item", *CATEGORY_TERMS}
  batch = toy.draw_epoch(run)[0]
  user = batch["user"][batch["user"] != sampling.PAD]
  rows = session.state.tables["user"].packed[:, :8]
  gradient = np.zeros_like(rows)
  np.add.at(gradient, user, 0.5 * rows[user] / len(user))
  assert found["user"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
  eight = toy.Session(run, engine=toy.make_engine(8)).table_gradients()
  assert eight == pytest.approx(found, rel=1e-5)


CATEGORY_TERMS = ("category", "category_prior")


def golden_session(variant):
  """Steps from random parameters with a made-up clustering."""
  name, _, loss = variant.partition("-")
  loss = loss or "squared"
  config = toy.get_config(name, interaction_loss=loss)
  if name == "best":
    config.remedies.history_in_user = 0.5
  config.losses[loss].learning_rate = 0.1  # a wrong gradient is to be seen
  for kind in config.weights:
    if kind != "overrides":
      config.weights[kind] = 0.5  # so that each term is seen in the sum
  run = toy.make_run(config, toy.random_data(40, 60))
  session = toy.Session(run)
  if config.num_categories:
    assignment = np.arange(60) % config.num_categories
    centroids = np.linspace(-1, 1, config.num_categories * 8).reshape(-1, 8)
    session.state = toy.with_categories(session.state, assignment, centroids)
  return session


@pytest.mark.parametrize("variant", list(GOLDEN))
def test_golden_first_steps(variant):
  found = golden_session(variant).train(2)["loss"]
  np.testing.assert_allclose(
    found,
    GOLDEN[variant],
    rtol=1e-4,
    err_msg=(
      f"The first steps of `{variant}` have changed. If you did not mean to"
      " change the model, the loss, the draws or the start, this is a bug. If"
      " you did, say so in the commit, check that the other tests of"
      f" test_mmm.py hold, and write {[float(x) for x in found]} into GOLDEN."
    ),
  )


def test_bfloat16_trains_the_same_float32_tables():
  """Encoders and shared logits are coarser; the start and the losses are not.

  By the first loss, which knows no update, the error is below 1/256.
  """
  exact = golden_session("best-softmax")
  run = exact.run
  config = run.config.copy_and_resolve_references()
  config.compute_dtype = "bfloat16"
  model = run.plain_model.clone(compute_dtype="bfloat16")
  coarse = toy.Session(run._replace(config=config, plain_model=model))
  coarse.state = toy.with_categories(
    coarse.state,
    exact.state.categories.assignment,
    exact.state.categories.centroids,
  )
  wanted, found = exact.train(2)["loss"], coarse.train(2)["loss"]
  np.testing.assert_allclose(found, wanted, rtol=1 / 256)
  assert (found != wanted).all()
  kinds = {leaf.dtype for leaf in jax.tree.leaves(coarse.state)}
  assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}


# --- learning rate ---------------------------------------------------------


@pytest.mark.parametrize(
  ("staircase", "step", "factor"),
  [
    (False, 0, 1.0),
    (False, 1000, 0.95),
    (False, 2500, 0.95**2.5),
    (True, 2500, 0.95**2),
    (True, 999, 1.0),
  ],
)
def test_learning_rate_decays_from_the_rate_of_the_loss(
  staircase, step, factor
):
  config = toy.get_config(
    "pmf",
    interaction_loss="bpr",
    losses__bpr__learning_rate=0.02,
    schedule__staircase=staircase,
  )
  found = update.learning_rate(config)(jnp.int32(step))
  np.testing.assert_allclose(found, 0.02 * factor, rtol=1e-6)


def test_the_decay_applies_to_rows_and_dense_parameters():
  # Times 1 in the first step, times 1e-30 in the second.
  config = toy.get_config(
    "cat", schedule__decay_rate=1e-30, schedule__decay_steps=1
  )
  session = toy.Session(toy.make_run(config, toy.random_data(40, 60)))
  session.state = toy.with_categories(
    session.state, np.zeros(60), np.ones((3, 8))
  )
  leaves = lambda state: [
    state.params["category_vectors"],
    state.tables["user"].rows,
    state.tables["item"].rows,
  ]
  states = [leaves(session.state)]
  for _ in range(2):
    session.train(1)
    states.append(leaves(session.state))
  for before, first, second in zip(*states):
    assert (before != first).any()
    assert (first == second).all()


def test_encoder_decay_spares_the_category_vectors():
  config = toy.get_config(
    remedies__encoder_decay=0.1, losses__squared__learning_rate=0.5
  )
  params = {"category_vectors": jnp.ones(2), "map_text": jnp.ones(2)}
  rule = update.dense_optimizer(config)
  zeros = jax.tree.map(jnp.zeros_like, params)
  moves, _ = rule.update(zeros, rule.init(params), params)
  assert (moves["category_vectors"] == 0).all()
  np.testing.assert_allclose(moves["map_text"], -0.5 * 0.1, rtol=1e-6)


# --- chunks ----------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 60), st.data())
def test_chunks_cover_the_rest_of_an_epoch(steps, every_steps, data):
  trainer = types.SimpleNamespace(
    sizes=types.SimpleNamespace(steps=steps),
    config=types.SimpleNamespace(
      log=types.SimpleNamespace(every_steps=every_steps)
    ),
  )
  ahead = lambda at: train.Trainer._chunks_ahead(trainer, at)
  whole = ahead(0)
  assert sum(whole) == steps
  length = update.chunk_steps(trainer.config, trainer.sizes)
  assert set(whole[:-1]) <= {length}
  assert 1 <= whole[-1] <= length <= every_steps
  assert len(whole) == math.ceil(steps / every_steps)  # no more than needed
  # Resumed after any chunk, the same chunks follow.
  done = data.draw(st.integers(0, len(whole)))
  assert ahead(sum(whole[:done])) == whole[done:]


@pytest.mark.parametrize(
  ("changes", "devices"),
  [
    ({}, 1),
    ({}, 8),
    ({"negatives__resample": False}, 1),
    ({"interaction_loss": "softmax"}, 1),
  ],
  ids=str,
)
def test_the_length_of_a_chunk_changes_nothing(changes, devices):
  # What is drawn ahead for a chunk is what each of its steps would draw.
  states, losses = [], []
  for chunk in (50, 4, 1):
    config = toy.get_config("pmf", log__every_steps=chunk, **changes)
    run = toy.make_run(config, toy.random_data(40, 60))
    session = toy.Session(run, engine=toy.make_engine(devices))
    losses.append(session.train_epochs(2)["loss"])
    states.append(session.state)
  assert len(losses[0]) == 2 * session.run.sizes.steps == states[0].step
  for loss, state in zip(losses[1:], states[1:]):
    assert (loss == losses[0]).all()
    same = jax.tree.map(lambda x, y: bool((x == y).all()), state, states[0])
    assert all(jax.tree.leaves(same))


# --- failure ---------------------------------------------------------------


def test_first_non_finite_names_place_and_term():
  good = np.ones(4)
  assert update.first_non_finite({"loss": good, "user": good}) is None
  late, early = good.copy(), good.copy()
  late[3], early[1] = np.inf, np.nan
  values = {"loss": early, "user": late, "item": early}
  # The term that is to blame, not the sum that it spoils.
  assert update.first_non_finite(values) == (1, "item")
  assert update.first_non_finite({"loss": late}) == (3, "loss")


def test_a_non_finite_term_stops_the_run_with_step_term_and_checkpoint(
  tmp_path,
):
  config = toy.get_config("pmf")
  data = toy.random_data(40, 60)
  user = data.user[0]  # whose vector is spoilt
  run = toy.make_run(config, data)
  drawn = toy.draw_epoch(run)
  first = 1 + next(i for i, b in enumerate(drawn) if user in b["user"])
  trainer = train.Trainer(run, tmp_path, toy.make_engine())
  trainer.start()
  trainer.save()
  state = toy.to_host(trainer.engine.first(trainer.state))
  packed = state.tables["user"].packed
  packed[user] = np.nan
  trainer.state = trainer.engine.replicate(state)
  progress = logs.Progress(1, done=0, primary=False)
  with pytest.raises(command.NonFiniteError) as caught:
    trainer.train_epoch(progress)
  trainer.close()
  message = str(caught.value)
  assert f"in step {first};" in message
  assert message.startswith(("interaction became nan", "user became nan"))
  assert "last good checkpoint: step 0" in message


@pytest.mark.parametrize("act", ["save", "validate"])
def test_a_spoilt_state_is_neither_saved_nor_validated(tmp_path, act):
  # The losses of a chunk do not see what its last update did.
  run = toy.make_run(toy.get_config("cat"), toy.random_data(40, 60))
  trainer = train.Trainer(run, tmp_path, toy.make_engine())
  trainer.start()
  trainer.save()
  state = toy.to_host(trainer.engine.first(trainer.state))
  state.params["category_vectors"][0, 0] = np.inf
  trainer.state, trainer.step = trainer.engine.replicate(state), 7
  with pytest.raises(command.NonFiniteError) as caught:
    getattr(trainer, act)()
  trainer.close()
  message = str(caught.value)
  assert "params.category_vectors is not finite after step 7" in message
  assert "last good checkpoint: step 0" in message


# --- early stopping --------------------------------------------------------


@pytest.mark.parametrize(
  ("ndcg", "stop", "best"),
  [
    ((0.1, 0.3, 0.2, 0.3), 4, 2),  # a tie is no improvement
    ((0.1, 0.2, 0.15, 0.3, 0.4, 0.5), 6, 6),  # ended by `epochs`
  ],
)
def test_patience_counts_evaluations_and_the_best_is_reported(
  monkeypatch, tmp_path, ndcg, stop, best
):
  said = iter(ndcg)
  monkeypatch.setattr(
    train.scoring,
    "score_protocols",
    lambda *_: ({"full": {"valid": {"ndcg@20": next(said)}}}, {}),
  )
  config = toy.get_config(
    "pmf", epochs=6, eval__every_epochs=1, eval__patience=2
  )
  data = toy.random_data(40, 60)
  data.part = np.zeros(len(data.user), np.int8)
  data.part[::9] = 1  # validation
  run = toy.make_run(config, data)
  trainer = train.Trainer(run, tmp_path, toy.make_engine())
  trainer.start()
  kept = train.train(trainer)
  trainer.close()
  assert trainer.step == stop * run.sizes.steps
  assert kept.step == best * run.sizes.steps
  assert kept.metric == ndcg[best - 1]
  last = trainer.engine.first(trainer.state).tables["user"].rows
  assert (kept.rows["user"] == last).all() == (best == stop)
  assert trainer.manifest.values["best_step"] == kept.step


# --- what is watched -------------------------------------------------------


def test_averages_are_over_rows_and_not_over_steps():
  watched = {
    "H1/matching_text": (np.array([3.0, 0.0, 1.0]), np.array([6.0, 0.0, 2.0])),
    "H3/length_user": (np.zeros(3), np.zeros(3)),
  }
  assert update.average(watched) == {
    "H1/matching_text": 4 / 8,
    "H3/length_user": None,
  }


def test_the_hazards_are_watched():
  # Few steps: two items of a shard in each make a mismatched pair.
  config = toy.get_config("full", batch_size=64)
  session = toy.Session(toy.make_run(config, toy.random_data(40, 60)))
  # Category 1 is 3 away from its centroid, the others lie on theirs.
  centroids = np.zeros((3, 8))
  vectors = centroids.copy()
  vectors[1, 2] = 3
  session.state = toy.with_categories(
    session.state, np.arange(60) % 3, centroids, vectors
  )
  tables = session.state.tables
  values = session.train(1)
  assert values["H4/category_to_centroid"] == pytest.approx([3 / 3])
  for source in ("text", "visual"):
    for pairs in ("matching", "mismatched"):
      assert 0 < values[f"H1/{pairs}_{source}"][0] < 1
  # alpha starts at 0: both weights are 1/2, or one is 1 for users of one net.
  assert 0.5 <= values["H2/largest_weight"][0] <= 1
  for name in ("user", "network_follow", "network_friend"):
    lengths = np.linalg.norm(tables[name].rows, axis=1)
    key = f"H3/length_{name.removeprefix('network_')}"
    assert lengths.min() <= values[key][0] <= lengths.max()


# --- learning --------------------------------------------------------------


def test_dense_updates_are_a_choice_and_move_rows_that_pause():
  states = {}
  for kind in ("rows", "dense"):
    config = toy.get_config("pmf")
    config.tables["update"] = kind
    session = toy.Session(toy.make_run(config, toy.random_data(40, 60)))
    session.train(1)
    before = session.state
    session.train(1)
    states[kind] = before, session.state
  first = {kind: pair[0].tables["user"].rows for kind, pair in states.items()}
  np.testing.assert_allclose(first["rows"], first["dense"], rtol=1e-5)
  moved = {
    kind: (one.tables["user"].rows != two.tables["user"].rows).any(1).sum()
    for kind, (one, two) in states.items()
  }
  assert moved["rows"] < moved["dense"]


def test_overfits_two_hundred_users():
  data = toy.random_data(200, 400, per_user=10)
  config = toy.get_config(
    "pmf",
    interaction_loss="softmax",
    model__dim=32,
    batch_size=256,
    losses__softmax__learning_rate=0.02,
    losses__softmax__shared_negatives=200,
    tables__init_scale=0.1,
    weights__user=0.0,
    weights__item=0.0,
  )
  run = toy.make_run(config, data)
  session = toy.Session(run)
  session.train_epochs(80)
  tables = {name: t.rows for name, t in session.state.tables.items()}
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  scores = unit(tables["user"]) @ unit(tables["item"]).T
  top = np.argsort(-scores, axis=1)[:, :10]
  recall = [
    np.isin(own, top[user]).mean()
    for user in range(200)
    if len(own := data.item[data.user == user])
  ]
  assert max(np.bincount(data.user)) <= 10
  assert np.mean(recall) > 0.9


def test_an_epoch_touches_every_user_and_item_row_that_trains():
  config = toy.get_config("pmf", normalisation="mean")
  data = toy.random_data(40, 60)
  session = toy.Session(toy.make_run(config, data))
  before = session.state
  session.train_epochs(1)
  moved = {
    name: (table.rows != before.tables[name].rows).any(1)
    for name, table in session.state.tables.items()
  }
  assert moved["user"][np.unique(data.user)].all()
  assert moved["item"][np.unique(data.item)].all()
  assert sampling.PAD not in data.user
