"""Checkpoints by Orbax: complete, atomic, and checked before they are used.

A checkpoint is the whole state of a run (the streams are functions of the
step). It is stored as a flat mapping from the path of each leaf to its array,
so that reading one needs neither pickle nor the classes that wrote it.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import time
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmm_jax import errors, files, parallel
from mmm_jax.datasets import records

_ITEM = "default"  # as Orbax calls the only thing that a checkpoint holds
_SUMS = "crc32"  # {path of a leaf: checksum}, in Orbax's custom metadata

# What keeps a file from being read that is not damaged.
_PASSING = (
  errno.EACCES,
  errno.EPERM,
  errno.EMFILE,
  errno.ENFILE,
  errno.ENOMEM,
  errno.ESTALE,
  errno.ETIMEDOUT,
)

_LOG = logging.getLogger("mmm_jax")


def open_manager(folder, *, keep: int) -> ocp.CheckpointManager:
  """The manager of `folder`, which is made if need be.

  Raises:
    errors.InputError: it cannot be made or listed.
  """
  # Nothing is read yet: Orbax opens no folder in which it cannot read when
  # each checkpoint was made, and a damaged one is to be passed over.
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    create=True,
    enable_async_checkpointing=False,
    lightweight_initialize=True,
  )
  # With a handler named here, Orbax does not look into the newest checkpoint,
  # which may be damaged, to learn how to read the others.
  handler = ocp.StandardCheckpointHandler()
  with files.explained(folder, "open"), parallel.bounded("opening checkpoints"):
    return ocp.CheckpointManager(folder, options=options, item_handlers=handler)


def save(manager: ocp.CheckpointManager, step: int, tree) -> None:
  """Writes `tree` as the checkpoint of `step`; nothing if it is there.

  Raises:
    errors.InputError: the disk is full or cannot be written; the checkpoints
      before it stay.
  """
  if step in manager.all_steps():
    return
  flat = _flat(jax.device_get(tree))
  sums = {_SUMS: {name: _sum(leaf) for name, leaf in flat.items()}}
  wanted = ocp.args.StandardSave(parallel.spread(flat))
  try:
    with parallel.bounded(f"writing the checkpoint of step {step}"), quiet():
      manager.save(step, args=wanted, custom_metadata=sums)
  except Exception as error:  # Orbax wraps the system's words several times
    reason = records.disk_reason(error)
    if not reason:
      raise
    # Nor is anybody told what its tasks say when they are thrown away.
    logging.getLogger("asyncio").disabled = True
    raise errors.InputError(
      f"cannot write the checkpoint of step {step} to {manager.directory}:"
      f" {reason}; free some space, then the same command continues"
    ) from error


@contextlib.contextmanager
def quiet():
  """Keeps the tracebacks to itself of what Orbax raises anyway.

  It logs them, and its threads print theirs a moment after it has failed.
  """
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with contextlib.redirect_stderr(io.StringIO()):
      try:
        yield
      except Exception:
        time.sleep(0.5)
        raise
  finally:
    logging.disable(before)


def load(manager: ocp.CheckpointManager, step: int, template):
  """The checkpoint of `step` as a tree like `template`, or any exception."""
  # Onto the host, wherever its parts were when it was written.
  wanted = ocp.args.StandardRestore(_flat(template))
  with quiet(), _reader() as reader:
    flat = reader.restore(manager.directory / str(step) / _ITEM, args=wanted)
    metadata = manager.metadata(step).custom_metadata or {}
  _check_sums(flat, metadata)
  return _unflat(flat, template)


def _reader() -> ocp.Checkpointer:
  """Reads by this process alone; a manager would wait for the others.

  One of them may not be able to read what this one can.
  """
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
  )
  return ocp.Checkpointer(
    ocp.StandardCheckpointHandler(multiprocessing_options=alone),
    multiprocessing_options=alone,
  )


def restore(manager: ocp.CheckpointManager, template):
  """The newest checkpoint that all processes can load, like `template`.

  Newer ones, which are damaged, are deleted: the run will write them again.

  Args:
    manager: of the run's folder.
    template: a tree of arrays with the wanted shapes and types.

  Returns:
    The tree with NumPy leaves, or None if there is no checkpoint at all.

  Raises:
    errors.InputError: there are checkpoints, and none of them loads, or the
      system does not let one be read.
  """
  steps = parallel.on_first(lambda: sorted(manager.all_steps(), reverse=True))
  for number, step in enumerate(steps):
    tree = parallel.together(
      functools.partial(_load_whole, manager, step, template)
    )
    (damaged,) = parallel.any_process([tree is None])
    if damaged:
      continue
    _delete(manager, steps[:number])
    return tree
  if steps:
    raise errors.InputError(
      f"none of the checkpoints {steps} in {manager.directory} loads; remove"
      " the folder to start anew, or give another --workdir"
    )
  return None


def _delete(manager, steps):
  explained = files.explained(manager.directory, "delete from")
  with explained, parallel.bounded("deleting damaged checkpoints"):
    for step in steps:
      manager.delete(step)


def _load_whole(manager, step, template):
  """`load`, or None where the checkpoint is damaged, which it says."""
  try:
    # Orbax takes a folder that it may not look into for one that is gone.
    for _ in os.walk(manager.directory / str(step), onerror=_raise):
      pass
    return load(manager, step, template)
  except Exception as error:  # whatever a damaged file makes Orbax raise
    _check_readable(error, f"checkpoint {step} of {manager.directory}")
    reason = " ".join(str(error).split())[:200]  # TensorStore's go on
    _LOG.warning(
      "checkpoint %s of %s does not load (%s: %s); trying the one before",
      step, manager.directory, type(error).__name__, reason,
    )  # fmt: skip
    return None


def _raise(error):
  raise error


def _check_readable(error: BaseException, what: str):
  """Raises InputError if the system is to blame, and `what` may be whole."""
  for cause in records.causes(error):
    number = records.system_number(cause, _PASSING)
    if isinstance(cause, MemoryError):  # NumPy's has no number
      number = errno.ENOMEM
    if number:
      raise errors.InputError(
        f"cannot read {what}: {os.strerror(number)}; mend that, then the same"
        " command continues"
      ) from error


def _check_sums(flat, metadata):
  """Raises ValueError if numbers are not those that were written.

  Orbax would hand out what a disk has altered.
  """
  sums = metadata.get(_SUMS, {})
  if set(sums) != set(flat):
    raise ValueError("its checksums are gone")
  for name, wanted in sums.items():
    if _sum(flat[name]) != wanted:
      raise ValueError(f"the numbers of {name} were altered on the disk")


def _sum(leaf) -> int:
  """Checksum of a leaf as devices hold it, where 64-bit numbers are off.

  Several processes write from devices, and the best metric is a float64.
  """
  if leaf.dtype.itemsize == 8:
    leaf = leaf.astype(f"{leaf.dtype.kind}4")
  return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))


def _flat(tree) -> dict[str, np.ndarray]:
  """{path: array}, without the empty ones, which Orbax refuses."""
  return {name: leaf for name, leaf in _named(tree) if leaf.size}


def _named(tree) -> list[tuple[str, np.ndarray]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  return [(name(path), np.asarray(leaf)) for path, leaf in leaves]


def _unflat(flat, template):
  wanted = _flat(template)
  if set(flat) != set(wanted):
    raise ValueError(f"leaves differ: {sorted(set(flat) ^ set(wanted))[:5]}")
  for name, leaf in wanted.items():
    if flat[name].shape != leaf.shape or flat[name].dtype != leaf.dtype:
      raise ValueError(
        f"{name} is {flat[name].dtype}{flat[name].shape}, wanted"
        f" {leaf.dtype}{leaf.shape}"
      )
  leaves = [np.asarray(flat.get(name, leaf)) for name, leaf in _named(template)]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)
