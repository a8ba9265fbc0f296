"""Builders on tiny files in the raw formats: records, core, and errors."""

import errno
import gzip
import json
import multiprocessing
import os
import pathlib
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mmm_jax import errors
from mmm_jax.datasets import (
  base,
  hetrec_lastfm,
  microlens,
  rawfiles,
  records,
  splits,
  tiktok,
)

REAL = os.environ.get("MMM_JAX_DATA")
REAL_FOLDERS = {
  "microlens": "microlens50k",
  "hetrec_lastfm": "hetrec_lastfm2k",
  "tiktok": "tiktok_mmssl",
}


def write_microlens(folder):
  """3 users, 4 items; Windows line ends and quoting as in the original."""
  folder.mkdir(parents=True)
  (folder / microlens.PAIRS).write_bytes(b"1\t4 2 1\r\n2\t2 3\r\n3\t1 2\r\n")
  (folder / microlens.TITLES).write_bytes(
    'item,title\r\n1,"one, two # three"\r\n2,"caf\u00e9"\r\n3,x\r\n'
    '4,"say ""hi"""\r\n'.encode()
  )
  (folder / microlens.CATEGORIES).write_bytes(
    b"video_id, tag\n1,Game\n2,Anime\n3,Game\n4,Anime\n9,Unused\n"
  )


def write_lastfm(folder):
  """2 users, 3 artists, friends of each other, 4 tags given."""
  folder.mkdir(parents=True)
  rows = {
    "user_artists.dat": ["2\t51\t10", "2\t52\t9", "5\t52\t3", "5\t60\t1"],
    "user_friends.dat": ["2\t5", "5\t2"],
    "user_taggedartists.dat": [
      "2\t51\t1\t1\t4\t2009",
      "2\t52\t2\t1\t4\t2009",
      "5\t52\t2\t1\t4\t2009",
      "5\t777\t1\t1\t4\t2009",
    ],
    "artists.dat": ["51\tAb\u00e9\tu\tp", "52\tCd\tu\tp", "60\tEf\tu\tp"],
    "tags.dat": ["1\tchanson fran\u00e7aise", "2\trock"],
  }
  for name, lines in rows.items():
    encoding = "latin-1" if name == "tags.dat" else "utf-8"
    text = "\n".join(["\t".join(hetrec_lastfm.COLUMNS[name]), *lines]) + "\n"
    (folder / name).write_bytes(text.encode(encoding))


def write_tiktok(folder):
  """3 users, 3 items, a split with 4, 1 and 1 pairs."""
  folder.mkdir(parents=True)
  (folder / "trn.tsv").write_text("0\t2\n0\t0\n1\t1\n2\t0\n")
  (folder / "val.tsv").write_text("0\t1\n")
  (folder / "tst.tsv").write_text("1\t2\n")
  for number, name in enumerate(tiktok.VECTORS.values()):
    array = np.arange(6, dtype=np.float16).reshape(3, 2) + number
    np.save(folder / name, array)


WRITERS = {
  "microlens": write_microlens,
  "hetrec_lastfm": write_lastfm,
  "tiktok": write_tiktok,
}


def make_config(tmp_path, name, core=0):
  return ml_collections.ConfigDict(
    {
      "name": name,
      "data_dir": str(tmp_path / "prepared"),
      "manual_dir": str(tmp_path / "raw"),
      "core": core,
    }
  )


def load(tmp_path, name, core=0):
  if not (tmp_path / "raw").exists():
    WRITERS[name](tmp_path / "raw")
  return base.load(make_config(tmp_path, name, core))


def test_microlens(tmp_path):
  dataset = load(tmp_path, "microlens")
  assert list(dataset.users) == ["1", "2", "3"]
  assert list(dataset.items) == ["1", "2", "3", "4"]
  assert list(dataset.user) == [0, 0, 0, 1, 1, 2, 2]
  assert list(dataset.item) == [3, 1, 0, 1, 2, 0, 1]
  assert dataset.ordered and dataset.part is None
  assert list(dataset.timestamp) == [-1] * 7
  assert dataset.text[3] == 'say "hi"' and dataset.text[1] == "caf\u00e9"
  assert list(dataset.title) == list(dataset.text)
  assert dataset.category_names == ["Anime", "Game"]
  assert list(dataset.category) == [1, 0, 1, 0]
  assert dataset.present["text"].all()
  assert dataset.vectors == {} and dataset.networks == {}


