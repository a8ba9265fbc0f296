"""Prepared sets on disk: two TFDS configs, `<name>/users` and `<name>/items`.

A folder `<data_dir>/<name>-<hash>` holds both as ArrayRecord, `set.json` with
what is common to all records, and `truth.npz` where a set has ground truth.
It is written under a lock into a temporary folder and renamed into place, so
that a folder with that name is always complete.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import TYPE_CHECKING, NamedTuple

from array_record.python import array_record_module
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from mmm_jax import errors

if TYPE_CHECKING:
  from mmm_jax.datasets import base

VERSION = "1.0.0"
_BLOCK = 1024  # records read at a time
_BUFFER = 2**14  # bytes that a reader asks its file for
_SPLIT = "train"  # TFDS wants a split's name; ours are made at load

_LOG = logging.getLogger("mmm_jax")


class _Info(tfds.core.DatasetInfo):
  """Knows nothing of the sets that Google prepared: no look-up, no traces."""

  def initialize_from_bucket(self):
    pass


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes one of the two configs from a RawData."""

  VERSION = tfds.core.Version(VERSION)
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="users", description="one record a user"),
    tfds.core.BuilderConfig(name="items", description="one record an item"),
  ]

  def __init__(self, *, raw: base.RawData, digest, **kwargs):
    self._raw = raw
    self._digest = digest
    super().__init__(**kwargs)

  def _features(self):
    if self.builder_config.name == "users":
      return user_features(self._raw)
    return item_features(self._raw)

  def _info(self):
    return _Info(
      builder=self,
      features=tfds.features.FeaturesDict(self._features()),
      # Record number = position: the two configs refer to each other by it.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {_SPLIT: self._generate_examples()}

  def _generate_examples(self):
    users = self.builder_config.name == "users"
    records = user_records(self._raw) if users else item_records(self._raw)
    for number, record in enumerate(records):
      _update(self._digest, record)
      yield number, record


def _update(digest, record):
  for key in sorted(record):
    value = record[key]
    digest.update(key.encode() + b"\0")
    if isinstance(value, np.ndarray):
      digest.update(value.tobytes() + b"\0")
    else:
      digest.update(repr(value).encode() + b"\0")


def _ints(dtype):
  # Raw bytes: a third of the room and of the decoding time of a varint list.
  return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes")


def user_features(raw: base.RawData) -> dict:
  """Features of `<name>/users`.

  `items` are record numbers in `<name>/items`, `network_<name>` record
  numbers in `<name>/users`; `timestamps` are -1 where unknown.
  """
  features = {
    "id": tfds.features.Text(),
    "items": _ints(np.int32),
    "timestamps": _ints(np.int64),
  }
  if raw.counts is not None:
    features["counts"] = _ints(np.int32)
  if raw.part is not None:
    features["part"] = _ints(np.int8)
  for network in sorted(raw.networks):
    features[f"network_{network}"] = _ints(np.int32)
  if raw.user_tags is not None:
    features["tag_items"] = _ints(np.int32)
    features["tag_texts"] = tfds.features.Tensor(shape=(None,), dtype=np.str_)
  return features


def user_records(raw: base.RawData) -> Iterator[dict]:
  """The records of `<name>/users`, in order."""
  for user, name in enumerate(raw.user_ids):
    items = np.asarray(raw.user_items[user], np.int32)
    record = {"id": name, "items": items}
    if raw.timestamps is None:
      record["timestamps"] = np.full(len(items), -1, np.int64)
    else:
      record["timestamps"] = np.asarray(raw.timestamps[user], np.int64)
    if raw.counts is not None:
      record["counts"] = np.asarray(raw.counts[user], np.int32)
    if raw.part is not None:
      record["part"] = np.asarray(raw.part[user], np.int8)
    for network, neighbours in raw.networks.items():
      record[f"network_{network}"] = np.asarray(neighbours[user], np.int32)
    if raw.user_tags is not None:
      tag_items, tag_texts = raw.user_tags[user]
      record["tag_items"] = np.asarray(tag_items, np.int32)
      record["tag_texts"] = list(tag_texts)
    yield record


def item_features(raw: base.RawData) -> dict:
  """Features of `<name>/items`: every dense source under its own name.

  `present_<source>` says whether the item has the source; the vector of one
  that has not is zero. `category` is -1 where unknown.
  """
  features = {"id": tfds.features.Text(), "category": np.int32}
  if raw.text is not None:
    features |= {"text": tfds.features.Text(), "present_text": np.bool_}
  if raw.title is not None:
    features["title"] = tfds.features.Text()
  for source in sorted(raw.vectors):
    features[source] = tfds.features.Tensor(
      shape=(dimension(raw, source),), dtype=np.float16, encoding="bytes"
    )
    features[f"present_{source}"] = np.bool_
  return features


def dimension(raw: base.RawData, source: str) -> int:
  """Length of the vectors of a dense source."""
  vectors = raw.vectors[source]
  if callable(vectors):
    return int(raw.vector_dims[source])
  return int(vectors.shape[1])


def _present(raw, source):
  if source in raw.present:
    return np.asarray(raw.present[source], bool)
  if source == "text":
    return np.array([bool(text) for text in raw.text], bool)
  return np.ones(len(raw.item_ids), bool)


def item_records(raw: base.RawData) -> Iterator[dict]:
  """The records of `<name>/items`, in order."""
  sources = sorted(raw.vectors)
  texts = [] if raw.text is None else ["text"]
  present = {source: _present(raw, source) for source in sources + texts}
  rows = {
    source: iter(vectors() if callable(vectors) else vectors)
    for source, vectors in raw.vectors.items()
  }
  for item, name in enumerate(raw.item_ids):
    category = -1 if raw.category is None else int(raw.category[item])
    record = {"id": name, "category": category}
    if raw.text is not None:
      record["text"] = raw.text[item]
    if raw.title is not None:
      record["title"] = raw.title[item]
    for source in sources:
      row = _as_float16(next(rows[source]), source, name)
      record[source] = row if present[source][item] else np.zeros_like(row)
    for source, mask in present.items():
      record[f"present_{source}"] = bool(mask[item])
    yield record


def _as_float16(row, source, item):
  with np.errstate(over="ignore"):
    narrow = np.asarray(row, np.float16)
  if not np.isfinite(narrow).all():
    raise errors.InputError(
      f"{source} of item {item}: found {np.abs(row).max():g} in its vector,"
      f" wanted finite numbers up to {np.finfo(np.float16).max:g} (they are"
      " kept as float16); scale the vectors first"
    )
  return narrow


class Alone:
  """One process, in the words that `mmm_jax.parallel` has for several."""

  @staticmethod
  def together(action):
    return action()

  @staticmethod
  def by_parts(read, count):
    return read(range(count))

  @staticmethod
  def bounded(what):
    return contextlib.nullcontext()


def prepare(
  folder: pathlib.Path, name: str, make_raw, processes=Alone
) -> pathlib.Path:
  """Writes a set unless it is there already.

  Args:
    folder: the final place; its name carries the hash of all that it is
      made from.
    name: of the set.
    make_raw: function without arguments that returns the RawData.
    processes: `mmm_jax.parallel` where a run may have several.

  Returns:
    `folder`.

  Raises:
    InputError: the raw files are wrong, the disk is full, or `folder`'s
      parent cannot be written.
  """
  if folder.is_dir():
    return folder
  with _disk_errors(folder.parent):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder, processes):
      if not folder.is_dir():
        _write_all(folder, name, make_raw)
  return folder


