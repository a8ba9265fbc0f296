"""What a run says while it goes and when it ends: rows, progress, table."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from typing import IO, Any

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2
import tqdm

from mmm_jax import errors, evaluate, files

_CUTOFFS = (10, 20, 30, 40)
# MMM's row of Tables 1-3 at these cutoffs; the data behind it are private.
_PAPER = {
  "precision": (0.1034, 0.06102, 0.04374, 0.03436),
  "recall": (0.3257, 0.365, 0.38595, 0.40015),
  "ndcg": (0.29904, 0.31502, 0.32192, 0.32613),
}
_WIDTH = 7  # Characters a figure in the table.
_PARTS = {"valid": "validation", "test": "test"}


class RunLog:
  """Appends one JSON row a logging step to `metrics.jsonl`.

  Every row is on its way to the disk when `write` returns, so that a killed
  run leaves whole rows, and at most one torn one that `resume` drops; call it
  before the first `write` of every session. With `primary=False` (every process
  but the first) nothing is written.
  """

  def __init__(self, workdir, *, tensorboard: bool, primary: bool):
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._events_folder = self.path.parent / "tensorboard"
    self._tensorboard = tensorboard
    self._primary = primary
    self._file = None
    self._events = None
    self._first_step = 0

  def last_step(self) -> int:
    """Of the last whole row; 0 if there is none."""
    return max((number for number, _ in self._rows()), default=0)

  def resume(self, step: int) -> None:
    """Drops the rows after `step`, which are to be done again.

    Raises:
      InputError: a row that is not JSON with a step (the last may be torn),
        or a file that cannot be read or written.
    """
    self.close()
    rows = self._rows()
    self._first_step = step + 1
    if self._primary and self.path.exists():
      with files.atomic(self.path) as file:
        file.writelines(line for number, line in rows if number <= step)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends `{"step": step, **values}`; what is not finite becomes null.

    Args:
      step: number of finished updates.
      values: numbers, strings, None, or (nested) sequences of these; arrays
        already on the host.

    Raises:
      InputError: the disk is full or not writable; the file then ends with
        the last whole row.
    """
    if not self._primary:
      return
    row = files.plain({"step": step, **values})
    line = json.dumps(row, allow_nan=False) + "\n"
    with files.explained(self.path):
      self._append(line.encode())
    if self._tensorboard:
      with files.explained(self._events_folder):
        self._write_events(step, row)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    if self._events is not None:
      # Each row was flushed; what still fails here was reported by `write`.
      with contextlib.suppress(OSError):
        self._events.close()
    self._file = self._events = None

  def __enter__(self) -> RunLog:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _rows(self) -> list[tuple[int, bytes]]:
    if not self.path.exists():
      return []
    with files.explained(self.path, "read"):
      lines = self.path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
      try:
        rows.append((int(json.loads(line)["step"]), line))
      except (ValueError, KeyError, TypeError) as error:
        if number < len(lines):
          raise errors.InputError(
            f"{self.path}, line {number}: found {line[:60]!r}, wanted a JSON "
            "object with a step; delete the line, or use another --workdir."
          ) from error
    return [(step, line.rstrip(b"\n") + b"\n") for step, line in rows]

  def _append(self, line: bytes) -> None:
    if self._file is None:
      # Unbuffered: nothing can be left over to fail when the file is closed.
      self._file = self.path.open("ab", buffering=0)
    end = os.fstat(self._file.fileno()).st_size
    try:
      while line:
        line = line[self._file.write(line) :]
    except OSError:
      self._file.truncate(end)
      raise

  def _write_events(self, step: int, row: Mapping[str, Any]) -> None:
    if self._events is None:
      self._events = _open_events(self._events_folder, self._first_step)
    values = [
      summary_pb2.Summary.Value(tag=name, simple_value=value)
      for name, value in row.items()
      if isinstance(value, int | float) and name != "step"
    ]
    self._events.write_event(
      event_pb2.Event(
        wall_time=time.time(),
        step=step,
        summary=summary_pb2.Summary(value=values),
      )
    )
    self._events.flush()


def _open_events(
  folder: pathlib.Path, first_step: int
) -> event_file_writer.EventsWriter:
  """A new event file that hides what older ones say of `first_step` on.

  This is the writer below `SummaryWriter`, whose thread would die of a full
  disk unseen and leave the run waiting for it.
  """
  folder.mkdir(exist_ok=True)
  # The name holds whole seconds: two quick sessions would share a file.
  suffix = f".{os.getpid()}"
  events = event_file_writer.EventsWriter(str(folder / "events"), suffix)
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  events.write_event(
    event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start)
  )
  return events


