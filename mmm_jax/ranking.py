"""Top-k of any scorer, tile by tile on the device, ties at random.

Legend: B users of a block, T items of a tile, N items, k length of a list,
C candidates of a list, n lists, D devices of this process.

Scores exist for one tile of B x T at a time, or for the candidates of a block:
memory beyond the item table does not depend on N. Every device holds all items
and ranks blocks of its own: D blocks at a time, in which processes take turns.
"""

import collections
from collections.abc import Callable
from concurrent import futures
import functools
import hashlib
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mmm_jax import candidates, kernels, parallel

# Scoring a gathered pair takes about as long as scoring this many pairs of a
# tile (dot products of 64 dimensions, 2 CPU cores).
_PAIR_COST = 100
_GROUP = 32  # scores of which _largest_of_groups looks at the largest first
_SIZES = ("num_items", "k", "tile", "in_cpp")
# Products by a library that takes a third of XLA's time for many items of few
# dimensions. A run leaves it out (mmm_jax/__init__.py), as it adds differently
# on each kind of processor; one with kernels, which rounds like no other, may
# have it for its scores.
_FAST_PRODUCTS = {
  "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}
_AHEAD = 32  # blocks whose exclusions are prepared while others are ranked


class Scorer(NamedTuple):
  """A model as the evaluator sees it.

  `score` is compiled once for each function object: keep it free of
  parameters, or hand it over as `jax.tree_util.Partial(function, parameters)`.
  An item scored -inf is never recommended; NaN and inf are errors.
  """

  users: Callable  # ids [D * B] int32 -> pytree of arrays [D * B, ...]
  items: Any  # pytree of arrays [N, ...], whole on each device
  score: Callable  # (users' pytree, pytree of T items) -> [B, T] float32
  engine: parallel.Engine  # the devices of this process that rank
  in_cpp: bool = False  # whether `kernels` are loaded, and to be used


def rank(
  scorer: Scorer,
  users: np.ndarray,
  exclude_indptr: np.ndarray,
  exclude_indices: np.ndarray,
  *,
  num_items: int,
  k: int,
  seed: int,
  user_block: int,
  item_tile: int,
) -> tuple[np.ndarray, np.ndarray]:
  """The k best items of each user among those not excluded, best first.

  Equal scores fall in an order that is random in (user, item, seed) and the
  same for every block and tile size and for any number of devices.

  Args:
    scorer: the model.
    users: [n] dense ids.
    exclude_indptr, exclude_indices: items to leave out, by user *id*.
    num_items: N, the leading axis of `scorer.items`.
    k: length of a list.
    seed: of the order of equal scores.
    user_block, item_tile: scores on a device at a time.

  Returns:
    items [n, k] int32 and scores [n, k] float32; -1 and -inf where fewer than
    k items are left.
  Raises:
    FloatingPointError: a score is NaN or inf.
  """
  users = np.asarray(users, np.int32)
  exclude = candidates.Csr(exclude_indptr, exclude_indices)
  at_once = user_block * scorer.engine.num_devices
  rows = list(candidates.row_blocks(len(users), at_once))
  # One width for all blocks, so that one compilation serves them all.
  counts = [
    exclude.counts[users[row]].reshape(-1, user_block).sum(1) for row in rows
  ]
  width = 1 << int(np.max(counts, initial=0)).bit_length()

  def excluded(number):
    pairs = [
      _excluded_pairs(exclude, block, width=width, num_items=num_items)
      for block in users[rows[number]].reshape(-1, user_block)
    ]
    return number, np.concatenate(pairs, axis=1)

  blocks = {}
  for number, pairs in _ahead(excluded, filter(_is_mine, range(len(rows)))):
    blocks[number * at_once] = _on_devices(
      _rank_block,
      scorer,
      users[rows[number]],
      *pairs,
      seed=seed,
      num_items=num_items,
      k=k,
      tile=min(item_tile, num_items),
    )
  return _gathered(blocks, users, k)


def rank_lists(scorer, user, blocks, *, num_items, k, seed, item_tile):
  """The k best of each candidate list, and the hash of all lists.

  The lists come in blocks of D * B.
  """
  digest = hashlib.sha256()
  first, tops = 0, {}
  for number, block in enumerate(blocks):
    lists = np.asarray(block.items)[: len(user) - first]
    digest.update(lists.astype("<i4", copy=False).tobytes())
    at, first = first, first + len(lists)
    if not _is_mine(number):
      continue
    tops[at] = _on_devices(
      _rank_lists_block,
      scorer,
      block.user,
      block.items,
      seed=seed,
      num_items=num_items,
      k=k,
      tile=min(item_tile, num_items),
    )
  items, _ = _gathered(tops, user, k)
  return items, digest.hexdigest()


def _on_devices(function, scorer, users, *block, seed, **sizes):
  """Lists of the D blocks of `users` [D * B], one on each device.

  Args:
    function: ranks one block, of (score, u, items, users, *block, seed).
    scorer: the model.
    users: dense ids, block behind block.
    *block: arrays like it, of which each device gets a D-th.
    seed: of the order of equal scores.
    **sizes: static arguments of `function`.
  """
  ranked = _mapped(
    *(function, scorer.engine, len(block)), in_cpp=scorer.in_cpp, **sizes
  )
  return ranked(
    _as_pytree(scorer.score),
    scorer.users(users),
    scorer.items,
    users,
    *block,
    np.uint32(seed),
  )


@functools.cache
def _mapped(function, engine, num_arrays, **sizes):
  """`function` for all devices; kept, since it is compiled once an object."""
  whole, part = parallel.REPLICATED, parallel.SHARDED
  inputs = (whole, part, whole, part, *[part] * num_arrays, whole)
  options = _FAST_PRODUCTS if sizes["in_cpp"] else None
  return engine.map(
    functools.partial(function, **sizes), inputs, part, options=options
  )


@functools.partial(jax.jit, static_argnames=_SIZES)
def _rank_block(
  score, u, items, users, rows, columns, seed, *, num_items, k, tile, in_cpp
):
  """The k best of all items for a block; (rows, columns) are left out."""
  shape = len(users), tile
  best_of = functools.partial(_top_k, k=k, in_cpp=in_cpp)

  def merge_tile(best, first):
    start, v = _tile_of(items, first, tile, num_items)
    scores = _clean(score(u, v), shape)
    item = start + jnp.arange(tile, dtype=jnp.int32)[None, :]
    if num_items % tile:  # What the last tile shares with its neighbour.
      scores = jnp.where(item >= first, scores, -jnp.inf)
    # Columns of other tiles become `tile`: beyond the end, hence dropped.
    inside = jnp.where(columns >= start, columns - start, tile)
    scores = scores.at[rows, inside].set(-jnp.inf, mode="drop")
    more = best_of(scores, item, users, seed)
    both = (jnp.concatenate(pair, 1) for pair in zip(best, more))
    return best_of(*both, users, seed), None

  nothing = jnp.full((shape[0], k), -jnp.inf), jnp.full((shape[0], k), -1)
  best, _ = lax.scan(merge_tile, nothing, _tile_starts(num_items, tile))
  return _in_order(*best, users, seed)


@functools.partial(jax.jit, static_argnames=_SIZES)
def _rank_lists_block(
  score, u, items, users, lists, seed, *, num_items, k, tile, in_cpp
):
  """The k best of each candidate list [B, C]; -1 is no candidate."""
  if lists.shape[1] * _PAIR_COST < num_items:
    scores = _pair_scores(score, u, items, lists)
  else:
    scores = _picked_scores(score, u, items, lists, num_items, tile)
  scores = jnp.where(lists >= 0, scores, -jnp.inf)
  best = _top_k(scores, lists, users, seed, k=k, in_cpp=in_cpp)
  return _in_order(*best, users, seed)


def _pair_scores(score, u, items, lists):
  """Scores of the candidates alone, from a gathered row for each."""
  v = jax.tree.map(lambda x: jnp.take(x, lists, axis=0, mode="clip"), items)

  def one_user(u, v):
    return score(jax.tree.map(lambda x: x[None], u), v)[0]

  return _clean(jax.vmap(one_user)(u, v), lists.shape)


def _picked_scores(score, u, items, lists, num_items, tile):
  """Scores of the candidates, picked out of those of all items."""
  shape = len(lists), tile

  def pick(scores, first):
    start, v = _tile_of(items, first, tile, num_items)
    tile_scores = _clean(score(u, v), shape)
    at = lists - start
    inside = (at >= 0) & (at < tile)
    here = jnp.take_along_axis(tile_scores, jnp.clip(at, 0, tile - 1), axis=1)
    return jnp.where(inside, here, scores), None

  nothing = jnp.full(lists.shape, -jnp.inf)
  return lax.scan(pick, nothing, _tile_starts(num_items, tile))[0]


def _tile_starts(num_items, tile):
  return jnp.arange(0, num_items, tile, dtype=jnp.int32)


def _tile_of(items, first, tile, num_items):
  """-> where the tile begins, its items. The last one reaches back over its
  neighbour, so that all are of one size without a padded copy of the table."""
  start = jnp.minimum(first, num_items - tile)
  cut = functools.partial(
    lax.dynamic_slice_in_dim, start_index=start, slice_size=tile
  )
  return start, jax.tree.map(cut, items)


def _clean(scores, shape):
  """Scores in float32, NaN as inf (for `_gathered` to find), no -0.0."""
  if scores.shape != shape:
    raise ValueError(
      f"score(u, v) returned shape {scores.shape} for {shape[0]} users and "
      f"{shape[1]} items; it must return {shape}."
    )
  scores = jnp.where(jnp.isnan(scores), jnp.inf, scores.astype(jnp.float32))
  # top_k puts -0.0 below 0.0, though they are a tie.
  return jnp.where(scores == 0, 0.0, scores)


def _tie_key(users, item, seed):
  """Random order of items that a user likes equally: float32 [B, T], larger
  is better. 30 bits of hash, read as positive floats: these sort like their
  bits, and only for float32 is top_k fast on every device."""
  bits = candidates.mix(seed, users[:, None], item) >> 2
  return lax.bitcast_convert_type(bits + jnp.uint32(1 << 23), jnp.float32)


def _top_k(scores, item, users, seed, *, k, in_cpp):
  """Scores and items of the k best of each row, in any order.

  lax.top_k prefers low positions. That matters only where place k + 1 ties
  with place k, and only then the row is chosen again, by tie key. Rows of
  fewer than k items stay as they are.
  """
  if scores.shape[1] <= k:
    return scores, jnp.broadcast_to(item, scores.shape)
  # Unless barriers hide the slices below, XLA sorts whole rows for them. One
  # for both aborts the compiler where the program is for several CPUs.
  best, at = map(lax.optimization_barrier, _largest(scores, k + 1, in_cpp))
  kth = best[:, k - 1 : k]
  tied = (best[:, k:] == kth) & (kth > -jnp.inf)

  def by_key():
    key = jnp.where(scores == kth, _tie_key(users, item, seed), -jnp.inf)
    return lax.top_k(jnp.where(scores > kth, jnp.inf, key), k)[1]

  at = lax.cond(tied.any(), by_key, lambda: at[:, :k])
  pick = functools.partial(jnp.take_along_axis, indices=at, axis=1)
  return pick(scores), pick(item)


def _largest(scores, k, in_cpp):
  """lax.top_k, by the way that is fast on the device; of equal scores, any."""
  if in_cpp:
    return kernels.largest(scores, k)
  return lax.platform_dependent(
    scores,
    cpu=lambda scores: tuple(lax.top_k(scores, k)),
    default=lambda scores: _largest_of_groups(scores, k),
  )


def _largest_of_groups(scores, k):
  """lax.top_k, first among the largest of every group.

  On a GPU, top_k takes 7 times as long as this for 41 of 26,744. None of the k
  largest values is missed: if its group is not among the k best, these hold k
  values at least as large. Among equal values any may be taken.
  """
  rows, size = scores.shape
  if size <= k * _GROUP:
    return tuple(lax.top_k(scores, k))
  padding = (0, 0), (0, -size % _GROUP)
  padded = jnp.pad(scores, padding, constant_values=-jnp.inf)
  groups = padded.reshape(rows, -1, _GROUP)
  _, group = lax.top_k(groups.max(-1), k)
  chosen = jnp.take_along_axis(groups, group[..., None], axis=1)
  best, at = lax.top_k(chosen.reshape(rows, -1), k)
  group = jnp.take_along_axis(group, at // _GROUP, axis=1)
  return best, jnp.minimum(group * _GROUP + at % _GROUP, size - 1)


def _in_order(scores, item, users, seed):
  """Items, best first, and their scores; -1 where the score is -inf."""
  key = _tie_key(users, item, seed)
  scores, _, item = lax.sort((-scores, -key, item), num_keys=2)
  return jnp.where(scores < jnp.inf, item, -1), -scores


def _as_pytree(score):
  """A function as an argument of jit: equal functions compile once."""
  if isinstance(score, jax.tree_util.Partial):
    return score
  return jax.tree_util.Partial(score)


def _excluded_pairs(exclude, users, *, width, num_items):
  """Row and item of what a block leaves out, filled up to `width` pairs with
  an item that no tile holds."""
  position, _, item = candidates.entries(exclude, users)
  pairs = np.full((2, width), num_items, np.int32)
  pairs[:, : len(item)] = position, item
  return pairs


def _ahead(function, values):
  """`function(value)` of each, in order, by threads and a few ahead of use."""
  with futures.ThreadPoolExecutor() as threads:
    waiting = collections.deque()
    for value in values:
      waiting.append(threads.submit(function, value))
      if len(waiting) > _AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def _is_mine(number):
  """Whether this process ranks a block; they take turns."""
  return number % jax.process_count() == jax.process_index()


def _gathered(blocks, users, k):
  """{first row: items and scores of a block} -> those of all users, k wide."""
  items = np.full((len(users), k), -1, np.int32)
  scores = np.full((len(users), k), -np.inf, np.float32)
  for first, (block_items, block_scores) in blocks.items():
    rows = slice(first, first + len(block_items))
    width = block_items.shape[1]
    items[rows, :width] = np.asarray(block_items)[: len(users) - first]
    scores[rows, :width] = np.asarray(block_scores)[: len(users) - first]
  # The blocks of other processes, which are empty here.
  items, scores = parallel.largest((items, scores))
  bad = (scores == np.inf).any(1)
  if bad.any():
    raise FloatingPointError(
      f"{bad.sum()} of {len(users)} lists hold a score that is NaN or inf; the "
      f"first is of user {users[bad.argmax()]} (dense id). The parameters are "
      "not finite: lower the learning rate or use an earlier checkpoint."
    )
  return items, scores
