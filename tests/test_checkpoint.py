"""Checkpoints come back bit for bit, and a damaged one is passed over."""

import contextlib
import errno
import logging
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import faults
from mmm_jax import checkpoint, command, errors, logs, scoring, train, update
import toy


def make_tree(step):
  rng = np.random.default_rng(step)
  table = update.tables.Table(
    rng.standard_normal((3, 4)).astype(np.float32), width=2
  )
  return {
    "tables": {"user": table},
    "step": np.int32(step),
    "odd": np.array([np.nan, -np.inf, 1e-42], np.float32),
    "metric": np.float64(0.1 + step),
    # Most of what there is: numbers without a checksum of TensorStore's.
    "rows": rng.standard_normal((300, 64)).astype(np.float32),
    "none": np.zeros((5, 0), bool),  # Orbax refuses empty arrays
  }


def saved(folder, *steps):
  manager = checkpoint.open_manager(folder, keep=2)
  for step in steps:
    checkpoint.save(manager, step, make_tree(step))
  return manager


def assert_bits(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other)):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert x.tobytes() == y.tobytes()


def test_round_trip_is_bit_for_bit(tmp_path):
  saved(tmp_path, 3).close()
  manager = checkpoint.open_manager(tmp_path, keep=2)
  assert_bits(checkpoint.restore(manager, make_tree(0)), make_tree(3))
  manager.close()


def test_no_checkpoint_is_none(tmp_path):
  manager = checkpoint.open_manager(tmp_path, keep=2)
  assert checkpoint.restore(manager, make_tree(0)) is None
  manager.close()


def test_the_newest_ones_are_kept(tmp_path):
  manager = saved(tmp_path, 1, 2, 3)
  assert sorted(manager.all_steps()) == [2, 3]
  assert_bits(checkpoint.restore(manager, make_tree(0)), make_tree(3))
  checkpoint.save(manager, 3, make_tree(7))  # is there: stays as it is
  assert_bits(checkpoint.restore(manager, make_tree(0)), make_tree(3))
  manager.close()


