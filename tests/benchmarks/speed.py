"""Speed of training and evaluation on this machine, and of `implicit` beside.

    python tests/benchmarks/speed.py --out=tests/results/speed.json
        [--manual_dir=microlens=DIR] [--only=pmf,mmm]
    python tests/benchmarks/speed.py --table=tests/results/speed.json

Medians of five after compilation, with the values of configs/mmm.py but for
what the text of a measurement names. Needs the extra `test`; no real data,
except for the lists of MicroLens, which are left out without --manual_dir.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import programs
from scipy import sparse

from mmm_jax import (
  assemble,
  command,
  input_pipeline,
  logs,
  manifest,
  parallel,
  recommend,
  scoring,
  tabulate,
  train,
  update,
)
from mmm_jax.datasets import splits

ROOT = pathlib.Path(__file__).parents[2]
REPEATS = 5
NEVER = 10**6
LARGE = 1_000_000  # users and items of B4
PER_USER = 8  # interactions of the made-up users of B4
LEAST_SHARE = 0.02  # of an epoch's operations, to have a line
BLOCK_STEPS = 200  # of each size in turn, for B4
EPOCHS, BPR_EPOCHS = 8, 40  # of PMF and of `implicit` in turn, for B1


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--manual_dir", type=_manual_dir, help="microlens=DIR")
  add_only(parser, MEASURED)
  parser.add_argument("--table", type=pathlib.Path, help="JSON file to print")
  parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.rows:
    print(json.dumps(measure_rows()))
    return
  if flags.table:
    print(markdown(json.loads(flags.table.read_text())))
    return
  measure(MEASURED, flags)


def _manual_dir(text):
  """The folder of MicroLens."""
  name, _, folder = text.partition("=")
  if name != "microlens" or not folder:
    raise argparse.ArgumentTypeError(f"found {text!r}, wanted microlens=DIR")
  return folder


def add_only(parser, measured) -> None:
  """Adds `--only`, names of figures between commas; by default all of them."""

  def names(text):
    found = text.split(",")
    if not set(found) <= set(measured):
      raise argparse.ArgumentTypeError(
        f"found {text!r}, wanted names of {', '.join(measured)}"
      )
    return found

  parser.add_argument(
    "--only",
    type=names,
    default=list(measured),
    help=f"of {', '.join(measured)}",
  )


def measure(measured: dict, flags) -> None:
  """Takes the figures that `--only` names and writes `--out`."""
  if flags.out and flags.out.exists() and set(flags.only) < set(measured):
    sys.exit(f"{flags.out} is there and would lose what --only leaves out")
  command.cache_compilations("~/.cache/mmm_jax")
  found = {}
  for name in flags.only:
    start = time.perf_counter()
    values = measured[name](flags)
    seconds = time.perf_counter() - start
    print(f"[{seconds:.0f} s] {json.dumps(values)}", flush=True)
    found |= values
    if flags.out:  # what is measured is kept, whatever comes after
      flags.out.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


LINES = (
  ("matrix product, 2048 × 2048, GF/s", "matmul_gflop_per_s", "{:.0f}", "–"),
  ("reading memory, GB/s", "memory_gb_per_s", "{:.0f}", "–"),
  ("`implicit` BPR, M pairs/s", "implicit_pairs_per_s", "M", "–"),
  (
    "`pmf`, M samples/s (positives + negatives)",
    "pmf_samples_per_s",
    "M",
    "≥ 2.0",
  ),
  ("… over the pairs of `implicit`", "samples_of_implicit", "{:.3f}", "≥ 0.7"),
  ("`pmf` by XLA alone, M samples/s", "pmf_samples_per_s_by_xla", "M", "–"),
  ("`pmf`, M pairs/s (negatives)", "pmf_pairs_per_s", "M", "–"),
  ("… over those of `implicit`", "pairs_of_implicit", "{:.3f}", "–"),
  (
    "MMM, an epoch of all terms, 16 neighbours, s",
    "mmm_epoch_s",
    "{:.2f}",
    "≤ 2.0",
  ),
  ("… with content streamed, s", "mmm_streamed_epoch_s", "{:.2f}", "–"),
  (
    "… against resident content, epochs in turn",
    "mmm_streamed_ratio",
    "{:.2f} ×",
    "≤ 1.3 ×",
  ),
  ("4096-d content, items/s", "content_items_per_s", "{:,.0f}", "≥ 3,000"),
  ("`full` evaluation, all metrics, s", "full_eval_s", "{:.2f}", "≤ 1.0"),
  ("top 20, all of MicroLens, s", "microlens_lists_s", "{:.1f}", "≤ 5"),
  ("step, 9,412 + 19,058 rows, ms", "step_ms_paper_size", "{:.1f}", "–"),
  ("step, 1 M + 1 M rows, ms", "step_ms_million_rows", "{:.1f}", "–"),
  ("ratio of the two", "row_update_ratio", "{:.2f}", "≤ 2"),
  (
    "memory / (tables + moments + index)",
    "table_memory_ratio",
    "{:.2f}",
    "≤ 1.1",
  ),
  ("start to first step, cold, s", "start_cold_s", "{:.1f}", "≤ 25"),
  ("… with the compilation cache, s", "start_cached_s", "{:.1f}", "≤ 15"),
)


def markdown(found: dict) -> str:
  """The figures of a file as a table."""
  found, lines = {**found}, []
  for unit in ("samples", "pairs"):
    if "implicit_pairs_per_s" in found:
      share = found[f"pmf_{unit}_per_s"] / found["implicit_pairs_per_s"]
      found[f"{unit}_of_implicit"] = share
  for text, key, form, wanted in LINES:
    if key in found:
      value = found[key]
      value = f"{value / 1e6:.2f}" if form == "M" else form.format(value)
      lines.append([text, value, wanted])
  what = "on {cores} cores, {cpu}".format(**found) if "cpu" in found else "what"
  table = tabulate.markdown([what, "measured", "wanted"], lines)
  if not {"profile", "matmul_gflop_per_s"} <= found.keys():
    return table
  return f"{table}\n\n{_profile_table(found)}\n\n{_shares_table(found)}"


def _profile_table(found):
  """A step against the limits of the machine: GF and MB at its full speed."""
  heads = ["step of", "measured, ms", "GFLOP", "at full speed, ms"]
  heads += ["MB by XLA", "by the kernels", "at full speed, ms"]
  lines = []
  for name, step in found["profile"].items():
    computing = 1000 * step["gflop"] / found["matmul_gflop_per_s"]
    moved = step["mb"], step["mb_by_kernels"]
    moving = sum(moved) / found["memory_gb_per_s"]
    figures = (step["step_ms"], step["gflop"], computing, *moved, moving)
    forms = ("{:.1f}", "{:.2f}", "{:.1f}", "{:.0f}", "{:.0f}", "{:.1f}")
    cells = [form.format(figure) for form, figure in zip(forms, figures)]
    lines.append([f"`{name}`", *cells])
  return tabulate.markdown(heads, lines)


def _shares_table(found):
  """Where the time goes: files by variants, the largest first."""
  shares = [step["shares"] for step in found["profile"].values()]
  of = lambda file: [each.get(file, 0.0) for each in shares]
  files = sorted(set().union(*shares), key=lambda f: sum(of(f)), reverse=True)
  large = lambda file: file != "other" and max(of(file)) >= LEAST_SHARE
  shown = list(filter(large, files))
  rest = [1 - sum(each) for each in zip(*map(of, shown))]
  rows = [*((f"`{file}`", of(file)) for file in shown), ("other", rest)]
  lines = [[name, *map("{:.0%}".format, row)] for name, row in rows]
  heads = ["time in", *(f"`{name}`" for name in found["profile"])]
  return tabulate.markdown(heads, lines)


def median_seconds(function, *, warm=1, repeats=REPEATS) -> float:
  """Of `repeats` calls, after `warm` that do not count."""
  seconds = []
  for _ in range(warm + repeats):
    start = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[warm:])


def get_config(variants="", **changes):
  """configs/mmm.py without validation; `a__b=value` changes the key a.b."""
  path = ROOT / "configs" / "mmm.py"
  spec = importlib.util.spec_from_file_location("speed_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(variants)
  config.epochs = NEVER
  config.eval.every_epochs = NEVER - 1
  config.checkpoint.every_seconds = float(NEVER)
  config.log.tensorboard = False
  config.parallel.devices = 1
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()}
  )
  return config


class Training:
  """A trainer in a folder of its own that is gone afterwards."""

  def __init__(self, config, run=None):
    self._folder = tempfile.mkdtemp(prefix="mmm_jax-speed-")
    self.run = run or assemble.assemble(config)
    engine = parallel.make_engine(config)
    self.trainer = train.Trainer(self.run, pathlib.Path(self._folder), engine)
    self.trainer.start()
    self._progress = logs.Progress(NEVER, done=0, primary=False)

  def epoch(self):
    self.trainer.train_epoch(self._progress)
    jax.block_until_ready(self.trainer.state)

  def epochs(self, number):
    for _ in range(number):
      self.epoch()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.trainer.close()
    shutil.rmtree(self._folder)


# --- the machine, and what others do on it ----------------------------------


def machine(_):
  """Product of two matrices, and reading memory, as fast as they go."""
  a = jnp.ones((2048, 2048))
  product = jax.jit(lambda a: a @ a)
  seconds = median_seconds(lambda: product(a).block_until_ready(), warm=2)
  large = jnp.ones(2**26)  # 256 MiB
  total = jax.jit(jnp.sum)
  reading = median_seconds(lambda: total(large).block_until_ready(), warm=2)
  return {
    "cpu": _cpu_name(),
    "cores": len(os.sched_getaffinity(0)),
    "revision": manifest.git_revision(),
    "matmul_gflop_per_s": 2 * 2048**3 / seconds / 1e9,
    "memory_gb_per_s": large.nbytes / reading / 1e9,
  }


def _cpu_name():
  """As Linux knows it."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  named = (line for line in lines if line.startswith("model name"))
  return next(named, "").partition(":")[2].strip() or "unknown"


