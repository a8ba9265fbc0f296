"""Starts the project's commands, as a user would or from a warm process.

`start` and `run` are `python -m ...`. A `Warm` process has imported a command
and forks for every call, which saves the seconds of the imports; what the
fork does from parsing flags to the exit code is the command's own.
"""

import atexit
import functools
import gc
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"--config={ROOT}/configs/mmm.py"
_LIMIT_S = 300


@functools.cache
def data_dir() -> pathlib.Path:
  """Prepared sets of this session; compiled programs outlive it."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="mmm_jax-tests-"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  compiled = pathlib.Path("~/.cache/mmm_jax/tests-compiled").expanduser()
  compiled.mkdir(parents=True, exist_ok=True)
  (folder / "compiled").symlink_to(compiled)
  return folder


SHORT = (
  f"--config.dataset.data_dir={data_dir()}",
  "--config.epochs=4",
  "--config.eval.every_epochs=2",
  "--config.log.every_steps=10",
  "--config.checkpoint.every_seconds=0.3",
)


@functools.cache
def config_module():
  """`configs/mmm.py`."""
  path = ROOT / "configs" / "mmm.py"
  spec = importlib.util.spec_from_file_location("tests_runs_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def config(variants: str):
  """The config of MMM, as `CONFIG:variants` gives it."""
  return config_module().get_config(variants)


class Done(NamedTuple):
  """How a command ended."""

  code: int
  out: str
  err: str


def assert_refused(done: Done, *words: str) -> None:
  """Bad input is one line on stderr, with these words, and exit code 2."""
  assert done.code == 2, done
  *before, message = done.err.splitlines()
  assert message.startswith("error: "), done.err
  # Statistics may stand before it and, where it is slow, progress.
  own = re.compile("simulated: | *[0-9]+%  ")
  assert all(map(own.match, before)), done.err
  assert "Traceback" not in done.err
  for word in words:
    assert word in message, (word, done.err)


def start(module: str, *arguments, cwd=None, **streams) -> subprocess.Popen:
  """Starts `python -m module arguments`; by default its output is dropped."""
  streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | (
    streams
  )
  command = [sys.executable, "-m", module, *map(str, arguments)]
  return subprocess.Popen(
    command, cwd=cwd or ROOT, env=environment(), **streams
  )


def run(module: str, *arguments, cwd=None) -> Done:
  """`start`, to the end."""
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  with start(module, *arguments, cwd=cwd, **pipes) as process:
    try:
      out, err = process.communicate(timeout=_LIMIT_S)
    finally:
      process.kill()
  return Done(process.returncode, out, err)


def start_together(
  folder, *arguments, processes=1, devices=1, own=(), limit_s=_LIMIT_S
) -> list["Child"]:
  """Starts all processes of a run in `folder`; the last one has `own` flags.

  What each of them says goes to a file beside it, see `said`.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  started = []
  for number in range(processes):
    together = (
      f"--coordinator={address}",
      f"--num_processes={processes}",
      f"--process_id={number}",
    )
    child = warm("mmm_jax.main").start(
      f"--workdir={folder}",
      *arguments,
      *(together if processes > 1 else ()),
      *(own if number == processes - 1 else ()),
      devices=devices,
      said=f"{folder}.{number}",
      limit_s=limit_s,
    )
    started.append(child)
  return started


def said(folder, number) -> str:
  """What a process of `start_together` has said."""
  return (folder.parent / f"{folder.name}.{number}").read_text()


def codes(processes, *, patience_s) -> list[int]:
  """How processes end; none is left when this returns or raises."""
  try:
    return [process.wait(patience_s) for process in processes]
  finally:
    for process in processes:
      process.kill()


def rows(folder) -> list[dict]:
  """What a run has logged so far."""
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_rows(processes, folder, count, *, patience_s) -> None:
  """Waits until a run has logged as much; else none of it is left."""
  end = time.monotonic() + patience_s
  while len(rows(folder)) < count:
    if time.monotonic() > end:
      for process in processes:
        process.kill()
      raise TimeoutError(f"{folder} has not logged {count} rows")
    time.sleep(0.05)


