"""Files are whole or not there; equal values are equal bytes."""

import errno
import math
import os
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmm_jax import errors, files


def test_json_is_a_function_of_the_values(tmp_path):
  one, other = tmp_path / "one.json", tmp_path / "other.json"
  files.write_json(one, {"b": 0.1, "a": {"y": np.float64(1), "x": math.nan}})
  files.write_json(other, {"a": {"x": None, "y": 1.0}, "b": 0.1})
  assert one.read_bytes() == other.read_bytes()
  assert one.read_text() == (
    '{\n  "a": {\n    "x": null,\n    "y": 1.0\n  },\n  "b": 0.1\n}\n'
  )


@pytest.mark.parametrize(
  "value, wanted",
  [
    (np.float32(0.1), 0.1),
    (np.float64(1 / 3), 1 / 3),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (-math.inf, None),
    ((1, [np.float32(np.nan)]), [1, [None]]),
    (np.array([[0.1, 2]], np.float32), [[0.1, 2.0]]),
    ({1: pathlib.PurePath("x").name}, {"1": "x"}),
  ],
)
def test_plain(value, wanted):
  found = files.plain(value)
  assert found == wanted
  assert type(found) is type(wanted)


def test_parquet_keeps_columns_in_order(tmp_path):
  path = tmp_path / "per_user.parquet"
  files.write_parquet(path, {"user": ["a", "b"], "ndcg@10": np.array([0.5, 1])})
  table = pq.read_table(path)
  assert table.column_names == ["user", "ndcg@10"]
  assert table.to_pylist()[1] == {"user": "b", "ndcg@10": 1.0}


@pytest.mark.parametrize(
  "write", [files.write_json, files.write_parquet], ids=["json", "parquet"]
)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write):
  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  path = tmp_path / "file"
  path.write_text("before")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(errors.InputError, match="Cannot write .*No space left"):
    write(path, {"a": [1]})
  assert os.listdir(tmp_path) == ["file"]
  assert path.read_text() == "before"


def test_a_link_stays_and_a_device_is_refused(tmp_path):
  (tmp_path / "there").write_text("old")
  (tmp_path / "link").symlink_to(tmp_path / "there")
  files.write_json(tmp_path / "link", {"a": 1})
  assert (tmp_path / "link").is_symlink()
  assert files.read_json(tmp_path / "there") == {"a": 1}
  for path in ("/dev/null", tmp_path):
    with pytest.raises(errors.InputError, match="no regular file"):
      files.write_json(path, {})
  assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("text", ["{bad", "[1]", ""])
def test_what_is_no_json_object_is_named(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(errors.InputError, match="config.json: .*JSON object"):
    files.read_json(tmp_path / "config.json")


def test_an_unwritable_folder_is_one_message(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(
    errors.InputError, match="Not a directory.*another folder"
  ):
    files.write_json(tmp_path / "file" / "result.json", {})
