"""TikTok (ICME 2019 challenge) in the ready-made split of MMSSL.

Users have no order in time; every item has an image and an audio vector.
"""

from __future__ import annotations

import numpy as np

from mmm_jax.datasets import base, rawfiles

VERSION = 1
PAGE = "https://github.com/HKUDS/MMSSL"
PARTS = ("trn.tsv", "val.tsv", "tst.tsv")
VECTORS = {"visual": "image_feat.npy", "audio": "audio_feat.npy"}
FILES = (*PARTS, *VECTORS.values())
LINES = {
  "trn.tsv": 59_541,
  "val.tsv": 3_051,
  "tst.tsv": 6_130,
}  # of the originals


def parse(manual_dir: str | None, options: dict) -> base.RawData:
  """Reads the split's three lists and the two arrays.

  Args:
    manual_dir: folder with FILES.
    options: none exist.

  Raises:
    InputError: a file is missing or not what it should be.
  """
  del options
  paths = rawfiles.locate(manual_dir, "tiktok", FILES, PAGE)
  files = {name: rawfiles.RawFile(path, PAGE) for name, path in paths.items()}
  vectors = {source: _vectors(files[name]) for source, name in VECTORS.items()}
  num_items = _common_length(files, vectors)
  user, item, part = _interactions(files, num_items)
  num_users = int(user.max()) + 1
  order = np.lexsort((item, part, user))
  cuts = np.searchsorted(user[order], np.arange(1, num_users))
  return base.RawData(
    user_ids=[str(user) for user in range(num_users)],
    item_ids=[str(item) for item in range(num_items)],
    user_items=np.split(item[order], cuts),
    part=np.split(part[order], cuts),
    ordered=False,
    vectors=vectors,
  )


def _vectors(file):
  """A float array [N, F]; never unpickles."""
  with file.path.open("rb") as stream:
    if stream.read(6) != b"\x93NUMPY":
      file.fail("byte 1", "no NumPy array", "a float array [N, F]")
  try:
    array = np.load(file.path, allow_pickle=False)
  except Exception as error:  # a damaged header raises almost anything
    reason = " ".join(str(error).split())
    file.fail("", f"a damaged array ({reason})", "a float array [N, F]")
  if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
    file.fail(
      "", f"an array {array.dtype}{list(array.shape)}", "a float array [N, F]"
    )
  bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
  if bad.size:
    file.fail(f"row {bad[0]}", "a value that is not finite", "finite numbers")
  return array


def _common_length(files, vectors):
  lengths = {source: len(array) for source, array in vectors.items()}
  if len(set(lengths.values())) > 1:
    files[VECTORS["audio"]].fail(
      "",
      f"{lengths['audio']} rows",
      f"{lengths['visual']}, as in {VECTORS['visual']}",
    )
  return lengths["visual"]


def _interactions(files, num_items):
  """(user, item, part) of every line; each pair once, ids without gaps."""
  rows = {
    name: list(rawfiles.table(files[name], ("user", "item"), header=False))
    for name in PARTS
  }
  rawfiles.check_lines(files, LINES)
  # Ids without gaps are smaller than the number of lines.
  num_pairs = sum(map(len, rows.values()))
  parts = [
    _pairs(files[name], rows[name], num_pairs, num_items) for name in PARTS
  ]
  user, item = np.concatenate(parts).T
  part = np.repeat(np.arange(3, dtype=np.int8), [len(pairs) for pairs in parts])
  _check_unique(files, user, item, part, num_items)
  last = files[PARTS[-1]]
  users = np.arange(user.max() + 1)
  rawfiles.check_all_used(
    last, "the three lists (0 to the largest)", users, np.isin(users, user)
  )
  items = np.arange(num_items)
  rawfiles.check_all_used(last, VECTORS["visual"], items, np.isin(items, item))
  return user.astype(np.int32), item.astype(np.int32), part


def _pairs(file, rows, max_users, num_items):
  pairs = []
  for line, (user, item) in rows:
    pair = (
      rawfiles.integer(file, line, "user", user),
      rawfiles.integer(file, line, "item", item),
    )
    if pair[0] >= max_users:
      file.fail(
        f"line {line}, column 'user'",
        f"the id {pair[0]}",
        f"ids without gaps (there are {max_users} interactions)",
      )
    if pair[1] >= num_items:
      file.fail(
        f"line {line}, column 'item'",
        f"the id {pair[1]}",
        f"a row of {VECTORS['visual']} (0 to {num_items - 1})",
      )
    pairs.append(pair)
  return np.array(pairs, np.int64)


def _check_unique(files, user, item, part, num_items):
  key = user * num_items + item
  first = np.unique(key, return_index=True)[1]
  if len(first) == len(key):
    return
  again = np.setdiff1d(np.arange(len(key)), first)[0]
  starts = np.searchsorted(part, np.arange(3))
  files[PARTS[part[again]]].fail(
    f"line {again - starts[part[again]] + 1}",
    f"user {user[again]} with item {item[again]} again",
    "each pair once in the three lists",
  )
