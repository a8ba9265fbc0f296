"""Several processes are one run: the same numbers, one writer, no hanging."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mmm_jax import command, errors, parallel, workdir
import runs

_PATIENCE_S = 240  # until a session has got somewhere, on a busy machine
LOST = "another process of this run is gone"


def start(folder, *arguments, variants="tiny,pmf", processes=2, **options):
  """All processes of a short run; each compiles it, so it is a small one."""
  return runs.start_together(
    folder,
    f"{runs.CONFIG}:{variants}",
    *runs.SHORT,
    *arguments,
    processes=processes,
    **options,
  )


codes = functools.partial(runs.codes, patience_s=_PATIENCE_S)
wait_for_rows = functools.partial(runs.wait_for_rows, patience_s=_PATIENCE_S)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The run of one process on one device."""
  folder = tmp_path_factory.mktemp("processes") / "alone"
  done = runs.warm("mmm_jax.main")(
    f"{runs.CONFIG}:tiny,pmf",
    *runs.SHORT,
    f"--workdir={folder}",
  )
  assert done.code == command.OK, done.err
  return folder


def assert_same_run(folder, other):
  found, wanted = runs.rows(folder), runs.rows(other)
  assert [row["step"] for row in found] == [row["step"] for row in wanted]
  np.testing.assert_allclose(
    [row["loss"] for row in found],
    [row["loss"] for row in wanted],
    rtol=1e-5,
  )
  found, wanted = (
    json.loads((run / "result.json").read_text()) for run in (folder, other)
  )
  assert found["candidates"] == wanted["candidates"]
  for part, metrics in wanted["full"].items():
    for name, value in metrics.items():
      assert found["full"][part][name] == pytest.approx(value, abs=1e-3)


def test_processes_and_devices_may_change_during_a_run(alone, tmp_path):
  """Four processes, then eight devices, then two processes of two.

  More, longer, and of the full model: tests/acceptance_devices.py.
  """
  folder = tmp_path / "several"
  started = start(folder, processes=4)
  wait_for_rows(started, folder, 3)
  started[1].send_signal(signal.SIGTERM)  # and not the first
  assert codes(started) == [command.STOPPED] * 4
  assert "the same command continues" in runs.said(folder, 0)

  count = len(runs.rows(folder)) + 1
  started = start(folder, processes=1, devices=8)
  wait_for_rows(started, folder, count)
  started[0].send_signal(signal.SIGTERM)
  assert codes(started) == [command.STOPPED]

  before = len(runs.said(folder, 1))
  assert codes(start(folder, devices=2)) == [command.OK, command.OK]
  assert_same_run(folder, alone)
  # The first one alone says and writes what there is to say.
  assert "pooled_1024" in runs.said(folder, 0)
  # Gloo's threads may put two lines into one, and an empty one behind it.
  own = [line for line in runs.said(folder, 1)[before:].splitlines() if line]
  assert all("peer ranks" in line or "[Gloo]" in line for line in own), own
  names = lambda run: {path.name for path in run.iterdir()}
  assert names(folder) == names(alone)


def test_a_run_survives_the_loss_of_a_process(alone):
  folder = alone.parent / "survivor"
  patience = "--config.parallel.timeout_s=5"
  started = start(folder, patience)
  wait_for_rows(started, folder, 2)
  started[1].kill()
  killed_at = time.monotonic()
  assert codes(started) == [command.STOPPED, -signal.SIGKILL]
  assert time.monotonic() - killed_at < 30
  assert LOST in runs.said(folder, 0)

  assert codes(start(folder, patience, processes=1, devices=8)) == [command.OK]
  assert_same_run(folder, alone)