def _write_all(folder, name, make_raw):
  # Whoever holds the lock is alone: older temporary folders are leftovers.
  for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
    shutil.rmtree(leftover, ignore_errors=True)
  temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
  try:
    raw = make_raw()
    temporary.mkdir()
    _write(temporary, name, raw)
    _sync(temporary)
    temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write(temporary, name, raw):
  digest = hashlib.sha256()
  tfds.disable_progress_bar()
  for config in ("users", "items"):
    builder_class = type(name, (_Builder,), {"name": name}, **_UNREGISTERED)
    builder = builder_class(
      raw=raw,
      digest=digest,
      data_dir=temporary,
      config=config,
      file_format="array_record",
    )
    with contextlib.redirect_stdout(None):
      builder.download_and_prepare(download_dir=temporary / "downloads")
    for path in builder.info.splits[_SPLIT].filepaths:
      _rewrite(path, sorted(raw.vectors) if config == "items" else ())
  shutil.rmtree(temporary / "downloads", ignore_errors=True)
  if raw.extra:
    np.savez(temporary / "truth.npz", **raw.extra)
  (temporary / "set.json").write_text(
    json.dumps(
      {
        "name": name,
        "ordered": raw.ordered,
        "networks": sorted(raw.networks),
        "vectors": {each: dimension(raw, each) for each in sorted(raw.vectors)},
        "category_names": list(raw.category_names),
        "fingerprint": digest.hexdigest(),
      },
      indent=2,
    )
  )


_UNREGISTERED = {"skip_registration": True}


