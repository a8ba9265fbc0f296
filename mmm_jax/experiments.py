"""Searches for configs, sweeps of runs, and the tables that they give.

python -m mmm_jax.experiments tune --model=mmm[:variant,...] --dataset=NAME
    --study=FILE [--trials=N] [--budget=SECONDS] [--workers=N]
    [--manual_dir=NAME=DIR]
python -m mmm_jax.experiments run --sweep=NAME [--list] [--cell=N]
    [--workdir=DIR] [--manual_dir=microlens=DIR,tiktok=DIR]
python -m mmm_jax.experiments table --sweep=NAME [--pairs]
    [--format=markdown|latex|csv] [--into=FILE.md]
python -m mmm_jax.experiments table --study=FILE,FILE
    [--format=markdown|latex|csv] [--into=FILE.md]

To be run from the repository's root. A trial of a search is validated and
never tested; the same command goes on with its study. A cell of a sweep is a
normal run of `mmm_jax.main` in its own folder; a finished one leaves its record
in tests/results/<sweep>/, and `table` needs nothing else. A run that another
cell, of any sweep, has recorded is taken from there, unless --cell asks for it.
"""

import hashlib
import importlib.util
import json
import math
import pathlib
import signal
import subprocess
import sys
from typing import Any, NamedTuple

from absl import flags

from mmm_jax import (
  command,
  errors,
  files,
  manifest,
  results,
  tabulate,
  validate,
)
from mmm_jax.datasets import base, splits

_CONFIGS = pathlib.Path("configs")

_SWEEP = flags.DEFINE_string("sweep", None, "A sweep of configs/sweeps.py.")
_LIST = flags.DEFINE_boolean("list", False, "Only print the cells.")
_CELL = flags.DEFINE_integer("cell", None, "Only this cell.", lower_bound=0)
_WORKDIR = flags.DEFINE_string(
  "workdir", "runs/sweeps", "Folder in which the cells have theirs."
)
_MANUAL_DIR = flags.DEFINE_list(
  "manual_dir", [], "Raw files of real sets: NAME=DIR, between commas."
)
_FORMAT = flags.DEFINE_enum(
  "format", "markdown", list(tabulate.FORMATS), "Of the table."
)
_MODEL = flags.DEFINE_string(
  "model", None, "To tune: a file of configs/, variants behind a colon."
)
_DATASET = flags.DEFINE_enum("dataset", None, base.SETS, "To tune on.")
_STUDY = flags.DEFINE_string("study", None, "Journal of the trials.")
_TRIALS = flags.DEFINE_integer(
  "trials", 30, "Of the study, earlier calls included.", lower_bound=1
)
_BUDGET = flags.DEFINE_float(
  "budget", math.inf, "Seconds after which no trial begins.", lower_bound=0
)
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes.", lower_bound=1)
_PAIRS = flags.DEFINE_boolean(
  "pairs", False, "Compare what the sweep's pairs in configs/sweeps.py name."
)
_INTO = flags.DEFINE_string(
  "into", None, "Markdown file whose block of this sweep is replaced."
)


class Cell(NamedTuple):
  """One run of a sweep."""

  number: int
  model: str  # a file of configs/, and its variants behind a colon
  dataset: str
  seed: int
  changes: dict[str, Any]  # {dotted key of the config: value}

  @property
  def line(self) -> str:
    return f"{self.number} {self.model} {self.dataset} {self.seed}"


def main(argv):
  actions = {"tune": _tune, "run": _run, "table": _table}
  if len(argv) != 2 or argv[1] not in actions:
    raise errors.InputError(
      f"found {' '.join(argv[1:]) or 'nothing'!r}, wanted one of"
      f" {', '.join(actions)}; see --help"
    )
  actions[argv[1]]()


def _required(flag):
  if flag.value is None:
    raise errors.InputError(f"--{flag.name} is missing; see --help")
  return flag.value


