"""Files that are whole or not there, and one message when that fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import secrets
from typing import IO, Any

from etils import epath
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmm_jax import errors

WHOLE = "whole://"  # in front of a folder whose files other libraries write


@contextlib.contextmanager
def explained(path, action: str = "write") -> Iterator[None]:
  """Turns the system's refusal to read or write `path` into an InputError."""
  try:
    yield
  except OSError as error:
    raise errors.InputError(
      f"Cannot {action} {path}: {error.strerror or error}. Free space there, "
      "correct the permissions, or choose another folder."
    ) from error


def plain(value: Any) -> Any:
  """NumPy and Python values as JSON has them; non-finite numbers as None.

  A float32 becomes the shortest decimal that gives it back, as 0.1, not
  0.10000000149011612.
  """
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if value is None or isinstance(value, str | bool | int):
    return value
  if isinstance(value, float) and not isinstance(value, np.generic):
    return value if math.isfinite(value) else None
  array = np.asarray(value)
  if array.ndim:
    return [plain(item) for item in array]
  if array.dtype.kind != "f":
    return array.item()
  return plain(float(str(array)))


@contextlib.contextmanager
def atomic(path) -> Iterator[IO[bytes]]:
  """A binary file that takes its name only when complete and on the disk.

  A link stays; what it points to is replaced.

  Raises:
    InputError: it cannot be written, or is a device, a pipe or a folder; what
      stood at `path` is untouched.
  """
  path = pathlib.Path(path).resolve()
  if path.exists() and not path.is_file():
    raise errors.InputError(
      f"Cannot write {path}: it is there and no regular file. Choose another"
      " name."
    )
  # In containers, processes that share a folder may share their number, too.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
  with explained(path):
    try:
      with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
      _sync_folder(path.parent)
    finally:
      with contextlib.suppress(OSError):
        temporary.unlink()


class _WholeFile(type(epath.Path())):
  """A path whose file takes its name only when it is complete."""

  def write_bytes(self, data: bytes) -> None:
    with atomic(self) as file:
      file.write(data)


@epath.register_path_cls(WHOLE)
class _Whole:
  """How epath, by which other libraries write, opens addresses with WHOLE."""

  def __new__(cls, address: str) -> _WholeFile:
    return _WholeFile(address.removeprefix(WHOLE))


def read_json(path) -> dict:
  """The JSON object in a file that an earlier session wrote.

  Raises:
    InputError: it cannot be read, or holds something else.
  """
  path = pathlib.Path(path)
  try:
    values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
      raise ValueError(f"found {type(values).__name__}")
    return values
  except (OSError, ValueError) as error:
    raise errors.InputError(
      f"{path}: {error}; wanted the JSON object that an earlier session wrote. "
      "Bring it back, delete it, or use another folder."
    ) from error


def write_json(path, value: Any) -> None:
  """Writes `value` as `plain` gives it, keys sorted: equal values, equal bytes.

  Raises:
    InputError: the file cannot be written.
  """
  text = json.dumps(
    plain(value), allow_nan=False, indent=2, sort_keys=True, ensure_ascii=False
  )
  with atomic(path) as file:
    file.write(text.encode() + b"\n")


def write_parquet(path, columns: Mapping[str, Any]) -> None:
  """Writes columns of equal lengths, {name: array or list}, in their order.

  Raises:
    InputError: the file cannot be written.
  """
  table = pa.table(dict(columns))
  with atomic(path) as file:
    pq.write_table(table, file, compression="zstd")


def _sync_folder(folder: pathlib.Path) -> None:
  """Makes a rename survive a power cut."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
