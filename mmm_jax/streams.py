"""From a data set to what lies on the devices, and from there to a batch.

`build` turns a split data set into two pytrees: `Shards`, of which every
device holds its part, and `Shared`, which every device holds whole. `plan`
puts an epoch in order, `draw_examples` picks positives and negatives ahead of a
dispatch of steps, and `draw_batch` is the beginning of every step.

Shapes: S data shards of this device, T steps of an epoch, W width of a step in
a shard, B = S * W, N items, M users, K networks.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmm_jax import errors, kernels, sampling
from mmm_jax.datasets import networks, splits

_INTERACTIONS, _USERS, _ITEMS = range(3)  # each bin of items has its own
_BINS = 4  # of text length
_MOST_MASKED = 128  # items of a user that are kept from being negatives


class Bin(NamedTuple):
  """A part of the item stream: items whose texts are about as long.

  An epoch spreads each bin over its steps, so that a step can encode short
  texts without the padding that long ones would need.
  """

  start: int  # first place in a shard
  places: int  # in a shard
  width: int  # of a step in a shard
  tokens: int  # most of a text


class Sizes(NamedTuple):
  """Everything that fixes a shape; known before tracing."""

  num_users: int
  num_items: int
  num_train: int
  num_shards: int
  steps: int  # of an epoch
  interaction_width: int
  item_bins: tuple[Bin, ...]
  user_width: int
  max_seen: int  # most training items of a user


class Shards(NamedTuple):
  """The streams, dealt to data shards: leading axis S."""

  number: jax.Array  # [S]
  keys: jax.Array  # [S, uses, 2], the same ones in every shard
  interactions: sampling.Stream  # ids "user", "item", and "row" if used
  items: sampling.Stream  # ids "item", bin behind bin; count [S, bins]
  users: sampling.Stream  # ids "user"


class Rows(NamedTuple):
  """Training interactions of user after user, oldest first where ordered.

  None where a run does not use it.
  """

  items: sampling.Adjacency | None  # of each user
  weight: jax.Array | None  # in the interaction term


class Shared(NamedTuple):
  """Look-up arrays that every device holds."""

  seen: sampling.Adjacency  # sorted training items of each user
  history: sampling.Adjacency  # the same, shuffled
  rows: Rows  # what is known of each training interaction
  networks: dict[str, sampling.Adjacency]
  membership: jax.Array  # [M, K] bool: has neighbours in network k
  present: dict[str, jax.Array]  # source -> [N] bool


class Plan(NamedTuple):
  """Order of an epoch: places in the streams, [S, T, W], -1 for none."""

  interactions: jax.Array
  items: jax.Array
  users: jax.Array


def measure(dataset, split, lengths, config) -> Sizes:
  """The sizes of a run.

  Args:
    dataset: the set.
    split: its split.
    lengths: [N] words of every item's text, or None if texts are not read.
    config: the run's config.

  Raises:
    errors.InputError: there is nothing to train on.
  """
  num_shards, batch_size = config.data_shards, config.batch_size
  train = split.part == splits.TRAIN
  num_train = int(train.sum())
  if not num_train:
    raise errors.InputError(
      f"split {config.split.protocol!r} of {dataset.name} leaves no training"
      " interaction; give another split.protocol or a larger set"
    )
  steps = math.ceil(num_train / batch_size)
  width = lambda size: math.ceil(math.ceil(size / num_shards) / steps)
  num_items = len(dataset.items)
  return Sizes(
    num_users=len(dataset.users),
    num_items=num_items,
    num_train=num_train,
    num_shards=num_shards,
    steps=steps,
    interaction_width=batch_size // num_shards,
    item_bins=_bins(lengths, num_items, width(num_items), num_shards),
    user_width=width(len(dataset.users)),
    max_seen=int(np.bincount(dataset.user[train]).max()),
  )


def _bins(lengths, num_items, width, num_shards) -> tuple[Bin, ...]:
  """Bins that together are no wider than the undivided stream."""
  bins, start = [], 0
  for part, items in _cut(lengths, num_items, width):
    places = math.ceil(len(items) / num_shards)
    tokens = 0 if lengths is None else max(int(lengths[items].max()), 1)
    bins.append(Bin(start, places, part, tokens))
    start += places
  return tuple(bins)


def _cut(lengths, num_items, width) -> list[tuple]:
  """(width, items) of every bin: as many items for each place of a step."""
  if lengths is None:
    return [(width, np.arange(num_items))]
  widths = [len(x) for x in np.array_split(range(width), min(_BINS, width))]
  ends = np.cumsum(widths) * num_items // width
  by_length = np.argsort(lengths, kind="stable")
  return list(zip(widths, np.split(by_length, ends[:-1])))


def build(
  dataset, split, sizes, used_networks, present, lengths, config
) -> tuple:
  """`Shards` and `Shared` of a run, as NumPy arrays.

  Args:
    dataset: the set.
    split: its split.
    sizes: from `measure`.
    used_networks: {name: datasets.base.Network}, in the model's order.
    present: source -> [N] bool, of the sources that the model reads.
    lengths: as for `measure`.
    config: the run's config.
  """
  train = split.part == splits.TRAIN
  user, item = dataset.user[train], dataset.item[train]
  pairs = {"user": user, "item": item}
  num_users, num_items = sizes.num_users, sizes.num_items
  order = np.lexsort((item, user))
  indptr = np.concatenate(
    [[0], np.bincount(user, minlength=num_users).cumsum()]
  )
  seen = networks.Network(indptr, item[order])
  rows = _rows(dataset, train, indptr, config.remedies)
  if any(part is not None for part in rows):
    pairs["row"] = np.arange(len(user))
  deal = lambda **ids: sampling.deal(config.seed, config.data_shards, **ids)
  width = sum(each.width for each in sizes.item_bins)
  items = [deal(item=own) for _, own in _cut(lengths, num_items, width)]
  shards = Shards(
    number=np.arange(config.data_shards, dtype=np.int32),
    keys=np.stack([sampling.branches(config.seed)] * config.data_shards),
    interactions=deal(**pairs),
    items=sampling.Stream(
      {"item": np.concatenate([part.ids["item"] for part in items], axis=1)},
      np.stack([part.count for part in items], axis=1),
    ),
    users=deal(user=np.arange(num_users)),
  )
  shared = Shared(
    seen=_adjacency(seen.indptr, seen.indices),
    history=_shuffled(seen, config.seed),
    rows=rows,
    networks={
      name: _shuffled(network, config.seed)
      for name, network in used_networks.items()
    },
    membership=np.stack(
      [np.diff(network.indptr) > 0 for network in used_networks.values()], 1
    )
    if used_networks
    else np.zeros((num_users, 0), bool),
    present=present,
  )
  return shards, shared


def _rows(dataset, train, indptr, remedies) -> Rows:
  """What a run uses of the order and the counts of training interactions.

  Raises:
    errors.InputError: the set does not tell it, or it would change nothing.
  """
  items = weight = None
  if remedies.history_around:
    if not remedies.history_in_user:
      raise errors.InputError(
        "remedies.history_around: found True, valid: False, as"
        " remedies.history_in_user is 0"
      )
    if not dataset.ordered:
      raise errors.InputError(
        f"remedies.history_around: found True, valid: False, as {dataset.name}"
        " does not tell in which order a user watched items"
      )
    items = _adjacency(indptr, dataset.item[train].astype(np.int32))
  if remedies.count_power:
    if dataset.count is None:
      raise errors.InputError(
        f"remedies.count_power: found {remedies.count_power}, valid: 0, as"
        f" {dataset.name} does not tell how often a user watched an item"
      )
    weight = _weights(
      dataset.user[train], dataset.count[train], remedies.count_power
    )
  return Rows(items, weight)


def _weights(user, count, power) -> np.ndarray:
  """What each training interaction weighs in the interaction term.

  c_ij = ln(1 + n_ij)^power, n_ij times that user i watched item j, divided by
  its mean over the user.
  """
  weight = np.log1p(count) ** power
  mean = np.bincount(user, weight) / np.maximum(np.bincount(user), 1)
  return (weight / mean[user]).astype(np.float32)


def choose_networks(dataset, split, config) -> tuple[dict, dict]:
  """The networks that the config names: explicit ones and `co_like`.

  Only training interactions enter `co_like`; a test of every edge follows.

  Returns:
    {name: network}, and {name: number} to log: edges, and what H5 is about.

  Raises:
    errors.InputError: a network is named that the set does not have.
  """
  known = (*dataset.networks, "co_like")
  names = _named(config.model.networks, known, "network", dataset)
  chosen = {n: dataset.networks[n] for n in names if n != "co_like"}
  if config.network.symmetrise:
    chosen = {n: networks.symmetrised(net) for n, net in chosen.items()}
  facts = {}
  if "co_like" in names:
    train = split.part == splits.TRAIN
    user, item = dataset.user[train], dataset.item[train]
    derived = networks.co_like(
      user,
      item,
      len(dataset.users),
      len(dataset.items),
      degree_cap=config.network.co_like_degree,
    )
    leaked = networks.edges_without_common_item(derived, user, item)
    if leaked:
      raise AssertionError(
        f"{leaked} co_like edges have no common training item (H5)"
      )
    chosen["co_like"] = derived
    facts["H5/co_like_edges_without_common_item"] = leaked
  if config.controls.networks == "rewired":
    chosen = {
      name: networks.rewired(network, (config.seed, number))
      for number, (name, network) in enumerate(chosen.items())
    }
  facts |= {f"edges/{n}": len(net.indices) for n, net in chosen.items()}
  return chosen, facts


def choose_sources(dataset, config) -> tuple[str, ...]:
  """Names of the content sources that the config asks for.

  Raises:
    errors.InputError: a source is named that the set does not have.
  """
  known = (*dataset.vectors, *(("text",) if "text" in dataset.present else ()))
  return _named(config.model.sources, known, "source", dataset)


def _named(wanted: str, known, kind, dataset) -> tuple[str, ...]:
  """The names in a comma-separated list; "*" is all that are known."""
  if wanted == "*":
    return tuple(known)
  names = tuple(name.strip() for name in wanted.split(",") if name.strip())
  for name in names:
    if name not in known:
      raise errors.InputError(
        f"{dataset.name} has no {kind} {name!r} (model.{kind}s); it has:"
        f" {', '.join(known) or 'none'}"
      )
  return names


def _shuffled(network, seed) -> sampling.Adjacency:
  """Neighbour lists in a random order, so that a window of one is a sample."""
  row = np.repeat(np.arange(len(network.indptr) - 1), np.diff(network.indptr))
  chance = np.random.default_rng(seed).random(len(row))
  indices = network.indices[np.lexsort((chance, row))].astype(np.int32)
  # A network of nobody has an entry, too, that nobody owns: a gather from an
  # empty array is an error.
  indices = indices if indices.size else np.zeros(1, np.int32)
  return _adjacency(network.indptr, indices)


def _adjacency(indptr, indices) -> sampling.Adjacency:
  """Lists for a device, where 64-bit integers are off.

  Raises:
    errors.InputError: more entries than 32 bits can number.
  """
  most = np.iinfo(np.int32).max
  if indptr[-1] > most:
    raise errors.InputError(
      f"lists of items or neighbours have {indptr[-1]:,} entries; a device can"
      f" number {most:,}. Give fewer interactions, or for co_like a smaller"
      " network.co_like_degree"
    )
  return sampling.Adjacency(indptr.astype(np.int32), indices)


def plan(
  shards: Shards, epoch: jax.Array, *, sizes: Sizes, in_cpp: bool = False
) -> Plan:
  """Order of this device's shards in an epoch."""

  def order(stream, name, width, packed):
    return sampling.epoch_order(
      stream,
      shards.number,
      name=name,
      keys=shards.keys[0],
      epoch=epoch,
      num_shards=sizes.num_shards,
      steps=sizes.steps,
      width=width,
      packed=packed,
      in_cpp=in_cpp,
    )

  def items(number):
    own = sizes.item_bins[number]
    ids = shards.items.ids["item"][:, own.start : own.start + own.places]
    part = sampling.Stream({"item": ids}, shards.items.count[:, number])
    places = order(part, _ITEMS + number, own.width, False)
    return jnp.where(places < 0, places, own.start + places)

  return Plan(
    order(shards.interactions, _INTERACTIONS, sizes.interaction_width, True),
    jnp.concatenate([items(n) for n in range(len(sizes.item_bins))], axis=-1),
    order(shards.users, _USERS, sizes.user_width, False),
  )


