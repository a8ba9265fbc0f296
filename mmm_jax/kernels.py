"""What XLA does slowly on CPUs, in C++: rows, sums, sorting, searching.

What `tables` does in a dozen of XLA's operations, each a pass over all rows of
the step, `kernels.cc` does in two, in a third of the time. It is compiled by
the system's C++ compiler when it is first needed, and kept. Orders, lists and
negatives are those of XLA, rows and sums but for the last bits, as XLA adds in
another order and joins products and sums here and there. Without a compiler,
XLA's operations do the work.
"""

import atexit
from concurrent import futures
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import tempfile
import threading

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from mmm_jax import errors, files

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_FLAGS = (
  *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno"),
  *("-shared", "-fPIC"),
)
_COMPILE_S = 120  # the longest that it may take
_TARGETS = (
  *("mmm_jax_touch_rows", "mmm_jax_adam_rows"),
  *("mmm_jax_stable_order", "mmm_jax_largest", "mmm_jax_unseen_item"),
  "mmm_jax_dot",
)
_TOUCH, _ADAM, _ORDER, _LARGEST, _UNSEEN, _DOT = _TARGETS

_registered = []  # the library, once JAX knows it; a process has one
_log = logging.getLogger(__name__)


def begin(config) -> None:
  """Begins to compile what `load` will wait for, on a thread of its own."""
  if _wanted(config) and not _registered:
    _library(config.dataset.data_dir)


def load(config) -> bool:
  """Whether a run is to use what is here, which then is loaded.

  Compiles it (3 to 9 s) if `dataset.data_dir` does not hold it yet. Several
  processes of a run must round alike, and some may lack a compiler: they do
  without.
  """
  if not _wanted(config):
    return False
  return bool(_registered) or _register(config.dataset.data_dir)


def _wanted(config) -> bool:
  alone_on_cpu = jax.devices()[0].platform == "cpu" and jax.process_count() == 1
  return config.parallel.kernels and alone_on_cpu


@functools.cache
def _library(data_dir: str) -> futures.Future:
  """The path of the library, once it is compiled."""
  folder = pathlib.Path(data_dir).expanduser() / "compiled"
  path = futures.Future()

  def compile_it():
    try:
      path.set_result(_compiled(folder))
    except Exception as error:  # for who waits for it
      path.set_exception(error)

  # Unlike those of executors, it keeps no process from ending.
  threading.Thread(target=compile_it, daemon=True).start()
  return path


@functools.cache
def _register(data_dir: str) -> bool:
  try:
    library = ctypes.CDLL(str(_library(data_dir).result()))
  except (OSError, errors.InputError, subprocess.SubprocessError) as error:
    said = (getattr(error, "stderr", None) or "").strip() or str(error)
    _log.info(
      "XLA does the work of kernels, which takes longer, as there is no C++"
      " library: %s",
      said.splitlines()[0],
    )
    return False
  for target in _TARGETS:
    handler = jax.ffi.pycapsule(getattr(library, target))
    jax.ffi.register_ffi_target(target, handler, platform="cpu")
  _registered.append(library)
  return True


def _compiled(folder: pathlib.Path) -> pathlib.Path:
  """The library of this source, these flags and this XLA in `folder`.

  Which machines of several kinds may share.
  """
  system = (platform.system(), platform.machine(), *platform.libc_ver())
  made_with = (*_FLAGS, jaxlib.__version__, *system)
  made_of = _SOURCE.read_bytes() + " ".join(made_with).encode()
  tag = hashlib.sha256(made_of).hexdigest()[:16]
  path = folder / f"kernels-{tag}.so"
  if path.exists():
    return path
  compiler = shutil.which("c++")
  if not compiler:
    raise FileNotFoundError("c++ is not on PATH")
  with files.explained(folder):
    folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as temporary:
    made = pathlib.Path(temporary, path.name)
    command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}"]
    _run([*command, str(_SOURCE), "-o", str(made)])
    with files.atomic(path) as file:
      file.write(made.read_bytes())
  return path


def _run(command):
  """Runs a compiler, which does not outlive this process if that can end it."""
  process = subprocess.Popen(
    command,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    errors="replace",
    process_group=0,  # with what it starts itself
  )

  def end():
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)

  atexit.register(end)
  try:
    _, said = process.communicate(timeout=_COMPILE_S)
  except subprocess.TimeoutExpired:
    end()
    raise
  finally:
    atexit.unregister(end)
  if process.returncode:
    raise subprocess.CalledProcessError(
      process.returncode, command, stderr=said
    )


