"""What may befall a run, done to it: it goes on, or says what to do.

`tests/faults.py` does the same at random, hundreds of times.
"""

import contextlib
import datetime
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

import faults
from mmm_jax import command
from mmm_jax.datasets import microlens
import runs

QUICK = (
  "--config.eval.protocols=('full',)",
  "--config.checkpoint.every_seconds=0.1",
)
COMMAND = (f"{runs.CONFIG}:tiny,pmf", *runs.SHORT, *QUICK)
_PATIENCE_S = 200


@pytest.fixture(scope="module")
def undisturbed(main, tmp_path_factory):
  """The folder of a run that nothing befell."""
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  done = main(*COMMAND, f"--workdir={workdir}")
  assert done.code == command.OK, done.err
  return workdir


@pytest.fixture
def disk(tmp_path):
  """A function that gives a small disk its size, and may forbid writing."""
  place = tmp_path / "disk"
  place.mkdir()
  mounted = False

  def mount(size: str, mode: str = "rw") -> pathlib.Path:
    nonlocal mounted
    options = f"size={size},{mode}" + (",remount" if mounted else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
      subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
      pytest.skip(f"a small disk needs the right to mount one: {error}")
    mounted = True
    return place

  yield mount
  if mounted:
    subprocess.run(["umount", str(place)], check=True)


def interrupt(main, number, ready, *arguments) -> runs.Done:
  """Starts a command and sends it a signal as soon as `ready()`."""
  process = main.start(*arguments)
  wait_until(ready)
  process.send_signal(number)
  return process.done()


def wait_until(ready):
  deadline = time.monotonic() + _PATIENCE_S
  while not ready():
    assert time.monotonic() < deadline
    time.sleep(0.001)


def has_trained(workdir):
  """There is something to go on from, and something to redo."""
  rows = workdir / "metrics.jsonl"
  return faults.steps(workdir) and rows.exists() and rows.stat().st_size


def continue_run(main, workdir, undisturbed, *arguments) -> runs.Done:
  """Ends the run; everything is as if nothing had befallen it."""
  done = main(*COMMAND, f"--workdir={workdir}", *arguments)
  assert done.code == command.OK, done.err
  assert_same_run(workdir, undisturbed)
  return done


def assert_same_run(workdir, undisturbed):
  for name in ("result.json", "per_user.parquet", "split.parquet"):
    assert faults.same_bytes(workdir / name, undisturbed / name), name
  assert faults.read_rows(workdir) == faults.read_rows(undisturbed)
  assert faults.names(workdir) == faults.names(undisturbed)
  found = faults.read_checkpoint(workdir)
  wanted = faults.read_checkpoint(undisturbed)
  assert set(found) == set(wanted)
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)


# --- signals ------------------------------------------------------------------


def test_ctrl_c_while_training(main, undisturbed, tmp_path):
  """`test_end_to_end.py` sends SIGTERM, and `kill -9` at random moments."""
  done = interrupt(
    main, signal.SIGINT, lambda: has_trained(tmp_path),
    *COMMAND, f"--workdir={tmp_path}",
  )  # fmt: skip
  assert done.code == command.STOPPED, done.err
  said = re.search(r"stopped at step (\d+); the same command", done.err)
  assert int(said[1]) == faults.steps(tmp_path)[-1]
  continue_run(main, tmp_path, undisturbed)
  values = json.loads((tmp_path / "manifest.json").read_text())
  assert (values["resumed"], values["redone_steps"]) == (1, 0)


def test_a_folder_that_vanishes_is_missed(main, tmp_path):
  workdir = tmp_path / "run"
  process = main.start(*COMMAND, f"--workdir={workdir}")
  wait_until(lambda: has_trained(workdir))
  workdir.rename(tmp_path / "elsewhere")
  done = process.done()
  runs.assert_refused(done, str(workdir))
  assert not workdir.exists()


def catches(process, number) -> bool:
  """Whether a process has a handler of its own for a signal."""
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  caught = int(re.search(r"^SigCgt:\t(\w+)$", status, re.MULTILINE)[1], 16)
  return bool(caught >> (number - 1) & 1)


