"""What XLA says of its programs: whose operations they are, and their time."""

import math
import pathlib
import re

import jax

import mmm_jax

PACKAGE = pathlib.Path(mmm_jax.__file__).parent


def events(folder):
  """(plane's name, line's name, event) of the newest trace in a folder."""
  path = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))[-1]
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        yield plane.name, line.name, event


def spans(folder) -> dict[tuple[str, str], float]:
  """Nanoseconds of every operation of a traced program, on all threads.

  Without those that only call others: {(program, operation): time}.
  """
  found = {}
  for _, _, event in events(folder):
    stats = dict(event.stats)
    name = stats.get("hlo_op", "")
    if name and not name.startswith(("while", "call", "conditional")):
      key = stats["hlo_module"], name
      found[key] = found.get(key, 0) + event.duration_ns
  return found


def shares_of_files(spans, text) -> dict[str, float]:
  """Shares of the time by the file of mmm_jax that asked for an operation.

  Those of a gradient are of the file whose values it is of, or, of a kernel,
  of the kernel's caller. For `kernels` by function; what is not of the program
  in `text` by the program's name.
  """
  tables = _source_tables(text)
  frames = dict(re.findall(r"%(\S+) = .*stack_frame_id=(\d+)", text))
  total, shares = sum(spans.values()), {}
  for (program, name), span in spans.items():
    place = f"program {program.removeprefix('jit_')}"
    if text.startswith(f"HloModule {program},"):
      place = _place(int(frames.get(name, 0)), tables)
    shares[place] = shares.get(place, 0) + span / total
  return shares


def _source_tables(text):
  """XLA's tables of where code stands: names, places, and frames."""
  section = lambda name: re.search(rf"^{name}\n((?:\d.*\n)+)", text, re.M)[1]
  numbers = lambda line: [int(n) for n in re.findall(r"=?(\d+)", line)]
  name_of = lambda line: line.split(" ", 1)[1].strip('"')
  return {
    "files": ["", *map(name_of, section("FileNames").splitlines())],
    "functions": ["", *map(name_of, section("FunctionNames").splitlines())],
    "places": [[], *map(numbers, section("FileLocations").splitlines())],
    "frames": [[], *map(numbers, section("StackFrames").splitlines())],
  }


def _place(frame, tables):
  """The innermost file of mmm_jax on the way to a frame."""
  while frame:
    _, at, parent = tables["frames"][frame]
    _, file, function, *_ = tables["places"][at]
    # Of another clone, if a program was compiled there and kept.
    _, ours, name = tables["files"][file].rpartition(f"/{PACKAGE.name}/")
    if ours and (PACKAGE / name).is_file():
      if name == "kernels.py":
        name += f", {tables['functions'][function].partition('.')[0]}"
      return name
    frame = parent - 1
  return "other"


def bytes_of_kernels(text) -> int:
  """What kernels move of rows [..., d] in a step, at most.

  `touch` reads and writes them; `adam` reads gradients, and reads and writes
  rows and both moments, which are fewer where rows repeat; `dot` reads them.
  """
  size = lambda shape: 4 * math.prod(map(int, shape))
  rows = lambda shapes: re.findall(r"f32\[(\d+),(\d+)\]", shapes)
  moved = 0
  for line in text.splitlines():
    if 'custom_call_target="mmm_jax_touch_rows"' in line:
      results = line.partition(" custom-call(")[0]
      moved += 2 * sum(map(size, rows(results)))
    elif 'custom_call_target="mmm_jax_adam_rows"' in line:
      constraints = re.search(r"operand_layout_constraints=\{(.*?)\}, o", line)
      # Of a table (packed, slot, links, ids, grads): every other one is [n, d].
      grads = rows(constraints[1])[1::2]
      moved += 7 * sum(map(size, grads))
    elif 'custom_call_target="mmm_jax_dot"' in line:
      operands = re.search(r" custom-call\((.*?)\)", line)[1].split(", ")
      shape = re.search(r"operand_layout_constraints=\{f32\[(.*?)\]", line)[1]
      moved += len(set(operands)) * size(shape.split(","))
  return moved
