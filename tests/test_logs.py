"""Rows, events, progress and the final table of a run."""

import errno
import io
import json
import math
import os
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mmm_jax import errors, logs


def read_rows(folder):
  return [
    json.loads(line) for line in (folder / "metrics.jsonl").open(newline="")
  ]


def run_log(folder, *, tensorboard=False, primary=True):
  return logs.RunLog(folder, tensorboard=tensorboard, primary=primary)


def test_rows_are_on_disk_at_once_and_nan_is_null(tmp_path):
  log = run_log(tmp_path)
  log.write(
    5,
    {
      "loss": np.float32(0.1),
      "rate": math.inf,
      "nan": jnp.float32(jnp.nan),
      "sizes": np.array([1, 2]),
      "note": None,
    },
  )
  assert read_rows(tmp_path) == [  # Before close.
    {
      "step": 5,
      "loss": 0.1,
      "rate": None,
      "nan": None,
      "sizes": [1, 2],
      "note": None,
    }
  ]
  log.close()


def test_resume_drops_later_rows_and_a_torn_one(tmp_path):
  with run_log(tmp_path) as log:
    for step in (2, 4, 6, 8):
      log.write(step, {"loss": step / 10})
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(b'{"step": 10, "lo')
  with run_log(tmp_path) as log:
    assert log.last_step() == 8
    log.resume(4)
    log.write(6, {"loss": 0.5})
  assert read_rows(tmp_path) == [
    {"step": 2, "loss": 0.2},
    {"step": 4, "loss": 0.4},
    {"step": 6, "loss": 0.5},
  ]
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resume_without_rows(tmp_path):
  log = run_log(tmp_path)
  assert log.last_step() == 0
  log.resume(7)
  assert not os.listdir(tmp_path)


def test_a_foreign_row_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
  with pytest.raises(errors.InputError, match=r"line 2: found b'hello"):
    run_log(tmp_path).resume(1)


def test_other_processes_write_nothing(tmp_path):
  with run_log(tmp_path, tensorboard=True, primary=False) as log:
    log.resume(3)
    log.write(4, {"loss": 1.0})
  assert not os.listdir(tmp_path)


def test_events_are_written_without_tensorflow(tmp_path):
  with run_log(tmp_path, tensorboard=True) as log:
    log.write(1, {"loss": np.float32(0.5), "nan": math.nan, "note": "x"})
  (path,) = (tmp_path / "tensorboard").iterdir()
  events = read_events(path)
  assert events[0].file_version == "brain.Event:2"
  assert [(e.step, list(map(scalar, e.summary.value))) for e in events[1:]] == [
    (0, []),
    (1, [("loss", 0.5)]),
  ]


def test_events_that_are_done_again_are_hidden(tmp_path):
  with run_log(tmp_path, tensorboard=True) as log:
    log.resume(6)
    log.write(7, {"loss": 1.0})
  (path,) = (tmp_path / "tensorboard").iterdir()
  _, start, row = read_events(path)
  assert start.session_log.status == event_pb2.SessionLog.START
  assert (start.step, row.step) == (7, 7)


def read_events(path):
  """TFRecord: uint64 length, 4 bytes of checksum, the event, 4 more."""
  content, events = path.read_bytes(), []
  while content:
    (length,) = struct.unpack("<Q", content[:8])
    events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
    content = content[16 + length :]
  return events


def scalar(value):
  return value.tag, value.simple_value


def test_a_full_disk_leaves_whole_rows(tmp_path):
  log = run_log(tmp_path)
  log.write(1, {"loss": 1.0})
  log._file = FullFile(log._file, room=5)
  with pytest.raises(errors.InputError, match="metrics.jsonl: No space left"):
    log.write(2, {"loss": 1.0})
  log.close()
  assert read_rows(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_an_absent_folder_is_one_message(tmp_path):
  with pytest.raises(errors.InputError, match="metrics.jsonl: No such file"):
    run_log(tmp_path / "absent").write(1, {})


class FullFile:
  """Takes `room` bytes, then fails as a full disk does."""

  def __init__(self, file, room):
    self._file, self._room = file, room

  def write(self, data):
    if not self._room:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = self._file.write(data[: self._room])
    self._room -= written
    return written

  def __getattr__(self, name):
    return getattr(self._file, name)


def example_result():
  values = {
    f"{metric}@{k}": k / 100
    for metric in ("precision", "ndcg")
    for k in (10, 20, 30, 40)
  }
  parts = {
    "valid": values | {"precision@20": None},
    "test": values | {"mean_popularity@10": 123.456},
  }
  return {
    "pooled_1024": parts,
    "full": parts,
    "strata": {"full": {}},
    "candidates": {"pooled_1024": "abc"},
  }


def test_final_table_has_every_value():
  table = logs.final_table(example_result(), dataset="microlens")
  full, pooled = table.split("\n\n")
  assert full.splitlines()[0].split() == ["full", "validation", "test"]
  assert full.splitlines()[1].split() == ["@10", "@20", "@30", "@40"] * 2
  rows = {row.split()[0]: row.split()[1:] for row in full.splitlines()[2:]}
  test = ["0.1000", "0.2000", "0.3000", "0.4000"]
  assert rows["precision"] == ["0.1000", "-", "0.3000", "0.4000", *test]
  assert rows["mean_popularity"] == ["123.5", "-", "-", "-"]
  assert pooled.splitlines()[0].startswith("pooled_1024")
  assert "paper" not in table
  assert max(map(len, table.splitlines())) <= 80


def test_published_figures_stand_only_where_they_compare():
  table = logs.final_table(example_result(), dataset="simulated")
  full, pooled = table.split("\n\n")
  assert "paper" not in full
  assert pooled.splitlines()[0].endswith("  paper (private data)")
  rows = {row.split()[0]: row.split()[1:] for row in pooled.splitlines()[2:]}
  assert rows["ndcg"][8:] == ["0.2990", "0.3150", "0.3219", "0.3261"]
  assert rows["recall"] == ["0.3257", "0.3650", "0.3860", "0.4002"]
  assert "paper" not in logs.final_table(
    {"full": example_result()["full"]}, dataset="simulated"
  )


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_is_plain_lines_away_from_a_terminal():
  stream = io.StringIO()
  progress = logs.Progress(
    4000, done=1000, primary=True, stream=stream, interval=0.0
  )
  progress.update(1000, "epoch 1")
  progress.close()
  assert re.fullmatch(
    r" 50%  [\d,]+ interactions/s  \d\d:\d\d left  epoch 1\n",
    stream.getvalue(),
  )


def test_progress_is_quiet_between_lines_and_in_other_processes():
  for primary, stream, interval in (
    (True, io.StringIO(), 30.0),
    (False, io.StringIO(), 0.0),
    (False, Terminal(), 0.0),
  ):
    progress = logs.Progress(
      10, done=0, primary=primary, stream=stream, interval=interval
    )
    progress.update(5, "")
    progress.close()
    assert not stream.getvalue()


def test_progress_is_a_bar_on_a_terminal():
  stream = Terminal()
  progress = logs.Progress(10, done=0, primary=True, stream=stream)
  progress.update(10, "epoch 1")
  progress.close()
  assert "interactions" in stream.getvalue()
  assert "epoch 1" in stream.getvalue()