def test_stopped_while_the_program_is_read(tmp_path):
  process = runs.start(
    "mmm_jax.main", *COMMAND, f"--workdir={tmp_path / 'run'}",
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  wait_until(lambda: catches(process, signal.SIGTERM))
  process.terminate()
  _, said = process.communicate(timeout=60)
  assert process.returncode == command.STOPPED
  assert said == "stopped; the same command continues\n"
  assert not (tmp_path / "run").exists()


def test_signals_that_do_not_end(main, undisturbed, tmp_path):
  """To the last moment of the process, which has begun to stop."""
  process = runs.start(
    "mmm_jax.main", *COMMAND, f"--workdir={tmp_path}",
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  wait_until(lambda: has_trained(tmp_path))
  while process.poll() is None:
    process.terminate()
    time.sleep(0.002)
  _, said = process.communicate()
  assert process.returncode == command.STOPPED, said
  assert "the same command continues" in said.splitlines()[-1]
  assert "Traceback" not in said
  continue_run(main, tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_training_is_resumable(tmp_path, number):
  """While the data are being made up, which takes a while at full size."""
  data_dir, workdir = tmp_path / "data", tmp_path / "run"
  process = runs.start(
    "mmm_jax.main", runs.CONFIG, f"--config.dataset.data_dir={data_dir}",
    f"--workdir={workdir}", stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  wait_until(lambda: list(data_dir.glob(".simulated-*")))  # its lock
  process.send_signal(number)
  _, said = process.communicate(timeout=60)
  assert process.returncode == command.STOPPED, said
  assert said == "stopped; the same command continues\n"
  assert not workdir.exists()
  assert not list(data_dir.glob("simulated-*"))


def test_killed_inside_the_writing_of_a_checkpoint(main, undisturbed, tmp_path):
  writing = lambda: faults.temporary_checkpoints(tmp_path)
  while not writing():  # once more if the kill came too late
    assert not (tmp_path / "result.json").exists()
    done = interrupt(
      main, signal.SIGKILL, lambda: has_trained(tmp_path) and writing(),
      *COMMAND, f"--workdir={tmp_path}",
    )  # fmt: skip
    assert done.code == -signal.SIGKILL
  continue_run(main, tmp_path, undisturbed)  # which leaves nothing of it


# --- checkpoints --------------------------------------------------------------


def flip_arrays(folder, rng):
  data = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
  faults.flip(data, rng)


def truncate_index(folder, rng):
  faults.truncate(folder / "default" / "manifest.ocdbt", rng)


@pytest.mark.parametrize("damage", [flip_arrays, truncate_index])
def test_the_checkpoint_before_a_damaged_one_is_used(
  main, undisturbed, tmp_path, damage
):
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  (workdir / "result.json").unlink()  # as if it had been killed before
  good, bad = faults.steps(workdir)
  damage(workdir / "checkpoints" / str(bad), random.Random(0))
  done = continue_run(main, workdir, undisturbed)
  assert f"checkpoint {bad} of {workdir}" in done.err
  assert "does not load" in done.err and "trying the one before" in done.err
  assert f"resumed at step {good}; {bad - good} to redo" in done.err
  assert "Traceback" not in done.err


def test_a_damaged_split_is_written_anew(main, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  (workdir / "result.json").unlink()
  faults.flip(workdir / "split.parquet", random.Random(0))
  continue_run(main, workdir, undisturbed)


# --- disks --------------------------------------------------------------------


@pytest.mark.parametrize("size", ["8k", "160k", "600k"])
def test_full_disk_under_the_workdir(main, undisturbed, disk, size):
  """Refused at any moment; with room, the same command ends the run."""
  workdir = disk(size) / "run"
  done = main(*COMMAND, f"--workdir={workdir}")
  runs.assert_refused(done, str(workdir.parent))
  assert not (workdir / "result.json").exists()
  disk("64m")
  continue_run(main, workdir, undisturbed)


def test_full_disk_under_the_data(main, disk):
  data_dir = disk("100k") / "data"
  done = main(
    *COMMAND,
    f"--config.dataset.data_dir={data_dir}",
    f"--workdir={data_dir.parent / 'run'}",
  )
  runs.assert_refused(done, "data_dir", "space")
  assert not list(data_dir.glob("simulated-*"))


def test_full_disk_under_the_compiled_programs(
  main, undisturbed, disk, tmp_path
):
  """JAX goes on without, and finds none that is cut short the next time."""
  compiled = disk("400k")  # for the C++ library and some of the programs
  data_dir = tmp_path / "data"
  data_dir.mkdir()
  (data_dir / "compiled").symlink_to(compiled)
  old, young = compiled / ".old-cache.1.tmp", compiled / ".young-cache.1.tmp"
  old.touch()
  os.utime(old, (0, 0))
  young.touch()
  elsewhere = f"--config.dataset.data_dir={data_dir}"
  done = continue_run(main, tmp_path / "full", undisturbed, elsewhere)
  assert "Error writing persistent compilation cache" in done.err
  assert "Cannot write" in done.err and "No space left" in done.err
  assert list(compiled.glob("*-cache"))
  assert list(compiled.glob(".*")) == [young]
  disk("64m")
  done = continue_run(main, tmp_path / "roomy", undisturbed, elsewhere)
  assert "persistent compilation cache" not in done.err


def test_workdir_on_a_read_only_disk(main, disk):
  workdir = disk("1m", "ro") / "run"
  done = main(*COMMAND, f"--workdir={workdir}")
  runs.assert_refused(done, str(workdir), "Read-only", "another --workdir")


def test_workdir_that_becomes_read_only(main, undisturbed, tmp_path):
  place = tmp_path / "checkpoints"
  process = main.start(*COMMAND, f"--workdir={tmp_path}")
  wait_until(lambda: has_trained(tmp_path))
  with unchangeable(place):
    done = process.done()
    runs.assert_refused(done, str(place), "no permission", "the same command")
  continue_run(main, tmp_path, undisturbed)


@contextlib.contextmanager
def unchangeable(folder):
  """Nobody, root included, may change what is in a folder."""
  try:
    subprocess.run(["chattr", "+i", folder], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"only root, and not on every disk, can forbid it: {error}")
  try:
    yield
  finally:
    subprocess.run(["chattr", "-i", folder], check=True)


# --- data ---------------------------------------------------------------------


@pytest.fixture
def data_dir(tmp_path):
  """An empty one, beside the compiled programs that all tests share."""
  folder = tmp_path / "data"
  folder.mkdir()
  share_programs(folder)
  return folder


def share_programs(folder):
  (folder / "compiled").symlink_to(runs.data_dir() / "compiled")


def test_read_only_data(main, undisturbed, disk, tmp_path):
  """Enough if they are prepared; else it says what it would write."""
  place = disk("32m")
  share_programs(place)
  disk("32m", "ro")
  elsewhere = f"--config.dataset.data_dir={place}"
  done = main(*COMMAND, elsewhere, f"--workdir={tmp_path / 'run'}")
  runs.assert_refused(done, f"data_dir={place}", "read-only", "writable")
  assert not (tmp_path / "run").exists()
  disk("32m", "rw")
  for prepared in runs.data_dir().glob("simulated-*"):
    shutil.copytree(prepared, place / prepared.name)
  disk("32m", "ro")
  continue_run(main, tmp_path / "run", undisturbed, elsewhere)


def test_killed_while_data_are_prepared(main, undisturbed, data_dir, tmp_path):
  """Half a set is none; the lock of the dead holds nobody up."""
  workdir, own = tmp_path / "run", f"--config.dataset.data_dir={data_dir}"
  half = lambda: list(data_dir.glob(".simulated-*.tmp-*"))
  done = interrupt(
    main, signal.SIGKILL, half, *COMMAND, own, f"--workdir={workdir}"
  )
  assert done.code == -signal.SIGKILL
  assert half() and list(data_dir.glob(".simulated-*.lock"))
  assert not list(data_dir.glob("simulated-*"))
  continue_run(main, workdir, undisturbed, own)
  assert not list(data_dir.glob(".*"))


def test_prepared_data_that_vanish_are_made_again(
  main, undisturbed, data_dir, tmp_path
):
  workdir, own = tmp_path / "run", f"--config.dataset.data_dir={data_dir}"
  interrupt(
    main, signal.SIGKILL, lambda: has_trained(workdir),
    *COMMAND, own, f"--workdir={workdir}",
  )  # fmt: skip
  (prepared,) = data_dir.glob("simulated-*")
  shutil.rmtree(prepared)
  continue_run(main, workdir, undisturbed, own)


def test_data_that_are_spoilt_while_they_stream(main, data_dir, tmp_path):
  arguments = (
    f"{runs.CONFIG}:tiny,con", *runs.SHORT, *QUICK,
    "--config.model.sources=visual", "--config.input.content_budget_mb=0.0",
    f"--config.dataset.data_dir={data_dir}", f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  process = main.start(*arguments)
  wait_until(lambda: has_trained(tmp_path / "run"))
  (prepared,) = data_dir.glob("simulated-*")
  for path in prepared.rglob("*array_record*"):
    os.truncate(path, path.stat().st_size // 2)
  done = process.done()
  runs.assert_refused(done, str(prepared), "damaged", "delete the folder")
  shutil.rmtree(prepared)
  done = main(*arguments)
  assert done.code == command.OK, done.err


def write_raw(folder):
  """A made-up MicroLens: 40 users, 60 items."""
  rng = np.random.default_rng(0)
  folder.mkdir()
  pairs = [
    f"{user}\t{' '.join(map(str, rng.choice(60, 20, replace=False) + 1))}\n"
    for user in range(1, 41)
  ]
  (folder / microlens.PAIRS).write_text("".join(pairs))
  titles = [f"{item},title {item}\n" for item in range(1, 61)]
  (folder / microlens.TITLES).write_text("item,title\n" + "".join(titles))
  tags = [f"{item},Game\n" for item in range(1, 61)]
  (folder / microlens.CATEGORIES).write_text("video_id,tag\n" + "".join(tags))


def test_raw_files_that_vanish_or_change(main, data_dir, tmp_path):
  raw, workdir = tmp_path / "raw", tmp_path / "run"
  write_raw(raw)
  arguments = (
    f"{runs.CONFIG}:tiny,microlens,pmf", *runs.SHORT, *QUICK,
    f"--config.dataset.data_dir={data_dir}",
    f"--config.dataset.manual_dir={raw}", f"--workdir={workdir}",
  )  # fmt: skip
  assert main(*arguments).code == command.OK
  (workdir / "result.json").rename(tmp_path / "result.json")
  pairs = raw / microlens.PAIRS
  whole = pairs.read_text()
  pairs.unlink()
  done = main(*arguments)
  assert (done.code, microlens.PAIRS in done.err) == (command.BAD_INPUT, True)
  assert "https://" in done.err and "Traceback" not in done.err
  pairs.write_text(whole.partition("\n")[2])  # without the first user
  done = main(*arguments)
  assert done.code == command.BAD_INPUT
  assert "the data changed since this run began" in done.err
  assert not (workdir / "result.json").exists()
  pairs.write_text(whole)
  assert main(*arguments).code == command.OK
  assert faults.same_bytes(workdir / "result.json", tmp_path / "result.json")


# --- numbers ------------------------------------------------------------------


def test_losses_that_are_not_finite(main, tmp_path):
  """`test_update.py` spoils single rows and parameters."""
  rate = "--config.losses.squared.learning_rate=1e30"
  done = main(*COMMAND, rate, f"--workdir={tmp_path}")
  assert done.code == command.FAILED, done
  message = done.err.splitlines()[-1]
  assert re.search(r"error: .*(became (nan|inf)|is not finite)", message)
  for words in ("step", "last good checkpoint: ", "Lower", "learning_rate"):
    assert words in message
  assert "Traceback" not in done.err
  assert not (tmp_path / "result.json").exists()


# --- clocks -------------------------------------------------------------------

JUMPING = """
import datetime, itertools, time

real, jumps = time.time, itertools.cycle([400 * 86400, -4000 * 86400])
time.time = lambda: real() + next(jumps)
time.time_ns = lambda: int(time.time() * 1e9)

class Jumping(datetime.datetime):
  @classmethod
  def now(cls, tz=None):
    return cls.fromtimestamp(time.time(), tz)

datetime.datetime = Jumping
"""


def test_clock_that_jumps(main, undisturbed, tmp_path, monkeypatch):
  """By years, back and forth, whenever it is read, and back for the rest."""
  (tmp_path / "sitecustomize.py").write_text(JUMPING)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  workdir = tmp_path / "run"
  started = time.monotonic()
  process = runs.start("mmm_jax.main", *COMMAND, f"--workdir={workdir}")
  wait_until(lambda: has_trained(workdir))
  process.send_signal(signal.SIGTERM)
  assert process.wait(_PATIENCE_S) == command.STOPPED
  passed = time.monotonic() - started
  values = json.loads((workdir / "manifest.json").read_text())
  created = datetime.datetime.fromisoformat(values["created"])
  away = datetime.datetime.now(datetime.UTC) - created
  assert abs(away.days) > 300
  assert all(0 <= seconds < passed for seconds in values["wall_s"].values())
  continue_run(main, workdir, undisturbed)


# --- locks --------------------------------------------------------------------


def test_second_process_is_refused(main, undisturbed, tmp_path):
  process = main.start(*COMMAND, f"--workdir={tmp_path}")
  wait_until(lambda: has_trained(tmp_path))
  process.send_signal(signal.SIGSTOP)  # or it may end before the other starts
  done = main(*COMMAND, f"--workdir={tmp_path}")
  process.send_signal(signal.SIGCONT)
  runs.assert_refused(done, "another process", str(tmp_path))
  assert process.wait() == command.OK
  assert_same_run(tmp_path, undisturbed)


def test_stale_lock(main, undisturbed, tmp_path):
  """What the file says is nobody's business: the system knows who is alive."""
  done = interrupt(
    main, signal.SIGKILL, lambda: has_trained(tmp_path),
    *COMMAND, f"--workdir={tmp_path}",
  )  # fmt: skip
  assert done.code == -signal.SIGKILL
  assert (tmp_path / ".lock").exists()
  (tmp_path / ".lock").write_text(f"{os.getpid()}\n")  # as if it were ours now
  continue_run(main, tmp_path, undisturbed)
