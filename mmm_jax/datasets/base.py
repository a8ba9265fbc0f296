"""One schema for every data set, and the core filter at load.

A set's module only parses. It has

  VERSION: int, raised whenever `parse` would give something else;
  FILES: names of the raw files (none for a set that is made up), and
    PAGE: the official page to get them from, where there are files;
  parse(manual_dir: str | None, options: dict) -> RawData.

To add a set: write such a module beside this one and name it in SETS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import difflib
import hashlib
import importlib
import json
import pathlib

import numpy as np

from mmm_jax import errors
from mmm_jax.datasets import networks, rawfiles, splits
from mmm_jax.datasets import records as records_lib

SETS = ("simulated", "microlens", "hetrec_lastfm", "tiktok")
SCHEMA = 2  # raised whenever the records would look different


@dataclasses.dataclass
class RawData:
  """What a set's `parse(manual_dir, options)` returns: nothing filtered.

  A position is an index into `user_ids` or `item_ids`.

  Attributes:
    user_ids, item_ids: raw ids as strings, unique.
    user_items: for every user an int array of item positions (unique within
      the user), oldest first where `ordered`.
    timestamps: for every user an int64 array beside `user_items`, or None.
    counts: for every user an int32 array beside `user_items`, how often the
      item was watched or played, at least 1; or None.
    part: for every user an int8 array (0 train, 1 valid, 2 test) where the
      set comes with its own split, or None.
    networks: {name: for every user an int array of user positions that the
      user follows}.
    text, title: one string an item ("" = absent), or None.
    category: int32 [N] into `category_names`, -1 unknown, or None.
    vectors: {source: float16 or float32 [N, F] array, or a function without
      arguments that returns an iterator over N rows [F]}.
    vector_dims: {source: F}; only needed where `vectors` holds a function.
    present: {source: bool [N]}; a source that is not named is complete
      (and "text" is present where the string is not empty).
    user_tags: for every user a pair (item positions, tag strings) of equal
      lengths, or None.
    ordered: `user_items` is chronological.
    extra: arrays kept beside the records as truth.npz (no object arrays).
  """

  user_ids: list[str]
  item_ids: list[str]
  user_items: list[np.ndarray]
  ordered: bool
  timestamps: list[np.ndarray] | None = None
  counts: list[np.ndarray] | None = None
  part: list[np.ndarray] | None = None
  networks: dict[str, list[np.ndarray]] = dataclasses.field(
    default_factory=dict
  )
  text: list[str] | None = None
  title: list[str] | None = None
  category: np.ndarray | None = None
  category_names: list[str] = dataclasses.field(default_factory=list)
  vectors: dict[str, np.ndarray | Callable[[], Iterable[np.ndarray]]] = (
    dataclasses.field(default_factory=dict)
  )
  vector_dims: dict[str, int] = dataclasses.field(default_factory=dict)
  present: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  user_tags: list[tuple[np.ndarray, list[str]]] | None = None
  extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tags:
  """(user, item, tag) triples with dense ids.

  Attributes:
    user, item: int32 [T].
    text: str [T].
  """

  user: np.ndarray
  item: np.ndarray
  text: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared set after the core filter: dense ids 0..M-1 and 0..N-1.

  Attributes:
    name: of the set.
    users, items: raw ids [M], [N], str objects.
    user, item: int32 [E], the interactions, by user, then in order of time
      where that is known.
    timestamp: int64 [E], -1 where unknown.
    count: int32 [E], how often the item was watched or played, or None.
    ordered: a user's interactions are chronological.
    part: int8 [E], the set's own split (0 train, 1 valid, 2 test), or None.
    networks: explicit ones.
    text: str [N], "" = absent, or None. Without what users added (tags).
    tags: what users wrote about items, or None.
    title: str [N], for people to read.
    category: int32 [N], -1 unknown, or None; for evaluation only.
    category_names: what the numbers mean.
    vectors: {dense source: dimension}.
    present: {source, "text" included: bool [N]}.
    records: int64 [N], record number of every item in `item_source`.
    item_source: their records, with the vectors by source.
    raw_users, raw_items: all ids before any filter.
    fingerprint: hash of the prepared records.
    statistics: see `summarise`.
    folder: where they lie (truth.npz of a simulated set is there).
  """

  name: str
  users: np.ndarray
  items: np.ndarray
  user: np.ndarray
  item: np.ndarray
  timestamp: np.ndarray
  count: np.ndarray | None
  ordered: bool
  part: np.ndarray | None
  networks: dict[str, networks.Network]
  text: np.ndarray | None
  tags: Tags | None
  title: np.ndarray
  category: np.ndarray | None
  category_names: list[str]
  vectors: dict[str, int]
  present: dict[str, np.ndarray]
  records: np.ndarray
  item_source: records_lib.Source
  raw_users: np.ndarray
  raw_items: np.ndarray
  fingerprint: str
  statistics: dict = dataclasses.field(default_factory=dict)
  folder: pathlib.Path | None = None

  @property
  def num_users(self) -> int:
    return len(self.users)

  @property
  def num_items(self) -> int:
    return len(self.items)


