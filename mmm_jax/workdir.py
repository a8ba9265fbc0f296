"""A run's folder: one process at a time, one config, whole files."""

import contextlib
import fcntl
import os
import pathlib
import platform
import secrets
import shutil
import time

from mmm_jax import assemble, errors, files, validate
from mmm_jax.datasets import splits


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
  """Makes the folder and keeps other processes out of it.

  What stands in the lock then is of this session alone, see `look`.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # Who is refused must not empty it.
    lock = open(workdir / ".lock", "a")  # noqa: SIM115, closed below
  except OSError as error:
    raise errors.InputError(
      f"cannot write to workdir {workdir}: {error.strerror}; choose another"
      " --workdir"
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.InputError(
        f"another process is working in {workdir}; wait for it, or choose"
        " another --workdir"
      ) from None
    except OSError as error:
      raise errors.InputError(
        f"cannot lock {workdir}: {error.strerror}; choose a --workdir on a file"
        " system that has locks, such as a disk or NFS"
      ) from error
    _remove_leftovers(workdir)
    try:
      with files.explained(workdir):
        lock.truncate(0)
        lock.write(secrets.token_hex(8))
        lock.flush()
        os.fsync(lock.fileno())
      yield
    except (errors.InputError, KeyboardInterrupt):
      _remove_if_empty(workdir)
      raise


def look(workdir: pathlib.Path) -> tuple[str, list[str]]:
  """What stands in the lock, and the checkpoints, as this process sees them."""
  mark, names = "", []
  late = contextlib.suppress(OSError)  # as of a view that is out of date
  with late:
    mark = (workdir / ".lock").read_text()
  with late:
    names = os.listdir(workdir / "checkpoints")
  return mark, sorted(filter(str.isdecimal, names))


def check_shared(workdir: pathlib.Path, wanted: tuple, *, timeout_s: int):
  """Waits until the folder looks as to the first process, which has locked it.

  A shared file system may show others late what one has written.

  Args:
    workdir: the folder.
    wanted: what `look` gives the first process.
    timeout_s: for how long.

  Raises:
    errors.InputError: it does not in time.
  """
  end = time.monotonic() + timeout_s
  while (found := look(workdir)) != wanted:
    if time.monotonic() > end:
      if found[0] == wanted[0]:
        raise errors.InputError(
          f"{workdir}/checkpoints on {platform.node()} has {found[1]}, and the"
          f" first process sees {wanted[1]} there; see that this host's view of"
          " the storage is up to date, then the same command continues"
        )
      raise errors.InputError(
        f"{workdir} on {platform.node()} is not the folder in which the first"
        " process works; give a --workdir on storage that all processes of the"
        " run share"
      )
    time.sleep(0.2)


def check_there(workdir: pathlib.Path) -> None:
  """Raises InputError if somebody has taken the folder's files away."""
  if not (workdir / "manifest.json").exists():
    raise errors.InputError(
      f"{workdir}: manifest.json was there and is gone; was the folder removed"
      " while this run worked in it? The same command starts anew"
    )


def _remove_leftovers(workdir):
  """What a killed session had begun to write; who holds the lock is alone."""
  for path in workdir.glob(".*.tmp"):
    with contextlib.suppress(OSError):
      path.unlink()
  for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"):
    shutil.rmtree(path, ignore_errors=True)


def _remove_if_empty(workdir):
  """Leaves nothing of a run that did not start."""
  with contextlib.suppress(OSError):
    if [path.name for path in workdir.iterdir()] == [".lock"]:
      (workdir / ".lock").unlink()
      workdir.rmdir()


def check_config(config, workdir: pathlib.Path) -> None:
  """Compares the config with the one of the run in the folder, if any.

  Values that change no result may be others: where files lie, what is logged
  and saved when, on which devices the run is.

  Raises:
    errors.InputError: the folder belongs to a run with another config.
  """
  path = workdir / "config.json"
  if not path.exists():
    return
  old, new = (
    dict(validate.leaves(validate.plain(each, without=validate.NO_RESULT)))
    for each in (validate.completed(files.read_json(path)), config)
  )
  keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
  if keys:
    shown = "; ".join(
      f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys
    )
    raise errors.InputError(
      f"{workdir} holds a run with another config ({shown}); give the same"
      " values to continue it, or another --workdir"
    )


def write_inputs(run: assemble.Run, workdir: pathlib.Path) -> None:
  """Writes the config, and the split that others can score systems with.

  Not before the data are read: a run whose data are wrong leaves nothing.
  """
  # Anew each time: where the data lie may have changed, and a disk may have
  # altered what was there.
  files.write_json(workdir / "config.json", validate.plain(run.config))
  splits.write(workdir / "split.parquet", run.dataset, run.split)


def write_results(
  run: assemble.Run, result: dict, per_user: dict, workdir: pathlib.Path
) -> dict:
  """Writes what `evaluate.evaluate` found; result.json, the last, ends it.

  Returns:
    What result.json holds.

  Raises:
    errors.InputError: the folder is gone, or cannot be written.
  """
  check_there(workdir)
  per_user = {**per_user, "user": run.dataset.users[per_user["user"]]}
  files.write_parquet(workdir / "per_user.parquet", per_user)
  files.write_json(workdir / "result.json", result)
  return read_result(workdir)


def read_result(workdir: pathlib.Path) -> dict | None:
  """What result.json holds; None if the run has not ended."""
  path = workdir / "result.json"
  return files.read_json(path) if path.exists() else None
