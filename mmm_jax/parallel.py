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
import contextlib
import ctypes
import dataclasses
import logging
import os
import pickle
import signal
import socket
import threading
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from mmm_jax import errors

AXIS = "data"
ENGINES = ("pmap", "mesh")  # the values of parallel.engine
PLATFORMS = ("cpu", "gpu", "tpu")  # and of parallel.platform

# What an argument or a result of a mapped function is.
REPLICATED, SHARDED, HOST = "replicated", "sharded", "host"

_PROCESSES = "process"  # axis with one device of every process
_TRANSPORTS = ("gloo", "nccl", "coordination")  # in messages of their errors
_BLOCK = 2**26  # bytes that processes send one another at a time
LOST = (
  "error: another process of this run is gone; the same command with the same"
  " --workdir continues"
)

_T = TypeVar("_T")


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

  def map(
    self, function: Callable, inputs, outputs, *, donate=(), options=None
  ) -> Callable:
    """Compiles `function` for all devices.

    Args:
      function: written for one device, of positional arguments.
      inputs: REPLICATED, SHARDED or HOST (small plain values) per argument.
      outputs: REPLICATED or SHARDED, for the result or for each of a tuple.
      donate: numbers of the arguments whose memory the results may take.
      options: flags of XLA for this function; pmap takes none.
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
    return jax.jit(mapped, donate_argnums=donate, compiler_options=options)


def make_engine(config) -> Engine:
  """The engine that `config.parallel` asks for.

  Raises:
    errors.InputError: too few devices, those of another platform, or they do
      not divide the data shards.
  """
  present = jax.devices()
  platform = present[0].platform
  # JAX takes the CPU where it finds no accelerator, and hardly says so.
  if config.parallel.platform not in ("", platform):
    raise errors.InputError(
      f"parallel.platform={config.parallel.platform}, but JAX finds only"
      f" {platform} devices here; see that the driver is there, and that the"
      " project is installed for them (README.md)"
    )
  wanted = config.parallel.devices or len(present)
  if jax.process_count() > 1 and wanted != len(present):
    raise errors.InputError(
      f"parallel.devices={wanted}, but the {jax.process_count()} processes of"
      f" this run have {len(present)} devices, and all are used; leave it 0"
    )
  if wanted > len(present):
    raise errors.InputError(
      f"parallel.devices={wanted}, but this process sees {len(present)}"
      f" {platform} device(s)"
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
  wait_s: int,
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
    wait_s: how long anything may take that needs others; see `bounded`.

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
  else:
    _check_address(coordinator, serves=process_id == 0)
  # What collectives of CPUs travel by; other devices have their own.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  late = (
    f"the processes of this run did not come together within {timeout_s} s"
    " (parallel.timeout_s)"
  )
  _Limit.wait_s = wait_s
  try:
    with _waiting(f"error: {late}; the same command continues"):
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=timeout_s,
        heartbeat_timeout_seconds=timeout_s,
        shutdown_timeout_seconds=timeout_s,
      )
  except ValueError as error:  # of flags or an environment that say too little
    names = "--coordinator, --num_processes and --process_id"
    if coordinator is None:
      names = f"what the environment says of this run's processes, or {names}"
    raise errors.InputError(f"{names}: {error}") from error
  except RuntimeError as error:
    raise errors.LostError(f"{late}: {error}") from error
  _learn_devices(wait_s)
  if jax.process_index():
    logging.getLogger("mmm_jax").setLevel(logging.WARNING)


def _learn_devices(wait_s):
  """Starts JAX's devices, of which all processes tell one another."""
  try:
    with _ending_after(wait_s, "learning of the others' devices"):
      jax.devices()
  except RuntimeError as error:
    if "timed out" not in str(error):  # as where there is no such device
      raise
    raise errors.LostError(
      f"the processes of this run did not tell of their devices: {error}"
    ) from error


def _scheduled() -> bool:
  """Whether a scheduler started this process as one of several."""
  tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
  workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
  if not tasks.isdecimal():
    raise errors.InputError(
      f"SLURM_STEP_NUM_TASKS: found {tasks!r}, valid: a whole number, or unset"
    )
  return int(tasks) > 1 or "," in workers


def _check_address(coordinator, *, serves):
  host, _, port = coordinator.rpartition(":")
  if not (host and port.isdigit() and 0 < int(port) < 2**16):
    raise errors.InputError(
      f"--coordinator: found {coordinator!r}, valid: HOST:PORT of the first"
      " process, with a port that is free there"
    )
  if serves:
    try:
      socket.create_server(("", int(port))).close()
    except OSError as error:
      raise errors.InputError(
        f"--coordinator: port {port} of this host cannot be used"
        f" ({error.strerror}); give one that is free"
      ) from error


class _Ending:
  """How a process ends when JAX aborts it."""

  code, words = errors.STOPPED, ""


