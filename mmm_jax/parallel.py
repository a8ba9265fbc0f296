"""Devices, and the two ways to map one per-device function over them.

A function is written for one device: it sees the whole of what is replicated,
its own part of what is sharded (leading axis: data shards), and reduces over
the axis named "data". `Engine.map` runs it on one device (`jit`), on several
by `pmap`, or by `shard_map` over a `Mesh`.
"""

from collections.abc import Callable
import dataclasses

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from mmm_jax import errors

AXIS = "data"
ENGINES = ("pmap", "mesh")  # the values of parallel.engine

# What an argument or a result of a mapped function is.
REPLICATED, SHARDED, HOST = "replicated", "sharded", "host"


@dataclasses.dataclass(frozen=True)
class Engine:
  """Where a run's arrays live and how its functions are mapped."""

  devices: tuple
  by_pmap: bool

  @property
  def num_devices(self) -> int:
    return len(self.devices)

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(self.devices), (AXIS,))

  def replicate(self, tree):
    """Host values -> a copy on every device."""
    if self.by_pmap:
      copy = lambda x: np.broadcast_to(x, (self.num_devices, *np.shape(x)))
      tree = jax.tree.map(lambda x: copy(np.asarray(x)), tree)
      return jax.device_put(tree, NamedSharding(self.mesh, P(AXIS)))
    return jax.device_put(tree, NamedSharding(self.mesh, P()))

  def shard(self, tree):
    """Host values with leading axis of data shards -> a part on each device."""
    if self.by_pmap:
      split = lambda x: x.reshape(
        self.num_devices, x.shape[0] // self.num_devices, *x.shape[1:]
      )
      tree = jax.tree.map(split, tree)
    return jax.device_put(tree, NamedSharding(self.mesh, P(AXIS)))

  def first(self, tree):
    """A replicated tree as plain arrays on the first device."""
    if self.by_pmap:
      return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)

  def whole(self, tree):
    """A sharded tree as host arrays with the leading axis of data shards."""
    arrays = jax.device_get(tree)
    if self.by_pmap:
      return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
    return arrays

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