# --- training ---------------------------------------------------------------


def pmf(_):
  """B1: epochs of PMF, with negatives checked against the positives.

  Beside them `implicit`'s BPR, which does the same: some epochs of each in
  turn, so that a slow second of the machine falls to both.
  """
  config = get_config("pmf")
  no_kernels = get_config("pmf", parallel__kernels=False)
  with Training(config) as ours, Training(no_kernels) as by_xla:
    both = [functools.partial(each.epochs, EPOCHS) for each in (ours, by_xla)]
    for epochs in both:
      epochs()
    known = ours.run.interactions
    bpr_s, (seconds, by_xla_s) = _in_turn_with_implicit(known, both)
  positives = int((known.part == splits.TRAIN).sum())
  samples = positives * (1 + config.negatives.per_positive)
  return {
    "implicit_pairs_per_s": positives * BPR_EPOCHS / bpr_s,
    "pmf_epoch_s": seconds / EPOCHS,
    "pmf_samples_per_s": samples * EPOCHS / seconds,
    "pmf_samples_per_s_by_xla": samples * EPOCHS / by_xla_s,
    "pmf_pairs_per_s": (samples - positives) * EPOCHS / seconds,
  }


def _in_turn_with_implicit(known, functions):
  """Median seconds of BPR_EPOCHS of `implicit` and of each function.

  Its first epoch is left out.
  """
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as implicit asks for
  from implicit import bpr

  training = known.part == splits.TRAIN
  positives = sparse.csr_matrix(
    (
      np.ones(training.sum(), np.float32),
      (known.user[training], known.item[training]),
    ),
    shape=(known.num_users, known.num_items),
  )
  bpr_seconds, seconds = [], []
  start = 0.0

  def after_epoch(epoch, *_):
    nonlocal start
    if epoch % BPR_EPOCHS == 0:
      bpr_seconds.append(time.perf_counter() - start)
      seconds.append([median_seconds(f, warm=0, repeats=1) for f in functions])
      start = time.perf_counter()

  model = bpr.BayesianPersonalizedRanking(
    factors=64,
    iterations=1 + BPR_EPOCHS * REPEATS,
    num_threads=2,
    verify_negative_samples=True,
    random_state=0,
  )
  model.fit(positives, show_progress=False, callback=after_epoch)
  medians = [statistics.median(each) for each in zip(*seconds[1:])]
  return statistics.median(bpr_seconds[1:]), medians


