"""Content of items (frames, tokens) on its way from TFDS to the devices.

Grain reads records from the ArrayRecord files in the order of the epoch. If
all content fits `input.content_budget_mb` it is read once and stays on the
devices; otherwise it streams, chunk by chunk. The step sees the same arrays
either way.

Shapes: S data shards, P places in a shard, T steps of a chunk, W items of a
step in a shard, F width of a source.
"""

from collections.abc import Iterator
from concurrent import futures
import dataclasses
import math

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mmm_jax import parallel, sampling

_BLOCK = 256  # items read at a time into what is resident
_SAMPLE = 4096  # items whose vectors tell mean and variance
_ALIGNMENT = 64  # bytes; XLA copies what lies otherwise
_FARTHEST = 10.0  # deviations; a number that is 0 in the sample may be more


@dataclasses.dataclass(frozen=True)
class ItemContent:
  """Content of items by dense id; of nothing (zeros) for PAD."""

  item_source: object  # list of record numbers -> list of dicts of features
  records: np.ndarray  # [N] record number of each item
  vectors: dict[str, int]  # source -> F
  tokens: np.ndarray | None  # [N, L]
  # source -> mean [F] and standard deviation [F] that are taken out
  moments: dict[str, tuple] = dataclasses.field(default_factory=dict)

  def __call__(self, items: np.ndarray) -> dict[str, np.ndarray]:
    """[n] ids -> {source: [n, ...]}."""
    real = np.flatnonzero(items != sampling.PAD)
    content = self.room((len(items),))
    if self.tokens is not None:
      content["text"][real] = self.tokens[items[real]]
    records = []
    if self.vectors and real.size:
      numbers = self.records[items[real]].tolist()
      records = self.item_source.__getitems__(numbers)
    for name in self.vectors:
      rows = content[name]
      for place, record in zip(real.tolist(), records):
        rows[place] = record[name]
      if name in self.moments:
        rows[real] = self._standardised(name, rows[real])
    return content

  def _standardised(self, name, rows):
    mean, deviation = self.moments[name]
    rows = (rows.astype(np.float32) - mean) / deviation
    return np.clip(rows, -_FARTHEST, _FARTHEST)

  def nothing(self) -> dict[str, np.ndarray]:
    content = {
      name: np.zeros(f, np.float16) for name, f in self.vectors.items()
    }
    if self.tokens is not None:
      content["text"] = np.zeros_like(self.tokens[0])
    return content

  def room(self, shape) -> dict[str, np.ndarray]:
    """Nothing, for as many items: {source: [*shape, ...] zeros}."""
    return {
      name: _zeros((*shape, *x.shape), x.dtype)
      for name, x in self.nothing().items()
    }

  @property
  def bytes_per_item(self) -> int:
    return sum(array.nbytes for array in self.nothing().values())

  def fits(self, budget_mb: float) -> bool:
    return self.bytes_per_item * len(self.records) <= budget_mb * 2**20


def _zeros(shape, dtype):
  """Zeros where a device that is a CPU can use them as they lie, uncopied."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.zeros(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def standardised(
  content: ItemContent, present: dict[str, np.ndarray]
) -> ItemContent:
  """The content with vectors of mean 0 and variance 1 in every number.

  Args:
    content: the items' content.
    present: source -> [N] bool, which items have it. The moments are taken
      over at most _SAMPLE of them, from all over the set.
  """
  moments = {}
  for name in content.vectors:
    items = np.flatnonzero(present[name])
    items = items[:: -(-len(items) // _SAMPLE) or 1]
    if not items.size:
      continue
    rows = content(items)[name].astype(np.float32)  # sums of float16 overflow
    # A number that never changes says nothing; it must not be blown up.
    deviation = np.maximum(rows.std(0), 1e-3 * rows.std() + 1e-12)
    moments[name] = rows.mean(0), deviation
  return dataclasses.replace(content, moments=moments)


def read(content: ItemContent, batches: np.ndarray, config) -> Iterator[dict]:
  """Content of each of n batches of item ids, given as [n, ...]."""
  shape = batches.shape[1:]
  # Records are read by the batch, which takes half the time of one by one.
  flat = batches.reshape(len(batches), -1)
  dataset = grain.MapDataset.source(flat).map(content)
  options = grain.ReadOptions(
    num_threads=config.input.threads,
    prefetch_buffer_size=config.input.prefetch_batches,
  )
  for batch in dataset.to_iter_dataset(options):
    yield {n: x.reshape(*shape, *x.shape[1:]) for n, x in batch.items()}


def load_resident(
  content: ItemContent, items: np.ndarray, engine: parallel.Engine, config
) -> dict[str, jax.Array]:
  """All content, in the places of the item stream: {source: [S, P, ...]}."""
  if not content.nothing():
    return {}
  bar = tqdm.tqdm(
    total=items.size, unit="item", desc="content", disable=None, leave=False
  )
  arrays = content.room((items.size,))
  missing = -items.size % _BLOCK
  blocks = np.pad(items.reshape(-1), (0, missing), constant_values=sampling.PAD)
  blocks = blocks.reshape(-1, _BLOCK)
  with bar:
    for number, batch in enumerate(read(content, blocks, config)):
      for name, values in batch.items():
        room = arrays[name][number * _BLOCK :][:_BLOCK]
        room[:] = values[: len(room)]
      bar.update(len(room))
  return engine.shard(
    {name: x.reshape(*items.shape, *x.shape[1:]) for name, x in arrays.items()}
  )


def stream(
  content: ItemContent,
  orders: Iterator[np.ndarray],
  length: int,
  engine: parallel.Engine,
  config,
) -> Iterator[dict[str, jax.Array]]:
  """Content of the coming chunks: {source: [S, T, W, ...]}.

  Args:
    content: the items' content.
    orders: [S, steps, W] item ids of one epoch after the other.
    length: T, steps of a chunk; the last one of an epoch may hold fewer.
    engine: where the arrays go.
    config: the run's config.
  """

  def fetch(batches, shards, width):
    # A short last chunk keeps the shape of the others.
    chunk = content.room((shards, length, width))
    for step, batch in zip(range(length), batches):
      for name, rows in batch.items():
        chunk[name][:, step] = rows
    return engine.shard(chunk)

  # One chunk is fetched while the devices work on the one before.
  with futures.ThreadPoolExecutor(1) as thread:
    ahead = None
    for order in orders:
      shards, steps, width = order.shape
      batches = read(content, order.swapaxes(0, 1), config)
      for _ in range(0, steps, length):
        following = thread.submit(fetch, batches, shards, width)
        if ahead is not None:
          yield ahead.result()
        ahead = following
    if ahead is not None:
      yield ahead.result()


def at_step(content: dict[str, jax.Array], places: jax.Array, step: jax.Array):
  """{source: [S, W, ...]} of one step, cut out of what `stream` gave."""
  del places
  return {name: array[:, step] for name, array in content.items()}


def at_places(
  content: dict[str, jax.Array], places: jax.Array, step: jax.Array
):
  """{source: [S, W, ...]} of one step, picked from what is resident."""
  del step
  rows = jnp.maximum(places, 0)
  pick = jax.vmap(lambda array, row: array[row])
  return {name: pick(array, rows) for name, array in content.items()}
