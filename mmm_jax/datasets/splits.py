"""Training, validation and test parts, made at load from protocol and seed."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pyarrow.compute as pc

from mmm_jax import errors, files

if TYPE_CHECKING:
  from mmm_jax.datasets import base

TRAIN, VALID, TEST = 0, 1, 2
LEFT_OUT = -1
NAMES = ("train", "valid", "test")
PROTOCOLS = (
  "auto",
  "random",
  "leave_last_out",
  "global_time",
  "predefined",
  "none",
)


@dataclasses.dataclass(frozen=True)
class Split:
  """The part of every interaction of a Dataset.

  Attributes:
    part: int8 [E]: TRAIN, VALID, TEST, or LEFT_OUT.
    fingerprint: hash of the raw ids with their parts.
  """

  part: np.ndarray
  fingerprint: str

  @property
  def sizes(self) -> dict[str, int]:
    """Interactions in every part and, under "left_out", in none."""
    sizes = {
      name: int((self.part == code).sum()) for code, name in enumerate(NAMES)
    }
    return sizes | {"left_out": int((self.part == LEFT_OUT).sum())}

  @property
  def line(self) -> str:
    """The sizes for people."""
    sizes = self.sizes.items()
    parts = [f"{name} {size:,}" for name, size in sizes if size]
    return f"split: {', '.join(parts)}"


def kind(config, has_own: bool) -> str:
  """Where the split comes from.

  Args:
    config: `split` of the run's config: `protocol`, `path`.
    has_own: the set comes with a split.

  Returns:
    "file", "own", or one of the protocols that are computed.

  Raises:
    InputError: unknown protocol, a path with a protocol that reads none, or
      `predefined` where nothing is.
  """
  protocol = config.protocol
  if protocol not in PROTOCOLS:
    raise errors.InputError(
      f"split.protocol: found '{protocol}', wanted one of "
      f"{', '.join(PROTOCOLS)}"
    )
  if config.path and protocol not in ("auto", "predefined"):
    raise errors.InputError(
      f"split.path: found '{config.path}' with split.protocol '{protocol}', "
      "which reads no file; set split.protocol to predefined or clear "
      "split.path"
    )
  if config.path:
    return "file"
  if protocol == "predefined" and not has_own:
    raise errors.InputError(
      "split.protocol: found 'predefined' for a set without a split of its "
      "own; give a Parquet file with the columns user, item, part in "
      "split.path, or choose another protocol"
    )
  if protocol in ("auto", "predefined"):
    return "own" if has_own else "random"
  return protocol


def make(dataset: base.Dataset, config) -> Split:
  """Splits the interactions of a data set.

  Args:
    dataset: as loaded with the same `config`.
    config: `split` of the run's config: `protocol`, `path`, `seed`, `ratios`
      (three numbers that sum to 1).

  Raises:
    InputError: the set lacks what the protocol needs, or the file is wrong.
  """
  source = kind(config, dataset.part is not None)
  if source == "file":
    part = _from_file(dataset, config.path)
  elif source == "own":
    part = dataset.part.astype(np.int8)
  elif source == "none":
    part = np.full(len(dataset.user), TRAIN, np.int8)
  elif source == "random":
    part = _random(dataset.user, config.seed, _bounds(config.ratios))
  elif source == "leave_last_out":
    part = _leave_last_out(dataset)
  else:
    part = _global_time(dataset, _bounds(config.ratios))
  return Split(part=part, fingerprint=_fingerprint(dataset, part))


def _bounds(ratios) -> tuple[float, float]:
  """Shares up to which interactions train and validate."""
  good = (
    len(ratios) == 3
    and all(isinstance(share, int | float) for share in ratios)
    and min(ratios) >= 0
    and ratios[0] > 0
  )
  if not good or abs(sum(ratios) - 1) > 1e-9:
    raise errors.InputError(
      f"split.ratios: found {tuple(ratios)}, wanted three shares (train, "
      "valid, test) that sum to 1, the first above 0"
    )
  # .7 + .1 is not .8 in floating point, and round() would notice.
  return ratios[0], round(ratios[0] + ratios[1], 12)


def _rank_in_user(user, key):
  """Rank of each interaction among those of its user, ascending by key."""
  order = np.lexsort((key, user))
  counts = np.bincount(user, minlength=1)
  starts = np.cumsum(counts) - counts
  rank = np.empty(len(user), np.int64)
  rank[order] = np.arange(len(user)) - starts[user[order]]
  return rank, counts[user]


def _random(user, seed, bounds):
  key = np.random.default_rng(seed).random(len(user))
  rank, total = _rank_in_user(user, key)
  # Python's round, once for every length of a history.
  lengths, which = np.unique(total, return_inverse=True)
  train = np.array([max(1, round(bounds[0] * int(n))) for n in lengths], int)
  valid = np.array([round(bounds[1] * int(n)) for n in lengths], int)
  part = np.full(len(user), TEST, np.int8)
  part[rank < valid[which]] = VALID
  part[rank < train[which]] = TRAIN
  return part


def _leave_last_out(dataset):
  """Last to test, last but one to validation; one or two keep the first."""
  if not dataset.ordered:
    raise errors.InputError(
      f"split.protocol: found 'leave_last_out', but '{dataset.name}' does not "
      "say in which order a user's interactions happened; choose random"
    )
  rank, total = _rank_in_user(dataset.user, np.arange(len(dataset.user)))
  part = np.full(len(rank), TRAIN, np.int8)
  part[(rank == total - 2) & (total >= 3)] = VALID
  part[(rank == total - 1) & (total >= 2)] = TEST
  return part


def _global_time(dataset, bounds):
  """Cuts the time line; what happened at the same time stays together."""
  if not len(dataset.timestamp) or dataset.timestamp.min() < 0:
    raise errors.InputError(
      f"split.protocol: found 'global_time', but '{dataset.name}' has no time "
      "for every interaction; choose random"
      + (" or leave_last_out" if dataset.ordered else "")
    )
  times = np.sort(dataset.timestamp)
  last = [max(1, round(bound * len(times))) - 1 for bound in bounds]
  part = np.full(len(times), TEST, np.int8)
  part[dataset.timestamp <= times[last[1]]] = VALID
  part[dataset.timestamp <= times[last[0]]] = TRAIN
  return part


def _from_file(dataset, path):
  position, codes = locate(
    path, dataset.users, dataset.items, dataset.user, dataset.item
  )
  part = np.full(len(dataset.user), LEFT_OUT, np.int8)
  part[position] = codes
  return part


def locate(
  path: str, users, items, user: np.ndarray, item: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the pairs of a split file among the interactions of a set.

  Args:
    path: a Parquet file with the columns user, item (raw ids), part.
    users, items: raw ids by number.
    user, item: ints [E], the interactions.

  Returns:
    For every row of the file the number of its interaction, and its part.

  Raises:
    InputError: no such file, other columns, unknown ids, parts or pairs,
      repeated pairs.
  """
  table = _read_table(path)
  row_user = _lookup(path, table, "user", users)
  row_item = _lookup(path, table, "item", items)
  codes = _codes(path, table)
  key = user.astype(np.int64) * len(items) + item
  wanted = row_user * len(items) + row_item
  _check_unique(path, table, wanted)
  order = np.argsort(key, kind="stable")
  place = np.searchsorted(key[order], wanted)
  place = order[np.minimum(place, len(order) - 1)]
  _check_rows(
    path,
    table,
    key[place] != wanted,
    "a pair that is no interaction of this data set",
    "pairs of the set that dataset.name and dataset.manual_dir give",
  )
  return place, codes