def mmm(_):
  """B2: whole epochs of all terms, with sampling and the Lloyd pass."""
  with Training(get_config(network__neighbour_cap=16)) as training:
    seconds = median_seconds(training.epoch, warm=2)
  return {"mmm_epoch_s": seconds}


def profile(_):
  """B6: epochs of the variants, and what XLA counts for a step of each.

  The time is that of an epoch over its steps: with the order of the epoch, the
  Lloyd pass and the log. What XLA counts is of one step and of what is drawn
  ahead for a dispatch. Shares are of the operations of a traced epoch.
  """
  return {"profile": {name: _profile(name) for name in PROFILED}}


def _profile(variant):
  with Training(get_config(variant, network__neighbour_cap=16)) as training:
    seconds = median_seconds(training.epoch, warm=2)
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        training.epoch()
      spans = programs.spans(folder)
    trainer = training.trainer
    plan = trainer._plan(trainer.shards, np.int32(0))
    lowered = trainer._chunk.lower(
      np.int32(1),
      trainer.state,
      trainer.shards,
      trainer.shared,
      plan,
      trainer.resident,
    )
    compiled = lowered.compile()
    cost, text = compiled.cost_analysis(), compiled.as_text()
    steps = training.run.sizes.steps
  return {
    "step_ms": 1000 * seconds / steps,
    "gflop": cost["flops"] / 1e9,
    "mb": cost["bytes accessed"] / 1e6,
    "mb_by_kernels": programs.bytes_of_kernels(text) / 1e6,
    "shares": programs.shares_of_files(spans, text),
  }