def _rewrite(path, vectors):
  """Writes the records of a file anew, for those who read them in every epoch.

  Without the compression of TFDS: with it the set `simulated` takes 100 MB
  instead of 163, and its vectors twice as long to be read. And with the vectors
  first, where they lie at the same place in every record.
  """
  reader = _open(path)
  plain = path.with_suffix(".plain")
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(plain), "group_size:1,uncompressed"
  )
  for start in range(0, reader.num_records(), _BLOCK):
    numbers = range(start, min(start + _BLOCK, reader.num_records()))
    for record in reader.read(list(numbers)):
      writer.write(_with_first(vectors, record) if vectors else record)
  writer.close()
  reader.close()
  plain.replace(path)


def _with_first(names, serialised):
  """A tf.train.Example whose entries `names` come first, in this order.

  Of protobuf messages one after the other all fields count.
  """
  rest = tf_example_pb2.Example.FromString(serialised)
  parts = []
  for name in names:
    part = tf_example_pb2.Example()
    part.features.feature[name].CopyFrom(rest.features.feature[name])
    del rest.features.feature[name]
    parts.append(part.SerializeToString())
  return b"".join([*parts, rest.SerializeToString()])


def _open(path):
  # Neither reading ahead nor large buffers help where every place is drawn.
  return array_record_module.ArrayRecordReader(
    os.fspath(path),
    options="readahead_buffer_size:0",
    file_reader_buffer_size=_BUFFER,
  )


def _sync(folder):
  for path in folder.rglob("*"):
    if path.is_file():
      with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(folder, processes):
  """Holds `.<folder>.lock`; the file goes away with the lock."""
  path = folder.parent / f".{folder.name}.lock"
  while True:
    file = path.open("w")
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _LOG.info("waiting for another process, which prepares %s", folder)
      with processes.bounded(
        f"waiting for another process to prepare {folder}"
      ):
        fcntl.flock(file, fcntl.LOCK_EX)
    # The holder before us removed the file: lock the one that is there now.
    with contextlib.suppress(FileNotFoundError):
      if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
        break
    file.close()
  try:
    yield
  finally:
    path.unlink(missing_ok=True)
    file.close()


@contextlib.contextmanager
def _disk_errors(data_dir):
  """Turns what a full or read-only disk raises into an InputError."""
  try:
    yield
  except errors.InputError:
    raise
  except Exception as error:
    reason = disk_reason(error)
    if not reason and isinstance(error, OSError):
      reason = error.strerror
    if not reason:
      raise
    raise errors.InputError(
      f"dataset.data_dir={data_dir}: found {reason}, wanted a writable folder "
      "with room for the prepared set; free some space or set "
      "--config.dataset.data_dir=DIR"
    ) from error


_DISK = {
  errno.ENOSPC: "no space left",
  errno.EDQUOT: "the disk quota used up",
  errno.EFBIG: "a limit on the size of files",
  errno.EACCES: "no permission to write",
  errno.EPERM: "no permission to write",
  errno.EROFS: "a read-only file system",
  errno.ENOTDIR: "a file where a folder should be",
  errno.EEXIST: "a file where a folder should be",
}


def disk_reason(error: BaseException) -> str:
  """Why a write failed, in words, or '' if it was not the disk's fault."""
  for cause in causes(error):
    number = system_number(cause, _DISK)
    if number:
      return _DISK[number]
    if "not enough disk space" in str(cause).lower():
      return "not enough space"
  return ""


def causes(error: BaseException | None) -> Iterator[BaseException]:
  """An exception and those behind it, the newest first."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def system_number(error: BaseException, among: Collection[int]) -> int:
  """Which of the system's error numbers `among` an exception tells of, or 0."""
  if isinstance(error, OSError) and error.errno in among:
    return error.errno
  # ArrayRecord's and TensorStore's own errors carry the system's words only.
  said = str(error).lower()
  found = (each for each in among if os.strerror(each).lower() in said)
  return next(found, 0)


