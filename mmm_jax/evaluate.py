"""Metrics of a scorer under three candidate protocols.

Legend: N items, k the longest list, n lists, C candidates of a list.

`full` ranks the catalogue, `pooled_1024` and `sampled_100` rank drawn lists
(candidates.py). All three share one scorer, one way to break ties (ranking.py)
and one path from lists to metrics.
"""

from concurrent import futures
import functools
import itertools
from typing import NamedTuple

import numpy as np

from mmm_jax import candidates, errors, metrics, ranking

Interactions = candidates.Interactions
Scorer = ranking.Scorer
rank = ranking.rank

PROTOCOLS = ("full", "pooled_1024", "sampled_100")
# What a part's ranking leaves out: what the model may know by then.
KNOWN = {"valid": ("train",), "test": ("train", "valid")}
# Upper ends of the first two strata, in training interactions.
USER_STRATA = (5, 20)
ITEM_STRATA = (2, 10)
_BLOCK = 8192  # lists that a thread takes at a time
_TABLE_KEYS = ("user", "protocol", "part")


class Ranked(NamedTuple):
  """The best k of n lists, best first; users ascend."""

  user: np.ndarray  # [n] int32
  items: np.ndarray  # [n, k] int32, -1 behind the end of a short list
  hits: np.ndarray  # [n, k] bool
  relevant: candidates.Csr  # n rows


def evaluate(
  scorer: Scorer,
  interactions: Interactions,
  *,
  parts,
  protocols,
  cutoffs,
  seed: int,
  user_block: int,
  item_tile: int,
):
  """Every metric of every protocol and part.

  Returns:
    result: `{protocol: {part: {metric@k: float}}}`, and under `strata` and
      `candidates` in the same nesting the metrics by stratum (`_strata`) and
      the SHA-256 of the candidate lists ([n, C] int32, little-endian). A part
      in which nobody has an item is left out.
    per_user: columns `user` (dense ids), `protocol`, `part` and each metric@k.
  Raises:
    errors.InputError: an unknown protocol or part.
    FloatingPointError: a score is NaN or inf.
  """
  _check_names("protocol", protocols, PROTOCOLS)
  _check_names("part", parts, KNOWN)
  result = {protocol: {} for protocol in protocols}
  strata = {protocol: {} for protocol in protocols}
  hashes = {name: {} for name in protocols if name in candidates.SIZES}
  tables = []
  for protocol, part in itertools.product(protocols, parts):
    ranked, digest = _ranked(
      scorer,
      interactions,
      protocol=protocol,
      part=part,
      k=max(cutoffs),
      seed=seed,
      user_block=user_block,
      item_tile=item_tile,
    )
    users, values = _per_user(ranked, metrics.RANKING, cutoffs)
    labels = np.full(len(users), protocol), np.full(len(users), part)
    tables.append(dict(zip(_TABLE_KEYS, (users, *labels))) | values)
    if not len(users):
      continue
    result[protocol][part] = _means(values)
    strata[protocol][part] = {
      "users": _user_strata(users, values, interactions),
      "items": _item_strata(ranked, interactions, cutoffs),
    }
    result[protocol][part] |= _exposure(ranked.items, interactions, cutoffs)
    if protocol in hashes:
      hashes[protocol][part] = digest
  return result | {"strata": strata, "candidates": hashes}, _stacked(tables)


def _ranked(scorer, interactions, *, protocol, part, k, seed, **tiling):
  """-> Ranked, and the hash of the candidate lists (None for `full`)."""
  user, relevant = candidates.lists(interactions, protocol=protocol, part=part)
  if protocol == "full":
    known = candidates.items_of_users(interactions, KNOWN[part])
    items, _ = rank(
      scorer,
      user,
      *known,
      num_items=interactions.num_items,
      k=k,
      seed=seed,
      **tiling,
    )
    digest = None
  else:
    blocks = candidates.draw(
      interactions,
      protocol=protocol,
      part=part,
      seed=seed,
      block=tiling["user_block"] * scorer.engine.num_devices,
    )
    items, digest = ranking.rank_lists(
      scorer,
      user,
      blocks,
      num_items=interactions.num_items,
      k=k,
      seed=seed,
      item_tile=tiling["item_tile"],
    )
  return Ranked(user, items, _found(items, relevant), relevant), digest


def _found(items, relevant: candidates.Csr):
  """Which of the ranked items [n, k] are relevant to their list."""
  largest = max(items.max(initial=0), relevant.indices.max(initial=0))
  # One column behind all items: for the places of short lists, which hold -1.
  width = int(largest) + 2

  def look_up(rows):
    row, _, item = candidates.entries(relevant, rows)
    pairs = row * width + item  # ascending
    wanted = np.arange(len(rows))[:, None] * width + items[rows]
    nearest = np.append(pairs, -2)[np.searchsorted(pairs, wanted)]
    return {"hits": nearest == wanted}

  return _by_blocks(look_up, len(items))["hits"]