def streamed(_):
  """B5: 4096-d content read anew in each epoch, against resident content.

  Two epochs of each in turn, so that a slow minute of the machine falls to
  both. The second counts: for the first, more than usual was read ahead while
  the other trained.
  """
  resident, streaming = (
    get_config(network__neighbour_cap=16, **changes)
    for changes in ({}, {"input__content_budget_mb": 0.0})
  )
  seconds, ratios = [], []
  with Training(resident) as first, Training(streaming) as second:
    for _ in range(1 + REPEATS):
      beside, streaming_s = (
        median_seconds(each.epoch, repeats=1) for each in (first, second)
      )
      seconds.append(streaming_s)
      ratios.append(streaming_s / beside)
    run = second.run
  items = np.arange(run.sizes.num_items, dtype=np.int32)
  batches = items[: len(items) // 1024 * 1024].reshape(-1, 1024)

  def read():
    for _ in input_pipeline.read(run.content, batches, streaming, ahead=4):
      pass

  reading = median_seconds(read)
  return {
    "mmm_streamed_epoch_s": statistics.median(seconds[1:]),
    "mmm_streamed_ratio": statistics.median(ratios[1:]),
    "content_items_per_s": batches.size / reading,
  }


# --- tables of a million rows -----------------------------------------------


def row_updates(_):
  """B4: the step with a million users and items against the paper's size.

  In a process of its own, whose peak of memory is then theirs.
  """
  done = subprocess.run(
    [sys.executable, __file__, "--rows"],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def measure_rows() -> dict:
  """Time of a step of both sizes in turn, and memory of the large one.

  The ratio is that of two blocks of dispatches that follow each other, so that
  a slow second of the machine falls to both.
  """
  with made_up_training(9412, 19058) as small, made_up_training() as large:
    reset_peak()
    rows = [Dispatches(each) for each in (small, large)]
    seconds = [
      [median_seconds(each.block, warm=0, repeats=1) for each in rows]
      for _ in range(1 + REPEATS)
    ][1:]
    process = resident_mb("VmHWM")
    device, tables = rows[1].memory_mb()
  small_s, large_s = (statistics.median(each) for each in zip(*seconds))
  return {
    "row_update_ratio": statistics.median(b / a for a, b in seconds),
    "step_ms_paper_size": 1000 * small_s / rows[0].steps_of_block,
    "step_ms_million_rows": 1000 * large_s / rows[1].steps_of_block,
    "table_memory_ratio": device / tables,
    "process_mb_million_rows": process,
  }


def made_up_training(users=LARGE, items=LARGE):
  config = get_config("pmf")
  run = assemble.build(
    config, made_up(users, items), split_of(users), assemble.Text()
  )
  return Training(config, run)


class Dispatches:
  """A training's dispatches without what an epoch does between them."""

  def __init__(self, training):
    trainer = self._trainer = training.trainer
    plan = trainer._plan(trainer.shards, np.int32(0))
    self._data = (trainer.shards, trainer.shared, plan, trainer.resident)
    self._steps = update.chunk_steps(trainer.config, trainer.sizes)
    self.steps_of_block = math.ceil(BLOCK_STEPS / self._steps) * self._steps

  def block(self):
    trainer = self._trainer
    for _ in range(self.steps_of_block // self._steps):
      trainer.state, _ = trainer._chunk(
        np.int32(self._steps), trainer.state, *self._data
      )
    jax.block_until_ready(trainer.state)

  def memory_mb(self) -> tuple[float, float]:
    """What XLA reserves for a dispatch, and tables, moments and index.

    The first is arguments, results that take no argument's place, and scratch,
    without the streams of interactions. A process holds more: a copy of the
    best parameters so far, which on a GPU's machine lies on the host.
    """
    state = self._trainer.state
    lowered = self._trainer._chunk.lower(
      np.int32(self._steps), state, *self._data
    )
    plan = lowered.compile().memory_analysis()
    device = (
      plan.argument_size_in_bytes
      + plan.output_size_in_bytes
      - plan.alias_size_in_bytes
      + plan.temp_size_in_bytes
      - sum(x.nbytes for x in jax.tree.leaves(self._data))
    )
    tables = sum(
      table.packed.nbytes + 4 * table.packed.shape[0]
      for table in state.tables.values()
    )
    return device / 2**20, tables / 2**20


@functools.cache
def made_up(users, items):
  """Interactions without structure, as far as training reads a data set."""
  rng = np.random.default_rng(0)
  user = np.repeat(np.arange(users, dtype=np.int32), PER_USER)
  item = rng.integers(items, size=users * PER_USER, dtype=np.int32)
  return dataset_of(user, item, users=users, items=items)


def dataset_of(user, item, *, users, items):
  """What training reads of a data set, from interactions alone."""
  return types.SimpleNamespace(
    name="made up",
    users=range(users),
    items=range(items),
    user=user,
    item=item,
    networks={},
    vectors={},
    present={},
    records=np.arange(items),
    item_source=None,
    category=None,
    statistics={},
    fingerprint="",
  )


def split_of(users):
  return splits.Split(np.zeros(users * PER_USER, np.int8), "")


def reset_peak():
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def resident_mb(key) -> float:
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (line for line in lines if line.startswith(key + ":"))
  return int(line.split()[1]) / 2**10


# --- evaluation and use -----------------------------------------------------


def full_evaluation(_):
  """B3: all metrics of `full`, paper-sized."""
  run = assemble.assemble(get_config("pmf"))
  best = scoring.snapshot(assemble.initial_state(run), -np.inf)
  score = lambda: scoring.score_protocols(run, best, ("test",), ("full",))
  return {"full_eval_s": median_seconds(score)}


def microlens_lists(flags):
  """B3: 20 items for all users of MicroLens, to Parquet, after loading."""
  if not flags.manual_dir:
    return {}
  config = get_config(
    "cat", dataset__name="microlens", dataset__manual_dir=flags.manual_dir
  )
  run = assemble.assemble(config)
  best = scoring.snapshot(assemble.initial_state(run), -np.inf)
  users = recommend.choose_users(run, "all")
  with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place, "lists.parquet")

    def lists():
      recommend.write(
        path, recommend.recommend(run, best, users, k=20), "parquet"
      )

    return {"microlens_lists_s": median_seconds(lists)}


def start(_):
  """B5: from the command to its first logged step, on prepared data."""
  home = pathlib.Path("~/.cache/mmm_jax").expanduser()
  assemble.assemble(get_config())  # prepares the data
  with tempfile.TemporaryDirectory() as place:
    data_dir = pathlib.Path(place, "data")
    data_dir.mkdir()
    for path in home.glob("simulated-*"):
      (data_dir / path.name).symlink_to(path)
    cold = seconds_to_first_step(data_dir, pathlib.Path(place, "cold"))
    runs = [
      seconds_to_first_step(data_dir, pathlib.Path(place, f"warm{number}"))
      for number in range(3)
    ]
  return {"start_cold_s": cold, "start_cached_s": statistics.median(runs)}


def seconds_to_first_step(data_dir, workdir) -> float:
  begin = time.perf_counter()
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "mmm_jax.main",
      "--config=configs/mmm.py",
      f"--config.dataset.data_dir={data_dir}",
      "--config.log.every_steps=1",
      f"--workdir={workdir}",
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  rows = workdir / "metrics.jsonl"
  try:
    while not (rows.exists() and rows.stat().st_size):
      if process.poll() is not None:
        sys.exit(f"the run ended with {process.returncode}")
      time.sleep(0.01)
    return time.perf_counter() - begin
  finally:
    process.kill()
    process.wait()


PROFILED = ("pmf", "cat", "net", "con", "full")
MEASURED = {
  "machine": machine,
  "pmf": pmf,
  "mmm": mmm,
  "profile": profile,
  "streamed": streamed,
  "rows": row_updates,
  "eval": full_evaluation,
  "lists": microlens_lists,
  "start": start,
}


if __name__ == "__main__":
  main()