class Examples(NamedTuple):
  """Positives of a step and what they are told from."""

  user: jax.Array  # [S, W], PAD where there is none
  item: jax.Array  # [S, W]
  row: jax.Array | None  # [S, W], in `Rows`
  negatives: jax.Array  # [B, n], or for the softmax [n']


def draw_examples(
  shards: Shards,
  shared: Shared,
  plan: Plan,
  step: jax.Array,
  *,
  sizes: Sizes,
  config,
) -> Examples:
  """The positives and negatives of a step on one device.

  They need nothing that a step changes. Arguments are those of `draw_batch`.
  """
  places = plan.interactions[:, jax.lax.rem(step, sizes.steps)]
  pairs = sampling.take(shards.interactions, places)
  negatives = _negatives(
    pairs["user"], places, shards, shared, step, sizes, config
  )
  return Examples(pairs["user"], pairs["item"], pairs.get("row"), negatives)


def draw_batch(
  shards: Shards,
  shared: Shared,
  plan: Plan,
  examples: Examples,
  content: dict[str, jax.Array],
  step: jax.Array,
  *,
  sizes: Sizes,
  config,
  num_devices: int,
) -> dict:
  """The batch of a step on one device.

  Args:
    shards: this device's part of the streams.
    shared: look-up arrays.
    plan: order of the epoch.
    examples: the step's, from `draw_examples`.
    content: {source: [S, W, ...]} of the step's items.
    step: finished updates of the run.
    sizes: shapes.
    config: the run's config.
    num_devices: devices that share the batch.

  Returns:
    `user`, `item` [B]; `weight` [B] of each in the interaction term, None if
    all are 1; `negatives` [B, n], or for the softmax [n'] and
    `seen_negatives` [B, n'], which of them are positives of the user;
    `stream_item` [S, W]; `vectors` {source: [S, W, F]}; `tokens`, one
    [S, width, L] for every bin of items, or none;
    `present` {source: [S, W]}; `stream_user` [U]; `neighbours` {network:
    [U, A]}; `user_neighbours` {network: [B, A]}; `history` [B, A], training
    items of the user but not the positive one; `membership` [B, K];
    `shared_fraction`, this device's part of rows that all devices hold.
  """
  epoch, at = jax.lax.div(step, sizes.steps), jax.lax.rem(step, sizes.steps)
  stream_item = sampling.take(shards.items, plan.items[:, at])["item"]
  stream_user = sampling.take(shards.users, plan.users[:, at])["user"]
  stream_user = stream_user.reshape(-1)
  # Of the networks and of the users' own items, which are a network, too.
  *draws, history_draw = sampling.window_draws(
    shards.keys[0], epoch, len(shared.networks) + 1
  )
  window = functools.partial(
    sampling.neighbours, cap=config.network.neighbour_cap
  )
  drawn = lambda ids: {
    name: window(ids, network, draw=draw)
    for draw, (name, network) in zip(draws, shared.networks.items())
  }
  content = dict(content)
  tokens = content.pop("text", None)
  user, item = examples.user.reshape(-1), examples.item.reshape(-1)
  negatives, rows = examples.negatives, shared.rows
  window_of_items = functools.partial(
    window, user, shared.history, draw=history_draw
  )
  if rows.items is None:
    history = window_of_items()
  else:
    history = sampling.around(
      user,
      examples.row.reshape(-1),
      rows.items,
      cap=config.network.neighbour_cap,
    )
  seen_negatives = None
  if config.interaction_loss == "softmax":
    own = window_of_items(cap=min(sizes.max_seen, _MOST_MASKED))
    seen_negatives = sampling.seen_among(
      negatives, own, num_items=sizes.num_items
    )
  return {
    "user": user,
    "item": item,
    "weight": None
    if rows.weight is None
    else rows.weight.at[examples.row.reshape(-1)].get(mode="clip"),
    "negatives": negatives,
    "seen_negatives": seen_negatives,
    "shared_fraction": 1 / num_devices,
    "stream_item": stream_item,
    "vectors": content,
    "tokens": _words(tokens, stream_item, sizes.item_bins),
    "present": {
      name: present.at[stream_item].get(mode="fill", fill_value=False)
      for name, present in shared.present.items()
    },
    "stream_user": stream_user,
    "neighbours": drawn(stream_user),
    "user_neighbours": drawn(user),
    # Without what is to be predicted.
    "history": jnp.where(history == item[:, None], sampling.PAD, history),
    "membership": shared.membership.at[user].get(mode="fill", fill_value=False),
  }


def _words(tokens, item, bins):
  """Rows of the word table by bin, PAD where there is no word or no item.

  What stands in the place of no item is another item's text if the content is
  resident; its words must not count as touched.
  """
  if tokens is None:
    return ()
  real = (tokens > 0) & (item != sampling.PAD)[..., None]  # 0 is padding
  words = jnp.where(real, tokens.astype(jnp.int32), sampling.PAD)
  parts = jnp.split(words, np.cumsum([each.width for each in bins])[:-1], 1)
  return tuple(part[..., : each.tokens] for part, each in zip(parts, bins))


def _negatives(user, places, shards, shared, step, sizes, config):
  if config.interaction_loss == "softmax":
    return sampling.shared_negatives(
      keys=shards.keys[0],
      step=step,
      count=config.losses.softmax.shared_negatives,
      num_items=sizes.num_items,
    )
  drawn = sampling.negatives(
    user,
    places,
    shards.number,
    shared.seen,
    keys=shards.keys[0],
    step=step,
    count=config.negatives.per_positive,
    num_items=sizes.num_items,
    max_seen=sizes.max_seen,
    resample=config.negatives.resample,
    in_cpp=kernels.load(config),
  )
  return drawn.reshape(-1, drawn.shape[-1])
