"""Intervals and paired tests over per-user values. Host arrays, float64.

Shapes: R runs (seeds) of one model, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools

import numpy as np
from scipy import stats

SAMPLES = 2000
_LEAST_SEEDS = 3  # fewer say nothing of the spread between seeds


def interval(values: np.ndarray, *, seed: int) -> tuple[float, float]:
  """95 % bootstrap interval of the mean of values [R, U].

  Users are drawn with replacement; runs too, where there are three or more.
  """
  means = _resampled_means(values, seed)
  num_runs = len(values)
  if num_runs >= _LEAST_SEEDS:
    rng = np.random.default_rng((seed, num_runs))
    drawn = rng.integers(num_runs, size=means.shape)
    means = np.take_along_axis(means, drawn, axis=1)
  low, high = np.quantile(means.mean(1), [0.025, 0.975])
  return float(low), float(high)


def half_width(values: Sequence[float]) -> float | None:
  """Of the 95 % interval of a mean over seeds (Student), from three on."""
  if len(values) < _LEAST_SEEDS:
    return None
  error = np.std(values, ddof=1) / np.sqrt(len(values))
  return float(stats.t.ppf(0.975, len(values) - 1) * error)


def _resampled_means(values, seed):
  """Means of values [R, U] over drawn users, [SAMPLES, R].

  A user brings the values of all runs along.
  """
  num_users = values.shape[1]
  found = values.any(0)  # most users of a sparse set find nothing
  times = _times_drawn(num_users, seed)[found].astype(np.float64)
  return (values[:, found] @ times).T / num_users


@functools.lru_cache(maxsize=4)
def _times_drawn(num_users, seed):
  """How often every user is drawn, [U, SAMPLES]; for all rows of a table."""
  rng = np.random.default_rng(seed)
  users = (rng.integers(num_users, size=num_users) for _ in range(SAMPLES))
  count = functools.partial(np.bincount, minlength=num_users)
  # In bytes, as the whole is large; nobody is drawn 256 times.
  times = np.stack([count(drawn).astype(np.uint8) for drawn in users])
  return np.ascontiguousarray(times.T)


def wilcoxon(one: np.ndarray, other: np.ndarray) -> float:
  """Two-sided p of Wilcoxon's signed-rank test on paired values [U].

  Pairs without a difference, most of a sparse set, are ranked with the others
  and then left out (Pratt).
  """
  difference = one - other
  if not difference.any():
    return 1.0
  return float(
    stats.wilcoxon(difference, zero_method="pratt", method="asymptotic").pvalue
  )


def bootstrap(one: np.ndarray, other: np.ndarray, *, seed: int) -> float:
  """Two-sided p of the mean difference of paired values [U].

  Twice the smaller share of resampled means on one side of zero, never below
  the resolution of the draws.
  """
  means = _resampled_means((one - other)[None], seed)
  beyond = min((means <= 0).sum(), (means >= 0).sum()) + 1
  return float(min(1.0, 2 * beyond / (SAMPLES + 1)))


def holm(p_values: Sequence[float]) -> np.ndarray:
  """p-values adjusted for all comparisons of a family (Holm, 1979).

  The k-th smallest of m is multiplied by m - k + 1, and none may come out
  below one that was smaller.
  """
  p_values = np.asarray(p_values, float)
  order = np.argsort(p_values, kind="stable")
  factors = len(p_values) - np.arange(len(p_values))
  adjusted = np.maximum.accumulate(p_values[order] * factors)
  result = np.empty_like(adjusted)
  result[order] = np.minimum(adjusted, 1.0)
  return result