def test_the_first_process_speaks_for_all(tmp_path):
  folder = tmp_path / "taken"
  folder.mkdir()
  with (folder / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert codes(start(folder)) == [command.BAD_INPUT] * 2
  for number in range(2):
    assert "another process is working in" in runs.said(folder, number)


def test_processes_with_another_config_are_refused(tmp_path):
  folder = tmp_path / "run"
  started = start(folder, own=["--config.seed=5"])
  assert codes(started) == [command.BAD_INPUT] * 2
  for number in range(2):
    assert "differ in their config" in runs.said(folder, number)
  assert not folder.exists()


def test_processes_that_share_no_folder_are_refused(tmp_path):
  folder, other = tmp_path / "run", tmp_path / "other"
  started = start(
    folder, "--config.parallel.timeout_s=10", own=[f"--workdir={other}"]
  )
  assert codes(started) == [command.BAD_INPUT] * 2
  for number in range(2):
    said = runs.said(folder, number)
    assert f"{other} on " in said and "is not the folder" in said
  assert not folder.exists() and not other.exists()


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_whose_others_never_come_gives_up(tmp_path, process_id):
  started = start(tmp_path / "alone", "--config.parallel.timeout_s=3")
  started[1 - process_id].kill()
  assert codes(started)[process_id] == command.STOPPED
  said = runs.said(tmp_path / "alone", process_id)
  assert "did not come together within 3 s" in said and LOST not in said


def start_first(folder, port, *arguments, **streams):
  """The first of two processes, the other of which is not started."""
  return runs.start(
    "mmm_jax.main",
    f"{runs.CONFIG}:tiny",
    f"--workdir={folder}",
    f"--coordinator=localhost:{port}",
    "--num_processes=2",
    "--process_id=0",
    **streams,
  )


def test_a_signal_is_heard_while_the_others_are_awaited(tmp_path):
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  with start_first(tmp_path / "run", port) as process:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
      try:
        socket.create_connection(("localhost", port)).close()
        break
      except OSError:
        time.sleep(0.1)
    time.sleep(1)  # from serving to waiting
    process.send_signal(signal.SIGTERM)
    assert codes([process]) == [command.STOPPED]
  assert time.monotonic() < end


def test_a_port_that_is_taken_is_said(tmp_path):
  with (
    socket.create_server(("", 0)) as taken,
    (tmp_path / "said").open("w") as said,
  ):
    port = taken.getsockname()[1]
    process = start_first(tmp_path / "run", port, stderr=said)
    assert codes([process]) == [command.BAD_INPUT]
  assert f"port {port} of this host" in (tmp_path / "said").read_text()


def test_what_one_process_finds_wrong_ends_all(tmp_path):
  """Its data cannot be read: nobody goes on to wait for it."""
  (tmp_path / "file").touch()
  started = start(
    tmp_path / "run",
    own=[f"--config.dataset.data_dir={tmp_path / 'file'}"],
  )
  assert codes(started) == [command.BAD_INPUT] * 2
  for number in range(2):
    said = runs.said(tmp_path / "run", number)
    assert f"data_dir={tmp_path / 'file'}: found a file where" in said
    assert LOST not in said


def test_data_that_something_holds_are_not_awaited_for_ever(alone, tmp_path):
  """By any process: the first one says so, whichever of them ends first."""
  data_dir = tmp_path / "data"
  data_dir.mkdir()
  with contextlib.ExitStack() as stack:
    for prepared in runs.data_dir().glob("simulated-*"):
      path = data_dir / f".{prepared.name}.lock"
      fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
    started = start(
      tmp_path / "run",
      "--config.parallel.wait_s=10",
      f"--config.dataset.data_dir={data_dir}",
    )
    wait_until_it_waits(started[1])
    assert codes(started) == [command.STOPPED] * 2
  said = runs.said(tmp_path / "run", 0)
  assert "waiting for another process to prepare" in said
  assert "takes more than 10 s (parallel.wait_s)" in said


def wait_until_it_waits(process):
  """For a lock, as the system says of it."""
  end = time.monotonic() + _PATIENCE_S
  waiting = re.compile(rf"-> FLOCK +\S+ +\S+ +{process.pid} ")
  while not waiting.search(pathlib.Path("/proc/locks").read_text()):
    assert time.monotonic() < end
    time.sleep(0.05)


def start_spoilt(folder, spoil, *arguments):
  """Two processes, the last of which runs the lines `spoil` before all else."""
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  spoilt = f"{spoil}\nfrom mmm_jax import command, main\ncommand.run(main.main)"
  started = []
  for number, program in enumerate([["-m", "mmm_jax.main"], ["-c", spoilt]]):
    line = [
      sys.executable,
      *program,
      f"{runs.CONFIG}:tiny,pmf",
      *runs.SHORT,
      f"--workdir={folder}",
      f"--coordinator=localhost:{port}",
      "--num_processes=2",
      f"--process_id={number}",
      *arguments,
    ]
    with (folder.parent / f"{folder.name}.{number}").open("w") as said:
      started.append(
        subprocess.Popen(line, env=runs.environment(), stdout=said, stderr=said)
      )
  return started


@pytest.mark.parametrize(
  ("module", "name", "missed"),
  [
    ("datasets.records", "prepare", "waiting for the other processes"),
    ("train", "Trainer.train_epoch", "training from step 0"),
  ],
)
def test_a_process_that_hangs_is_missed(tmp_path, module, name, missed):
  """It lives, and its heartbeats go on; it would hang for as long as it may."""
  folder = tmp_path / "run"
  hang = f"""
import time
import mmm_jax.{module}
mmm_jax.{module}.{name} = lambda *_, **__: time.sleep(1000)
"""
  started = start_spoilt(folder, hang, "--config.parallel.wait_s=20")
  assert codes(started) == [command.STOPPED] * 2
  said = runs.said(folder, 0)
  assert f"{missed} takes more than 20 s (parallel.wait_s)" in said
  assert LOST in runs.said(folder, 1)


FAILS_TO_READ = """
from mmm_jax import checkpoint
load, errors = checkpoint.load, [{error}]
def fail(*arguments):
  if errors:
    raise errors.pop()
  return load(*arguments)
checkpoint.load = fail
"""


def unfinished(alone, folder) -> list[int]:
  """A copy of a run that lacks the end; the steps of its checkpoints."""
  shutil.copytree(alone, folder)
  (folder / "result.json").unlink()
  return steps_of(folder)


def steps_of(folder):
  return sorted(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*"))


def test_a_checkpoint_that_one_process_may_not_read_ends_all(alone, tmp_path):
  folder = tmp_path / "run"
  steps = unfinished(alone, folder)
  spoil = FAILS_TO_READ.format(error="PermissionError(13, 'no')")
  assert codes(start_spoilt(folder, spoil)) == [command.BAD_INPUT] * 2
  for number in range(2):
    said = runs.said(folder, number)
    assert f"cannot read checkpoint {steps[-1]} of" in said
    assert "Permission denied" in said and LOST not in said
  assert steps_of(folder) == steps


def test_a_checkpoint_that_one_process_finds_damaged_is_nobodys(
  alone, tmp_path
):
  folder = tmp_path / "run"
  steps = unfinished(alone, folder)
  assert len(steps) == 2
  spoil = FAILS_TO_READ.format(error="ValueError('damaged')")
  assert codes(start_spoilt(folder, spoil)) == [command.OK] * 2
  assert f"checkpoint {steps[-1]} of" in runs.said(folder, 1)
  assert f"resumed at step {steps[-2]};" in runs.said(folder, 0)
  assert_same_run(folder, alone)


def test_an_error_of_one_process_is_its_own(tmp_path):
  """One host's files are spoilt while they stream; the other host goes on."""
  folder, data_dir = tmp_path / "run", tmp_path / "data"
  data_dir.mkdir()
  (data_dir / "compiled").symlink_to(runs.data_dir() / "compiled")
  started = start(
    folder,
    "--config.model.sources=visual",
    "--config.input.content_budget_mb=0.0",
    "--config.parallel.timeout_s=5",
    "--config.epochs=1000",
    variants="tiny,con",
    own=[f"--config.dataset.data_dir={data_dir}"],
  )
  wait_for_rows(started, folder, 3)
  (prepared,) = data_dir.glob("simulated-*")
  for path in prepared.rglob("*array_record*"):
    os.truncate(path, path.stat().st_size // 2)
  assert codes(started) == [command.STOPPED, command.BAD_INPUT]
  assert LOST in runs.said(folder, 0)
  assert "found a damaged prepared set" in runs.said(folder, 1)
  assert LOST not in runs.said(folder, 1)


def test_values_are_checked_before_others_are_awaited(main, tmp_path):
  together = ("--coordinator=localhost:1", "--num_processes=2")
  done = main(
    runs.CONFIG, *together, "--process_id=1", f"--workdir={tmp_path / 'run'}",
    "--config.parallel.timeout_s=0",
  )  # fmt: skip
  runs.assert_refused(done, "parallel.timeout_s", "1 or more")


def test_flags_that_say_too_little_are_explained():
  done = runs.run("mmm_jax.main", f"{runs.CONFIG}:tiny", "--process_id=1")
  assert done.code == command.BAD_INPUT
  assert "go together; found None, None and 1" in done.err
  together = "--coordinator=localhost", "--num_processes=2", "--process_id=1"
  done = runs.run("mmm_jax.main", f"{runs.CONFIG}:tiny", *together)
  assert done.code == command.BAD_INPUT
  assert "found 'localhost', valid: HOST:PORT" in done.err


def test_an_environment_that_says_too_little_is_explained(monkeypatch):
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "x")
  with runs.start("mmm_jax.main", runs.CONFIG, stderr=-1, text=True) as process:
    _, said = process.communicate(timeout=60)
  assert process.returncode == command.BAD_INPUT
  assert "SLURM_STEP_NUM_TASKS: found 'x', valid: a whole number" in said


def test_devices_of_which_nobody_tells_are_a_loss(monkeypatch):
  def fail(words):
    raise RuntimeError(f"Unable to initialize backend 'cpu': {words}")

  monkeypatch.setattr(parallel.jax, "devices", lambda: fail("it timed out"))
  with pytest.raises(errors.LostError, match="did not tell of their devices"):
    parallel._learn_devices(60)
  monkeypatch.setattr(parallel.jax, "devices", lambda: fail("no such device"))
  with pytest.raises(RuntimeError, match="no such device") as other:
    parallel._learn_devices(60)
  assert not isinstance(other.value, errors.LostError)


def test_a_checkpoint_that_one_host_does_not_see_is_waited_for(tmp_path):
  folder = tmp_path / "checkpoints"
  (folder / "20").mkdir(parents=True)
  (folder / "30.orbax-checkpoint-tmp").mkdir()
  wanted = ("", ["20", "30"])
  with pytest.raises(errors.InputError, match=r"has \['20'\], and the first"):
    workdir.check_shared(tmp_path, wanted, timeout_s=0)
  later = threading.Timer(0.5, (folder / "30").mkdir)
  later.start()
  workdir.check_shared(tmp_path, wanted, timeout_s=60)
  later.join()


def test_a_process_without_others_may_take_as_long_as_it_needs(monkeypatch):
  """Launchers tell it of the others, of whom there are none."""
  monkeypatch.setattr(parallel.jax.distributed, "is_initialized", lambda: True)
  with parallel.bounded("what it does"):
    kinds = {type(thread) for thread in threading.enumerate()}
  assert threading.Timer not in kinds


def test_without_other_processes_nothing_is_exchanged():
  assert parallel.any_process([True, False]) == [True, False]
  done = []
  parallel.on_first(lambda: done.append(1))
  assert done == [1]
  assert parallel.together(lambda: 5) == 5
  assert parallel.exchange("a") == ["a"]
  parts = parallel.by_parts(lambda numbers: {"square": numbers}, 3)
  assert list(parts["square"]) == [0, 1, 2]
  tree = {"a": np.arange(3)}
  assert parallel.largest(tree) is parallel.spread(tree) is tree