def touch(touches: list[tuple]) -> list[tuple]:
  """Rows of tables, and the places where each is in the ids.

  All tables at once: threads wake once, and find places beside reading.

  Args:
    touches: of each table (packed, slot, ids, sizes, d): [R, 3 * d] rows and
      moments; [R] int32 scratch of any content, whose memory the result takes;
      [n], PAD for none; lengths of the arrays of rows that are wanted of the
      ids from the first on, or none.

  Returns:
    Of each table (slot, links, rows): what `adam` wants, and the arrays
    [size, d], zeros where an id is PAD.
  """
  arguments, results, aliases = [], [], {}
  for packed, slot, ids, sizes, width in touches:
    aliases[len(arguments) + 1] = len(results)
    arguments += [packed, slot, ids]
    results += [jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in (slot, ids)]
    results += [jax.ShapeDtypeStruct((n, width), packed.dtype) for n in sizes]
  reads = np.array([len(sizes) for *_, sizes, _ in touches], np.int64)
  call = jax.ffi.ffi_call(_TOUCH, results, input_output_aliases=aliases)
  found = iter(call(*arguments, reads=reads))
  return [
    (next(found), next(found), [next(found) for _ in sizes])
    for *_, sizes, _ in touches
  ]


def adam(updates, rate, count, *, b1, b2, eps):
  """A step of Adam for touched rows, with the sums of their gradients.

  Args:
    updates: of each table (packed, slot, links, ids, grads): [R, 3 * d] rows
      and moments, whose memory the result takes; both as `touch` gives them;
      [n], PAD for none; [n, d].
    rate: learning rate.
    count: this update's number, from 1.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: Adam's.

  Returns:
    The packed rows of each table.
  """
  shapes = [jax.ShapeDtypeStruct(u[0].shape, u[0].dtype) for u in updates]
  first = 3  # of the arguments is a table
  aliases = {first + 5 * t: t for t in range(len(updates))}
  step = jax.ffi.ffi_call(_ADAM, shapes, input_output_aliases=aliases)
  unbias = lambda decay: 1 / jnp.float32(1 - decay**count)
  return step(
    *(jnp.float32(rate), unbias(b1), unbias(b2)),
    *(each for update in updates for each in update),
    b1=np.float32(b1),
    b2=np.float32(b2),
    fresh1=np.float32(1 - b1),
    fresh2=np.float32(1 - b2),
    eps=np.float32(eps),
  )


@jax.custom_vjp
def dot(left: jax.Array, right: jax.Array) -> jax.Array:
  """`layers.dot` of float32 rows of one shape: [..., d] twice -> [...].

  It has gradients of any order, but no forward mode.
  """
  sums = jax.ShapeDtypeStruct(left.shape[:-1], jnp.float32)
  call = jax.ffi.ffi_call(_DOT, sums, vmap_method="broadcast_all")
  return call(left, right)


def _dot_backward(rows, grad):
  left, right = rows
  return grad[..., None] * right, grad[..., None] * left


dot.defvjp(lambda *rows: (dot(*rows), rows), _dot_backward)


def squared_norm(rows: jax.Array) -> jax.Array:
  """`layers.squared_norm`: [..., d] float32 -> [...]."""
  return dot(rows, rows)


def stable_order(keys: jax.Array) -> jax.Array:
  """`sampling.stable_order`: [P] uint32 -> [P] int32."""
  order = jax.ShapeDtypeStruct(keys.shape, jnp.int32)
  call = jax.ffi.ffi_call(_ORDER, order, vmap_method="broadcast_all")
  return call(keys)


def largest(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """What `lax.top_k` gives, for k up to n: [B, n] -> [B, k] twice.

  But that of equal values any may be taken, in any order.
  """
  shape = (values.shape[0], k)
  found = [jax.ShapeDtypeStruct(shape, t) for t in (jnp.float32, jnp.int32)]
  return tuple(jax.ffi.ffi_call(_LARGEST, found)(values))


def unseen_item(
  rank: jax.Array, user: jax.Array, indptr: jax.Array, indices: jax.Array
) -> jax.Array:
  """`sampling.unseen_item` for [..., n] ranks of users [...]."""
  call = jax.ffi.ffi_call(
    _UNSEEN,
    jax.ShapeDtypeStruct(rank.shape, jnp.int32),
    vmap_method="expand_dims",  # what all examples share is not repeated
  )
  return call(rank, user, indptr, indices)