@contextlib.contextmanager
def _waiting(words):
  """While JAX waits for the others, in C++, where Python hears no signal.

  Its client aborts, from a thread of its own, when the others do not come, and
  later when one of them is lost while Python may wait in a collective. So
  neither an exception nor one of Python's own handlers can tell of that, and
  these are C's.
  """
  library = ctypes.CDLL(None)
  library.signal.restype = ctypes.c_void_p
  _Ending.words = words
  library.signal(int(signal.SIGABRT), _end)
  stops = signal.SIGTERM, signal.SIGINT
  for number in stops:
    library.signal(int(number), _stop)
  try:
    yield
  finally:
    for number in stops:
      signal.signal(number, signal.getsignal(number))
  _Ending.words = f"{LOST} (see above)"


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end(_):
  try:
    os.write(2, f"{_Ending.words}\n".encode() if _Ending.words else b"")
  finally:
    os._exit(_Ending.code)


_stop = ctypes.CFUNCTYPE(None, ctypes.c_int)(errors.stop_at_once)


class _Limit:
  """How long what needs other processes may take, in seconds."""

  wait_s = 0


@contextlib.contextmanager
def bounded(what: str):
  """Ends this process with 75 if what needs others takes too long.

  Of one that lives and hangs nothing else tells, as its heartbeats go on.

  Args:
    what: the error's words for it.
  """
  if not several():
    yield
    return
  with _ending_after(_Limit.wait_s, what):
    yield


@contextlib.contextmanager
def _ending_after(wait_s, what):
  """By a thread: no exception, no handler of Python's reaches a wait in C++."""
  timer = threading.Timer(wait_s, _give_up, [wait_s, what])
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _give_up(wait_s, what):
  words = (
    f"error: {what} takes more than {wait_s} s (parallel.wait_s): another"
    " process, or this one, hangs or needs longer; the same command continues"
  )
  try:
    os.write(2, f"{words}\n".encode())
  finally:
    os._exit(errors.STOPPED)


def _gather(tree):
  """Host arrays of all processes, stacked, on each of them."""
  with bounded("waiting for the other processes"):
    return multihost_utils.process_allgather(tree)


def decide(code: int) -> None:
  """Sets the exit code of a process that is about to end.

  At its end it waits for the others, and is aborted if they do not come, as
  when it ends because of an error that they do not have.
  """
  _Ending.code, _Ending.words = code, ""


def several() -> bool:
  """Whether this run has others; starts no devices in one without any."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_loss(error: Exception) -> bool:
  """Whether an exception is of a collective that lost a process."""
  text = str(error).lower()
  joined = jax.distributed.is_initialized()
  return joined and any(name in text for name in _TRANSPORTS)


def exchange(value: Any) -> list:
  """What each process gives, in their order; all must call this."""
  if not several():
    return [value]
  own = np.frombuffer(pickle.dumps(value), np.uint8)
  # Two numbers, as JAX has none of more than 32 bits.
  sizes = _gather(np.array(divmod(len(own), _BLOCK), np.int32))
  sizes = [int(blocks) * _BLOCK + int(rest) for blocks, rest in sizes]
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(own)] = own
  starts = range(0, len(padded), _BLOCK)
  parts = [_gather(padded[start : start + _BLOCK]) for start in starts]
  rows = np.concatenate(parts, 1)
  return [
    pickle.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def any_process(flags: Sequence[bool]) -> list[bool]:
  """Of each flag, whether it is set in any process; all must call this."""
  if not several():
    return list(flags)
  return _gather(np.array(flags, bool)).any(0).tolist()


def largest(tree):
  """Elementwise maximum of host arrays over the processes."""
  if not several():
    return tree
  return jax.tree.map(lambda x: x.max(0), _gather(tree))


def check_alike(what: str, text: str) -> None:
  """Raises InputError on all processes unless their `text` is the same.

  Args:
    what: the error's words for it.
    text: such as a fingerprint.
  """
  if len(set(exchange(text))) > 1:
    raise errors.InputError(
      f"the {jax.process_count()} processes of this run differ in {what}; start"
      " all of them by the same command, on the same files"
    )


def on_first(action: Callable[[], _T]) -> _T:
  """What `action` returns on the first process, which alone runs it.

  Its InputError is everybody's.
  """
  if not several():
    return action()
  first = jax.process_index() == 0
  result, told = exchange(_attempt(action) if first else None)[0]
  if told:
    raise errors.InputError(told)
  return result


def together(action: Callable[[], _T]) -> _T:
  """What `action` returns, unless it raises InputError on any process.

  Then that is everybody's: no process goes on, to wait for one that has ended.
  The action itself exchanges nothing.
  """
  if not several():
    return action()
  result, told = _attempt(action)
  told = next(filter(None, exchange(told)), "")
  if told:
    raise errors.InputError(told)
  return result


def _attempt(action):
  """What it returns, and what its InputError says."""
  try:
    return action(), ""
  except errors.InputError as error:
    return None, str(error)


def by_parts(read: Callable[[range], dict[str, list]], count: int) -> dict:
  """`read(range(count))`, of which each process reads an equal part.

  Args:
    read: numbers of records -> {column: their values}.
    count: of all records.
  """
  if not several():
    return read(range(count))
  number, total = jax.process_index(), jax.process_count()
  own = range(number * count // total, (number + 1) * count // total)
  parts = exchange(together(lambda: read(own)))
  return {
    name: [value for part in parts for value in part[name]] for name in parts[0]
  }


def spread(tree):
  """Equal host arrays -> global ones that all processes can write together.

  Each holds a part of what divides into as many, and all hold the rest.
  """
  if not several():
    return tree
  count = jax.process_count()
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
