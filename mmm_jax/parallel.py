"""Processes, devices, and two ways to map one per-device function over them.

A function is written for one device: it sees the whole of what is replicated,
its own part of what is sharded (leading axis: data shards), and reduces over
the axis named "data". `Engine.map` runs it on one device (`jit`), on several
by `pmap`, or by `shard_map` over a `Mesh`.

A run may have several processes, each with devices of its own (`join`). They
run the same program on the same host values; each puts its own data shards on
its devices, and the first one alone writes files (`on_first`).
"""

from collections.abc import Callable, Sequence
import ctypes
import dataclasses
import logging
import os
import signal
import zlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from mmm_jax import errors

AXIS = "data"
ENGINES = ("pmap", "mesh")  # the values of parallel.engine

# What an argument or a result of a mapped function is.
REPLICATED, SHARDED, HOST = "replicated", "sharded", "host"

_PROCESSES = "process"  # axis with one device of every process
_TRANSPORTS = ("gloo", "nccl", "coordination")  # in messages of their errors
_MESSAGE = 4096  # bytes of a text that processes send one another
LOST = (
  "error: another process of this run is gone; the same command with the same"
  " --workdir continues"
)
_STOPPED = 75  # as command.STOPPED, which is above this module


@dataclasses.dataclass(frozen=True)
class Engine:
  """Where a run's arrays live and how its functions are mapped."""

  devices: tuple  # of all processes
  by_pmap: bool

  @property
  def num_devices(self) -> int:
    return len(self.devices)

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(self.devices), (AXIS,))

  @property
  def _own_devices(self):
    return [d for d in self.devices if d.process_index == jax.process_index()]

  def _put(self, tree, spec):
    # What pmap maps over, a process sees as an array of its own devices.
    mesh = self.mesh
    if self.by_pmap:
      mesh = jax.sharding.Mesh(np.array(self._own_devices), (AXIS,))
    sharding = NamedSharding(mesh, spec)
    put = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: put(sharding, np.asarray(x)), tree)

  def own(self, tree):
    """Host values of all data shards -> those of this process."""
    first = self.devices.index(self._own_devices[0])

    def cut(x):
      size = len(x) // self.num_devices  # shards of a device
      return x[first * size : (first + len(self._own_devices)) * size]

    return jax.tree.map(cut, tree)

  def replicate(self, tree):
    """Host values -> a copy on every device."""
    if not self.by_pmap:
      return self._put(tree, P())
    copies = len(self._own_devices)
    copy = lambda x: np.broadcast_to(x, (copies, *np.shape(x)))
    return self._put(jax.tree.map(copy, tree), P(AXIS))

  def shard(self, tree):
    """Host values of this process's data shards -> a part on each device."""
    if self.by_pmap:
      split = lambda x: x.reshape(len(self._own_devices), -1, *x.shape[1:])
      tree = jax.tree.map(split, tree)
    return self._put(tree, P(AXIS))

  def first(self, tree):
    """A replicated tree as plain arrays on this process's first device."""
    if self.by_pmap:
      return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)

  def local(self, tree):
    """A sharded tree as host arrays of this process's data shards."""

    def gather(x):
      parts = sorted(x.addressable_shards, key=lambda part: part.index[0].start)
      whole = np.concatenate([np.asarray(part.data) for part in parts])
      return whole.reshape(-1, *x.shape[2:]) if self.by_pmap else whole

    return jax.tree.map(gather, tree)

  def map(self, function: Callable, inputs, outputs, *, donate=()) -> Callable:
    """Compiles `function` for all devices.

    Args:
      function: written for one device, of positional arguments.
      inputs: REPLICATED, SHARDED or HOST (small plain values) per argument.
      outputs: REPLICATED or SHARDED, for the result or for each of a tuple.
      donate: numbers of the arguments whose memory the results may take.
    """
    if self.by_pmap:
      axes = tuple(None if kind == HOST else 0 for kind in inputs)
      return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=axes,
        devices=self.devices,
        donate_argnums=donate,
      )
    spec = lambda kind: P(AXIS) if kind == SHARDED else P()
    mapped = jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=tuple(spec(kind) for kind in inputs),
      out_specs=jax.tree.map(spec, outputs),
      check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=donate)


def make_engine(config) -> Engine:
  """The engine that `config.parallel` asks for.

  Raises:
    errors.InputError: too few devices, or they do not divide the data shards.
  """
  present = jax.devices()
  wanted = config.parallel.devices or len(present)
  if jax.process_count() > 1 and wanted != len(present):
    raise errors.InputError(
      f"parallel.devices={wanted}, but the {jax.process_count()} processes of"
      f" this run have {len(present)} devices, and all are used; leave it 0"
    )
  if wanted > len(present):
    raise errors.InputError(
      f"parallel.devices={wanted}, but this process sees {len(present)}"
      f" {present[0].platform} device(s)"
    )
  if config.data_shards % wanted:
    valid = [n for n in range(1, wanted + 1) if config.data_shards % n == 0]
    raise errors.InputError(
      f"data_shards={config.data_shards} does not divide over {wanted}"
      f" devices; set data_shards to a multiple of {wanted}, or"
      f" parallel.devices to one of {valid}"
    )
  by_pmap = config.parallel.engine == "pmap" and wanted > 1
  return Engine(tuple(present[:wanted]), by_pmap)


