"""Ranking metrics as pure functions of who was hit where.

Legend: n lists (any leading axes), K places of a list, N items. `hits[..., r]`
says whether place r (best first) holds a relevant item, `num_relevant[...]` how
many relevant items there are, in the list or not. Every metric returns one
value a list and leaves averaging to the caller; without a relevant item it is
undefined, which is NaN and not 0. Host arrays, float64.
"""

from collections.abc import Callable, Iterable

import numpy as np


def precision(hits: np.ndarray, num_relevant: np.ndarray, *, k: int):
  """Share of the k places that hit; a list shorter than k has empty places."""
  return _defined(hits[..., :k].sum(-1) / k, num_relevant)


def recall(hits: np.ndarray, num_relevant: np.ndarray, *, k: int):
  """Share of the relevant items that stand in the first k places."""
  found = hits[..., :k].sum(-1)
  return _defined(found / np.maximum(num_relevant, 1), num_relevant)


def hit_rate(hits: np.ndarray, num_relevant: np.ndarray, *, k: int):
  """1 if any of the first k places hits, else 0."""
  return _defined(hits[..., :k].any(-1), num_relevant)


def mrr(hits: np.ndarray, num_relevant: np.ndarray, *, k: int):
  """1 / the place of the first hit, 0 if the first k places hold none."""
  hits = hits[..., :k]
  return _defined(hits.any(-1) / (hits.argmax(-1) + 1), num_relevant)


def average_precision(hits: np.ndarray, num_relevant: np.ndarray, *, k: int):
  """Precision at each hit, summed and divided by min(k, num_relevant)."""
  hits = hits[..., :k]
  places = np.arange(1, hits.shape[-1] + 1)
  precisions = (hits * np.cumsum(hits, -1) / places).sum(-1)
  reachable = np.clip(num_relevant, 1, k)
  return _defined(precisions / reachable, num_relevant)


def ndcg(hits: np.ndarray, num_relevant: np.ndarray, *, k: int):
  """Sum of 1 / log2(place + 1) over hits, against hits at every place.

  The ideal list has its min(k, num_relevant) hits in front.
  """
  gains = 1 / np.log2(np.arange(2, k + 2))
  reachable = np.clip(num_relevant, 1, k)
  ideal = np.cumsum(gains)[reachable - 1]
  hits = hits[..., :k]
  return _defined(hits @ gains[: hits.shape[-1]] / ideal, num_relevant)


RANKING: dict[str, Callable] = {
  "precision": precision,
  "recall": recall,
  "ndcg": ndcg,
  "hit_rate": hit_rate,
  "mrr": mrr,
  "map": average_precision,
}


def at_cutoffs(
  hits: np.ndarray,
  num_relevant: np.ndarray,
  *,
  names: Iterable[str],
  cutoffs: Iterable[int],
) -> dict[str, np.ndarray]:
  """One array a `metric@k`, in the order of `names`, then of `cutoffs`."""
  return {
    f"{name}@{k}": RANKING[name](hits, num_relevant, k=k)
    for name in names
    for k in cutoffs
  }


def coverage(exposure: np.ndarray) -> float:
  """Share of the catalogue recommended to anyone; `exposure` [N] counts."""
  return float((exposure > 0).mean())


def gini(exposure: np.ndarray) -> float:
  """Inequality of exposure [N]: 0 if all items get equally much, towards 1
  if one gets everything; NaN if nothing was recommended."""
  total = exposure.sum()
  if total == 0:
    return float("nan")
  place = np.arange(1, exposure.size + 1)
  weights = 2 * place - exposure.size - 1
  return float(weights @ np.sort(exposure) / (exposure.size * total))


def mean_popularity(exposure: np.ndarray, popularity: np.ndarray) -> float:
  """Mean training interactions [N] of a recommended item, as often as it is
  recommended; NaN if nothing was recommended."""
  total = exposure.sum()
  return float(exposure @ popularity / total) if total else float("nan")


def _defined(values: np.ndarray, num_relevant: np.ndarray) -> np.ndarray:
  return np.where(num_relevant > 0, values, np.nan)
