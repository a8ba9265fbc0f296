"""Checked reading of raw files: what is wrong is said with file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import csv
import dataclasses
import hashlib
import io
import os
import pathlib
from typing import NoReturn

import numpy as np

from mmm_jax import errors

_MAX_ID = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class RawFile:
  """One raw file and all that an error message about it must say.

  Attributes:
    path: where it lies.
    page: the official page to get it from.
    encoding: of a text file.
  """

  path: pathlib.Path
  page: str
  encoding: str = "utf-8"

  def fail(self, where: str, found: str, wanted: str) -> NoReturn:
    """Raises InputError: place, what was found, what is wanted, the remedy."""
    place = f"{self.path}, {where}" if where else f"{self.path}"
    raise errors.InputError(
      f"{place}: found {found}, wanted {wanted}; get the original file from "
      f"{self.page}"
    )


def locate(manual_dir: str | None, name: str, files: Sequence[str], page: str):
  """Finds a set's raw files.

  Args:
    manual_dir: the folder that holds them.
    name: of the set, for messages.
    files: wanted file names.
    page: official page.

  Returns:
    {file name: path}.

  Raises:
    InputError: no folder was given, it is no folder, or files are missing.
  """
  wanted = ", ".join(files)
  remedy = f"get them from {page} and put them there"
  if not manual_dir:
    raise errors.InputError(
      f"dataset.manual_dir is not set: '{name}' is read from a folder with "
      f"the files {wanted}; get them from {page} and give the folder with "
      "--config.dataset.manual_dir=DIR (with mmm_jax.experiments: "
      f"--manual_dir={name}=DIR)"
    )
  folder = pathlib.Path(manual_dir).expanduser()
  if not folder.is_dir():
    found = "a file" if folder.exists() else "nothing"
    raise errors.InputError(
      f"dataset.manual_dir={manual_dir}: found {found}, wanted a folder with "
      f"the files {wanted}; {remedy}"
    )
  missing = [file for file in files if not (folder / file).is_file()]
  if missing:
    raise errors.InputError(
      f"{folder}: found no {', '.join(missing)}, wanted the files {wanted} "
      f"of '{name}'; {remedy}"
    )
  return {file: folder / file for file in files}


def digest(paths: Sequence[pathlib.Path]) -> str:
  """SHA-256 over names and contents of `paths`, in hexadecimal."""
  total = hashlib.sha256()
  for path in paths:
    total.update(os.fsencode(path.name) + b"\0")
    total.update(hashlib.sha256(_read(path)).digest())
  return total.hexdigest()


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise errors.InputError(
      f"{path}: found {error.strerror}, wanted a readable file; check its "
      "permissions"
    ) from error


def read_text(file: RawFile) -> str:
  """The whole file as text.

  Raises:
    InputError: empty, not in its encoding, or without the final line end.
  """
  data = _read(file.path)
  if not data.strip():
    file.fail("line 1", "an empty file", "data")
  if b"\0" in data:
    line = data[: data.index(b"\0")].count(b"\n") + 1
    file.fail(f"line {line}", "a NUL byte", f"{file.encoding} text")
  text = _decode(file, data)
  if not text.endswith("\n"):
    lines = text.count("\n") + 1
    tail = text.rsplit("\n", 1)[-1][-40:]
    file.fail(
      f"line {lines}",
      f"a last line that is cut off after {tail!r}",
      "a line end (the file is truncated)",
    )
  return text


def _decode(file: RawFile, data: bytes) -> str:
  if file.encoding == "latin-1":
    _refuse_utf8(file, data)
  try:
    return data.decode(file.encoding)
  except UnicodeDecodeError as error:
    start = data.rfind(b"\n", 0, error.start) + 1
    line = data.count(b"\n", 0, error.start) + 1
    file.fail(
      f"line {line}, byte {error.start - start + 1}",
      f"the byte 0x{data[error.start]:02x}",
      f"{file.encoding} text",
    )


def _refuse_utf8(file: RawFile, data: bytes):
  # Any byte is valid latin-1, so a file that was converted shows only in
  # that its letters beyond ASCII form valid UTF-8, which latin-1 never does.
  if data.isascii():
    return
  try:
    data.decode("utf-8")
  except UnicodeDecodeError:
    return
  start = next(i for i, byte in enumerate(data) if byte > 127)
  line = data.count(b"\n", 0, start) + 1
  file.fail(f"line {line}", "text in utf-8", "text in latin-1")


def lines(file: RawFile) -> list[str]:
  """Lines without their ends; Unix and Windows ends both count."""
  return [line.removesuffix("\r") for line in read_text(file).split("\n")[:-1]]


def check_header(file: RawFile, found: Sequence[str], wanted: Sequence[str]):
  """Raises InputError unless the two lists of column names are equal."""
  if list(found) != list(wanted):
    file.fail("line 1", f"the header {list(found)}", f"{list(wanted)}")


def table(
  file: RawFile, columns: Sequence[str], *, header: bool
) -> Iterator[tuple[int, list[str]]]:
  """Rows of a tab-separated file: (line number from 1, fields).

  Raises:
    InputError: another header, or a line with another number of fields.
  """
  for number, line in enumerate(lines(file), start=1):
    fields = line.split("\t")
    if header and number == 1:
      check_header(file, fields, columns)
      continue
    _check_width(file, number, fields, columns)
    yield number, fields


def _check_width(file, number, fields, columns):
  if len(fields) != len(columns):
    file.fail(
      f"line {number}",
      f"{len(fields)} columns in {_short(fields)!r}",
      f"{len(columns)} columns ({', '.join(columns)})",
    )


def _short(fields: Sequence[str]) -> str:
  text = " ".join(fields)
  return text if len(text) <= 60 else text[:57] + "..."


def csv_table(
  file: RawFile, columns: Sequence[str]
) -> Iterator[tuple[int, list[str]]]:
  """Rows of a quoted CSV file with a header: (line number, fields).

  Blanks around the names in the header do not count.
  """
  reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
  try:
    check_header(file, [name.strip() for name in next(reader)], columns)
    for fields in reader:
      _check_width(file, reader.line_num, fields, columns)
      yield reader.line_num, fields
  except csv.Error as error:
    file.fail(
      f"line {reader.line_num}", f"broken quoting ({error})", "CSV fields"
    )


def integer(file: RawFile, line: int, column: str, field: str) -> int:
  """The field as an integer from 0; InputError otherwise."""
  # isdecimal alone would let other scripts' digits through.
  if field.isascii() and field.isdecimal() and int(field) <= _MAX_ID:
    return int(field)
  file.fail(
    f"line {line}, column '{column}'",
    repr(field),
    f"an integer from 0 to {_MAX_ID}",
  )


def known(
  file: RawFile, line: int, column: str, field: str, positions: dict, table: str
) -> int:
  """The position of an integer id in another file's table.

  Args:
    file, line, column, field: the id and where it stands.
    positions: {id: position}.
    table: the file that lists the ids.

  Raises:
    InputError: no integer, or no such id.
  """
  number = integer(file, line, column, field)
  if number not in positions:
    file.fail(
      f"line {line}, column '{column}'",
      f"the id {number}",
      f"one of the {len(positions)} ids in {table} (between "
      f"{min(positions, default=0)} and {max(positions, default=0)})",
    )
  return positions[number]


def check_all_used(file: RawFile, table: str, ids: Sequence, used: np.ndarray):
  """Every id of `table` must occur in `file`: the originals are complete.

  Args:
    file: the file that should name all ids.
    table: where the ids come from.
    ids: the ids.
    used: bool, beside `ids`.

  Raises:
    InputError: some id never occurs, so that lines must be missing.
  """
  missing = np.flatnonzero(~np.asarray(used, bool))
  if missing.size:
    file.fail(
      "end of file",
      f"no line for {missing.size} of the {len(ids)} ids in {table}, first "
      f"{ids[missing[0]]}",
      "every one of them (the file is truncated, or the two do not belong "
      "together)",
    )


def check_lines(files: dict[str, RawFile], official: dict[str, int]):
  """Finds files that were cut between two lines.

  Args:
    files: those of one folder.
    official: {name: lines of the original}. Nothing is asked of a folder
      where no file has its number, which holds other data in the same format.

  Raises:
    InputError: some files have their number of lines and one has not.
  """
  found = {name: _read(files[name].path).count(b"\n") for name in official}
  wrong = [name for name in official if found[name] != official[name]]
  if wrong and len(wrong) < len(official):
    files[wrong[0]].fail(
      f"line {found[wrong[0]]}",
      "the end of the file",
      f"{official[wrong[0]]} lines, as the original has",
    )