def _by_blocks(function, num_lists):
  """`function(rows)`, a dict of arrays, of all lists, a block a thread.

  NumPy lets go of the interpreter's lock, so all cores work.
  """
  lists = np.arange(num_lists)
  blocks = np.split(lists, range(_BLOCK, num_lists, _BLOCK))
  with futures.ThreadPoolExecutor() as threads:
    values = list(threads.map(function, blocks))
  return _stacked(values)


def _per_user(ranked: Ranked, names, cutoffs, *, stratum=None):
  """-> users [m], and metric@k [m] averaged over the lists of each user.

  With `stratum` (bool [N]) only the test items in it count as relevant; a
  user who has none is NaN.
  """
  counts = ranked.relevant.counts

  def measure(rows):
    hits, count = ranked.hits[rows], counts[rows]
    if stratum is not None:
      hits = hits & stratum[ranked.items[rows]]
      row, _, item = candidates.entries(ranked.relevant, rows)
      count = np.bincount(row, stratum[item], len(rows)).astype(int)
    values = metrics.at_cutoffs(hits, count, names=names, cutoffs=cutoffs)
    return values | {"count": count}

  values = _by_blocks(measure, len(ranked.user))
  count = values.pop("count")
  first = np.flatnonzero(np.diff(ranked.user, prepend=-1))
  users = ranked.user[first]
  if len(users) == len(ranked.user):
    return users, values
  defined = np.add.reduceat((count > 0).astype(float), first)
  defined[defined == 0] = np.nan
  return users, {
    name: np.add.reduceat(np.where(count > 0, value, 0.0), first) / defined
    for name, value in values.items()
  }


def _means(values):
  """Averages over the users for whom a metric is defined."""
  return {
    name: float(value[~np.isnan(value)].mean())
    for name, value in values.items()
  }


def _exposure(items, interactions: Interactions, cutoffs):
  """Coverage, Gini and mean popularity of the first k recommendations."""
  popularity = _training_counts(interactions, "item")
  values, exposure, done = {}, 0, 0
  for k in sorted(cutoffs):
    more, done = items[:, done:k], k
    counts = np.bincount(more[more >= 0], minlength=interactions.num_items)
    exposure = exposure + counts
    values[f"coverage@{k}"] = metrics.coverage(exposure)
    values[f"gini@{k}"] = metrics.gini(exposure)
    values[f"mean_popularity@{k}"] = metrics.mean_popularity(
      exposure, popularity
    )
  return values


def _user_strata(users, values, interactions: Interactions):
  """All metrics, averaged over the users of each stratum."""
  activity = _training_counts(interactions, "user")[users]
  return {
    name: _stratum({key: value[inside] for key, value in values.items()})
    for name, inside in _strata(activity, USER_STRATA)
  }


def _item_strata(ranked: Ranked, interactions: Interactions, cutoffs):
  """Recall and hit rate of the test items of each stratum.

  The lists stay as they are; a user's recall is the share found of those of
  their test items that are in the stratum, averaged over the users with any.
  """
  frequency = _training_counts(interactions, "item")
  return {
    name: _stratum(
      _per_user(ranked, ("recall", "hit_rate"), cutoffs, stratum=inside)[1]
    )
    for name, inside in _strata(frequency, ITEM_STRATA)
  }


def _stratum(values):
  """How many users a stratum has, and their averages if it has any."""
  num_users = int((~np.isnan(next(iter(values.values())))).sum())
  return {"num_users": num_users} | (_means(values) if num_users else {})


def _strata(counts, ends):
  """Name and members of the three strata of `counts`."""
  low, high = ends
  yield f"<={low}", counts <= low
  yield f"{low + 1}-{high}", (counts > low) & (counts <= high)
  yield f">{high}", counts > high


@functools.lru_cache(maxsize=8)
def _training_counts(interactions: Interactions, side: str):
  """Training interactions of each `user` or `item`."""
  train = candidates.in_parts(interactions, ("train",))
  num_ids = getattr(interactions, f"num_{side}s")
  return np.bincount(getattr(interactions, side)[train], minlength=num_ids)


def _stacked(tables):
  return {
    name: np.concatenate([table[name] for table in tables])
    for name in (tables[0] if tables else ())
  }


def _check_names(kind, names, valid):
  for name in names:
    if name not in valid:
      raise errors.InputError(
        f"Evaluation {kind} {name!r} does not exist; valid: {', '.join(valid)}."
      )
