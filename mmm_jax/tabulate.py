"""Tables of recorded runs: means, intervals, paired tests.

A row is a model on a data set, over its seeds. Each is compared with the first
model of its set, in a table of pairs with the one that it is named with; the
p-values of a set are adjusted together (Holm).
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
Table = tuple[list[str], list[list[str]]]  # heads, and lines as long as they
_OPTIONAL = ("nmi", "ari")  # columns of sets with categories of their own
_PAIR_HEADS = {
  **{key: _HEADS[key] for key in ("dataset", "model")},
  "reference": "less",
  "difference": "test nDCG@20",
  **{key: _HEADS[key] for key in ("wilcoxon", "bootstrap")},
}


def full_table(records: list[dict]) -> Table:
  """Every model of a sweep, compared with the first of its set.

  Args:
    records: as `experiments.read_records` gives them, in the sweep's order.

  Returns:
    Heads and lines, for one of FORMATS.

  Raises:
    errors.InputError: runs on one set saw other data, splits or candidates.
  """
  found = rows(records)
  empty = {key for key in _OPTIONAL if all(row[key] == "–" for row in found)}
  return _table(found, {k: v for k, v in _HEADS.items() if k not in empty})


def rows(records: list[dict]) -> list[dict[str, str]]:
  """What is in `full_table`: one dictionary with the keys of _HEADS a row."""
  table = []
  for models in _group(records).values():
    table += _set_rows(models)
  return table


def pairs_table(records: list[dict], pairs) -> Table:
  """Models of a sweep, each less another one on the same users.

  Args:
    records: as in `full_table`.
    pairs: (set, model, reference), by the names that `full_table` has for them.

  Raises:
    errors.InputError: as in `full_table`; or the sweep has no such model.
  """
  groups = _group(records)
  found = []
  for dataset in dict.fromkeys(name for name, _, _ in pairs):
    wanted = [pair[1:] for pair in pairs if pair[0] == dataset]
    models = groups.get(dataset, {})
    for name in (name for pair in wanted for name in pair):
      if name not in models:
        raise errors.InputError(
          f"the sweep has no {name} on {dataset}, but"
          f" {', '.join(models) or 'nothing at all'}"
        )
    runs = [(models[one], models[other]) for one, other in wanted]
    for one, other in runs:
      if not _comparable(one, other):
        raise errors.InputError(
          f"cells {one[0]['number']} and {other[0]['number']} have other data"
          " or splits; their users cannot be paired"
        )
    compared = _compare(runs)
    found += [
      {"dataset": dataset, "model": one, "reference": other, **row}
      for (one, other), row in zip(wanted, compared)
    ]
  return _table(found, _PAIR_HEADS)


def _table(found, heads) -> Table:
  lines = [[row[key] for key in heads] for row in found]
  return list(heads.values()), lines


def _group(records):
  """{set: {model: its runs}}, in the order of the records."""
  groups = {}
  for record in records:
    sets = groups.setdefault(_set_name(record), {})
    sets.setdefault(_model_name(record), []).append(record)
  return groups


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
  compared = _compare([(runs, reference) for runs in others.values()])
  compared = dict(zip(others, compared))
  none = dict.fromkeys(("difference", "wilcoxon", "bootstrap"), "–")
  return [
    _row(runs) | compared.get(name, none) for name, runs in models.items()
  ]


def _compare(pairs) -> list[dict[str, str]]:
  """Differences and tests of comparable runs, one family of tests."""
  means = [(_values(a).mean(0), _values(b).mean(0)) for a, b in pairs]
  wilcoxon = [significance.wilcoxon(*pair) for pair in means]
  bootstrap = [significance.bootstrap(*pair, seed=_SEED) for pair in means]
  return [
    {"difference": _difference(*pair), "wilcoxon": _p(w), "bootstrap": _p(b)}
    for pair, w, b in zip(
      pairs, significance.holm(wilcoxon), significance.holm(bootstrap)
    )
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
        " different candidate lists; remove their files in tests/results and"
        " run them again"
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
  return "< .001" if value < 0.001 else f"{value:.3f}"


def markdown(heads: list[str], lines: list[list[str]]) -> str:
  """A Markdown table of text."""
  lines = [heads, ["---"] * len(heads), *lines]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(heads: list[str], lines: list[list[str]]) -> str:
  escape = {"_": r"\_", "%": r"\%", "–": "--", "<": "$<$", "±": r"$\pm$"}
  clean = lambda text: "".join(escape.get(sign, sign) for sign in text)
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


def as_csv(heads: list[str], lines: list[list[str]]) -> str:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerows([heads, *lines])
  return text.getvalue().rstrip("\n")


FORMATS = {"markdown": markdown, "latex": latex, "csv": as_csv}
