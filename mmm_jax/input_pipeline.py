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

# Items read at a time: the reader wakes its threads for every call, so that an
# item takes half as much of a core with 1,024 as with 128.
_BLOCK = 1024
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
    for start in range(0, len(real) if self.vectors else 0, _BLOCK):
      self._read_vectors(items, real[start : start + _BLOCK], content)
    return content

  def _read_vectors(self, items, places, content):
    """Puts the vectors of `items[places]` there."""
    numbers = self.records[items[places]].tolist()
    records = self.item_source.__getitems__(numbers)
    for name in self.vectors:
      rows = content[name]
      for place, record in zip(places.tolist(), records):
        rows[place] = record[name]
      if name in self.moments:
        rows[places] = self._standardised(name, rows[places])

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


def read(
  content: ItemContent, batches: np.ndarray, config, ahead: int
) -> Iterator[dict]:
  """Content of each of n batches of item ids, given as [n, ...].

  Up to `ahead` of them are read before they are asked for.
  """
  shape = batches.shape[1:]
  flat = batches.reshape(len(batches), -1)
  dataset = grain.MapDataset.source(flat).map(content)
  options = grain.ReadOptions(
    num_threads=min(config.input.threads, ahead),
    prefetch_buffer_size=ahead,
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
  contents = read(content, blocks, config, ahead=config.input.threads)
  with bar:
    for number, batch in enumerate(contents):
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
  chunks_ahead = -(-config.input.prefetch_batches // length)
  fetch = lambda contents: engine.shard(next(contents))
  # One chunk is on its way to the devices while they work on the one before.
  with futures.ThreadPoolExecutor(1) as thread:
    ahead = None
    for order in orders:
      chunks = _chunks(order, length)
      contents = read(content, chunks, config, chunks_ahead)
      for _ in chunks:
        following = thread.submit(fetch, contents)
        if ahead is not None:
          yield ahead.result()
        ahead = following
    if ahead is not None:
      yield ahead.result()


def _chunks(order, length):
  """[S, steps, W] as [chunks, S, length, W]; a short last one ends in PAD."""
  shards, steps, width = order.shape
  order = np.pad(
    order,
    ((0, 0), (0, -steps % length), (0, 0)),
    constant_values=sampling.PAD,
  )
  return order.reshape(shards, -1, length, width).swapaxes(0, 1)


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