def make_own_engine(config) -> Engine:
  """This process's part of a run's devices, for work without reductions.

  By `shard_map`, whose results are arrays like any other. Takes the devices
  there are: a run's lists may be asked for on a smaller machine.
  """
  devices = jax.local_devices()[: config.parallel.devices or None]
  return Engine(tuple(devices), by_pmap=False)


# --- processes ---------------------------------------------------------------


def join(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  timeout_s: int,
) -> None:
  """Makes this process one of a run, where there are several.

  To be called before anything else asks JAX for its devices.

  Args:
    coordinator: HOST:PORT of the first process; "auto" leaves all to JAX; None
      if the scheduler's environment says it, or there is one process.
    num_processes: of the run.
    process_id: of this one, from 0.
    timeout_s: how long to wait for the others to come, and how long one of
      them may be silent before the run ends.

  Raises:
    errors.InputError: the three flags do not go together.
    errors.LostError: the others have not come in time.
  """
  given = [coordinator, num_processes, process_id]
  if coordinator == "auto" or (given == [None] * 3 and _scheduled()):
    coordinator = num_processes = process_id = None
  elif given == [None] * 3:
    return
  elif None in given:
    raise errors.InputError(
      "--coordinator, --num_processes and --process_id go together; found"
      f" {coordinator}, {num_processes} and {process_id}"
    )
  elif not coordinator.rpartition(":")[2].isdigit():
    raise errors.InputError(
      f"--coordinator: found {coordinator!r}, valid: HOST:PORT of the first"
      " process, with a port that is free there"
    )
  _end_when_others_are_lost()
  # What collectives of CPUs travel by; other devices have their own.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=timeout_s,
      heartbeat_timeout_seconds=timeout_s,
      shutdown_timeout_seconds=timeout_s,
    )
  except ValueError as error:  # of flags or an environment that say too little
    raise errors.InputError(
      f"--coordinator, --num_processes, --process_id: {error}"
    ) from error
  except RuntimeError as error:
    raise errors.LostError(
      f"the processes of this run did not come together within {timeout_s} s"
      f" (parallel.timeout_s): {error}"
    ) from error
  if jax.process_index():
    logging.getLogger("mmm_jax").setLevel(logging.WARNING)


def _scheduled() -> bool:
  """Whether a scheduler started this process as one of several."""
  tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
  workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
  return int(tasks) > 1 or "," in workers


def _end_when_others_are_lost():
  """Gives the abort by which JAX ends a process a message and a code.

  Its client aborts from a thread of its own when a process is lost, while
  Python may wait in a collective; so neither an exception nor one of Python's
  own signal handlers can tell of it.
  """
  library = ctypes.CDLL(None)
  library.signal.restype = ctypes.c_void_p
  library.signal(int(signal.SIGABRT), _end)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end(_):
  os.write(2, f"{LOST} (see above)\n".encode())
  os._exit(_STOPPED)


def is_loss(error: Exception) -> bool:
  """Whether an exception is of a collective that lost a process."""
  text = str(error).lower()
  # Last, as it starts JAX where an error came before anything needed it.
  return any(name in text for name in _TRANSPORTS) and jax.process_count() > 1


def any_process(flags: Sequence[bool]) -> list[bool]:
  """Of each flag, whether it is set in any process; all must call this."""
  if jax.process_count() == 1:
    return list(flags)
  found = multihost_utils.process_allgather(np.array(flags, bool))
  return found.any(0).tolist()


def largest(tree):
  """Elementwise maximum of host arrays over the processes."""
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(
    lambda x: x.max(0), multihost_utils.process_allgather(tree)
  )


def check_alike(what: str, text: str) -> None:
  """Raises InputError on all processes unless their `text` is the same.

  Args:
    what: the error's words for it.
    text: such as a fingerprint.
  """
  if jax.process_count() == 1:
    return
  mine = np.array([zlib.crc32(text.encode())], np.uint32)
  if len(np.unique(multihost_utils.process_allgather(mine))) > 1:
    raise errors.InputError(
      f"the {jax.process_count()} processes of this run differ in {what}; start"
      " all of them by the same command, on the same files"
    )


def on_first(action: Callable[[], object]) -> None:
  """Runs `action` on the first process; its InputError is everybody's."""
  if jax.process_count() == 1:
    action()
    return
  told = ""
  if jax.process_index() == 0:
    try:
      action()
    except errors.InputError as error:
      told = str(error)
  told = _from_first(told)
  if told:
    raise errors.InputError(told)


def _from_first(text: str) -> str:
  """The first process's text, cut to _MESSAGE bytes."""
  code = np.zeros(_MESSAGE, np.uint8)
  raw = np.frombuffer(text.encode()[:_MESSAGE], np.uint8)
  code[: len(raw)] = raw
  code = multihost_utils.broadcast_one_to_all(code)
  return bytes(code).rstrip(b"\0").decode(errors="ignore")


def spread(tree):
  """Equal host arrays -> global ones that all processes can write together.

  Each holds a part of what divides into as many, and all hold the rest.
  """
  count = jax.process_count()
  if count == 1:
    return tree
  firsts = {device.process_index: device for device in reversed(jax.devices())}
  devices = np.array([firsts[number] for number in range(count)])
  mesh = jax.sharding.Mesh(devices, (_PROCESSES,))

  def put(x):
    if x.ndim and len(x) % count == 0:
      part = np.split(x, count)[jax.process_index()]
      spec = P(_PROCESSES)
    else:
      part, spec = x, P()
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_process_local_data(sharding, part, x.shape)

  return jax.tree.map(put, tree)
