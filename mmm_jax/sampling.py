"""What a step trains on, drawn on the device: shuffles, negatives, neighbours.

The four kinds of things in Eq. 17 are four streams. Interactions, items and
users are dealt once to `S` data shards, whose number does not depend on the
machine; the order of a shard is a function of (seed, epoch, shard) and a
negative one of (seed, step, shard), so every number of devices that divides
`S` draws the same batches.

Shapes: S data shards of this device, P places in a shard, W width of a step
in a shard, B = S * W examples of a step, K networks.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mmm_jax import kernels

# An id that points nowhere: gathers of it give zeros, scatters drop it.
PAD = np.iinfo(np.int32).max

_STREAMS = 6  # at most: interactions, users, four bins of items

# Every use of randomness has its own branch of the seed.
_USES = _SHUFFLE, _NEGATIVES, _SHARED, _NEIGHBOURS = range(4)


class Stream(NamedTuple):
  """Ids dealt to shards; places behind `count` hold PAD."""

  ids: dict[str, jax.Array]  # each [S, P] int32
  count: jax.Array  # [S] int32


class Adjacency(NamedTuple):
  """Neighbour lists in one array: row i owns indptr[i] to indptr[i + 1]."""

  indptr: jax.Array  # [rows + 1] int32
  indices: jax.Array  # [edges] int32


def branches(seed: int) -> jax.Array:
  """A key for every use of randomness, [uses, 2] uint32.

  A run's data and no part of its programs, which so are compiled once for all
  seeds.
  """
  branch = lambda use: jax.random.fold_in(jax.random.key(seed), use)
  return jax.random.key_data(jax.vmap(branch)(jnp.arange(len(_USES))))


def _key(keys: jax.Array, use: int) -> jax.Array:
  return jax.random.wrap_key_data(keys[use])


def deal(seed: int, num_shards: int, **ids: np.ndarray) -> Stream:
  """Shuffles rows of ids and deals them round-robin to the shards (host)."""
  size = len(next(iter(ids.values())))
  places = -(-size // num_shards)
  order = np.random.default_rng((seed, size)).permutation(size)
  padded = np.full(places * num_shards, -1)
  padded[:size] = order
  by_shard = padded.reshape(places, num_shards).T
  dealt = {
    name: np.where(by_shard < 0, PAD, values[by_shard]).astype(np.int32)
    for name, values in ids.items()
  }
  return Stream(dealt, (by_shard >= 0).sum(1).astype(np.int32))


def epoch_order(
  stream: Stream,
  shard: jax.Array,
  *,
  name: int,
  keys: jax.Array,
  epoch: jax.Array,
  num_shards: int,
  steps: int,
  width: int,
  packed: bool,
  in_cpp: bool = False,
) -> jax.Array:
  """Places of a stream in the order in which an epoch visits them.

  Args:
    stream: the ids, [S, P].
    shard: numbers of this device's shards, [S].
    name: tells the streams of one run apart.
    keys: `branches` of the run.
    epoch: number of finished epochs.
    num_shards: data shards on all devices.
    steps: steps in an epoch.
    width: places that a step takes from a shard.
    packed: fill steps to the brim and leave the last one short (the
      interactions), or spread the places evenly over all steps.
    in_cpp: whether `kernels` are loaded, and to be used.

  Returns:
    [S, steps, W] int32 places; -1 where a step has none left. Every place
    occurs exactly once.
  """
  places = next(iter(stream.ids.values())).shape[1]
  key = jax.random.fold_in(_key(keys, _SHUFFLE), name)
  key = jax.random.fold_in(key, epoch)

  def order_of_shard(number, count):
    bits = jax.random.bits(jax.random.fold_in(key, number), (places,))
    # 31 bits, so that the empty places can sort behind all real ones.
    bits = jnp.where(jnp.arange(places) < count, bits >> 1, jnp.uint32(PAD) + 1)
    order = (kernels.stable_order if in_cpp else stable_order)(bits)
    step = jnp.arange(steps)
    if packed:
      taken = jnp.clip(count - step * width, 0, width)
    else:
      # What does not come out even falls to a run of steps that begins
      # elsewhere in each shard and stream: together they give each step the
      # same.
      whole, rest = lax.div(count, steps), lax.rem(count, steps)
      turn = lax.div(number * steps, num_shards) + name * steps // _STREAMS
      taken = whole + (lax.rem(step + turn, steps) < rest)
    end = jnp.cumsum(taken)
    at = (end - taken)[:, None] + jnp.arange(width)
    return jnp.where(at < end[:, None], order.at[at].get(mode="clip"), -1)

  return jax.vmap(order_of_shard)(shard, stream.count)


def stable_order(keys: jax.Array) -> jax.Array:
  """What `jnp.argsort(keys)` gives, for [P] uint32: [P] int32.

  In passes from the lowest bits to the highest, each of which sorts as many of
  a key's bits as fit into a number beside its place: two passes for up to 2**16
  places, four for up to 2**24. XLA sorts single numbers on a CPU in a sixth of
  the time of pairs.
  """
  size = keys.shape[0]
  for_place = max(1, (size - 1).bit_length())
  for_key = 32 - for_place
  place = jnp.arange(size, dtype=jnp.uint32)
  order = place
  for lowest in range(0, 32, for_key):
    part = keys[order] >> lowest & jnp.uint32(2**for_key - 1)
    passed = lax.sort(part << for_place | place)
    order = order[passed & jnp.uint32(2**for_place - 1)]
  return order.astype(jnp.int32)


def take(stream: Stream, places: jax.Array) -> dict[str, jax.Array]:
  """Ids at `places` [S, W] of each shard; PAD where a place is -1."""
  found = {
    name: jnp.take_along_axis(ids, jnp.maximum(places, 0), axis=1)
    for name, ids in stream.ids.items()
  }
  return {n: jnp.where(places < 0, PAD, ids) for n, ids in found.items()}


def bounded(bits: jax.Array, bound: jax.Array) -> jax.Array:
  """Maps 32 random bits to 0 ... bound - 1 without division.

  The upper half of the 64-bit product bits * bound (Lemire 2019), put
  together from 16-bit halves because 64-bit integers are off in JAX. The bias
  is at most bound / 2**32.
  """
  bits, bound = bits.astype(jnp.uint32), jnp.asarray(bound).astype(jnp.uint32)
  low, high = bits & 0xFFFF, bits >> 16
  bound_low, bound_high = bound & 0xFFFF, bound >> 16
  middle = high * bound_low + (low * bound_low >> 16)
  carry = (middle & 0xFFFF) + low * bound_high
  upper = high * bound_high + (middle >> 16) + (carry >> 16)
  return upper.astype(jnp.int32)


def unseen_item(
  rank: jax.Array, user: jax.Array, seen: Adjacency, *, max_seen: int
) -> jax.Array:
  """The rank-th item that a user has not seen, in the order of item ids.

  Below the k-th seen item s_k lie s_k - k unseen ones, which grows with k: so
  the wanted item is rank + #{k: s_k - k <= rank}, found by bisection in the
  user's sorted list. No draw is ever rejected.

  Args:
    rank: any shape, 0 ... (unseen items of that user) - 1.
    user: same shape.
    seen: sorted training items of every user.
    max_seen: length of the longest list.
  """
  start = seen.indptr[user]
  size = seen.indptr[user + 1] - start
  rounds = int(max_seen).bit_length()

  def grow(number, below):
    more = below + (1 << (rounds - 1 - number))
    item = seen.indices.at[start + more - 1].get(mode="clip")
    fits = (more <= size) & (item - (more - 1) <= rank)
    return jnp.where(fits, more, below)

  # A loop of the device: unrolled, XLA works out each round from the first on.
  below = lax.fori_loop(0, rounds, grow, jnp.zeros_like(rank))
  return rank + below


def negatives(
  user: jax.Array,
  places: jax.Array,
  shard: jax.Array,
  seen: Adjacency,
  *,
  keys: jax.Array,
  step: jax.Array,
  count: int,
  num_items: int,
  max_seen: int,
  resample: bool,
  in_cpp: bool = False,
) -> jax.Array:
  """Items for every example that are no training positives of its user.

  Args:
    user: [S, W], PAD where there is no example.
    places: [S, W] places of the examples in their shards.
    shard: [S] shard numbers.
    seen: sorted training items of every user.
    keys: `branches` of the run.
    step: finished updates.
    count: negatives of an example, n.
    num_items: N.
    max_seen: most training items of a user.
    resample: new negatives in each epoch; otherwise an example keeps the same
      ones for ever, as the paper's text has it.
    in_cpp: whether `kernels` are loaded, and to be used.

  Returns:
    [S, W, n] int32, uniform over the user's unseen items.
  """
  key = _key(keys, _NEGATIVES)
  if resample:
    key, places = jax.random.fold_in(key, step), jnp.arange(user.shape[1])
  bits = bits_at(key, shard[:, None, None], places[..., None], range(count))
  real = user != PAD
  user = jnp.where(real, user, 0)
  unseen = num_items - (seen.indptr[user + 1] - seen.indptr[user])
  rank = bounded(bits, unseen[..., None])
  if in_cpp:
    item = kernels.unseen_item(rank, user, *seen)
  else:
    everyone = jnp.broadcast_to(user[..., None], rank.shape)
    item = unseen_item(rank, everyone, seen, max_seen=max_seen)
  # A user who has seen everything has no negative.
  real = real & (unseen > 0)
  return jnp.where(real[..., None], item, PAD)


def shared_negatives(
  *, keys: jax.Array, step: jax.Array, count: int, num_items: int
) -> jax.Array:
  """[n'] items, uniform with replacement, the same on every device."""
  key = jax.random.fold_in(_key(keys, _SHARED), step)
  bits = jax.random.bits(key, (count,))
  return bounded(bits, num_items)


def seen_among(
  shared: jax.Array, own: jax.Array, *, num_items: int
) -> jax.Array:
  """Which of the shared negatives are among each user's own items.

  Args:
    shared: [n'] items, the same one more than once perhaps.
    own: [B, A] items of every user, PAD behind them.
    num_items: N.

  Returns:
    [B, n'] bool.
  """
  count = shared.shape[0]
  # One place of each item among the shared ones stands for all of them.
  place = jnp.full(num_items, count).at[shared].set(jnp.arange(count))
  found = place.at[own].get(mode="fill", fill_value=count)
  user = jnp.arange(own.shape[0])[:, None]
  seen = jnp.zeros((own.shape[0], count), bool)
  seen = seen.at[user, found].set(True, mode="drop")
  return seen[:, place[shared]]


def window_draws(
  keys: jax.Array, epoch: jax.Array, num_networks: int
) -> jax.Array:
  """32 random bits of an epoch for every network, [networks] uint32."""

  def draw(number):
    key = jax.random.fold_in(_key(keys, _NEIGHBOURS), number)
    return jax.random.bits(jax.random.fold_in(key, epoch), ())

  return jax.vmap(draw)(jnp.arange(num_networks))


def neighbours(
  user: jax.Array, network: Adjacency, *, draw: jax.Array, cap: int
) -> jax.Array:
  """Up to `cap` neighbours or items of each user, PAD behind (Eq. 12).

  All of them where there are no more than `cap`; otherwise a window of the
  user's list, which was shuffled once, from a place that is drawn afresh in
  each epoch: every neighbour is equally likely.

  Args:
    user: [B], PAD for nobody.
    network: neighbour lists, shuffled.
    draw: the network's of `window_draws`.
    cap: most neighbours in a mean.

  Returns:
    [B, cap] int32.
  """
  draws = scramble(user.astype(jnp.uint32) ^ draw)
  return _window(user, network, draws, cap)


def fixed_neighbours(
  user: jax.Array, network: Adjacency, *, cap: int
) -> jax.Array:
  """The first `cap` neighbours of each user, [B, cap]: a sample for good."""
  return _window(user, network, jnp.zeros(user.shape, jnp.uint32), cap)


def around(
  user: jax.Array, place: jax.Array, items: Adjacency, *, cap: int
) -> jax.Array:
  """Up to `cap` of a user's items next to one of them, PAD for none.

  Half of them before it and half behind, with the odd one before. Near an end
  of the list there are fewer.

  Args:
    user: [B], PAD for nobody.
    place: [B] of the one in `items.indices`.
    items: of every user, in order.
    cap: most items.

  Returns:
    [B, cap] int32.
  """
  real = user != PAD
  user, place = jnp.where(real, user, 0), jnp.where(real, place, 0)
  start, end = items.indptr[user], items.indptr[user + 1]
  behind = cap // 2
  offset = [*range(behind - cap, 0), *range(1, behind + 1)]
  at = place[:, None] + jnp.array(offset, jnp.int32)
  found = items.indices.at[at].get(mode="clip")
  inside = (at >= start[:, None]) & (at < end[:, None])
  return jnp.where(inside & real[:, None], found, PAD)


def _window(user, network, draw, cap):
  """`cap` neighbours in a row, from a place that 32 random bits choose."""
  real = user != PAD
  user = jnp.where(real, user, 0)
  start = network.indptr[user]
  degree = network.indptr[user + 1] - start
  offset = jnp.where(degree > cap, bounded(draw, degree), 0)
  place = jnp.arange(cap)
  at = offset[:, None] + place
  at -= jnp.where(at >= degree[:, None], degree[:, None], 0)
  found = network.indices.at[start[:, None] + at].get(mode="clip")
  wanted = (place < degree[:, None]) & real[:, None]
  return jnp.where(wanted, found, PAD)


def bits_at(key: jax.Array, *coordinates) -> jax.Array:
  """32 random bits for every combination of coordinates, which broadcast.

  A hash of a few multiplications: as every step needs thousands, the
  generator behind `jax.random` would take a tenth of it.
  """
  first, last = jax.random.bits(key, (2,))
  x = first
  for coordinate in coordinates:
    x = scramble(x + jnp.asarray(coordinate).astype(jnp.uint32))
  return scramble(x ^ last)


def scramble(x: jax.Array) -> jax.Array:
  """A bijection of 32 bits that spreads them (MurmurHash3's finaliser)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
