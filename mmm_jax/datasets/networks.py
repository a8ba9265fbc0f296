"""Networks of users: as given, or derived from training interactions."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

_USER_BLOCK = 2048
_EDGE_BLOCK = 1 << 18
_SCALE = 1 << 16  # weights are integers: sums do not depend on their order
_ROUNDS = 100  # of mending a rewired network
_WEIGHT_BITS, _HASH_BITS = 30, 23  # beside 11 for the row in its block


@dataclasses.dataclass(frozen=True)
class Network:
  """Whom every user follows, as compressed rows.

  Attributes:
    indptr: int64 [M + 1].
    indices: int32 [edges], ascending within a user, no loops, no repeats.
  """

  indptr: np.ndarray
  indices: np.ndarray

  @property
  def num_edges(self) -> int:
    return len(self.indices)

  @property
  def sources(self) -> np.ndarray:
    """int32 [edges]: the user that every edge starts at."""
    degrees = np.diff(self.indptr)
    return np.repeat(np.arange(len(degrees), dtype=np.int32), degrees)


def from_edges(
  source: np.ndarray, target: np.ndarray, num_users: int
) -> Network:
  """Compressed rows of a list of edges.

  Args:
    source, target: ints [n]; edges with a negative end are left out, as are
      loops and repeats.
    num_users: M.
  """
  good = (source >= 0) & (target >= 0) & (source != target)
  return Network(
    *compressed(source[good], target[good], rows=num_users, columns=num_users)
  )


def compressed(
  row: np.ndarray, column: np.ndarray, *, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of ids from 0 on, each once, as compressed rows.

  Returns:
    `indptr` int64 [rows + 1], `indices` int32, ascending within a row.
  """
  # By a sort: np.unique hashes integers, which takes 50 times as long.
  key = np.sort(row.astype(np.int64) * columns + column)
  key = key[np.diff(key, prepend=-1) > 0]
  row, column = np.divmod(key, max(columns, 1))
  ends = np.cumsum(np.bincount(row, minlength=rows))
  indptr = np.concatenate([[0], ends]).astype(np.int64)
  return indptr, column.astype(np.int32)


def co_like(
  user: np.ndarray,
  item: np.ndarray,
  num_users: int,
  num_items: int,
  *,
  degree_cap: int,
) -> Network:
  """Links every user to those who share items, rare items counting more.

  The weight of an edge is the sum over common items of 1 / ln(1 + n), n being
  the item's number of users (Adamic and Adar, 2003). A user keeps the
  `degree_cap` heaviest edges; equal weights fall by a hash of the two ids.

  Args:
    user, item: ints [E], training interactions only.
    num_users, num_items: M, N.
    degree_cap: most edges of a user, 1 or more.

  Returns:
    Directed edges; every one has a common item in the input.
  """
  ones = np.ones(len(user), np.int64)
  liked = sparse.csr_array((ones, (user, item)), shape=(num_users, num_items))
  liked.data[:] = 1  # repeated pairs were summed
  popularity = np.bincount(liked.indices, minlength=num_items)
  rarity = np.rint(_SCALE / np.log1p(np.maximum(popularity, 1)))
  weighted = liked.copy()
  weighted.data = rarity.astype(np.int64)[liked.indices]
  by_item = liked.T.tocsr()
  kept = [
    _heaviest(
      weighted[start : start + _USER_BLOCK] @ by_item, start, degree_cap
    )
    for start in range(0, num_users, _USER_BLOCK)
  ]
  source, target = (np.concatenate(ends) for ends in zip(*kept, strict=True))
  return from_edges(source, target, num_users)


def _heaviest(shared, start, degree_cap):
  """(source, target) of each row's heaviest entries, the diagonal left out."""
  row = np.repeat(np.arange(shared.shape[0]), np.diff(shared.indptr))
  other = row + start != shared.indices
  row, target = row[other], shared.indices[other].astype(np.int64)
  # One sort key: row, then weight from above, then hash.
  key = row.astype(np.uint64) << np.uint64(_WEIGHT_BITS + _HASH_BITS)
  weight = np.minimum(shared.data[other], (1 << _WEIGHT_BITS) - 1)
  key |= ((1 << _WEIGHT_BITS) - 1 - weight).astype(np.uint64) << np.uint64(
    _HASH_BITS
  )
  key |= _hash(row + start, target) >> np.uint64(64 - _HASH_BITS)
  order = np.argsort(key, kind="stable")
  starts = np.searchsorted(row, np.arange(shared.shape[0]))
  kept = order[np.arange(len(row)) - starts[row] < degree_cap]
  return row[kept] + start, target[kept]


def _hash(source, target):
  # Equal weights are common; by id they would all point at the first users.
  mixed = source.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  mixed ^= target.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
  mixed ^= mixed >> np.uint64(29)
  return mixed * np.uint64(0xBF58476D1CE4E5B9)


def edges_without_common_item(
  network: Network, user: np.ndarray, item: np.ndarray
) -> int:
  """Counts edges whose two users share no item; 0 is wanted.

  Looks every item of an edge's source up among the pairs of its target, and
  so knows nothing of how the network was made.

  Args:
    network: M users.
    user, item: ints [E], training interactions.
  """
  num_users, num_items = len(network.indptr) - 1, int(item.max(initial=-1)) + 1
  indptr, owned = compressed(user, item, rows=num_users, columns=num_items)
  starts, degrees = indptr[:-1], np.diff(indptr)
  pairs = np.repeat(np.arange(num_users), degrees) * num_items + owned
  without = 0
  for first in range(0, network.num_edges, _EDGE_BLOCK):
    block = slice(first, first + _EDGE_BLOCK)
    source, target = network.sources[block], network.indices[block]
    lengths = degrees[source]
    edge = np.repeat(np.arange(len(source)), lengths)
    offset = np.arange(len(edge)) - np.repeat(
      np.cumsum(lengths) - lengths, lengths
    )
    wanted = target[edge].astype(np.int64) * num_items
    wanted += owned[starts[source[edge]] + offset]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    common = np.bincount(edge[pairs[place] == wanted], minlength=len(source))
    without += int((common == 0).sum())
  return without


def symmetrised(network: Network) -> Network:
  """Every edge in both directions, once."""
  source, target = network.sources, network.indices
  return from_edges(
    np.concatenate([source, target]),
    np.concatenate([target, source]),
    len(network.indptr) - 1,
  )


def rewired(network: Network, seed) -> Network:
  """Other neighbours at random: a control.

  Edges exchange their ends, so that every user has and is as many neighbours
  as before. What would link a user to itself or twice to another is exchanged
  again, up to _ROUNDS times, and then left out. Friendships lose their other
  direction.
  """
  rng = np.random.default_rng(seed)
  source, target = network.sources, rng.permutation(network.indices)
  for _ in range(_ROUNDS):
    bad = _loops_and_repeats(source, target)
    if not bad.size:
      break
    for one, other in zip(bad, rng.integers(len(target), size=bad.size)):
      target[one], target[other] = target[other], target[one]
  return from_edges(source, target, len(network.indptr) - 1)


def _loops_and_repeats(source, target):
  """Edges that are not wanted: to oneself, and all but one of equal ones."""
  order = np.lexsort((target, source))
  same = np.zeros(len(order), bool)
  same[1:] = (np.diff(source[order]) == 0) & (np.diff(target[order]) == 0)
  return np.union1d(order[same], np.flatnonzero(source == target))
