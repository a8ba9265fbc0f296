"""Content on its way to the step: resident and streamed are the same."""

import jax
import numpy as np
import pytest

from mmm_jax import input_pipeline, logs, sampling, train
import toy

PAD = sampling.PAD
PICTURES = np.arange(12, dtype=np.float16).reshape(4, 3)
TOKENS = np.array([[1, 2], [3, 0], [0, 0], [4, 5]], np.int32)


class Source:
  """Counts how often it is read."""

  def __init__(self):
    self.reads = 0

  def __getitems__(self, records):
    self.reads += len(records)
    return [{"visual": PICTURES[r], "text": "not read"} for r in records]


def make_content(**changes):
  values = dict(
    item_source=Source(),
    records=np.array([3, 2, 1, 0]),
    vectors={"visual": 3},
    tokens=TOKENS,
  )
  return input_pipeline.ItemContent(**values | changes)


@pytest.mark.parametrize("block", [1, 2, 1024])
def test_content_goes_by_record_number(monkeypatch, block):
  monkeypatch.setattr(input_pipeline, "_BLOCK", block)
  found = make_content()(np.array([1, PAD, 3, 0]))
  wanted = [PICTURES[2], np.zeros(3), PICTURES[0], PICTURES[3]]
  np.testing.assert_array_equal(found["visual"], wanted)
  np.testing.assert_array_equal(found["text"][[0, 2, 3]], TOKENS[[1, 3, 0]])


def test_padding_reads_nothing():
  content = make_content()
  found = content(np.array([PAD]))
  assert not found["visual"].any() and not found["text"].any()
  assert content.item_source.reads == 0


def test_without_vectors_no_record_is_read():
  content = make_content(vectors={})
  assert set(content(np.array([0]))) == {"text"}
  assert content.item_source.reads == 0


def test_budget_is_bytes_of_all_items():
  content = make_content()
  size = 4 * (3 * 2 + 2 * 4)  # items * (float16 + int32)
  assert content.bytes_per_item * 4 == size
  assert content.fits(size / 2**20)
  assert not content.fits((size - 1) / 2**20)


def test_read_keeps_shapes_and_order():
  batches = np.array([[[0, 1]], [[3, PAD]], [[2, 2]]])
  found = list(
    input_pipeline.read(make_content(), batches, toy.get_config(), ahead=2)
  )
  assert [x["visual"].shape for x in found] == [(1, 2, 3)] * 3
  np.testing.assert_array_equal(
    found[1]["visual"], [[PICTURES[0], np.zeros(3)]]
  )
  np.testing.assert_array_equal(found[2]["text"], [[TOKENS[2], TOKENS[2]]])


def test_streamed_chunks_hold_the_content_of_their_steps():
  order = np.array([[[0], [1], [2]], [[3], [PAD], [0]]])  # [S, steps, W]
  engine, config = toy.make_engine(2), toy.get_config()
  chunks = list(
    input_pipeline.stream(
      make_content(), iter([order, order]), 2, engine, config
    )
  )
  assert len(chunks) == 4  # two of each epoch
  nothing = np.zeros(3)
  first = engine.local(chunks[0]["visual"])
  np.testing.assert_array_equal(
    first[:, :, 0], [[PICTURES[3], PICTURES[2]], [PICTURES[0], nothing]]
  )
  last = engine.local(chunks[1]["visual"])
  np.testing.assert_array_equal(last[:, 0, 0], [PICTURES[1], PICTURES[3]])
  assert last.shape == first.shape  # a short chunk is not compiled again


@pytest.mark.parametrize("block", [3, 1024])
def test_resident_content_lies_in_the_places_of_the_stream(monkeypatch, block):
  monkeypatch.setattr(input_pipeline, "_BLOCK", block)
  items = np.array([[0, 2], [3, PAD]])
  engine = toy.make_engine()
  found = input_pipeline.load_resident(
    make_content(), items, engine, toy.get_config()
  )
  text = engine.local(found["text"])
  np.testing.assert_array_equal(
    text, [[TOKENS[0], TOKENS[2]], [TOKENS[3], [0, 0]]]
  )
  picked = input_pipeline.at_places(
    found, np.array([[1, -1], [0, 0]]), np.int32(9)
  )
  np.testing.assert_array_equal(picked["text"][0, 0], TOKENS[2])
  np.testing.assert_array_equal(picked["text"][1, 1], TOKENS[3])


def trained(tmp_path, budget_mb, engine):
  config = toy.get_config(
    input__content_budget_mb=budget_mb, log__every_steps=4
  )
  run = toy.make_run(config, toy.random_data(40, 60))
  trainer = train.Trainer(run, tmp_path, engine)
  trainer.start()
  progress = logs.Progress(1, done=0, primary=False)
  for _ in range(2):  # K-means comes between them
    trainer.train_epoch(progress)
  trainer.close()
  kind = trainer.manifest.values["content"]
  return kind, toy.to_host(engine.first(trainer.state))


@pytest.mark.parametrize("engine", [(1, "mesh"), (8, "pmap")])
def test_resident_and_streamed_runs_end_with_identical_parameters(
  tmp_path, engine
):
  engine = toy.make_engine(*engine)
  kind, state = trained(tmp_path / "resident", 1024.0, engine)
  other_kind, other = trained(tmp_path / "streamed", 0.0, engine)
  assert (kind, other_kind) == ("resident", "streamed")
  assert state.step == 2 * 9
  assert (state.categories.assignment >= 0).all()
  jax.tree.map(np.testing.assert_array_equal, state, other)


def test_standardised_vectors_have_mean_0_and_variance_1():
  rng = np.random.default_rng(0)
  rows = (30 + 5 * rng.standard_normal((50, 3))).astype(np.float16)
  rows[:, 2] = 7  # says nothing
  data = toy.random_data(40, 50)
  data.vectors["visual"] = rows
  plain = toy.make_run(toy.get_config("con"), data)
  run = toy.make_run(toy.get_config("con", input__standardise=True), data)
  there = np.setdiff1d(np.arange(50), data.absent["visual"])
  found = run.content(there)["visual"].astype(float)
  np.testing.assert_allclose(found.mean(0), 0, atol=1e-2)
  np.testing.assert_allclose(found.std(0), [1, 1, 0], atol=1e-2)
  raw = rows[there].astype(float)
  expected = (raw - raw.mean(0))[:, :2] / raw.std(0)[:2]
  np.testing.assert_allclose(found[:, :2], expected, atol=1e-2)
  assert (plain.content(there)["visual"] == rows[there]).all()
  assert (run.content(np.array([PAD]))["visual"] == 0).all()