def truncate(folder):
  """Halves the file that holds the arrays."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def flip(folder):
  """One bit of the arrays, which Orbax would not notice."""
  data = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
  faults.flip(data, random.Random(0))


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def drop_manifest(folder):
  for path in folder.rglob("manifest.ocdbt"):
    path.unlink()


def drop_sums(folder):
  (folder / "_CHECKPOINT_METADATA").unlink()


def spoil_sums(folder):
  (folder / "_CHECKPOINT_METADATA").write_text("{bad")


def rename_key(folder):
  """One bit, for which Orbax would open none of the checkpoints."""
  path = folder / "_CHECKPOINT_METADATA"
  text = path.read_text()
  assert "performance_metrics" in text
  path.write_text(text.replace("performance_metrics", "performance_metricr"))


DAMAGES = (
  truncate,
  flip,
  empty,
  drop_manifest,
  drop_sums,
  spoil_sums,
  rename_key,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, caplog, damage):
  saved(tmp_path, 1, 2).close()
  damage(tmp_path / "2")
  manager = checkpoint.open_manager(tmp_path, keep=2)
  with caplog.at_level(logging.WARNING):
    found = checkpoint.restore(manager, make_tree(0))
  manager.close()
  assert_bits(found, make_tree(1))
  if damage is not empty:  # Orbax does not even list an empty folder
    assert "checkpoint 2" in caplog.text


@pytest.mark.parametrize("damage", [spoil_sums, rename_key])
def test_nothing_is_deleted_before_another_one_has_loaded(tmp_path, damage):
  """Whoever only reads deletes nothing at all."""
  saved(tmp_path, 1, 2).close()
  damage(tmp_path / "2")
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    assert_bits(checkpoint.load(manager, 1, make_tree(0)), make_tree(1))
  assert (tmp_path / "2" / "_CHECKPOINT_METADATA").exists()
  truncate(tmp_path / "1")
  refused = pytest.raises(errors.InputError, match="remove the folder")
  with checkpoint.open_manager(tmp_path, keep=2) as manager, refused:
    checkpoint.restore(manager, make_tree(0))
  assert (tmp_path / "2" / "_CHECKPOINT_METADATA").exists()


def test_leaves_that_do_not_fit_are_named(tmp_path):
  manager = saved(tmp_path, 1)
  template = make_tree(0) | {"more": jnp.zeros(1)}
  with pytest.raises(errors.InputError, match=r"none of the checkpoints \[1\]"):
    checkpoint.restore(manager, template)
  manager.close()


@pytest.mark.parametrize("damage", [truncate, rename_key])
def test_all_damaged_is_an_error_that_says_what_to_do(tmp_path, damage):
  saved(tmp_path, 1, 2).close()
  for step in "12":
    damage(tmp_path / step)
  with pytest.raises(errors.InputError, match="remove the folder"):
    manager = checkpoint.open_manager(tmp_path, keep=2)
    with contextlib.closing(manager):
      checkpoint.restore(manager, make_tree(0))
  assert {"1", "2"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
    ValueError('PERMISSION_DENIED: Error opening "d": Permission denied'),
  ],
)
def test_what_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, error):
  saved(tmp_path, 1, 2).close()
  manager = checkpoint.open_manager(tmp_path, keep=2)

  def load(manager, step, template):
    raise RuntimeError("while it was read") from error

  monkeypatch.setattr(checkpoint, "load", load)
  with pytest.raises(errors.InputError, match="cannot read checkpoint 2 of"):
    checkpoint.restore(manager, make_tree(0))
  monkeypatch.undo()
  assert_bits(checkpoint.restore(manager, make_tree(0)), make_tree(2))
  manager.close()


@pytest.mark.parametrize("place", ["", "default"])
def test_a_folder_that_may_not_be_read_is_not_damaged(
  tmp_path, monkeypatch, place
):
  """Root may read all: the system's words are put into Python's mouth."""
  saved(tmp_path, 1, 2).close()
  hidden = str(tmp_path / "2" / place).rstrip("/")
  scandir = os.scandir

  def refuse(path):
    if str(path) == hidden:
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), hidden)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    with pytest.raises(errors.InputError, match="cannot read checkpoint 2 of"):
      checkpoint.restore(manager, make_tree(0))
    monkeypatch.undo()
    assert_bits(checkpoint.restore(manager, make_tree(0)), make_tree(2))


def start(tmp_path, **changes):
  config = toy.get_config("cat", log__every_steps=4, **changes)
  run = toy.make_run(config, toy.random_data(40, 60))
  trainer = train.Trainer(run, tmp_path, toy.make_engine())
  trainer.start()
  return trainer


def train_epochs(trainer, number):
  progress = logs.Progress(1, done=0, primary=False)
  while trainer.step < number * trainer.sizes.steps:
    trainer.train_epoch(progress)


def finish(trainer):
  """Trains to the end of the second epoch; all that is kept."""
  train_epochs(trainer, 2)
  trainer.close()
  return toy.to_host(trainer.kept())


@pytest.mark.parametrize("changes", [{}, {"remedies__ema_decay": 0.5}])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, changes):
  expected = finish(start(tmp_path / "whole", **changes))
  assert ("average" in expected) == bool(changes)
  stopped = start(tmp_path / "stopped", **changes)
  train_epochs(stopped, 1)
  stopped.stop_asked = True
  chunk = update.chunk_steps(stopped.config, stopped.sizes)
  assert 1 < chunk < stopped.sizes.steps
  at = stopped.sizes.steps + chunk
  with pytest.raises(command.Stopped, match=f"step {at};"):
    train_epochs(stopped, 2)
  stopped.close()
  resumed = start(tmp_path / "stopped", **changes)
  assert resumed.step == at
  assert resumed.manifest.values["redone_steps"] == 0
  assert_bits(finish(resumed), expected)


@pytest.mark.parametrize("warmup", [1, 2])
def test_what_is_scored_is_the_mean_of_epochs(tmp_path, monkeypatch, warmup):
  trainer = start(
    tmp_path, remedies__ema_decay=0.25, kmeans__warmup_epochs=warmup
  )
  after = []
  for epoch in (1, 2, 3):
    train_epochs(trainer, epoch)
    after.append(toy.to_host(scoring.snapshot(trainer.state, -np.inf)))
  scored = []

  def score(_, best, *__):
    scored.append(best)
    return {"full": {"valid": {"ndcg@20": 0.5}}}, {}

  monkeypatch.setattr(scoring, "score_protocols", score)
  trainer.validate()
  trainer.close()
  kept = trainer.kept()
  for found in (*scored, trainer.best, kept["average"]):
    same = found.categories.assignment == after[2].categories.assignment
    assert same.all()
    for values in (
      lambda each: each.rows["user"],
      lambda each: each.params["category_vectors"],
    ):
      first, second, third = (values(each) for each in after)
      # Before the first K-means nothing is averaged.
      mean = 0.25 * first + 0.75 * second if warmup == 1 else second
      mean = 0.25 * mean + 0.75 * third
      np.testing.assert_allclose(values(found), mean, rtol=1e-5, atol=1e-7)
  assert len(scored) == 1
  not_validated = kept | {"best": scoring.snapshot(trainer.state, -np.inf)}
  assert scoring.reported(not_validated) is kept["average"]
  assert scoring.reported(kept) is kept["best"]


def test_checksums_are_of_what_several_processes_write():
  exact = np.array(0.0133, np.float64)
  through_devices = exact.astype(np.float32).astype(np.float64)
  assert exact != through_devices
  assert checkpoint._sum(exact) == checkpoint._sum(through_devices)
  assert checkpoint._sum(exact) != checkpoint._sum(2 * exact)