def test_hetrec_lastfm(tmp_path):
  dataset = load(tmp_path, "hetrec_lastfm")
  assert list(dataset.users) == ["2", "5"]
  assert list(dataset.items) == ["51", "52", "60"]
  assert list(dataset.item) == [0, 1, 1, 2]
  assert list(dataset.count) == [10, 9, 3, 1]
  assert list(dataset.text) == ["Ab\u00e9", "Cd", "Ef"]
  friend = dataset.networks["friend"]
  assert list(friend.indptr) == [0, 1, 2] and list(friend.indices) == [1, 0]
  tags = dataset.tags
  found = list(zip(tags.user, tags.item, tags.text, strict=True))
  # The tag of an artist that is not in artists.dat is left out.
  assert found == [
    (0, 0, "chanson fran\u00e7aise"),
    (0, 1, "rock"),
    (1, 1, "rock"),
  ]
  assert not dataset.ordered and dataset.category is None


def test_tiktok(tmp_path):
  dataset = load(tmp_path, "tiktok", core=5)  # its own split: no core
  assert (dataset.num_users, dataset.num_items) == (3, 3)
  pairs = set(zip(dataset.user, dataset.item, dataset.part, strict=True))
  assert pairs == {
    (0, 2, 0),
    (0, 0, 0),
    (1, 1, 0),
    (2, 0, 0),
    (0, 1, 1),
    (1, 2, 2),
  }
  assert dataset.vectors == {"audio": 2, "visual": 2}
  record = dataset.item_source[int(dataset.records[1])]
  np.testing.assert_array_equal(record["visual"], np.float16([2, 3]))
  np.testing.assert_array_equal(record["audio"], np.float16([3, 4]))
  assert record["visual"].dtype == np.float16
  assert set(record) == {"audio", "visual"}  # nothing else is parsed


def test_item_source_can_be_pickled(tmp_path):
  source = load(tmp_path, "tiktok").item_source
  again = pickle.loads(pickle.dumps(source))
  assert len(again) == len(source) == 3
  np.testing.assert_array_equal(again[2]["audio"], source[2]["audio"])


def test_prepared_once_and_anew_when_a_raw_file_changes(tmp_path):
  first = load(tmp_path, "microlens")
  stamp = (first.folder / "set.json").stat().st_mtime_ns
  assert load(tmp_path, "microlens").folder == first.folder
  assert (first.folder / "set.json").stat().st_mtime_ns == stamp
  titles = tmp_path / "raw" / microlens.TITLES
  titles.write_bytes(titles.read_bytes().replace(b"3,x", b"3,y"))
  other = load(tmp_path, "microlens")
  assert other.folder != first.folder
  assert other.fingerprint != first.fingerprint
  assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == (
    sorted([first.folder.name, other.folder.name])
  )


def test_two_processes_prepare_at_once(tmp_path):
  write_microlens(tmp_path / "raw")
  context = multiprocessing.get_context("spawn")
  with context.Pool(2) as pool:
    prints = pool.map(_fingerprint, [tmp_path] * 2)
  assert prints[0] == prints[1]
  assert len(list((tmp_path / "prepared").iterdir())) == 1


def _fingerprint(tmp_path):
  return base.load(make_config(tmp_path, "microlens")).fingerprint