def load(config, split=None, processes=records_lib.Alone) -> Dataset:
  """Prepares a set if needed, reads it and applies the core filter.

  Args:
    config: `dataset` of the run's config: `name`, `data_dir`, `manual_dir`,
      `core` (interactions that every user and item must keep, 0 = off), and
      the set's own options under its name, where it has any.
    split: `split` of the run's config; None = `auto`. The set's own split and
      one from a file are taken as they stand, without a further core.
    processes: `mmm_jax.parallel` where a run may have several; all call this.

  Raises:
    InputError: unknown name, wrong raw files, a data_dir without room.
  """
  module = _module(config.name)
  folder = processes.together(lambda: _prepare(module, config, processes))
  about, users, items, source = records_lib.read(folder, processes)
  edges = _edges(users)
  keep, core = processes.together(
    lambda: _select(edges, users, items, config, split)
  )
  dataset = _assemble(
    about, users, items, source, edges, keep, core["filtered"]
  )
  return dataclasses.replace(
    dataset, folder=folder, statistics=summarise(dataset, len(keep), core)
  )


def _module(name):
  if name not in SETS:
    near = difflib.get_close_matches(name, SETS, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise errors.InputError(
      f"dataset.name: found '{name}'{hint}, wanted one of {', '.join(SETS)}"
    )
  return importlib.import_module(f"mmm_jax.datasets.{name}")


def _prepare(module, config, processes):
  """The prepared folder: named by raw files, code version and options."""
  name = config.name
  options = config[name].to_dict() if name in config else {}
  identity = {"schema": SCHEMA, "code": module.VERSION, "options": options}
  if module.FILES:
    paths = rawfiles.locate(config.manual_dir, name, module.FILES, module.PAGE)
    identity["files"] = rawfiles.digest(list(paths.values()))
  text = json.dumps(identity, sort_keys=True)
  tag = hashlib.sha256(text.encode()).hexdigest()[:16]
  data_dir = pathlib.Path(config.data_dir).expanduser()
  return records_lib.prepare(
    data_dir / f"{name}-{tag}",
    name,
    lambda: module.parse(config.manual_dir, options),
    processes,
  )


def _edges(users):
  """Interactions of all raw users: dict of arrays [E]."""
  lengths = [len(items) for items in users["items"]]
  edges = {
    "user": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
    "item": _joined(users["items"], np.int32),
    "timestamp": _joined(users["timestamps"], np.int64),
  }
  for name, dtype in (("part", np.int8), ("counts", np.int32)):
    if name in users:
      edges[name] = _joined(users[name], dtype)
  return edges


def _joined(arrays, dtype):
  return np.concatenate([np.zeros(0, dtype), *arrays])


def _select(edges, users, items, config, split):
  """Which edges stay (bool [E]), and what the core did, for the statistics."""
  everything = np.ones(len(edges["user"]), bool)
  kind = splits.kind(split, "part" in edges) if split else "own"
  if kind == "file":
    position, _ = splits.locate(
      split.path, users["id"], items["id"], edges["user"], edges["item"]
    )
    keep = np.zeros_like(everything)
    keep[position] = True
    left_out = int((~keep).sum())
    return keep, {"size": 0, "filtered": True, "left_out": left_out}
  if not config.core or (kind == "own" and "part" in edges):
    return everything, {"size": 0, "filtered": False}
  keep, report = core_filter(edges["user"], edges["item"], config.core)
  if not keep.any():
    raise errors.InputError(
      f"dataset.core: found {config.core}, which leaves nothing of "
      f"'{config.name}', wanted a number that some users and items reach; set "
      "a smaller one (0 keeps everything)"
    )
  return keep, report | {"filtered": True}


def core_filter(
  user: np.ndarray, item: np.ndarray, size: int
) -> tuple[np.ndarray, dict]:
  """Repeats the filter until every user and item left has `size` edges.

  Args:
    user, item: ints [E].
    size: wanted interactions of a user and of an item.

  Returns:
    bool [E], the edges that stay; and {size, rounds, single_pass: {users,
    items, interactions}}: what one pass alone would have kept.
  """
  keep = np.ones(len(user), bool)
  report = {"size": int(size), "rounds": 0}
  while True:
    enough = _frequent(user, keep, size) & _frequent(item, keep, size)
    if not report["rounds"]:
      report["single_pass"] = _counts(user[enough & keep], item[enough & keep])
    if np.array_equal(enough & keep, keep):
      return keep, report
    keep &= enough
    report["rounds"] += 1


def _frequent(ids, keep, size):
  counts = np.bincount(ids[keep], minlength=ids.max(initial=-1) + 1)
  return counts[ids] >= size


def _counts(user, item):
  return {
    "users": int(np.count_nonzero(np.bincount(user))),
    "items": int(np.count_nonzero(np.bincount(item))),
    "interactions": len(user),
  }


def _assemble(about, users, items, source, edges, keep, filtered) -> Dataset:
  """Dense ids for what stays."""
  kept_users, user_of = _dense(edges["user"][keep], len(users["id"]), filtered)
  kept_items, item_of = _dense(edges["item"][keep], len(items["id"]), filtered)
  raw_users, raw_items = _strings(users["id"]), _strings(items["id"])
  text = _strings(items["text"])[kept_items] if "text" in items else None
  title = items["title"] if "title" in items else items.get("text")
  category = np.array(items["category"], np.int32)[kept_items]
  sources = [*about["vectors"], *(["text"] if "text" in items else [])]
  return Dataset(
    name=about["name"],
    users=raw_users[kept_users],
    items=raw_items[kept_items],
    user=user_of[edges["user"][keep]],
    item=item_of[edges["item"][keep]],
    timestamp=edges["timestamp"][keep],
    count=edges["counts"][keep] if "counts" in edges else None,
    ordered=about["ordered"],
    part=edges["part"][keep] if "part" in edges else None,
    networks={
      name: _network(users[f"network_{name}"], kept_users, user_of)
      for name in about["networks"]
    },
    text=text,
    tags=_tags(users, user_of, item_of) if "tag_items" in users else None,
    title=_strings(title or [""] * len(raw_items))[kept_items],
    category=category if (category >= 0).any() else None,
    category_names=about["category_names"],
    vectors=about["vectors"],
    present={
      source: np.array(items[f"present_{source}"], bool)[kept_items]
      for source in sources
    },
    records=kept_items.astype(np.int64),
    item_source=source,
    raw_users=raw_users,
    raw_items=raw_items,
    fingerprint=about["fingerprint"],
  )


def _strings(values):
  array = np.empty(len(values), object)
  array[:] = values
  return array


def _dense(ids, total, filtered):
  """Raw positions that stay, ascending, and raw -> dense (-1 = dropped)."""
  used = np.bincount(ids, minlength=total) > 0
  kept = np.flatnonzero(used) if filtered else np.arange(total)
  dense = np.full(total, -1, np.int32)
  dense[kept] = np.arange(len(kept), dtype=np.int32)
  return kept, dense


def _network(neighbours, kept_users, user_of):
  lengths = [len(each) for each in neighbours]
  source = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
  target = _joined(neighbours, np.int32)
  return networks.from_edges(user_of[source], user_of[target], len(kept_users))


def _tags(users, user_of, item_of):
  lengths = [len(each) for each in users["tag_items"]]
  user = user_of[np.repeat(np.arange(len(lengths)), lengths)]
  item = item_of[_joined(users["tag_items"], np.int32)]
  text = _strings([text for each in users["tag_texts"] for text in each])
  good = (user >= 0) & (item >= 0)
  return Tags(user=user[good], item=item[good], text=text[good])


def summarise(dataset: Dataset, num_raw: int, core: dict) -> dict:
  """The statistics that are printed and stored.

  Args:
    dataset: after the filter.
    num_raw: interactions before it.
    core: report of `core_filter`.

  Returns:
    users, items, interactions, per_user and per_item {min, median, mean, max},
    density, networks {name: edges}, sources {name: share of items}, raw,
    core.
  """
  num_edges = len(dataset.user)
  cells = dataset.num_users * dataset.num_items
  return {
    "users": dataset.num_users,
    "items": dataset.num_items,
    "interactions": num_edges,
    "per_user": _spread(dataset.user, dataset.num_users),
    "per_item": _spread(dataset.item, dataset.num_items),
    "density": num_edges / cells if cells else 0.0,
    "networks": {
      name: each.num_edges for name, each in dataset.networks.items()
    },
    "sources": {
      name: float(mask.mean()) for name, mask in dataset.present.items()
    },
    "raw": {
      "users": len(dataset.raw_users),
      "items": len(dataset.raw_items),
      "interactions": num_raw,
    },
    "core": core,
  }


def _spread(ids, total):
  counts = np.bincount(ids, minlength=total)
  return {
    "min": int(counts.min()),
    "median": float(np.median(counts)),
    "mean": float(counts.mean()),
    "max": int(counts.max()),
  }


def statistics_line(dataset: Dataset) -> str:
  """The statistics of a set on one line for people."""
  statistics = dataset.statistics
  parts = [
    f"{statistics['users']:,} users",
    f"{statistics['items']:,} items",
    f"{statistics['interactions']:,} interactions",
    f"per user {_spread_text(statistics['per_user'])}",
    f"per item {_spread_text(statistics['per_item'])}",
    f"density {100 * statistics['density']:.3f} %",
  ]
  for network_name, num_edges in statistics["networks"].items():
    parts.append(f"network {network_name} {num_edges:,} edges")
  for source, share in statistics["sources"].items():
    parts.append(f"{source} {100 * share:.1f} % of items")
  return f"{dataset.name}: {', '.join(parts)}{_core_text(statistics)}"


def _spread_text(spread):
  return (
    f"{spread['min']}/{spread['median']:g}/{spread['max']} (min/median/max)"
  )


def _core_text(statistics):
  core, raw = statistics["core"], statistics["raw"]
  if "left_out" in core:
    return (
      f"; split.path leaves out {core['left_out']:,} of "
      f"{raw['interactions']:,} interactions"
    )
  if not core["size"]:
    return ""
  once = core["single_pass"]
  return (
    f"; {core['size']}-core in {core['rounds']} rounds dropped "
    f"{raw['users'] - statistics['users']:,} users and "
    f"{raw['items'] - statistics['items']:,} items of {raw['users']:,} and "
    f"{raw['items']:,} (a single pass would keep {once['users']:,}, "
    f"{once['items']:,}, {once['interactions']:,})"
  )
