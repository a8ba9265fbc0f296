"""Top-k recommendations from a finished run.

python -m mmm_jax.recommend --workdir=DIR --output=FILE [--users=all|id,id]
    [--k=20] [--format=parquet|csv|jsonl]

Ranks all items but the user's training and validation items, with the
parameters, scores and order of equal scores of `full` on test.
"""

import difflib
import functools
import json
import pathlib

from absl import flags
import ml_collections
import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from mmm_jax import (
  assemble,
  candidates,
  checkpoint,
  command,
  errors,
  evaluate,
  files,
  manifest,
  parallel,
  scoring,
  validate,
)

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.")
_USERS = flags.DEFINE_string("users", "all", "all, or ids between commas.")
_K = flags.DEFINE_integer("k", 20, "Length of a list.", lower_bound=1)
_FORMAT = flags.DEFINE_enum(
  "format", "parquet", ["parquet", "csv", "jsonl"], "Of the output."
)
_OUTPUT = flags.DEFINE_string("output", None, "File to write.")
# Columns whose values Parquet is to write once, and the most that these may
# take. With its own 1 MB the titles of 20,000 items stand there again for every
# user, in five times the file.
_REPEATED = ["user", "item", "rank", "title"]
_DICTIONARY_BYTES = 1 << 26


def main(argv):
  if len(argv) > 1:
    raise errors.InputError(f"unexpected argument {argv[1]!r}; see --help")
  for flag in (_WORKDIR, _OUTPUT):
    if flag.value is None:
      raise errors.InputError(f"--{flag.name} is missing; see --help")
  config = read_config(pathlib.Path(_WORKDIR.value))
  command.cache_compilations(config.dataset.data_dir)
  run, best = load_run(pathlib.Path(_WORKDIR.value), config)
  users = choose_users(run, _USERS.value)
  write(_OUTPUT.value, recommend(run, best, users, k=_K.value), _FORMAT.value)


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of the run in a folder.

  Raises:
    errors.InputError: there is no finished run.
  """
  for name in ("config.json", "result.json", "manifest.json"):
    if not (workdir / name).exists():
      raise errors.InputError(
        f"{workdir} has no {name}: no finished run is there; train one with"
        f" python -m mmm_jax.main --config=... --workdir={workdir}"
      )
  values = validate.completed(files.read_json(workdir / "config.json"))
  return ml_collections.ConfigDict(_with_tuples(values))


def _with_tuples(value):
  """JSON has lists only, where a config has tuples."""
  if isinstance(value, dict):
    return {key: _with_tuples(inner) for key, inner in value.items()}
  return tuple(value) if isinstance(value, list) else value


def load_run(
  workdir: pathlib.Path, config
) -> tuple[assemble.Run, scoring.Best]:
  """A run and the parameters that its result.json stands for.

  Raises:
    errors.InputError: the data are gone or changed, or no checkpoint loads.
  """
  run = assemble.assemble(config)
  path = workdir / "manifest.json"
  made = manifest.read(path)
  manifest.check_same(
    path, made, data=run.dataset.fingerprint, split=run.split.fingerprint
  )
  state = assemble.initial_state(run)
  template = scoring.to_keep(state, config)
  folder = workdir.absolute() / "checkpoints"
  with checkpoint.open_manager(folder, keep=config.checkpoint.keep) as manager:
    try:  # An older one may hold other parameters than result.json is of.
      found = checkpoint.load(manager, made["step"], template)
    except Exception as error:  # whatever a damaged file makes Orbax raise
      raise errors.InputError(
        f"{folder}: found no readable checkpoint of step {made.get('step')}"
        f" ({type(error).__name__}), wanted the one that the run ended with;"
        " delete result.json and run its command again"
      ) from error
  return run, scoring.reported(found)


def choose_users(run: assemble.Run, wanted: str) -> np.ndarray:
  """Dense ids of the users in a comma-separated list of raw ids, or all.

  Raises:
    errors.InputError: an id that the run does not know.
  """
  if wanted == "all":
    every = candidates.in_parts(run.interactions, candidates.PARTS)
    return np.flatnonzero(np.bincount(run.interactions.user[every]))
  known = {raw: user for user, raw in enumerate(run.dataset.users)}
  users = []
  for raw in filter(None, map(str.strip, wanted.split(","))):
    if raw not in known:
      near = difflib.get_close_matches(raw, known, n=3)
      hint = f"; near matches: {', '.join(near)}" if near else ""
      raise errors.InputError(
        f"--users: {raw!r} is none of the {len(known)} users of"
        f" {run.dataset.name}{hint}"
      )
    users.append(known[raw])
  if not users:
    raise errors.InputError("--users: found no id, wanted all, or ids")
  return np.array(list(dict.fromkeys(users)), np.int32)


def recommend(
  run: assemble.Run, best: scoring.Best, users: np.ndarray, *, k: int
) -> pa.Table:
  """Lists of at most k items for `users`, as columns.

  Returns:
    `user`, `item`, `rank` (from 1), `score`, `item_share` and
    `category_share` (which add up to the score; null where the model has no
    such parts), `title`.
  """
  settings = run.config.eval
  scorer = scoring.make_scorer(run, best.params, best.rows, best.categories)
  items, scores = evaluate.rank(
    scorer,
    users,
    *candidates.items_of_users(run.interactions, evaluate.KNOWN["test"]),
    num_items=run.sizes.num_items,
    k=min(k, run.sizes.num_items),
    seed=settings.seed,
    user_block=settings.user_block,
    item_tile=settings.item_tile,
  )
  item_share, category_share = _shares(run, best, scorer, users, items)
  listed = items >= 0
  rank = np.broadcast_to(np.arange(1, items.shape[1] + 1), items.shape)
  user = np.broadcast_to(users[:, None], items.shape)
  strings = lambda values, rows: pa.array(values, pa.string()).take(
    pa.array(rows[listed])
  )
  return pa.table(
    {
      "user": strings(run.dataset.users, user),
      "item": strings(run.dataset.items, items),
      "rank": pa.array(rank[listed], pa.int32()),
      "score": pa.array(scores[listed], pa.float32()),
      "item_share": pa.array(
        item_share[listed], pa.float32(), from_pandas=True
      ),
      "category_share": pa.array(
        category_share[listed], pa.float32(), from_pandas=True
      ),
      "title": strings(run.dataset.title, items),
    }
  )


def _shares(run, best, scorer, users, items):
  """The two parts of every score, [n, k] each; NaN for other models."""
  if not hasattr(run.model, "shares"):
    nothing = np.full(items.shape, np.nan, np.float32)
    return nothing, nothing
  parts = run.model.apply(
    {"params": best.params}, best.rows, best.categories, method="item_parts"
  )
  engine = scorer.engine
  whole, part = parallel.REPLICATED, parallel.SHARDED
  compute = engine.map(
    functools.partial(_block_shares, run.model),
    (part, whole, whole, part),
    part,
  )
  parts = engine.replicate(parts)
  at_once = run.config.eval.user_block * engine.num_devices
  blocks = []
  for rows in candidates.row_blocks(len(users), at_once):
    blocks.append(compute(scorer.users(users[rows]), *parts, items[rows]))
  gathered = [np.concatenate(part)[: len(users)] for part in zip(*blocks)]
  return gathered if gathered else (items * 0.0, items * 0.0)


def _block_shares(model, vectors, item, offset, ids):
  return model.shares(vectors, item[ids], offset[ids])


def write(path, table: pa.Table, kind: str) -> None:
  """Writes the lists; the file appears under its name when it is complete."""
  with files.atomic(path) as file:
    if kind == "parquet":
      parquet.write_table(
        table,
        file,
        compression="zstd",
        use_dictionary=_REPEATED,
        dictionary_pagesize_limit=_DICTIONARY_BYTES,
      )
    elif kind == "csv":
      csv.write_csv(table, file)
    else:
      for batch in table.to_batches(max_chunksize=65536):
        for row in batch.to_pylist():
          file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
  command.run(main)