class Progress:
  """Interactions per second and time left on stderr.

  A bar where stderr is a terminal, else a line at most every `interval`
  seconds. `total` is an upper bound: early stopping may end the run before.
  """

  def __init__(
    self,
    total: int,
    *,
    done: int,
    primary: bool,
    stream: IO[str] | None = None,
    interval: float = 30.0,
  ):
    self._stream = sys.stderr if stream is None else stream
    self._primary = primary
    self._plain = primary and not self._stream.isatty()
    self._total, self._done = total, done
    self._interval = interval
    self._printed = (time.monotonic(), done)
    self._bar = tqdm.tqdm(
      total=total,
      initial=done,
      unit=" interactions",
      unit_scale=True,
      file=self._stream,
      dynamic_ncols=True,
      disable=self._plain or not primary,
    )

  def update(self, interactions: int, note: str) -> None:
    """Counts interactions (positives) and shows `note`, e.g. epoch and loss."""
    self._done += interactions
    self._bar.set_postfix_str(note, refresh=False)
    self._bar.update(interactions)
    now = time.monotonic()
    if self._plain and now - self._printed[0] >= self._interval:
      self._print_line(now, note)

  def write(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    if self._primary:
      self._bar.write(text, file=self._stream)

  def close(self) -> None:
    self._bar.close()

  def _print_line(self, now: float, note: str) -> None:
    # The rate since the last line: compilation is over after the first one.
    then, done_then = self._printed
    rate = (self._done - done_then) / (now - then)
    left = (self._total - self._done) / rate if rate else math.inf
    clock = tqdm.tqdm.format_interval(left) if math.isfinite(left) else "?"
    share = self._done / self._total
    self.write(
      f"{share:4.0%}  {rate:,.0f} interactions/s  {clock} left  {note}"
    )
    self._stream.flush()
    self._printed = (now, self._done)


def final_table(result: Mapping[str, Any], *, dataset: str) -> str:
  """metric x k for validation and test, one block a protocol.

  Args:
    result: as in `result.json`; keys that are not protocols are passed over.
    dataset: the set's name; `simulated` brings the published figures of MMM
      under `pooled_1024`, the protocol closest to the published one.
  """
  blocks = []
  for protocol in (name for name in evaluate.PROTOCOLS if name in result):
    groups = {
      _PARTS[part]: _by_metric(result[protocol][part])
      for part in _PARTS
      if part in result[protocol]
    }
    if dataset == "simulated" and protocol == "pooled_1024":
      groups["paper (private data)"] = {
        metric: dict(zip(_CUTOFFS, figures, strict=True))
        for metric, figures in _PAPER.items()
      }
    blocks.append(_block(protocol, groups))
  return "\n\n".join(blocks)


def _by_metric(values: Mapping[str, float]) -> dict[str, dict[int, float]]:
  table = {}
  for key, value in values.items():
    metric, _, cutoff = key.partition("@")
    table.setdefault(metric, {})[int(cutoff)] = value
  return table


def _block(title: str, groups: Mapping[str, dict]) -> str:
  metrics = list(dict.fromkeys(m for group in groups.values() for m in group))
  columns = {
    name: sorted({k for row in group.values() for k in row})
    for name, group in groups.items()
  }
  width = max(map(len, [title, *metrics]))
  heads = [title.ljust(width)]
  cutoffs = [" " * width]
  for name, ks in columns.items():
    heads.append(name.center(_WIDTH * len(ks)))
    cutoffs.append("".join(f"@{k}".rjust(_WIDTH) for k in ks))
  rows = [heads, cutoffs]
  for metric in metrics:
    cells = [
      "".join(_cell(groups[name].get(metric, {}), k) for k in ks)
      for name, ks in columns.items()
    ]
    rows.append([metric.ljust(width), *cells])
  return "\n".join("  ".join(row).rstrip() for row in rows)


def _cell(row: Mapping[int, float], cutoff: int) -> str:
  if not row:
    return " " * _WIDTH
  value = row.get(cutoff)
  if value is None or not math.isfinite(value):
    return "-".rjust(_WIDTH)
  decimals = 4 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
  return f"{value:.{decimals}f}".rjust(_WIDTH)
