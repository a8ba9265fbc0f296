"""Tables of recorded runs: means, intervals, paired tests.

A row is a model on a data set, over its seeds. Each is compared with the first
model of its set, and the p-values of a set are adjusted together (Holm).
"""

from __future__ import annotations

import csv
import io

import numpy as np

from mmm_jax import errors, significance

_SEED = 0  # of the resampling
_SILENT = ("epochs", "dataset.data_dir")  # changes that name no row
_HEADS = {
  "dataset": "set",
  "model": "model",
  "seeds": "seeds",
  "valid": "valid nDCG@20",
  "test": "test nDCG@20",
  "interval": "95 % interval",
  "difference": "less the first",
  "recall": "test recall@20",
  "pooled": "pooled_1024 nDCG@20",
  "wilcoxon": "p (Wilcoxon)",
  "bootstrap": "p (bootstrap)",
  "epochs": "epochs (best)",
  "minutes": "minutes",
  "memory": "peak GB",
  "nmi": "NMI",
  "ari": "ARI",
}
_OPTIONAL = ("nmi", "ari")  # columns of sets with categories of their own


def rows(records: list[dict]) -> list[dict[str, str]]:
  """Cells of the table, as text: one dictionary with the keys of _HEADS a row.

  Args:
    records: as `experiments.read_records` gives them, in the sweep's order.

  Raises:
    errors.InputError: runs on one set saw other data, splits or candidates.
  """
  groups = {}
  for record in records:
    sets = groups.setdefault(_set_name(record), {})
    sets.setdefault(_model_name(record), []).append(record)
  table = []
  for models in groups.values():
    table += _set_rows(models)
  return table


def _set_name(record) -> str:
  """The set, and what the cell changes about its data."""
  return _with_changes(record["dataset"], record, of_data=True)


def _model_name(record) -> str:
  """The model, and what else the cell changes."""
  return _with_changes(record["model"], record, of_data=False)


def _with_changes(name, record, *, of_data):
  changes = [
    f"{key.removeprefix('dataset.').removeprefix('simulated.')}={value}"
    for key, value in record["changes"].items()
    if key.startswith("dataset.") == of_data and key not in _SILENT
  ]
  return " ".join([name, *changes])


def _set_rows(models):
  _, reference = next(iter(models.items()))
  others = {
    name: runs for name, runs in models.items()
    if _comparable(runs, reference) and runs is not reference
  }  # fmt: skip
  mean = lambda runs: _values(runs).mean(0)
  differences = {
    name: _difference(runs, reference) for name, runs in others.items()
  }
  paired = [(mean(runs), mean(reference)) for runs in others.values()]
  tests = {
    "wilcoxon": [significance.wilcoxon(*pair) for pair in paired],
    "bootstrap": [significance.bootstrap(*pair, seed=_SEED) for pair in paired],
  }
  adjusted = {
    test: dict(zip(others, significance.holm(found)))
    for test, found in tests.items()
  }
  return [
    _row(runs)
    | {test: _p(found.get(name)) for test, found in adjusted.items()}
    | {"difference": differences.get(name, "–")}
    for name, runs in models.items()
  ]


def _comparable(runs, reference):
  """Runs on the same test users and items; another split is its own table.

  The same split with other candidates would be a fault of the evaluation.
  """
  seen = lambda runs: {
    (run["hashes"]["data"], run["hashes"]["split"]) for run in runs
  }
  if len(seen(runs)) > 1:
    raise errors.InputError(
      f"cells {[run['number'] for run in runs]} of {runs[0]['model']} on"
      f" {runs[0]['dataset']} have different data or splits; run them again"
    )
  if seen(runs) != seen(reference):
    return False
  for run in runs:
    theirs, ours = run["hashes"], reference[0]["hashes"]
    if theirs["candidates"] != ours["candidates"]:
      raise errors.InputError(
        f"cells {run['number']} and {reference[0]['number']} have one split and"
        " different candidate lists; run them again"
      )
  return True


