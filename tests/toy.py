"""Runs that are small enough for a test and need no files.

A `Data` is what a builder and a split would give; `make_run` makes a run of
it, and a `Session` trains it step by step without logs and checkpoints.
"""

import dataclasses
import functools
import types

import jax
import numpy as np

from mmm_jax import assemble, input_pipeline, parallel, streams, update
from mmm_jax.datasets import networks as networks_lib
from mmm_jax.datasets import splits
import runs


def get_config(variants="", **changes):
  """A shrunken config; `a__b=value` changes the key a.b."""
  config = runs.config(variants)
  with config.unlocked():
    config.model.dim = 8
    config.batch_size = 16
    config.data_shards = 8
    config.num_categories = min(config.num_categories, 3)
    config.text.filters = 4
    config.text.widths = (2, 3)
    config.network.neighbour_cap = 4
    config.losses.softmax.shared_negatives = 8
    config.tables.init_scale = 0.5
    config.log.tensorboard = False
    config.log.every_steps = 50
    for path, value in changes.items():
      *folders, key = path.split("__")
      functools.reduce(getattr, folders, config)[key] = value
  return config


@dataclasses.dataclass
class Data:
  """A split data set in memory; every interaction trains unless `part` says."""

  num_users: int
  num_items: int
  user: np.ndarray
  item: np.ndarray
  networks: dict[str, list] = dataclasses.field(default_factory=dict)
  vectors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  tokens: np.ndarray | None = None
  words: np.ndarray | None = None
  absent: dict[str, list] = dataclasses.field(default_factory=dict)
  part: np.ndarray | None = None
  count: np.ndarray | None = None
  ordered: bool = False  # then by item

  @functools.cached_property
  def dataset(self):
    """Its `datasets.base.Dataset`, as far as training reads one."""
    order = np.lexsort((self.item, self.user))
    sources = (*self.vectors, *(("text",) if self.tokens is not None else ()))
    return types.SimpleNamespace(
      name="toy",
      users=np.array([f"u{i}" for i in range(self.num_users)], object),
      items=np.array([f"v{j}" for j in range(self.num_items)], object),
      user=np.asarray(self.user, np.int32)[order],
      item=np.asarray(self.item, np.int32)[order],
      ordered=self.ordered,
      count=None if self.count is None else np.asarray(self.count)[order],
      networks={n: as_network(lists) for n, lists in self.networks.items()},
      vectors={n: x.shape[1] for n, x in self.vectors.items()},
      present={n: self._present(n) for n in sources},
      records=np.arange(self.num_items),
      item_source=_Source(self.vectors),
      title=np.array([f"title {j}" for j in range(self.num_items)], object),
      category=None,
      statistics={},
      fingerprint="toy",
    )

  @functools.cached_property
  def split(self):
    order = np.lexsort((self.item, self.user))
    part = np.zeros(len(order), np.int8) if self.part is None else self.part
    return splits.Split(np.asarray(part, np.int8)[order], "toy")

  def _present(self, source):
    present = np.ones(self.num_items, bool)
    present[self.absent.get(source, [])] = False
    return present


@dataclasses.dataclass(frozen=True)
class _Source:
  vectors: dict

  def __getitems__(self, items):
    return [
      {name: rows[item] for name, rows in self.vectors.items()}
      for item in items
    ]


def as_network(lists) -> networks_lib.Network:
  """Neighbour lists as CSR; `lists[i]` are the neighbours of user i."""
  indptr = np.cumsum([0, *map(len, lists)])
  return networks_lib.Network(
    indptr, np.array(sum(map(list, lists), []), np.int32)
  )


def random_data(num_users, num_items, *, seed=0, per_user=6) -> Data:
  """Structureless data with two sources and two networks, some lacking."""
  rng = np.random.default_rng(seed)
  pick = lambda size, most: rng.permutation(size)[: rng.integers(1, most + 1)]
  items = [pick(num_items, per_user) for _ in range(num_users)]
  lists = lambda: [
    [] if i % 5 == 0 else sorted(set(pick(num_users, 7).tolist()) - {i})
    for i in range(num_users)
  ]
  tokens = rng.integers(1, 12, (num_items, 5)).astype(np.int32)
  # Padding only behind the words, as `features.encode` has it.
  tokens[:, 3:] *= np.cumprod(rng.random((num_items, 2)) < 0.5, 1)
  return Data(
    num_users=num_users,
    num_items=num_items,
    user=np.repeat(np.arange(num_users), [len(own) for own in items]),
    item=np.concatenate(items),
    networks={"follow": lists(), "friend": lists()},
    vectors={"visual": rng.standard_normal((num_items, 6)).astype(np.float16)},
    tokens=tokens,
    words=(0.5 * rng.standard_normal((12, 4))).astype(np.float32),
    absent={"visual": [1, 4], "text": [2]},
  )