def test_leftovers_of_a_killed_preparation_go(tmp_path):
  folder = load(tmp_path, "microlens").folder
  leftover = folder.parent / f".{folder.name}.tmp-1"
  folder.rename(leftover)
  load(tmp_path, "microlens")
  assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_missing_modalities_are_masked_and_rows_may_be_a_function(tmp_path):
  def rows():
    yield from np.float32([[1, 2], [3, 4]])

  raw = base.RawData(
    user_ids=["u"],
    item_ids=["a", "b"],
    user_items=[np.array([1, 0])],
    ordered=True,
    timestamps=[np.array([5, 7])],
    text=["", "word"],
    vectors={"visual": rows},
    vector_dims={"visual": 2},
    present={"visual": np.array([True, False])},
    extra={"latent": np.ones(3)},
  )
  folder = records.prepare(tmp_path / "set-0", "set", lambda: raw)
  about, users, items, source = records.read(folder)
  assert about["vectors"] == {"visual": 2} and about["ordered"]
  assert items["present_text"] == [0, 1]
  assert items["present_visual"] == [1, 0]
  np.testing.assert_array_equal(source[0]["visual"], np.float16([1, 2]))
  np.testing.assert_array_equal(source[1]["visual"], np.float16([0, 0]))
  np.testing.assert_array_equal(users["timestamps"][0], [5, 7])
  with np.load(folder / "truth.npz", allow_pickle=False) as truth:
    np.testing.assert_array_equal(truth["latent"], np.ones(3))


def prepare_vectors(folder, sizes, rng, count=3):
  """A prepared set of `count` items, each source as long as `sizes` says."""
  raw = base.RawData(
    user_ids=["u"],
    item_ids=[f"video {number}" for number in range(count)],
    user_items=[np.arange(count)],
    ordered=True,
    text=["word " * 60 * number for number in range(count)],
    vectors={name: rng.random((count, n)) for name, n in sizes.items()},
  )
  records.prepare(folder, "set", lambda: raw)
  return records.Vectors(folder, "set", tuple(sizes)), raw.vectors


@pytest.mark.parametrize("size", [1, 63, 64, 5000, 9000])
def test_vectors_are_found_where_tfds_finds_them(tmp_path, size):
  # Their bytes, and an item's, have lengths of one, two, and three digits.
  rng = np.random.default_rng(size)
  sizes = {"visual": size, "audio": 4, "v": 7}
  source, _ = prepare_vectors(tmp_path / "set-0", sizes, rng)
  builder = tfds.builder_from_directory(
    tmp_path / "set-0" / "set" / "items" / records.VERSION
  )
  by_tfds = builder.as_data_source(split="train")
  assert len(source) == len(by_tfds) == 3
  for ours, theirs in zip(source.__getitems__(range(3)), by_tfds):
    assert set(ours) == set(sizes)
    for name in sizes:
      assert ours[name].dtype == np.float16
      np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_record_whose_vector_is_short_is_damage(tmp_path):
  rng = np.random.default_rng(0)
  source, _ = prepare_vectors(tmp_path / "set-0", {"visual": 5}, rng)
  other, _ = prepare_vectors(tmp_path / "set-1", {"visual": 4}, rng)
  source._readers = other._readers
  with pytest.raises(errors.InputError, match="visual.*5.*delete the folder"):
    source[0]


def test_records_of_several_files(tmp_path):
  rng = np.random.default_rng(0)
  sizes = {"visual": 5}
  source, first = prepare_vectors(tmp_path / "set-0", sizes, rng)
  other, second = prepare_vectors(tmp_path / "set-1", sizes, rng, count=2)
  # TFDS begins a second file only after many megabytes.
  source._readers += other._readers
  source._ends = np.array([3, 5])
  assert len(source) == 5
  rows = np.concatenate([first["visual"], second["visual"]]).astype(np.float16)
  wanted = [4, 0, 3, 2, 2]
  found = [record["visual"] for record in source.__getitems__(wanted)]
  np.testing.assert_array_equal(found, rows[wanted])


def test_statistics(tmp_path):
  dataset = load(tmp_path, "tiktok")
  statistics = dataset.statistics
  assert statistics["density"] == 6 / (3 * 3)
  assert statistics["per_user"] == {
    "min": 1,
    "median": 2.0,
    "mean": 6 / 3,
    "max": 3,
  }
  assert statistics["sources"] == {"audio": 1.0, "visual": 1.0}
  line = base.statistics_line(dataset)
  assert "\n" not in line and "3 users, 3 items, 6 interactions" in line
  json.dumps(statistics)