def _values(runs) -> np.ndarray:
  return np.stack([run["per_user"] for run in runs]).astype(np.float64)


def _difference(runs, reference) -> str:
  """The mean difference, user by user, and its 95 % interval.

  Run by run where both have the same seeds, so that what a seed does to both
  is not taken for a difference; else between the means over the runs.
  """
  ours, theirs = _values(runs), _values(reference)
  if [run["seed"] for run in runs] != [run["seed"] for run in reference]:
    ours, theirs = ours.mean(0)[None], theirs.mean(0)[None]
  low, high = significance.interval(ours - theirs, seed=_SEED)
  return f"{(ours - theirs).mean():+.4f} ({low:+.4f} to {high:+.4f})"


def _row(runs) -> dict[str, str]:
  first = runs[0]
  low, high = significance.interval(_values(runs), seed=_SEED)
  minutes = np.mean([run["seconds"]["total"] for run in runs]) / 60
  memory = max(run["peak_memory_mb"] for run in runs) / 1024
  return {
    "dataset": _set_name(first),
    "model": _model_name(first),
    "seeds": str(len(runs)),
    "valid": _metric(runs, "full", "valid", "ndcg@20"),
    "test": _metric(runs, "full", "test", "ndcg@20"),
    "interval": f"{low:.4f}–{high:.4f}",
    "recall": _metric(runs, "full", "test", "recall@20"),
    "pooled": _metric(runs, "pooled_1024", "test", "ndcg@20"),
    "epochs": ", ".join(_epochs(run) for run in runs),
    "minutes": f"{minutes:.1f}",
    "memory": f"{memory:.1f}",
    "nmi": _likeness(runs, "nmi"),
    "ari": _likeness(runs, "ari"),
  }


def _metric(runs, protocol, part, name):
  found = [run["metrics"][protocol].get(part, {}).get(name) for run in runs]
  return "–" if None in found else f"{np.mean(found):.4f}"


def _likeness(runs, name):
  found = [run["clusters"].get(name) for run in runs]
  if None in found:
    return "–"
  spread = significance.half_width(found)
  interval = "" if spread is None else f" ± {spread:.3f}"
  return f"{np.mean(found):.3f}{interval}"


def _epochs(run):
  """Trained epochs and the best one; marked if patience did not end it."""
  mark = "" if run["ended_by"] == "patience" else "*"
  return f"{run['epochs']}{mark} ({run['best_epoch']})"


def _p(value):
  if value is None:
    return "–"
  return "< .001" if value < 0.001 else f"{value:.3f}"


def _lines(table):
  """Heads and rows, without optional columns that are empty."""
  empty = {key for key in _OPTIONAL if all(row[key] == "–" for row in table)}
  keys = [key for key in _HEADS if key not in empty]
  lines = [[row[key] for key in keys] for row in table]
  return [_HEADS[key] for key in keys], lines


def markdown(table: list[dict[str, str]]) -> str:
  return markdown_lines(*_lines(table))


def markdown_lines(heads: list[str], lines: list[list[str]]) -> str:
  """A Markdown table of text."""
  lines = [heads, ["---"] * len(heads), *lines]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(table: list[dict[str, str]]) -> str:
  escape = {"_": r"\_", "%": r"\%", "–": "--", "<": "$<$", "±": r"$\pm$"}
  clean = lambda text: "".join(escape.get(sign, sign) for sign in text)
  heads, lines = _lines(table)
  lines = [heads, *lines]
  body = [" & ".join(map(clean, line)) + r" \\" for line in lines]
  body.insert(1, r"\midrule")
  columns = "l" * len(heads)
  return "\n".join(
    [
      rf"\begin{{tabular}}{{{columns}}}",
      r"\toprule",
      *body,
      r"\bottomrule",
      r"\end{tabular}",
    ]
  )


def as_csv(table: list[dict[str, str]]) -> str:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  heads, lines = _lines(table)
  writer.writerows([heads, *lines])
  return text.getvalue().rstrip("\n")


FORMATS = {"markdown": markdown, "latex": latex, "csv": as_csv}
