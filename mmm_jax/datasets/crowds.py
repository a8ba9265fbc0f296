"""Who gets to see something, and who of those chooses it (for `simulated`).

B rows, P pool.
"""

from __future__ import annotations

import numpy as np


class Crowd:
  """Members of communities, to be drawn in proportion to their weights."""

  def __init__(
    self, community: np.ndarray, weight: np.ndarray, num_communities: int
  ):
    """Members 0, 1, … with their communities (ints) and weights (positive)."""
    self._order = np.argsort(community, kind="stable")
    self._ends = np.cumsum(weight[self._order])
    starts = np.searchsorted(
      community[self._order], np.arange(num_communities + 1)
    )
    self._bounds = np.concatenate([[0.0], self._ends])[starts]

  def draw(
    self,
    rng: np.random.Generator,
    home: np.ndarray,
    *,
    size: int,
    home_share: float,
  ) -> np.ndarray:
    """Members [B, size], drawn with replacement.

    Args:
      rng: advanced.
      home: a community for every row [B].
      size: draws of a row.
      home_share: chance that a draw stays in the row's community; the others
        fall on everyone.
    """
    low, high = self._bounds[home][:, None], self._bounds[home + 1][:, None]
    anywhere = rng.random((len(home), size)) >= home_share
    anywhere |= low == high  # nobody lives there
    low = np.where(anywhere, 0.0, low)
    high = np.where(anywhere, self._ends[-1], high)
    point = low + (high - low) * rng.random(anywhere.shape)
    place = np.searchsorted(self._ends, point, side="right")
    return self._order[np.minimum(place, len(self._order) - 1)]


def strangers(
  rng: np.random.Generator, rows: int, size: int, *, total: int
) -> np.ndarray:
  """Members [rows, size] of `total`, all different within a row."""
  start = rng.integers(total, size=(rows, 1))
  return (start + np.arange(size) * (total // max(size, 1))) % total


def without_repeats(pool: np.ndarray, utility: np.ndarray) -> np.ndarray:
  """`utility` [B, P], -inf where a member of `pool` [B, P] stands again."""
  order = np.argsort(pool, axis=1, kind="stable")
  ordered = np.take_along_axis(pool, order, axis=1)
  again = np.zeros(pool.shape, bool)
  np.put_along_axis(
    again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1
  )
  return np.where(again, -np.inf, utility)


def choose(
  rng: np.random.Generator, utility: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """A multinomial choice without replacement, by the Gumbel top-k trick.

  The first column of a row is drawn in proportion to exp(utility), every
  later one in the same way among those left.

  Args:
    rng: advanced.
    utility: floats [B, P]; -inf is never chosen.
    counts: ints [B], how many to choose.

  Returns:
    Rows and columns chosen, ints [sum of counts], by row, a row's in the order
    of the draws; fewer where a row has fewer choices.
  """
  waits = rng.standard_exponential(utility.shape, np.float32)
  # The float32 draw may be 0, whose logarithm would win over everything. The
  # logarithms of float32 are not the same ones on all processors.
  waits = np.maximum(waits, np.finfo(np.float32).tiny)
  key = utility - np.log(waits, dtype=np.float64)
  most = min(int(counts.max(initial=0)), key.shape[1])
  top = np.argpartition(-key, most - 1, axis=1)[:, :most]
  best = np.take_along_axis(key, top, axis=1)
  order = np.argsort(-best, axis=1, kind="stable")
  best = np.take_along_axis(best, order, axis=1)
  columns = np.take_along_axis(top, order, axis=1)
  drawn = (np.arange(most) < counts[:, None]) & np.isfinite(best)
  return np.nonzero(drawn)[0], columns[drawn]