# --- the core ----------------------------------------------------------------

EDGES = st.sets(
  st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(edges=EDGES, size=st.integers(1, 4))
def test_core_is_the_largest_set_with_enough_edges(edges, size):
  user, item = np.array(sorted(edges)).T
  keep, report = base.core_filter(user, item, size)
  left = set(edges)
  rounds = 0
  while True:
    few = {
      pair
      for pair in left
      if sum(pair[0] == other[0] for other in left) < size
      or sum(pair[1] == other[1] for other in left) < size
    }
    if not few:
      break
    left -= few
    rounds += 1
    if rounds == 1:
      assert report["single_pass"]["interactions"] == len(left)
  assert set(zip(user[keep], item[keep], strict=True)) == left
  assert report["rounds"] == rounds


def test_core_drops_and_renumbers(tmp_path):
  # Item 4 (1 user) goes, then item 3; user 2 keeps one item and goes as well.
  dataset = load(tmp_path, "microlens", core=2)
  assert list(dataset.users) == ["1", "3"]
  assert list(dataset.items) == ["1", "2"]
  assert list(dataset.user) == [0, 0, 1, 1]
  assert list(dataset.item) == [1, 0, 0, 1]
  assert list(dataset.records) == [0, 1]
  assert list(dataset.raw_users) == ["1", "2", "3"]
  core = dataset.statistics["core"]
  assert core["rounds"] == 2 and core["single_pass"]["interactions"] == 5
  assert "a single pass would keep" in base.statistics_line(dataset)


def test_core_that_leaves_nothing(tmp_path):
  with pytest.raises(errors.InputError, match="leaves nothing"):
    load(tmp_path, "microlens", core=5)


# --- bad input ---------------------------------------------------------------


def edited(name, change):
  return lambda folder: (folder / name).write_bytes(
    change((folder / name).read_bytes())
  )


def missing(name):
  return lambda folder: (folder / name).unlink()


def without_last_line(data):
  return b"\n".join(data.split(b"\n")[:-2]) + b"\n"


def utf16(data):
  return data.decode("latin-1").encode("utf-16")


M, L, T = "microlens", "hetrec_lastfm", "tiktok"
BAD = [
  # set, what is done to the files, and what the message must name
  (M, missing(microlens.TITLES), [microlens.TITLES, microlens.PAGE]),
  (
    M,
    edited(microlens.PAIRS, lambda d: d[:-3]),
    [microlens.PAIRS, "line 3", "cut off"],
  ),
  (M, edited(microlens.PAIRS, lambda d: b""), ["empty file"]),
  (M, edited(microlens.PAIRS, utf16), [microlens.PAIRS, "line 1"]),
  (
    M,
    edited(microlens.PAIRS, lambda d: d.replace(b"2\t2", b"x2\t2")),
    ["line 2", "'user'", "'x2'", "integer"],
  ),
  (
    M,
    edited(microlens.PAIRS, lambda d: d.replace(b"2 3", b"2 33")),
    ["line 2", "'items'", "33", microlens.TITLES],
  ),
  (
    M,
    edited(microlens.PAIRS, lambda d: d.replace(b"\t", b",")),
    ["line 1", "1 columns", "2 columns"],
  ),
  (
    M,
    edited(microlens.PAIRS, lambda d: d.replace(b"3\t1", b"1\t1")),
    ["line 3", "user 1 again"],
  ),
  (
    M,
    edited(microlens.PAIRS, lambda d: d.replace(b"2 3", b"2 2")),
    ["line 2", "'items'", "the item 2 again"],
  ),
  (
    M,
    edited(microlens.TITLES, lambda d: d.replace(b"item,", b"video,")),
    [microlens.TITLES, "header", "video"],
  ),
  (
    M,
    edited(microlens.TITLES, lambda d: d.replace(b"\xc3", b"")),
    [microlens.TITLES, "line 3", "byte", "0xa9", "utf-8"],
  ),
  (
    M,
    edited(microlens.TITLES, lambda d: d.replace(b'two # three"', b"two")),
    [microlens.TITLES, "line"],
  ),
  (
    M,
    edited(microlens.CATEGORIES, lambda d: b"video_id, tag\n1,Game\n"),
    [microlens.CATEGORIES, "end of file", "3 of the 4"],
  ),
  (L, missing("tags.dat"), ["tags.dat", hetrec_lastfm.PAGE]),
  (
    L,
    edited("tags.dat", lambda d: d.decode("latin-1").encode()),
    ["tags.dat", "line 2", "utf-8", "latin-1"],
  ),
  (
    L,
    edited("artists.dat", lambda d: d.decode().encode("latin-1")),
    ["artists.dat", "line 2", "byte", "0xe9"],
  ),
  (
    L,
    edited("artists.dat", lambda d: d.replace(b"\tpictureURL", b"")),
    ["artists.dat", "line 1", "header"],
  ),
  (
    L,
    edited("artists.dat", without_last_line),
    ["user_artists.dat", "line 5", "artistID", "60", "artists.dat"],
  ),
  (
    L,
    edited("user_artists.dat", lambda d: d.replace(b"\t9\n", b"\n")),
    ["user_artists.dat", "line 3", "2 columns", "3 columns"],
  ),
  (
    L,
    edited("user_artists.dat", without_last_line),
    ["user_artists.dat", "end of file", "first 60"],
  ),
  (
    L,
    edited("user_friends.dat", lambda d: d.replace(b"2\t5", b"2\t6")),
    ["user_friends.dat", "line 2", "friendID", "6"],
  ),
  (
    L,
    edited("user_friends.dat", lambda d: d.replace(b"2\t5", b"2\t-5")),
    ["user_friends.dat", "line 2", "'-5'", "integer"],
  ),
  (
    L,
    edited("user_taggedartists.dat", lambda d: d[: len(d) // 2]),
    ["user_taggedartists.dat", "cut off"],
  ),
  (T, missing("val.tsv"), ["val.tsv", tiktok.PAGE]),
  (
    T,
    edited("trn.tsv", lambda d: d.replace(b"1\t1", b"1\t7")),
    ["trn.tsv", "line 3", "'item'", "7", "image_feat.npy", "0 to 2"],
  ),
  (
    T,
    edited("trn.tsv", lambda d: d.replace(b"1\t1", b"1\t1\t5")),
    ["trn.tsv", "line 3", "3 columns"],
  ),
  (
    T,
    edited("tst.tsv", lambda d: b"0\t1\n"),
    ["tst.tsv", "line 1", "again"],
  ),
  (T, edited("image_feat.npy", lambda d: d[:-4]), ["image_feat.npy"]),
  (T, edited("image_feat.npy", lambda d: b"text\n"), ["image_feat.npy"]),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_raw_files(tmp_path, case):
  name, spoil, wanted = BAD[case]
  WRITERS[name](tmp_path / "raw")
  spoil(tmp_path / "raw")
  with pytest.raises(errors.InputError) as caught:
    load(tmp_path, name)
  message = str(caught.value)
  assert "\n" not in message
  for part in [*wanted, str(tmp_path / "raw"), "https://"]:
    assert part in message, message
  prepared = tmp_path / "prepared"
  assert not prepared.exists() or not list(prepared.iterdir())


def test_file_cut_between_lines(tmp_path, monkeypatch):
  lines = {microlens.PAIRS: 3, microlens.TITLES: 5, microlens.CATEGORIES: 6}
  monkeypatch.setattr(microlens, "LINES", lines)
  write_microlens(tmp_path / "raw")
  microlens.parse(str(tmp_path / "raw"), {})
  edited(microlens.PAIRS, without_last_line)(tmp_path / "raw")
  with pytest.raises(errors.InputError, match="pairs.tsv, line 2: .*3 lines"):
    microlens.parse(str(tmp_path / "raw"), {})


def test_ids_with_a_gap(tmp_path):
  write_tiktok(tmp_path / "raw")
  edited("trn.tsv", lambda d: d.replace(b"1\t1\n", b""))(tmp_path / "raw")
  edited("tst.tsv", lambda d: d.replace(b"1\t2", b"2\t2"))(tmp_path / "raw")
  with pytest.raises(errors.InputError, match="no line for 1 of the 3 ids"):
    load(tmp_path, "tiktok")


def test_vectors_that_float16_cannot_hold_are_refused(tmp_path):
  write_tiktok(tmp_path / "raw")
  path = tmp_path / "raw" / "audio_feat.npy"
  np.save(path, np.load(path).astype(np.float32) + 1e6)
  with pytest.raises(errors.InputError, match="audio of item 0.*65504"):
    load(tmp_path, "tiktok")


def test_pickled_array_is_refused(tmp_path):
  write_tiktok(tmp_path / "raw")
  np.save(tmp_path / "raw" / "image_feat.npy", np.array([{}]), True)
  with pytest.raises(errors.InputError, match="image_feat.npy"):
    load(tmp_path, "tiktok")


def test_no_manual_dir():
  with pytest.raises(errors.InputError, match="manual_dir is not set") as error:
    microlens.parse(None, {})
  for name in microlens.FILES:
    assert name in str(error.value)


def test_manual_dir_that_is_no_folder(tmp_path):
  with pytest.raises(errors.InputError, match="found nothing"):
    tiktok.parse(str(tmp_path / "none"), {})


def test_unknown_set(tmp_path):
  config = make_config(tmp_path, "microlenz")
  with pytest.raises(errors.InputError, match="did you mean 'microlens'"):
    base.load(config)


def test_data_dir_that_is_a_file(tmp_path):
  (tmp_path / "prepared").write_text("")
  with pytest.raises(errors.InputError, match="data_dir"):
    load(tmp_path, "microlens")


def test_full_disk(tmp_path, monkeypatch):
  def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(records, "_sync", full)
  with pytest.raises(errors.InputError, match="no space left"):
    load(tmp_path, "microlens")
  assert not list((tmp_path / "prepared").iterdir())


def test_full_disk_as_the_record_writer_says_it():
  error = RuntimeError("UNAVAILABLE: write() failed: No space left on device")
  assert records.disk_reason(error) == "no space left"
  assert records.disk_reason(KeyError("features")) == ""


def test_damaged_prepared_set(tmp_path):
  folder = load(tmp_path, "microlens").folder
  for path in folder.rglob("*array_record*"):
    path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(errors.InputError, match="delete the folder"):
    load(tmp_path, "microlens")


def test_latin1_file_may_hold_plain_ascii(tmp_path):
  path = tmp_path / "tags.dat"
  path.write_bytes(b"a\n")
  assert rawfiles.lines(rawfiles.RawFile(path, "page", "latin-1")) == ["a"]


def test_a_gzip_in_place_of_a_text_file(tmp_path):
  path = tmp_path / "tags.dat"
  path.write_bytes(gzip.compress(b"a\n"))
  with pytest.raises(errors.InputError, match="tags.dat"):
    rawfiles.lines(rawfiles.RawFile(path, "page", "utf-8"))


# --- real files --------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="MMM_JAX_DATA does not name real files")
@pytest.mark.parametrize(
  ("name", "counts", "parts"),
  [
    ("microlens", (46420, 14079, 332730), (241553, 27293, 63884)),
    ("hetrec_lastfm", (1859, 2823, 71355), (49894, 7197, 14264)),
    ("tiktok", (9308, 6710, 68722), (59541, 3051, 6130)),
  ],
)
def test_real_sizes(tmp_path, name, counts, parts):
  config = make_config(tmp_path, name, core=5)
  config.manual_dir = str(pathlib.Path(REAL) / REAL_FOLDERS[name])
  dataset = base.load(config)
  assert counts == (dataset.num_users, dataset.num_items, len(dataset.user))
  split = splits.make(
    dataset,
    ml_collections.ConfigDict(
      {"protocol": "auto", "path": "", "seed": 3, "ratios": (0.7, 0.1, 0.2)}
    ),
  )
  assert tuple(split.sizes.values()) == (*parts, 0)