def read_cells(sweep: str) -> list[Cell]:
  """The cells of a sweep in `configs/sweeps.py`.

  Raises:
    errors.InputError: there is no such sweep.
  """
  sweeps = _load("sweeps").SWEEPS
  if sweep not in sweeps:
    raise errors.InputError(
      f"--sweep: found {sweep!r}, wanted one of {', '.join(sweeps)}"
    )
  return [Cell(n, **cell) for n, cell in enumerate(sweeps[sweep]())]


def _load(name):
  path = _CONFIGS / f"{name}.py"
  if not _CONFIGS.is_dir():
    raise errors.InputError(
      f"{path.absolute()} is not there; run this from the repository's root"
    )
  if not path.exists():
    raise errors.InputError(
      f"found {name!r}, wanted the name of a file in {_CONFIGS.absolute()},"
      " such as mmm or, with variants, mmm:tiktok"
    )
  spec = importlib.util.spec_from_file_location(f"mmm_jax_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def read_config(cell: Cell):
  """The config of a cell, as its command will have it."""
  config = _model_config(cell.model)
  config.update_from_flattened_dict(
    {"dataset.name": cell.dataset, "seed": cell.seed, **cell.changes}
  )
  return config


def _model_config(model: str):
  name, _, variants = model.partition(":")
  module = _load(name)
  if not hasattr(module, "get_config"):
    raise errors.InputError(f"--model: configs/{name}.py is no model's config")
  try:
    return module.get_config(variants)
  except ValueError as error:
    raise errors.InputError(f"--model: {error}") from error


def hash_config(config, *, without=()) -> str:
  """SHA-256 of the values of a run that its results depend on.

  Args:
    config: of the run.
    without: further keys whose values do not count.
  """
  now = dict(validate.leaves(config))
  neutral = [k for k, value in validate.LATER.items() if now.get(k) == value]
  without = (*validate.NO_RESULT, *neutral, *without)
  values = validate.plain(config, without=without)
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


# --- tuning ------------------------------------------------------------------


def _tune():
  study = _required(_STUDY)
  model, dataset = _required(_MODEL), _required(_DATASET)
  if _WORKERS.value > 1:
    _tune_in_processes()
    return
  name = model.partition(":")[0]
  module = _load(name)
  if not hasattr(module, "search_space"):
    raise errors.InputError(
      f"--model: configs/{name}.py has no `search_space`; that of"
      " configs/mmm.py shows how to write one"
    )
  manual_dir = read_manual_dirs(_MANUAL_DIR.value).get(dataset, "")

  def make_config():
    config = _model_config(model)
    config.dataset.name = dataset
    config.dataset.manual_dir = manual_dir
    return config

  config = make_config()
  space = module.search_space(config)
  # Of what is searched the values do not matter, but for the first trial.
  rest = hash_config(config, without=space)
  tune = _load_tune()
  base.load(config.dataset, config.split)  # what fails leaves no journal
  found = tune.search(
    make_config,
    space,
    {"model": model, "dataset": dataset, "config": rest},
    study,
    trials=_TRIALS.value,
    budget=_BUDGET.value,
  )
  print(tune.summary(found))


def _load_tune():
  """`tune`, which needs an optional package."""
  try:
    from mmm_jax import tune
  except ImportError as error:
    raise errors.InputError(
      f"{error.name} is not installed; pip install 'mmm_jax[all]'"
    ) from error
  return tune


def _tune_in_processes():
  """The same command, several times at once on the same study."""
  command_line = [sys.executable, "-m", "mmm_jax.experiments", *sys.argv[1:]]
  processes = [
    subprocess.Popen([*command_line, "--workers=1"])
    for _ in range(_WORKERS.value)
  ]
  try:
    codes = [process.wait() for process in processes]
  finally:
    for process in processes:
      process.terminate()
      process.wait()
  # What cannot go on counts for more than what can.
  for code in sorted(codes, key=lambda code: code not in (1, 2)):
    _end_as(code, f"a worker on {_STUDY.value}")


def _end_as(code, name):
  """Ends as a command that this one has started did, unless that was well."""
  if code == command.STOPPED:
    raise command.Stopped(f"stopped in {name}; the same command continues")
  if code < 0:  # for a shell 128 and the signal's number
    raise command.Ended(
      128 - code,
      f"{name}: signal {-code} killed it; the same command continues",
    )
  if code:
    raise command.Ended(
      code, f"{name}: it ended with {code}; the message above says why"
    )


# --- running -----------------------------------------------------------------


def _run():
  sweep = _required(_SWEEP)
  cells = read_cells(sweep)
  chosen = [c for c in cells if _CELL.value in (None, c.number)]
  if not chosen:
    raise errors.InputError(
      f"--cell: found {_CELL.value}, wanted 0 to {len(cells) - 1}"
    )
  if _LIST.value:
    print("\n".join(cell.line for cell in chosen))
    return
  manual_dirs = read_manual_dirs(_MANUAL_DIR.value)
  for cell in chosen:
    config = read_config(cell)
    config.dataset.manual_dir = manual_dirs.get(cell.dataset, "")
    dataset = base.load(config.dataset, config.split)
    split = splits.make(dataset, config.split)
    now = {"data": dataset.fingerprint, "split": split.fingerprint}
    wanted = {"config": hash_config(config), **now}
    path = results.path_of(sweep, cell.number)
    if results.is_of(path, wanted):
      print(f"{cell.line}: recorded already", file=sys.stderr)
      continue
    same = results.find_same(wanted) if _CELL.value is None else None
    if same is not None:
      print(f"{cell.line}: recorded as {same}", file=sys.stderr)
      results.copy(same, path, cell._asdict())
      continue
    print(cell.line, file=sys.stderr)
    # A folder for each config: a cell that was changed starts anew.
    name = f"{cell.number}-{wanted['config'][:12]}"
    workdir = pathlib.Path(_WORKDIR.value, sweep, name)
    stop = _train(cell, config, workdir)
    made = workdir / "manifest.json"
    manifest.check_same(made, manifest.read(made), **now)
    results.write(path, cell._asdict(), config, wanted["config"], workdir)
    if stop:
      raise command.Stopped(
        f"stopped after {cell.line}; the same command continues"
      )


def read_manual_dirs(texts: list[str]) -> dict[str, str]:
  """{set: the folder of its raw files}, of texts NAME=DIR.

  Raises:
    errors.InputError: one is something else, or names no set.
  """
  pairs = [text.partition("=") for text in texts]
  for name, equals, folder in pairs:
    if not (equals and folder and name in base.SETS):
      raise errors.InputError(
        f"--manual_dir: found {name + equals + folder!r}, wanted NAME=DIR with"
        f" a name of {', '.join(base.SETS)}"
      )
  return {name: folder for name, _, folder in pairs}


def _train(cell, config, workdir):
  """Runs the cell's command, to the end of what it may have begun before.

  Returns:
    Whether a signal came too late to stop it.
  """
  name, colon, variants = cell.model.partition(":")
  changes = {
    "dataset.name": cell.dataset,
    "dataset.manual_dir": config.dataset.manual_dir,
    "seed": cell.seed,
    # So that a record does not depend on whether there is a compiler.
    "parallel.kernels": False,
    **cell.changes,
  }
  code, asked = _call(
    [
      sys.executable,
      "-m",
      "mmm_jax.main",
      f"--config={_CONFIGS}/{name}.py{colon}{variants}",
      *(f"--config.{key}={value}" for key, value in changes.items()),
      f"--workdir={workdir}",
    ]
  )
  _end_as(code, f"{cell.line}, run in {workdir}")
  return asked


def _call(command_line) -> tuple[int, bool]:
  """The exit code of a command, and whether a signal came meanwhile.

  If so, the command was told to save and to stop.
  """
  process = subprocess.Popen(command_line, stdout=subprocess.DEVNULL)
  asked = False
  while True:  # however often it is asked
    try:
      return process.wait(), asked
    except KeyboardInterrupt:  # Ctrl-C tells both of it, a scheduler only one
      asked = True
      process.send_signal(signal.SIGTERM)


# --- tables ------------------------------------------------------------------


def _table():
  if _INTO.value is not None and _FORMAT.value != "markdown":
    raise errors.InputError(
      f"--into is for Markdown, found --format={_FORMAT.value}"
    )
  if _INTO.value is not None and not pathlib.Path(_INTO.value).is_file():
    raise errors.InputError(
      f"--into: found {_INTO.value}, wanted a file that has a block for it"
    )
  if _STUDY.value and (_SWEEP.value or _PAIRS.value):
    raise errors.InputError(
      "--study is of trials, --sweep and --pairs are of cells: found both"
    )
  if _STUDY.value:
    name, tables = "studies", study_tables(_STUDY.value.split(","))
  elif _PAIRS.value:
    sweep = _required(_SWEEP)
    name, tables = f"{sweep} pairs", [pairs_table(sweep)]
  else:
    name = _required(_SWEEP)
    tables = [tabulate.full_table(read_records(name))]
  write = tabulate.FORMATS[_FORMAT.value]
  text = "\n\n".join(write(*table) for table in tables)
  if _INTO.value is None:
    print(text)
  else:
    _replace_block(pathlib.Path(_INTO.value), name, text)


def study_tables(paths: list[str]) -> list[tabulate.Table]:
  """Sizes of studies with their best values, and what they searched."""
  tune = _load_tune()
  studies = tune.read_studies(paths)
  return [tune.sizes_table(studies), tune.spaces_table(studies)]


def pairs_table(sweep: str) -> tabulate.Table:
  """What `PAIRS` in `configs/sweeps.py` compares within a sweep.

  Raises:
    errors.InputError: it names no pairs for the sweep; or of `read_records`.
  """
  pairs = getattr(_load("sweeps"), "PAIRS", {})
  if sweep not in pairs:
    raise errors.InputError(
      f"--pairs: PAIRS in configs/sweeps.py has none for {sweep}, but for"
      f" {', '.join(pairs) or 'nothing'}"
    )
  return tabulate.pairs_table(read_records(sweep), list(pairs[sweep]()))


def read_records(sweep: str) -> list[dict]:
  """The records of all cells; under `per_user` the values of their users.

  Raises:
    errors.InputError: a cell has none, or it is of another config; cells of one
      set and split saw other data or another split; the values of the users are
      not those of the metric.
  """
  records, seen = [], {}
  for cell in read_cells(sweep):
    path = results.path_of(sweep, cell.number)
    for file in (path, path.with_suffix(".npy")):
      if not file.exists():
        raise errors.InputError(
          f"{file} is not there: cell {cell.line!r} has not been run; run it"
          f" with python -m mmm_jax.experiments run --sweep={sweep}"
          f" --cell={cell.number}"
        )
    # Names are the sweep's of today, the rest is what the run gave.
    record = results.read(path) | cell._asdict()
    config = read_config(cell)
    if record["hashes"]["config"] != hash_config(config):
      raise errors.InputError(
        f"{path} is of another config than cell {cell.line!r} has now; run it"
        " again"
      )
    record["per_user"] = results.read_users(path, record)
    # What a run is given: cells that say the same must have seen the same.
    asked = f"{config.dataset}{config.split}"
    first_path, first = seen.setdefault(asked, (path, record))
    for name in ("data", "split"):
      if record["hashes"][name] != first["hashes"][name]:
        raise errors.InputError(
          f"{path} and {first_path} are of one {name} by their configs, and of"
          " two by their hashes; run them again"
        )
    records.append(record)
  return records


def _replace_block(path, name, text):
  """Puts the table between <!-- table: NAME --> and <!-- end -->."""
  head, tail = f"<!-- table: {name} -->\n", "<!-- end -->"
  with files.explained(path, "read"):
    old = path.read_text()
  before, found, rest = old.partition(head)
  _, ended, after = rest.partition(tail)
  if not (found and ended):
    raise errors.InputError(
      f"{path} has no block from {head.strip()!r} to {tail!r}"
    )
  with files.atomic(path) as file:
    file.write(f"{before}{head}\n{text}\n\n{tail}{after}".encode())


if __name__ == "__main__":
  command.run(main)
