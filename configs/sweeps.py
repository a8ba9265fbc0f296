"""Sweeps: lists of runs whose results are recorded and tabled together.

  python -m mmm_jax.experiments run --sweep=variants --list

A function here is a sweep and yields its cells. A cell names a model (a file
beside this one with its variants behind a colon), a data set and a seed, and
may change single values of that config. Rows of a table are compared with the
first model that a sweep yields for the set.
"""

REAL_SETS = ("hetrec_lastfm", "tiktok", "microlens")


def cell(model, dataset, seed=0, **changes):
  """One run; `changes` are keys of the config with __ for every dot."""
  values = {key.replace("__", "."): value for key, value in changes.items()}
  return {"model": model, "dataset": dataset, "seed": seed, "changes": values}


def variants():
  """The paper's variants on the embedded set, and MMM on the real ones."""
  for variant in ("full", "con", "cat", "net", "pmf", "paper", "fair"):
    yield cell(f"mmm:{variant}", "simulated")
  for dataset in REAL_SETS:
    yield cell("mmm:full", dataset)


SWEEPS = {function.__name__: function for function in (variants,)}
