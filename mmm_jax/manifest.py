"""The manifest of a run: all that may differ between two equal runs."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import datetime
import importlib.metadata
import pathlib
import platform
import resource
import subprocess
import sys
import time

import jax

from mmm_jax import errors, files

_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "tensorflow-datasets",
  "grain",
)


class Manifest:
  """`manifest.json`, kept up to date over every session of one run.

  A session is one start of the command. Dates, versions and devices are those
  of the latest; wall times and redone steps add up; peak memory is the
  maximum. Only the first process (`primary`) writes.
  """

  def __init__(self, workdir, *, data: str, split: str, primary: bool):
    """Opens the manifest, new or as an earlier session left it.

    Args:
      workdir: the run's folder.
      data, split: fingerprints of the prepared data and of the split.
      primary: this process writes.

    Raises:
      InputError: the file is there and is not a manifest, or it is one of a
        run on other data or another split.
    """
    self.path = pathlib.Path(workdir) / "manifest.json"
    self._primary = primary
    self._started = time.monotonic()
    self._timing = {}  # {phase: since when it is not counted yet}
    before = read(self.path)
    check_same(self.path, before, data=data, split=split)
    now = _now()
    self._before_s = before.get("wall_s", {}).get("total", 0.0)
    self.values = {
      "created": now,
      "resumed": 0,
      "redone_steps": 0,
      **before,
      "session_started": now,
      "finished": None,
      "data": data,
      "split": split,
      "git_revision": git_revision(),
      "versions": versions(),
      "device": device(),
    }
    self.values.setdefault("wall_s", {})
    self.values.setdefault("peak_memory_mb", 0.0)

  def resumed(self, *, step: int, last_step: int) -> None:
    """Counts a resume from `step` of a run that had got to `last_step`."""
    self.values["resumed"] += 1
    self.values["redone_steps"] += max(0, last_step - step)
    self.write()

  @contextlib.contextmanager
  def timed(self, phase: str) -> Iterator[None]:
    """Adds the seconds spent inside to `wall_s[phase]`."""
    self._timing[phase] = time.monotonic()
    try:
      yield
    finally:
      self._count(phase)
      del self._timing[phase]

  def _count(self, phase):
    now, wall = time.monotonic(), self.values["wall_s"]
    wall[phase] = wall.get(phase, 0.0) + now - self._timing[phase]
    self._timing[phase] = now

  def write(self, *, finished: bool = False) -> None:
    """Writes what is known so far; at every checkpoint and at the end."""
    for phase in self._timing:  # a kill would lose what is not written
      self._count(phase)
    session_s = time.monotonic() - self._started
    self.values["wall_s"]["total"] = self._before_s + session_s
    self.values["updated"] = _now()
    if finished:
      self.values["finished"] = self.values["updated"]
    self.values["peak_memory_mb"] = max(
      self.values["peak_memory_mb"], peak_memory_mb()
    )
    self.values["device"] = device()
    if self._primary:
      files.write_json(self.path, self.values)


def versions() -> dict[str, str | None]:
  """Python's version and those of the packages that shape a result."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = None
  return found


def git_revision() -> str | None:
  """Commit of the checkout that this code runs from, "-dirty" if changed.

  Records of results do not count: a sweep writes them while it runs.

  None for an installed copy, also where that lies inside another repository.
  """
  here = pathlib.Path(__file__).resolve()
  try:
    _git(here.parent, "ls-files", "--error-unmatch", here.name)
    revision = _git(here.parent, "rev-parse", "HEAD")
    changed = _git(
      here.parents[1], "status", "--porcelain", "--untracked-files=no",
      "--", ".", ":!tests/results",
    )  # fmt: skip
    return revision + ("-dirty" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return None


def device() -> dict[str, object]:
  """Platform, kind and count; peak memory where the platform reports it."""
  first = jax.local_devices()[0]
  peak = (first.memory_stats() or {}).get("peak_bytes_in_use")
  return {
    "platform": first.platform,
    "kind": first.device_kind,
    "count": jax.device_count(),
    "processes": jax.process_count(),
    "peak_memory_mb": None if peak is None else peak / 2**20,
  }


def peak_memory_mb() -> float:
  """Largest resident size of this process so far, in MiB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _git(folder: pathlib.Path, *arguments: str) -> str:
  done = subprocess.run(
    ["git", "-C", str(folder), *arguments],
    capture_output=True,
    check=True,
    text=True,
    timeout=10,
  )
  return done.stdout.strip()


def check_same(path: pathlib.Path, recorded: dict, **now: str) -> None:
  """Raises InputError if `data` or `split` are not those that are recorded.

  Args:
    path: the manifest, for the message.
    recorded: what it holds; nothing yet is the same as anything.
    now: the fingerprints.
  """
  for kind, found in now.items():
    if recorded.get(kind, found) != found:
      raise errors.InputError(
        f"{path}: the {kind} changed since this run began (fingerprint now"
        f" {found[:12]}, then {recorded[kind][:12]}); bring back the files that"
        " it began with, or start anew in another --workdir"
      )


def read(path: pathlib.Path) -> dict:
  """What a manifest holds; nothing if there is none.

  Raises:
    InputError: the file is there and is not a manifest.
  """
  return files.read_json(path) if path.exists() else {}


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
