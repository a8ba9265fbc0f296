"""The manifest adds up over the sessions of a run."""

import json
import os
import time

import pytest

from mmm_jax import errors, manifest


def open_manifest(folder, primary=True):
  return manifest.Manifest(folder, data="d", split="s", primary=primary)


def test_manifest_adds_up_over_sessions(tmp_path):
  first = open_manifest(tmp_path)
  with first.timed("train"):
    pass
  first.values["wall_s"]["train"] = 2.0
  first.write()
  created = first.values["created"]
  second = open_manifest(tmp_path)
  second.resumed(step=10, last_step=14)
  third = open_manifest(tmp_path)
  third.resumed(step=20, last_step=20)
  with third.timed("train"):
    pass
  third.write(finished=True)
  values = json.loads((tmp_path / "manifest.json").read_text())
  assert values["resumed"] == 2
  assert values["redone_steps"] == 14 - 10
  assert values["created"] == created
  assert values["finished"] == values["updated"]
  assert 2.0 <= values["wall_s"]["train"] < 2.1
  assert values["wall_s"]["total"] > 0
  assert values["peak_memory_mb"] > 1
  assert values["versions"]["jax"]
  assert values["device"]["count"] >= 1
  assert (values["data"], values["split"]) == ("d", "s")


@pytest.mark.parametrize("kind", ["data", "split"])
def test_other_data_or_another_split_do_not_continue_a_run(tmp_path, kind):
  open_manifest(tmp_path).write()
  before = (tmp_path / "manifest.json").read_bytes()
  now = {"data": "d", "split": "s"} | {kind: "other"}
  with pytest.raises(errors.InputError, match=f"the {kind} changed"):
    manifest.Manifest(tmp_path, **now, primary=True)
  assert (tmp_path / "manifest.json").read_bytes() == before


def test_times_of_a_killed_session_count_up_to_its_last_writing(tmp_path):
  killed = open_manifest(tmp_path)
  with killed.timed("training"):
    time.sleep(0.05)
    killed.write()
    written = json.loads((tmp_path / "manifest.json").read_text())
  assert 0.05 <= written["wall_s"]["training"] < 1
  again = open_manifest(tmp_path)
  with again.timed("training"):
    time.sleep(0.05)
  assert again.values["wall_s"]["training"] >= 0.1


def test_manifest_of_other_processes_is_not_written(tmp_path):
  open_manifest(tmp_path, primary=False).write()
  assert not os.listdir(tmp_path)


def test_a_broken_manifest_is_named(tmp_path):
  (tmp_path / "manifest.json").write_text("{")
  with pytest.raises(errors.InputError, match="manifest.json"):
    open_manifest(tmp_path)