def environment() -> dict[str, str]:
  """For processes that import the project, on the CPU."""
  path = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
  return os.environ | {
    "PYTHONPATH": path,
    "JAX_PLATFORMS": "cpu",
    # With them a program's key has the path of `data_dir` in it.
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
  }


class Child:
  """A command that a `Warm` process runs, much like a `subprocess.Popen`."""

  def __init__(self, pid: int, folder: tempfile.TemporaryDirectory):
    self.pid, self._folder = pid, folder

  def poll(self) -> int | None:
    """The exit code, None as long as it runs."""
    path = pathlib.Path(self._folder.name) / "code"
    return int(path.read_text()) if path.exists() else None

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)

  def wait(self, patience_s=2 * _LIMIT_S) -> int:
    """The exit code; less than zero is the signal that ended it."""
    end = time.monotonic() + patience_s
    while self.poll() is None:
      if time.monotonic() > end:
        raise TimeoutError(f"process {self.pid} goes on after {patience_s} s")
      time.sleep(0.01)
    return self.poll()

  def done(self) -> Done:
    """How it ends, and what it has said, if that went to no other file."""
    code = self.wait()
    # One that was killed at once has said nothing.
    paths = [pathlib.Path(self._folder.name) / name for name in "12"]
    return Done(code, *[p.read_text() if p.exists() else "" for p in paths])


class Warm:
  """A process that forks for every command line of one module.

  Calling it runs one to its end; `start` leaves time in between.
  """

  def __init__(self, module: str):
    self._process = subprocess.Popen(
      [sys.executable, __file__, module],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment(),
    )

  def __call__(self, *arguments, cwd=None) -> Done:
    return self.start(*arguments, cwd=cwd).done()

  def start(
    self, *arguments, cwd=None, devices=1, said=None, limit_s=_LIMIT_S
  ) -> Child:
    """Starts a command; what it says goes to the file `said`, if given."""
    folder = tempfile.TemporaryDirectory()
    request = {
      "arguments": list(map(str, arguments)),
      "cwd": str(cwd or ROOT),
      "folder": folder.name,
      "devices": devices,
      "said": [str(said or f"{folder.name}/{name}") for name in "12"],
      "limit_s": limit_s,
    }
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    return Child(int(self._process.stdout.readline()), folder)

  def close(self):
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


@functools.cache
def warm(module: str) -> Warm:
  """The one of a module that all tests share."""
  process = Warm(module)
  atexit.register(process.close)
  return process


def _serve(name):
  module = importlib.import_module(name)
  from mmm_jax import command

  _cache_small_programs(command)
  gc.freeze()  # or tracing in every child walks all that was imported
  # What libraries say must not be taken for an answer.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers end by themselves
  for line in sys.stdin:
    if not os.fork():
      _keep(module, command, json.loads(line), answers)


def _keep(module, command, request, answers):
  """Starts the process of a command, and writes down how it ends."""
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  child = os.fork()
  if not child:
    _answer(module, command, request)
  print(child, file=answers, flush=True)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  path = pathlib.Path(request["folder"]) / "code"
  if path.parent.exists():  # or nobody waits any more
    path.with_suffix(".new").write_text(str(code))
    path.with_suffix(".new").rename(path)
  os._exit(0)


def _cache_small_programs(command):
  """They are most of what a short run compiles."""
  import jax

  cache = command.cache_compilations

  def cache_all(data_dir):
    cache(data_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

  command.cache_compilations = cache_all


def _answer(module, command, request):
  import jax

  signal.alarm(request["limit_s"])
  os.chdir(request["cwd"])
  for number, path in enumerate(request["said"], start=1):
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
  jax.config.update("jax_num_cpu_devices", request["devices"])
  sys.argv = [module.__file__, *request["arguments"]]
  code = 1
  try:
    command.run(module.main)
    code = 0
  except SystemExit as end:
    code = end.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
  _serve(sys.argv[1])
