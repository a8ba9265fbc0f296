"""Who is ranked against what: parts of a split, and drawn candidate lists.

Legend: E interactions, M users, N items, n lists (rows), B rows of a block,
C candidates of a list, S most items that a user has seen.

A list is its relevant items followed by random items which the user has in no
part. It depends on the split and a seed and on nothing else: not on the model,
nor on the block size, nor on the device (all arithmetic is in integers).

Random items come without replacement from a keyed permutation: candidate j of
a row is image j of a pseudo-random bijection of the user's unseen items, keyed
by (seed, list). So any block of lists is drawn on the device by itself, in time
and memory that do not depend on N.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mmm_jax import sampling
from mmm_jax.datasets import networks

PARTS = {"train": 0, "valid": 1, "test": 2}
# Items of a list, the relevant ones included; `sampled_100` has a list a test
# item, `pooled_1024` a list a user.
SIZES = {"pooled_1024": 1024, "sampled_100": 101}
_FEISTEL_ROUNDS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
  """Host arrays; `part` holds the values of PARTS, or -1 for left-out pairs.

  Never changed: what is derived from one is kept (`items_of_users`).
  """

  user: np.ndarray  # [E] int
  item: np.ndarray  # [E] int
  part: np.ndarray  # [E] int
  num_users: int
  num_items: int


class Csr(NamedTuple):
  """Sorted distinct `indices[indptr[row]:indptr[row + 1]]` of every row."""

  indptr: np.ndarray  # [rows + 1] int64
  indices: np.ndarray  # int32

  @property
  def counts(self) -> np.ndarray:
    return np.diff(self.indptr)


class Lists(NamedTuple):
  """A block of candidate lists, the relevant items in front."""

  user: np.ndarray  # [B] int32
  items: jax.Array  # [B, C] int32, -1 where a list is shorter
  num_relevant: np.ndarray  # [B] int32


@functools.lru_cache(maxsize=8)
def items_of_users(
  interactions: Interactions, parts: tuple[str, ...] | None
) -> Csr:
  """Items of every user (rows 0..M-1) in the named parts; `None` is all."""
  user, item = interactions.user, interactions.item
  if parts is not None:
    chosen = in_parts(interactions, parts)
    user, item = user[chosen], item[chosen]
  size = {"rows": interactions.num_users, "columns": interactions.num_items}
  return Csr(*networks.compressed(user, item, **size))


def in_parts(interactions: Interactions, parts) -> np.ndarray:
  """Which interactions are in the named parts, [E] bool."""
  wanted = np.zeros(len(PARTS) + 1, bool)  # the last one: in no part
  wanted[[PARTS[name] for name in parts]] = True
  return wanted[interactions.part]


def entries(csr: Csr, rows: np.ndarray):
  """Entries of the given rows -> (position in `rows`, place, index), flat."""
  counts = csr.indptr[rows + 1] - csr.indptr[rows]
  position = np.repeat(np.arange(len(rows)), counts)
  place = np.arange(len(position)) - np.repeat(counts.cumsum() - counts, counts)
  return position, place, csr.indices[csr.indptr[rows][position] + place]


def padded(csr: Csr, rows: np.ndarray, *, width: int, fill: int) -> np.ndarray:
  """The given rows as a matrix [len(rows), width], `fill` behind their end."""
  matrix = np.full((len(rows), width), fill, np.int32)
  position, place, index = entries(csr, rows)
  matrix[position, place] = index
  return matrix


def lists(interactions: Interactions, *, protocol: str, part: str):
  """Who is ranked -> user of each list [n], relevant items of each list.

  One list for each user with an item in the part, users ascending; for
  `sampled_100` one for each of these items.
  """
  relevant = items_of_users(interactions, (part,))
  users = np.flatnonzero(relevant.counts).astype(np.int32)
  if protocol == "sampled_100":
    user = np.repeat(users, relevant.counts[users])
    return user, Csr(np.arange(len(user) + 1), relevant.indices)
  indptr = np.append(relevant.indptr[users], relevant.indptr[-1])
  return users, Csr(indptr, relevant.indices)


def row_blocks(num_rows: int, block: int) -> Iterator[np.ndarray]:
  """0..num_rows-1 in blocks of one size; the last repeats its last row."""
  for first in range(0, num_rows, block):
    yield np.minimum(np.arange(first, first + block), num_rows - 1)


def draw(
  interactions: Interactions,
  *,
  protocol: str,
  part: str,
  seed: int,
  block: int,
) -> Iterator[Lists]:
  """Candidate lists of a part in blocks of `block` rows, users ascending.

  All blocks have one shape; the last repeats its last list to fill it. Lists
  of more than SIZES[protocol] relevant items hold those and nothing else.
  """
  seen = items_of_users(interactions, None)
  user, relevant = lists(interactions, protocol=protocol, part=part)
  most = int(relevant.counts.max(initial=0))
  fill = functools.partial(
    _fill,
    num_items=interactions.num_items,
    width=min(max(SIZES[protocol], most), interactions.num_items),
    size=SIZES[protocol],
  )
  seen_width = int(seen.counts.max(initial=0))
  for rows in row_blocks(len(user), block):
    rows_user = user[rows]
    count = relevant.counts[rows].astype(np.int32)
    first_item = relevant.indices[relevant.indptr[rows]]
    # Lists of one user differ by their item only under `sampled_100`.
    label = first_item if protocol == "sampled_100" else np.full_like(count, -1)
    items = fill(
      padded(relevant, rows, width=most, fill=-1),
      count,
      padded(seen, rows_user, width=seen_width, fill=np.iinfo(np.int32).max),
      seen.counts[rows_user].astype(np.int32),
      mix(np.uint32(seed), SIZES[protocol], rows_user, label),
    )
    yield Lists(rows_user, items, count)


def mix(*words) -> jax.Array:
  """uint32 hash of integers that broadcast; equal everywhere and for ever."""
  state = jnp.uint32(0x9E3779B9)
  for word in words:
    word = jnp.asarray(word).astype(jnp.uint32)
    state = sampling.scramble(state ^ word) + jnp.uint32(0x9E3779B9)
  return state


@functools.partial(jax.jit, static_argnames=("num_items", "width", "size"))
def _fill(
  relevant, num_relevant, seen, num_seen, key, *, num_items, width, size
):
  """Relevant items [B, R], then random unseen ones -> [B, width], -1 padded."""
  place = jnp.arange(width)[None, :]
  # Rows of one block differ in length where one has more relevant items than
  # a list has places.
  length = jnp.maximum(size, num_relevant)[:, None]
  unseen = (num_items - num_seen)[:, None]
  number = place - num_relevant[:, None]
  drawn = jnp.clip(number, 0, jnp.maximum(unseen - 1, 0))
  drawn = _permuted(drawn, jnp.maximum(unseen, 1), key[:, None], num_items)
  listed = (number < unseen) & (place < length)
  items = jnp.where(listed, _unseen_item(drawn, seen), -1)
  front = relevant[:, :width]
  front = jnp.pad(front, ((0, 0), (0, width - front.shape[1])))
  return jnp.where(number < 0, front, items)


def _unseen_item(number: jax.Array, seen: jax.Array) -> jax.Array:
  """Number r of the unseen items is r + #{k : seen[k] - k <= r}."""
  gaps = seen - jnp.arange(seen.shape[1])[None, :]
  before = functools.partial(jnp.searchsorted, side="right")
  return number + jax.vmap(before)(gaps, number).astype(jnp.int32)


def _permuted(x, size, key, most: int):
  """Image of x in [0, size) under a bijection of [0, size) given by `key`.

  A Feistel network permutes a x b >= `most` values; those that leave the
  range walk on along their cycle until they are back (Black and Rogaway,
  "Ciphers with arbitrary finite domains", 2002).
  """
  a = max(1, math.isqrt(most - 1) + 1)
  b = -(-most // a)
  size = size.astype(jnp.uint32)
  once = functools.partial(_feistel, key=key, a=a, b=b)
  x, _ = lax.while_loop(
    lambda state: state[1].any(),
    lambda state: _walked(state, once, size),
    (x.astype(jnp.uint32), jnp.ones(x.shape, bool)),
  )
  return x.astype(jnp.int32)


def _walked(state, once, size):
  x, outside = state
  x = jnp.where(outside, once(x), x)
  return x, x >= size


def _feistel(x, *, key, a: int, b: int):
  left, right = x // b, x % b
  for number in range(0, _FEISTEL_ROUNDS, 2):
    left = (left + mix(key, number, right) % a) % a
    right = (right + mix(key, number + 1, left) % b) % b
  return left * b + right
