"""MicroLens-50K: short videos with English titles (Ni et al., 2023).

Histories are chronological, without times. Likes and views are not read:
they count events that a split holds out.
"""

from __future__ import annotations

import numpy as np

from mmm_jax.datasets import base, rawfiles

VERSION = 1
PAGE = "https://github.com/westlake-repl/MicroLens"
PAIRS = "MicroLens-50k_pairs.tsv"
TITLES = "MicroLens-50k_titles.csv"
CATEGORIES = "tags_to_summary.csv"
FILES = (PAIRS, TITLES, CATEGORIES)
LINES = {PAIRS: 50_000, TITLES: 19_221, CATEGORIES: 19_739}  # of the originals


def parse(manual_dir: str | None, options: dict) -> base.RawData:
  """Reads the three raw files.

  Args:
    manual_dir: folder with FILES.
    options: none exist.

  Raises:
    InputError: a file is missing or not what it should be.
  """
  del options
  paths = rawfiles.locate(manual_dir, "microlens", FILES, PAGE)
  files = {name: rawfiles.RawFile(path, PAGE) for name, path in paths.items()}
  # All files by themselves, then their lengths, then one against another: so
  # that the message names the file that is wrong.
  titles = _titles(files[TITLES])
  pairs = list(rawfiles.table(files[PAIRS], ("user", "items"), header=False))
  labels = _labels(files[CATEGORIES])
  rawfiles.check_lines(files, LINES)
  users, histories = _histories(files[PAIRS], pairs, titles)
  category, names = _categories(files[CATEGORIES], labels, titles)
  return base.RawData(
    user_ids=[str(user) for user in users],
    item_ids=[str(item) for item in titles],
    user_items=histories,
    ordered=True,
    text=list(titles.values()),
    category=category,
    category_names=names,
  )


def _titles(file):
  """{item id: title}, in the order of the file."""
  titles = {}
  for line, (item, title) in rawfiles.csv_table(file, ("item", "title")):
    number = rawfiles.integer(file, line, "item", item)
    if number in titles:
      file.fail(
        f"line {line}, column 'item'", f"item {number} again", "each item once"
      )
    titles[number] = title.strip()
  if not titles:
    file.fail("line 2", "no items", "one line an item")
  return titles


def _histories(file, rows, titles):
  """User ids and, for each, the positions of the items watched, in order."""
  positions = {item: position for position, item in enumerate(titles)}
  histories = {}
  for line, (user, items) in rows:
    number = rawfiles.integer(file, line, "user", user)
    if number in histories:
      file.fail(
        f"line {line}, column 'user'", f"user {number} again", "each user once"
      )
    watched = {}  # in order; 2 and 02 are one item
    for item in items.split(" "):
      position = rawfiles.known(file, line, "items", item, positions, TITLES)
      if position in watched:
        file.fail(
          f"line {line}, column 'items'",
          f"the item {item} again",
          "each item once in a user's history",
        )
      watched[position] = True
    histories[number] = np.fromiter(watched, np.int32)
  used = np.zeros(len(titles), bool)
  used[np.concatenate(list(histories.values()))] = True
  rawfiles.check_all_used(file, TITLES, list(titles), used)
  return list(histories), list(histories.values())


def _labels(file):
  """{item id: category}."""
  return {
    rawfiles.integer(file, line, "video_id", item): label.strip()
    for line, (item, label) in rawfiles.csv_table(file, ("video_id", "tag"))
  }


def _categories(file, labels, titles):
  """Category of every item and the categories' names, sorted."""
  used = np.array([item in labels for item in titles])
  rawfiles.check_all_used(file, TITLES, list(titles), used)
  names = sorted({labels[item] for item in titles})
  index = {name: number for number, name in enumerate(names)}
  return np.array([index[labels[item]] for item in titles], np.int32), names
