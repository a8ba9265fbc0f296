"""Last.fm of HetRec 2011: artists, friends, tags (Cantador et al., 2011).

The text of an artist is its name; the tags that users gave stay with the
users, because a tag is evidence of listening: `features.compose_tag_text`
adds them at load, without those of held-out pairs.
"""

from __future__ import annotations

import collections

import numpy as np

from mmm_jax.datasets import base, rawfiles

VERSION = 2
PAGE = "https://grouplens.org/datasets/hetrec-2011/"
COLUMNS = {
  "user_artists.dat": ("userID", "artistID", "weight"),
  "user_friends.dat": ("userID", "friendID"),
  "user_taggedartists.dat": (
    "userID",
    "artistID",
    "tagID",
    "day",
    "month",
    "year",
  ),
  "artists.dat": ("id", "name", "url", "pictureURL"),
  "tags.dat": ("tagID", "tagValue"),
}
FILES = tuple(COLUMNS)
LINES = {  # of the originals
  "user_artists.dat": 92_835,
  "user_friends.dat": 25_435,
  "user_taggedartists.dat": 186_479,
  "artists.dat": 17_633,
  "tags.dat": 11_947,
}


def parse(manual_dir: str | None, options: dict) -> base.RawData:
  """Reads the five raw files.

  Args:
    manual_dir: folder with FILES.
    options: none exist.

  Raises:
    InputError: a file is missing or not what it should be.
  """
  del options
  paths = rawfiles.locate(manual_dir, "hetrec_lastfm", FILES, PAGE)
  files = {
    name: rawfiles.RawFile(
      path, PAGE, "latin-1" if name == "tags.dat" else "utf-8"
    )
    for name, path in paths.items()
  }
  # All files by themselves, then their lengths, then one against another: so
  # that the message names the file that is wrong.
  rows = {
    name: list(rawfiles.table(file, COLUMNS[name], header=True))
    for name, file in files.items()
  }
  rawfiles.check_lines(files, LINES)
  return _parse_rows({name: (files[name], rows[name]) for name in FILES})


def _parse_rows(tables):
  artists = _named(*tables["artists.dat"])
  positions = {artist: number for number, artist in enumerate(artists)}
  histories = _histories(*tables["user_artists.dat"], positions)
  users = {user: number for number, user in enumerate(histories)}
  tags = _named(*tables["tags.dat"])
  return base.RawData(
    user_ids=[str(user) for user in users],
    item_ids=[str(artist) for artist in artists],
    user_items=[np.fromiter(own, np.int32) for own in histories.values()],
    counts=[np.fromiter(own.values(), np.int32) for own in histories.values()],
    ordered=False,
    networks={"friend": _friends(*tables["user_friends.dat"], users)},
    text=list(artists.values()),
    user_tags=_user_tags(
      *tables["user_taggedartists.dat"], users, positions, tags
    ),
  )


def _named(file, rows):
  """{id: name} of a table whose first two columns are id and name."""
  id_column = COLUMNS[file.path.name][0]
  names = {}
  for line, fields in rows:
    number = rawfiles.integer(file, line, id_column, fields[0])
    if number in names:
      file.fail(
        f"line {line}, column '{id_column}'",
        f"the id {number} again",
        "each id once",
      )
    names[number] = fields[1].strip()
  if not names:
    file.fail("line 2", "no rows", "at least one")
  return names


def _histories(file, rows, positions):
  """{user id: {position of an artist listened to: how often}}."""
  histories = collections.defaultdict(dict)
  used = np.zeros(len(positions), bool)
  for line, (user, artist, weight) in rows:
    number = rawfiles.integer(file, line, "userID", user)
    position = rawfiles.known(
      file, line, "artistID", artist, positions, "artists.dat"
    )
    plays = rawfiles.integer(file, line, "weight", weight)
    if plays < 1:
      file.fail(f"line {line}, column 'weight'", f"{plays}", "1 or more")
    if position in histories[number]:
      file.fail(
        f"line {line}", f"user {user} with artist {artist} again", "each once"
      )
    histories[number][position] = plays
    used[position] = True
  rawfiles.check_all_used(file, "artists.dat", list(positions), used)
  return histories


def _friends(file, rows, users):
  """For every user the positions of their friends, as listed."""
  friends = [[] for _ in users]
  for line, (user, friend) in rows:
    source = rawfiles.known(
      file, line, "userID", user, users, "user_artists.dat"
    )
    target = rawfiles.known(
      file, line, "friendID", friend, users, "user_artists.dat"
    )
    friends[source].append(target)
  used = np.array([bool(each) for each in friends])
  rawfiles.check_all_used(file, "user_artists.dat", list(users), used)
  return [np.array(each, np.int32) for each in friends]


def _user_tags(file, rows, users, positions, tags):
  """For every user (artist positions, tags given to them)."""
  given = [([], []) for _ in users]
  for line, fields in rows:
    user = rawfiles.known(
      file, line, "userID", fields[0], users, "user_artists.dat"
    )
    artist = rawfiles.integer(file, line, "artistID", fields[1])
    tag = rawfiles.known(file, line, "tagID", fields[2], tags, "tags.dat")
    # Some tagged artists are not in artists.dat, in the original as well.
    if artist in positions:
      given[user][0].append(positions[artist])
      given[user][1].append(tag)
  return [(np.array(items, np.int32), texts) for items, texts in given]