class Source:
  """Random access to records: `len(source)`, `source[number] -> dict`.

  Reads TFDS' files by itself: for records as small as ours TFDS' own source
  takes half as long again, and its decoder ten times. Threads may share it, and
  pickling it keeps the address alone.
  """

  def __init__(self, folder: pathlib.Path, config: str, name: str, skip=()):
    """Opens the records.

    Args:
      folder: a prepared set.
      config: 'users' or 'items'.
      name: of the set.
      skip: features that are left out.
    """
    self._arguments = (folder, config, name, skip)
    builder = tfds.builder_from_directory(folder / name / config / VERSION)
    features = builder.info.features
    self._features = {k: features[k] for k in features if k not in skip}
    split = builder.info.splits[_SPLIT]
    self._readers = [_open(path) for path in split.filepaths]
    self._ends = np.cumsum(split.shard_lengths)

  def __reduce__(self):
    return type(self), self._arguments

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, number: int) -> dict:
    return self.__getitems__([number])[0]

  def __getitems__(self, numbers) -> list[dict]:
    with _damage_named(self._arguments[0]):
      return [self._parse(record) for record in self._read(numbers)]

  def _read(self, numbers):
    """The bytes of each record, file by file."""
    numbers = np.asarray(numbers)
    file = np.searchsorted(self._ends, numbers, side="right")
    found = [b""] * len(numbers)
    for each in np.unique(file):
      at = np.flatnonzero(file == each)
      reader = self._readers[each]
      own = numbers[at] - self._ends[each] + reader.num_records()
      for place, record in zip(at, reader.read(own.tolist())):
        found[place] = record
    return found

  def _parse(self, serialised):
    fields = tf_example_pb2.Example.FromString(serialised).features.feature
    return {
      key: _decode(fields[key], feature)
      for key, feature in self._features.items()
    }

  def columns(self, numbers: range) -> dict[str, list]:
    """{feature: its values in these records}."""
    result = {key: [] for key in self._features}
    for start in range(0, len(numbers), _BLOCK):
      for record in self.__getitems__(numbers[start : start + _BLOCK]):
        for key, value in record.items():
          result[key].append(value)
    return result


class Vectors(Source):
  """The dense vectors of items alone.

  They are taken from where they lie in a record's bytes, which costs a fraction
  of the time of parsing it and makes no copy.
  """

  def __init__(self, folder: pathlib.Path, name: str, sources):
    """Opens the records; `sources` are all that the set has."""
    super().__init__(folder, "items", name)
    self._arguments = (folder, name, sources)
    self._places, start = {}, 0
    for each in sorted(sources):
      place = _place(each, self._features[each], start)
      self._places[each] = place
      start = place.end

  def _parse(self, serialised):
    found = {}
    for name, place in self._places.items():
      if not serialised.startswith(place.head, place.start):
        wanted = {name: place.count for name, place in self._places.items()}
        raise ValueError(f"a record without vectors of {wanted} numbers")
      found[name] = np.frombuffer(
        serialised, place.dtype, place.count, place.start + len(place.head)
      )
    return found


class _Place(NamedTuple):
  """Where in a record's bytes a vector lies, as `_with_first` puts it there.

  In all records at the same place, as vectors of a source are of one length.
  """

  start: int
  head: bytes  # what stands before the numbers: lengths, name and kind
  dtype: np.dtype
  count: int

  @property
  def end(self) -> int:
    return self.start + len(self.head) + self.count * self.dtype.itemsize


def _place(name, feature, start) -> _Place:
  (count,), dtype = feature.shape, np.dtype(feature.np_dtype)
  size = count * dtype.itemsize
  example = tf_example_pb2.Example()
  example.features.feature[name].bytes_list.value.append(bytes(size))
  whole = example.SerializeToString()
  return _Place(start, whole[: len(whole) - size], dtype, count)


def _decode(field, feature):
  """The value of one field, by the kinds of feature that are written here."""
  if field.HasField("int64_list"):
    return field.int64_list.value[0]
  values = field.bytes_list.value
  if feature.np_dtype.kind != "O":
    return np.frombuffer(values[0], feature.np_dtype)
  texts = [value.decode("utf-8") for value in values]
  return texts if feature.shape else texts[0]


def read(
  folder: pathlib.Path, processes=Alone
) -> tuple[dict, dict, dict, Source]:
  """What a load needs of a prepared set.

  Of several processes each reads a part of the records, and has the others'
  from the processes that read them.

  Args:
    folder: as `prepare` leaves it.
    processes: `mmm_jax.parallel` where a run may have several.

  Returns:
    The content of set.json; the columns of users and of items, {feature:
    values}, the items' without their vectors; the items' records.

  Raises:
    InputError: the folder was damaged after it was written.
  """

  def begin():
    with _damage_named(folder):
      about = json.loads((folder / "set.json").read_text())
      name, vectors = about["name"], about["vectors"]
      users = Source(folder, "users", name)
      items = Source(folder, "items", name, skip=vectors)
      return about, users, items, Vectors(folder, name, tuple(vectors))

  about, users, items, vectors = processes.together(begin)
  return (
    about,
    processes.by_parts(users.columns, len(users)),
    processes.by_parts(items.columns, len(items)),
    vectors,
  )


@contextlib.contextmanager
def _damage_named(folder):
  """Turns whatever reading damaged records raises into an InputError."""
  try:
    yield
  except errors.InputError:
    raise
  except Exception as error:
    reason = " ".join(str(error).split())[:200]
    raise errors.InputError(
      f"{folder}: found a damaged prepared set ({reason}), wanted the files as "
      "they were written; delete the folder and run again"
    ) from error