def make_run(config, data: Data) -> assemble.Run:
  """What `assemble.assemble` would make of the data.

  "*" means the sources and the explicit networks; `co_like` only by name.
  """
  if config.model.networks == "*":
    config.model.networks = ",".join(data.networks)
  has_text = "text" in streams.choose_sources(data.dataset, config)
  text = assemble.Text(data.tokens, data.words) if has_text else assemble.Text()
  return assemble.build(config, data.dataset, data.split, text)


def make_engine(devices=1, kind="mesh") -> parallel.Engine:
  return parallel.Engine(tuple(jax.devices()[:devices]), kind == "pmap")


class Session:
  """A run in training: `state` is on the host, between chunks.

  Args:
    run: the run.
    state: to start from; the run's initial one if None.
    engine: one device if None.
  """

  def __init__(self, run, *, state=None, engine=None):
    self.run, self.engine = run, engine or make_engine()
    self.state = to_host(state or assemble.initial_state(run))
    self._shards = self.engine.shard(self.engine.own(run.shards))
    self._shared = self.engine.replicate(run.shared)
    self._content = input_pipeline.load_resident(
      run.content, run.shards.items.ids["item"], self.engine, run.config
    )
    self._plan = self.engine.map(
      functools.partial(streams.plan, sizes=run.sizes),
      (parallel.SHARDED, parallel.HOST),
      parallel.SHARDED,
    )
    self._chunk = update.make_train_chunk(
      run.model,
      run.config,
      run.sizes,
      run.weights,
      self.engine,
      resident=True,
    )

  def train(self, num_steps) -> dict[str, np.ndarray]:
    """Takes `num_steps` steps of one epoch; the values of each."""
    epoch = int(self.state.step) // self.run.sizes.steps
    plan = self._plan(self._shards, np.int32(epoch))
    state, series = self._chunk(
      np.int32(num_steps),
      self.engine.replicate(self.state),
      self._shards,
      self._shared,
      plan,
      self._content,
    )
    self.state = to_host(self.engine.first(state))
    values, watched = self.engine.first(series).by_name()
    with np.errstate(invalid="ignore"):  # a step may hold nothing to watch
      values |= {name: sums / rows for name, (sums, rows) in watched.items()}
    return {name: series[:num_steps] for name, series in values.items()}

  def table_gradients(self) -> dict[str, float]:
    """What `update.table_gradients` finds in the first batch."""
    run = self.run
    measure = update.make_table_gradients(
      run.model, run.config, run.sizes, run.weights, self.engine, resident=True
    )
    plan = self._plan(self._shards, np.int32(0))
    norms = measure(
      np.int32(0),
      self.engine.replicate(self.state),
      self._shards,
      self._shared,
      plan,
      self._content,
    )
    norms = jax.device_get(self.engine.first(norms))
    return {name: float(norm) for name, norm in norms.items()}

  def train_epochs(self, epochs) -> dict[str, np.ndarray]:
    """Whole epochs, in the chunks that the config asks for."""
    steps = self.run.sizes.steps
    size = update.chunk_steps(self.run.config, self.run.sizes)
    parts = [
      self.train(min(size, steps - at))
      for _ in range(epochs)
      for at in range(0, steps, size)
    ]
    return {
      name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }


def to_host(tree):
  """Copies, because the host's view of donated memory does not last."""
  return jax.tree.map(np.array, jax.device_get(tree))


def with_categories(state, assignment, centroids, vectors=None):
  """The state after a made-up K-means."""
  categories = state.categories.replace(
    assignment=np.asarray(assignment, np.int32),
    centroids=np.asarray(centroids, np.float32),
  )
  params = dict(state.params)
  if vectors is not None:
    params["category_vectors"] = np.asarray(vectors, np.float32)
  return state.replace(categories=categories, params=params)


def draw_epoch(run, epoch=0, shards=slice(None), tokens=None) -> list[dict]:
  """The ids of every batch of an epoch, drawn by the run's own code.

  `shards` picks the data shards that the drawing device holds; the words of
  `tokens` [N, L] are drawn, too.
  """
  shards = jax.tree.map(lambda x: jax.numpy.asarray(x)[shards], run.shards)
  shared = jax.tree.map(jax.numpy.asarray, run.shared)
  plan = streams.plan(shards, np.int32(epoch), sizes=run.sizes)

  content = {}
  if tokens is not None:
    items = np.minimum(run.shards.items.ids["item"], len(tokens) - 1)
    content["text"] = jax.numpy.asarray(tokens[items])

  @jax.jit
  def draw(step):
    settings = {"sizes": run.sizes, "config": run.config}
    examples = streams.draw_examples(shards, shared, plan, step, **settings)
    places = plan.items[:, jax.lax.rem(step, run.sizes.steps)]
    return streams.draw_batch(
      shards,
      shared,
      plan,
      examples,
      input_pipeline.at_places(content, places, step),
      step,
      num_devices=1,
      **settings,
    )

  first = epoch * run.sizes.steps
  steps = range(first, first + run.sizes.steps)
  return [jax.device_get(draw(np.int32(step))) for step in steps]
