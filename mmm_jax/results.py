"""Records of finished cells: tests/results/<sweep>/<cell>.json, .npy beside.

The one has the metrics, hashes of what they depend on, and how the run went,
the other the values of its users. A table needs nothing else.
"""

import json
import math
import pathlib

import numpy as np
from pyarrow import parquet

from mmm_jax import errors, files, manifest

FOLDER = pathlib.Path("tests/results")
METRIC = "ndcg@20"  # kept for every user
FIELDS = {  # what `read` asks for, as tables need it
  "number",
  "model",
  "dataset",
  "seed",
  "changes",
  "metrics",
  "hashes",
  "seconds",
  "peak_memory_mb",
  "epochs",
  "best_epoch",
  "ended_by",
  "clusters",
}


def path_of(sweep: str, number: int) -> pathlib.Path:
  return FOLDER / sweep / f"{number}.json"


def _remedy(path):
  """What to do about a record that is no good."""
  return f"remove {path} and {path.with_suffix('.npy').name}, and run it again"


def read(path: pathlib.Path) -> dict:
  """A record without the values of its users.

  Raises:
    errors.InputError: it is no record.
  """
  found = files.read_json(path)
  missing = sorted(FIELDS.difference(found))
  if missing:
    raise errors.InputError(
      f"{path} is no record of a cell, as it has no {', '.join(missing)};"
      f" {_remedy(path)}"
    )
  return found


def read_users(path: pathlib.Path, record: dict) -> np.ndarray:
  """The users' values beside a record, float16 [U].

  Raises:
    errors.InputError: they cannot be read, or are not those of its metric.
  """
  beside = path.with_suffix(".npy")
  try:
    values = np.load(beside, allow_pickle=False)
  except (EOFError, OSError, ValueError) as error:
    raise errors.InputError(f"{beside}: {error}; {_remedy(path)}") from error
  mean = values.mean(dtype=np.float64)
  metric = record["metrics"]["full"]["test"][METRIC]
  if not math.isclose(mean, metric, abs_tol=1e-4):
    raise errors.InputError(
      f"{path}: test {METRIC} is {metric:.5f}, and {mean:.5f} as the mean of"
      f" {beside.name}; {_remedy(path)}"
    )
  return values


def is_of(path: pathlib.Path, wanted: dict) -> bool:
  """Whether a record is there, with the `wanted` hashes, and its users'."""
  if not (path.exists() and path.with_suffix(".npy").exists()):
    return False
  found = read(path)["hashes"]
  return all(found[name] == wanted[name] for name in wanted)


def find_same(wanted: dict) -> pathlib.Path | None:
  """The record of a cell, of any sweep, that has the `wanted` hashes."""
  paths = sorted(FOLDER.glob("*/*.json"))
  return next((path for path in paths if is_of(path, wanted)), None)


def copy(path: pathlib.Path, own: pathlib.Path, cell: dict) -> None:
  """Records for a cell what is recorded for the same run."""
  own.parent.mkdir(parents=True, exist_ok=True)
  with files.atomic(own.with_suffix(".npy")) as file:
    file.write(path.with_suffix(".npy").read_bytes())
  files.write_json(own, read(path) | cell)


def write(path: pathlib.Path, cell: dict, config, config_hash: str, workdir):
  """Records the finished run of a cell.

  Args:
    path: of the record.
    cell: what a sweep says of it.
    config: of the run.
    config_hash: of the values that its results depend on.
    workdir: of the run, a path.
  """
  result = files.read_json(workdir / "result.json")
  made = manifest.read(workdir / "manifest.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.atomic(path.with_suffix(".npy")) as file:
    np.save(file, per_user(workdir))
  candidates = result.pop("candidates")
  strata = result.pop("strata")
  values = {
    **cell,
    "metrics": result,
    "strata": {"full": strata.get("full", {})},
    "hashes": {
      "config": config_hash,
      "data": made["data"],
      "split": made["split"],
      "candidates": candidates,
    },
    "revision": made["git_revision"],
    "device": made["device"]["kind"],
    "seconds": made["wall_s"],
    "peak_memory_mb": made["peak_memory_mb"],
    **progress(workdir, config),
  }
  files.write_json(path, values)


def per_user(workdir: pathlib.Path) -> np.ndarray:
  """Test nDCG@20 of `full` of every user with a test item, float16 [U].

  In the order of the split's users; there are no ids in it.
  """
  table = parquet.read_table(
    workdir / "per_user.parquet",
    columns=[METRIC],
    filters=[("protocol", "=", "full"), ("part", "=", "test")],
  )
  return table[METRIC].to_numpy().astype(np.float16)


def progress(workdir: pathlib.Path, config) -> dict:
  """How far a run came, and which of its epochs was the best.

  With the likeness of that epoch's categories to those that the set has, and
  its terms' gradients on the tables, as shares of that of the interactions.
  """
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  key = f"valid/{METRIC}"
  validated = [row for row in rows if key in row] or rows[-1:]
  best = max(validated, key=lambda row: (row.get(key, 0), -row["epoch"]))
  since = sum(row["epoch"] > best["epoch"] for row in validated)
  return {
    "epochs": round(rows[-1]["epoch"]),
    "best_epoch": round(best["epoch"]),
    "ended_by": "patience" if since >= config.eval.patience else "epochs",
    "clusters": {
      name: best[f"kmeans/{name}"]
      for name in ("nmi", "ari")
      if f"kmeans/{name}" in best
    },
    "gradients": {
      key.removeprefix("gradient/"): norm / best["gradient/interaction"]
      for key, norm in best.items()
      if key.startswith("gradient/") and key != "gradient/interaction"
    },
  }