def _read_table(path):
  file = pathlib.Path(path).expanduser()
  wanted = "a Parquet file with the columns user, item, part"
  try:
    table = parquet.read_table(file)
  except (OSError, pa.ArrowInvalid) as error:
    raise errors.InputError(
      f"split.path={path}: found no readable file "
      f"({str(error).splitlines()[0]}), wanted {wanted}"
    ) from error
  missing = [
    name for name in ("user", "item", "part") if name not in table.column_names
  ]
  if missing or not table.num_rows:
    found = f"the columns {table.column_names}, {table.num_rows} rows"
    raise errors.InputError(
      f"split.path={path}: found {found}, wanted {wanted}"
    )
  return table


def _check_rows(path, table, bad, found, wanted):
  rows = np.flatnonzero(bad)
  if rows.size:
    row = table.slice(int(rows[0]), 1).to_pylist()[0]
    raise errors.InputError(
      f"split.path={path}, row {rows[0] + 1} (user {row['user']!r}, item "
      f"{row['item']!r}, part {row['part']!r}): found {found} (in {rows.size} "
      f"of {table.num_rows} rows), wanted {wanted}"
    )


def _texts(path, table, column):
  try:
    return pc.cast(table[column], pa.string())
  except pa.ArrowException as error:
    raise errors.InputError(
      f"split.path={path}, column '{column}': found {table[column].type}"
      f" ({str(error).splitlines()[0]}), wanted strings"
    ) from error


def _lookup(path, table, column, ids):
  """Numbers of the raw ids in a column, int64 [rows]."""
  values = _texts(path, table, column)
  number = pc.index_in(values, value_set=pa.array(list(ids), pa.string()))
  number = pc.fill_null(number, -1).to_numpy().astype(np.int64)
  _check_rows(
    path,
    table,
    number < 0,
    f"an unknown {column}",
    f"one of the {len(ids)} {column}s of this data set",
  )
  return number


def _codes(path, table):
  values = _texts(path, table, "part")
  number = pc.index_in(values, value_set=pa.array(NAMES))
  number = pc.fill_null(number, -1).to_numpy().astype(np.int8)
  _check_rows(
    path, table, number < 0, "an unknown part", f"one of {', '.join(NAMES)}"
  )
  return number


def _check_unique(path, table, key):
  first = np.unique(key, return_index=True)[1]
  again = np.ones(len(key), bool)
  again[first] = False
  _check_rows(path, table, again, "a pair again", "each pair once")


def _fingerprint(dataset, part):
  digest = hashlib.sha256()
  for ids in (dataset.users, dataset.items):
    digest.update("\n".join(ids).encode() + b"\0")
  for array in (dataset.user, dataset.item, part):
    digest.update(np.ascontiguousarray(array).tobytes() + b"\0")
  return digest.hexdigest()


def write(path: str | pathlib.Path, dataset: base.Dataset, split: Split):
  """Writes the split as Parquet: user, item (raw ids), part; atomically.

  Interactions that are left out are not in the file.

  Raises:
    InputError: the file cannot be written.
  """
  used = split.part != LEFT_OUT
  columns = {
    "user": pa.array(dataset.users[dataset.user[used]], pa.string()),
    "item": pa.array(dataset.items[dataset.item[used]], pa.string()),
    "part": pa.array(np.array(NAMES)[split.part[used]], pa.string()),
  }
  files.write_parquet(path, columns)
