"""Speed of training and evaluation on one accelerator, against its memory.

    python tests/benchmarks/gpu.py --out=tests/results/gpu.json
        [--only=pmf,mmm] [--scale=0.01] [--trace=DIR]
    python tests/benchmarks/gpu.py --table=tests/results/gpu.json

Data are made up in the shape of MovieLens 20M (users, items, interactions,
their tails), and for an epoch of MMM the embedded set. Medians of five after
compilation. Beside the time of a step stand its bytes and operations as XLA
counts them, and the time that its bytes would take at the bandwidth measured
in the same run. `--scale` shrinks the data and batches, to try the script on a
CPU; its figures then mean nothing.
"""

import argparse
import functools
import json
import math
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import programs
import speed

from mmm_jax import (
  assemble,
  candidates,
  evaluate,
  losses,
  sampling,
  scoring,
  tabulate,
  train,
)
from mmm_jax.datasets import networks, splits

USERS, ITEMS, INTERACTIONS = 138_493, 26_744, 20_000_263
LEAST = 20  # interactions of a user of MovieLens 20M
BATCH = 1 << 17  # positives
BLOCK = 4096  # users that are ranked at a time


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  speed.add_only(parser, MEASURED)
  parser.add_argument("--scale", type=float, default=1.0, help="of the data")
  parser.add_argument("--table", type=pathlib.Path, help="JSON file to print")
  parser.add_argument("--trace", type=pathlib.Path, help="folder of profiles")
  flags = parser.parse_args()
  if flags.table:
    print(markdown(json.loads(flags.table.read_text())))
    return
  speed.measure(MEASURED, flags)


LINES = (
  (
    "PMF, M samples/s (positives + negatives)",
    ("pmf", "samples_per_s"),
    1e6,
    "≥ 200",
  ),
  ("NeuMF-shaped, M samples/s", ("neumf", "samples_per_s"), 1e6, "≥ 60"),
  ("… in bfloat16", ("neumf_bfloat16", "samples_per_s"), 1e6, "–"),
  ("MMM, an epoch of all terms, s", ("mmm", "epoch_s"), 1, "≤ 0.25"),
  ("`full` ranking, G scores/s", ("eval", "scores_per_s"), 1e9, "≥ 5"),
  ("… lists of all tested users, s", ("eval", "lists_s"), 1, "–"),
  ("… with all metrics on the host, s", ("eval", "with_metrics_s"), 1, "–"),
  ("matrix product, float32 (TF32), TFLOP/s", ("float32_tflop_per_s",), 1, "–"),
  ("… bfloat16, TFLOP/s", ("bfloat16_tflop_per_s",), 1, "–"),
  ("copying memory, read and written, GB/s", ("memory_gb_per_s",), 1, "–"),
)


def markdown(found: dict) -> str:
  """The figures of a file as two tables; what it lacks is left out."""
  lines = []
  for text, keys, unit, wanted in LINES:
    *folders, name = keys
    inside = functools.reduce(lambda d, key: d.get(key, {}), folders, found)
    if name in inside:
      lines.append([text, f"{inside[name] / unit:.3g}", wanted])
  heads = [f"on one {found['device']}", "measured", "wanted"]
  table = tabulate.markdown(heads, lines)
  return f"{table}\n\n{_floor_table(found)}"


def _floor_table(found):
  """Steps against what the device's memory and arithmetic would allow."""
  heads = ["step of", "positives", "measured, ms", "MB", "at full speed, ms"]
  heads += ["share", "GFLOP of products", "at full speed, ms", "busy"]
  if "eval" in found:
    found = found | {"ranking": _ranking_step(found["eval"])}
  lines = []
  for name in ("pmf", "neumf", "neumf_bfloat16", "mmm", "ranking"):
    if name not in found:
      continue
    step = found[name]
    kind = "bfloat16" if name.endswith("bfloat16") else "float32"
    moving = step["mb"] / found["memory_gb_per_s"]
    computing = step["gflop"] / found[f"{kind}_tflop_per_s"]
    share = moving / step["step_ms"]
    lines.append(
      [
        f"`{name}`",
        f"{step['batch_positives']:,}",
        f"{step['step_ms']:.2f}",
        f"{step['mb']:,.0f}",
        f"{moving:.2f}",
        f"{share:.0%}",
        f"{step['gflop']:.1f}",
        f"{computing:.3f}",
        f"{step['busy_share']:.0%}" if "busy_share" in step else "–",
      ]
    )
  return tabulate.markdown(heads, lines)


def _ranking_step(ranked):
  """A block of users against all items, from its sizes alone.

  The least that it moves: vectors once, each score written and read once, as
  products are not fused with what looks for the best.
  """
  dim = get_config(1.0).model.dim
  scores = BLOCK * ranked["items"]
  return ranked | {
    "batch_positives": BLOCK,  # users
    "step_ms": 1000 * ranked["lists_s"] / math.ceil(ranked["users"] / BLOCK),
    "mb": 4 * (2 * scores + dim * (BLOCK + ranked["items"])) / 1e6,
    "gflop": 2 * dim * scores / 1e9,
  }


# --- the device -------------------------------------------------------------


def machine(flags):
  """Product of two matrices, and copying memory, as fast as they go."""
  size = max(int(8192 * flags.scale**0.5), 256)
  rate = lambda dtype: 2 * size**3 / _seconds(_product, _random(size, dtype))
  many = max(int(2**30 * flags.scale), 2**20)  # 4 GiB
  copy = jax.jit(lambda x: x + 1)
  seconds = _seconds(copy, jnp.arange(many, dtype=jnp.float32))
  return {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "scale": flags.scale,
    "float32_tflop_per_s": rate(jnp.float32) / 1e12,
    "bfloat16_tflop_per_s": rate(jnp.bfloat16) / 1e12,
    "memory_gb_per_s": 2 * 4 * many / seconds / 1e9,
  }


@jax.jit
def _product(a):
  return a @ a


def _random(size, dtype):
  return jax.random.normal(jax.random.key(0), (size, size), dtype)


def _seconds(function, *arguments):
  call = lambda: jax.block_until_ready(function(*arguments))
  return speed.median_seconds(call, warm=2)


# --- data -------------------------------------------------------------------


@functools.cache
def movielens_shaped(scale):
  """Interactions with the counts and tails of MovieLens 20M, and no meaning.

  A user's number of them is log-normal from LEAST on, an item's popularity
  falls as a power of its rank; none occurs twice.
  """
  users, items = max(int(USERS * scale), 64), max(int(ITEMS * scale), 2048)
  wanted = int(INTERACTIONS * users / USERS)
  rng = np.random.default_rng(0)
  activity = LEAST + rng.lognormal(3.9, 1.1, users)
  popularity = 1 / (np.arange(items) + 50.0) ** 1.1
  drawn = int(1.6 * wanted)
  counts = (drawn * activity / activity.sum()).astype(int)
  user = np.repeat(np.arange(users), counts)
  ends = np.cumsum(popularity) / popularity.sum()
  item = np.searchsorted(ends, rng.random(len(user))).clip(max=items - 1)
  indptr, item = networks.compressed(user, item, rows=users, columns=items)
  user = np.repeat(np.arange(users), np.diff(indptr))
  kept = np.sort(rng.permutation(len(item))[:wanted])
  user, item = user[kept], item[kept]
  user, item = user.astype(np.int32), item.astype(np.int32)
  return speed.dataset_of(user, item, users=users, items=items)


def made_up_run(config, scale, *, parts=(1.0, 0.0, 0.0)):
  """A run of `pmf` on all interactions, or on `parts` of them."""
  dataset = movielens_shaped(scale)
  rng = np.random.default_rng(1)
  part = rng.choice(3, len(dataset.user), p=parts).astype(np.int8)
  split = splits.Split(part, "")
  return assemble.build(config, dataset, split, assemble.Text())


def get_config(scale, **changes):
  batch = max(int(BATCH * scale), 1024) // 8 * 8
  return speed.get_config("pmf", batch_size=batch, **changes)


# --- training ---------------------------------------------------------------


def pmf(flags):
  """PMF, squared error, 64 dimensions, 5 checked negatives."""
  config = get_config(flags.scale)
  run = made_up_run(config, flags.scale)
  return {"pmf": _training("pmf", config, run, flags)}


def neumf(flags):
  """NeuMF-shaped: 64 factors, a tower 256-256-128-64, 4 checked negatives."""
  config = get_config(
    flags.scale, negatives__per_positive=4, interaction_loss="bce"
  )
  run = made_up_run(config, flags.scale)
  run = run._replace(module=NEUMF, model=NeuMFShaped(), weights=WEIGHTS)
  found = {"neumf": _training("neumf", config, run, flags)}
  config = config.copy_and_resolve_references()
  config.compute_dtype = "bfloat16"
  run = run._replace(config=config, model=NeuMFShaped("bfloat16"))
  return found | {"neumf_bfloat16": _training("neumf16", config, run, flags)}


def mmm(flags):
  """MMM, paper-sized: an epoch of all terms with sampling and Lloyd pass."""
  small = dict(network__neighbour_cap=16)
  config = speed.get_config(**small)
  return {"mmm": _training("mmm", config, assemble.assemble(config), flags)}


def _training(name, config, run, flags):
  """Whole epochs, and what a step of them moves and computes."""
  with speed.Training(config, run) as training:
    seconds = speed.median_seconds(training.epoch, warm=2)
    trainer = training.trainer
    kernels = _profile(training.epoch, flags, name) if flags.trace else {}
    flops, moved = _counted(trainer)
    steps = run.sizes.steps
  samples = run.sizes.num_train * (1 + config.negatives.per_positive)
  return {
    "batch_positives": config.batch_size,
    "epoch_s": seconds,
    "step_ms": 1000 * seconds / steps,
    "samples_per_s": samples / seconds,
    "gflop": flops / 1e9,
    "mb": moved / 1e6,
    **kernels,
  }


def _counted(trainer: train.Trainer):
  """Operations of a step's matrix products, and bytes as the compiler counts.

  Its bytes have in them what is drawn ahead for a dispatch. On a GPU its own
  count of operations leaves out what it hands to a library.
  """
  plan = trainer._plan(trainer.shards, np.int32(0))
  data = (trainer.shards, trainer.shared, plan, trainer.resident)
  traced = trainer._chunk.trace(np.int32(1), trainer.state, *data)
  compiled = traced.lower().compile().cost_analysis()
  return _operations(traced.jaxpr.jaxpr), compiled["bytes accessed"]


def _operations(jaxpr) -> int:
  """Of all matrix products in a program, those of a loop counted once."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      inner = math.prod(left[axis] for axis in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    for inside in jax.tree.leaves(list(equation.params.values())):
      inside = getattr(inside, "jaxpr", inside)
      total += _operations(inside) if hasattr(inside, "eqns") else 0
  return total


def _profile(function, flags, name):
  """Share of the time in which the device works, and the longest kernels."""
  folder = flags.trace / name
  with jax.profiler.trace(str(folder)):
    function()
  spans, begin, end = {}, np.inf, 0
  busy = 0
  for plane, line, event in programs.events(folder):
    if plane.startswith("/device:") and line.startswith("Stream"):
      spans[event.name] = spans.get(event.name, 0) + event.duration_ns
      begin, end = min(begin, event.start_ns), max(end, event.end_ns)
      busy += event.duration_ns
  longest = sorted(spans.items(), key=lambda pair: -pair[1])[:25]
  return {
    "busy_share": busy / max(end - begin, 1),
    "kernels_ms": {kernel: ns / 1e6 for kernel, ns in longest},
  }


class NeuMFShaped(nn.Module):
  """The arithmetic of NeuMF (He et al., 2017): GMF beside an MLP."""

  compute_dtype: str = "float32"
  factors: int = 64
  tower: tuple[int, ...] = (256, 256, 128, 64)

  @property
  def width(self):  # of a row: factors, and half of what enters the tower
    return self.factors + self.tower[0] // 2

  @nn.compact
  def __call__(self, user, item):
    """Rows [..., width] of both sides -> logits [...]."""
    product = user[..., : self.factors] * item[..., : self.factors]
    x = jnp.concatenate(
      [user[..., self.factors :], item[..., self.factors :]], -1
    )
    for size in self.tower[1:]:
      x = nn.relu(nn.Dense(size, dtype=self.compute_dtype)(x))
    x = jnp.concatenate([product, x.astype(product.dtype)], -1)
    return nn.Dense(1)(x)[..., 0]

  def lookups(self, batch):
    return {
      "user": {"interaction": batch["user"]},
      "item": {"positive": batch["item"], "negative": batch["negatives"]},
    }

  def loss(self, rows, batch, categories):
    del categories
    user = rows["user"]["interaction"][:, None]
    item, negative = rows["item"]["positive"], rows["item"]["negative"]
    items = jnp.concatenate([item[:, None], negative], 1)
    logits = self(jnp.broadcast_to(user, items.shape), items)
    term = losses.PAIRWISE["bce"](
      logits[:, 0],
      logits[:, 1:],
      batch["user"] != sampling.PAD,
      batch["negatives"] != sampling.PAD,
    )
    return {"interaction": term}, {}


def _start_params(model, content, words, rng):
  row = jnp.zeros((1, model.width))
  return model.init(rng, row, row)["params"]


def _table_rows(model, sizes, words, rng, scale):
  user, item = jax.random.split(rng)
  normal = lambda key, rows: jax.random.normal(key, (rows, model.width))
  return {
    "user": scale * normal(user, sizes.num_users),
    "item": scale * normal(item, sizes.num_items),
  }


WEIGHTS = {"interaction": 1.0}
NEUMF = types.SimpleNamespace(
  start_params=_start_params,
  table_rows=_table_rows,
  start_categories=lambda model, sizes: jnp.zeros(0),
)


# --- evaluation -------------------------------------------------------------


def full_evaluation(flags):
  """`full`, all metrics, of the test part, what was trained on left out."""
  config = get_config(flags.scale, eval__user_block=BLOCK)
  run = made_up_run(config, flags.scale, parts=(0.7, 0.1, 0.2))
  best = scoring.snapshot(assemble.initial_state(run), -np.inf)
  score = lambda: scoring.score_protocols(run, best, ("test",), ("full",))
  lists = lambda: _lists(run, best)
  lists_s, seconds = map(speed.median_seconds, (lists, score))
  users = len(lists())
  scores = users * run.sizes.num_items
  kernels = _profile(lists, flags, "eval") if flags.trace else {}
  return {
    "eval": {
      "users": users,
      "items": run.sizes.num_items,
      "lists_s": lists_s,
      "scores_per_s": scores / lists_s,
      "with_metrics_s": seconds,
      **kernels,
    }
  }


def _lists(run, best):
  """The best items of every tested user, as `full` ranks them."""
  known = candidates.items_of_users(run.interactions, evaluate.KNOWN["test"])
  users, _ = candidates.lists(run.interactions, protocol="full", part="test")
  settings = run.config.eval
  items, _ = evaluate.rank(
    scoring.make_scorer(run, best.params, best.rows, best.categories),
    users,
    *known,
    num_items=run.sizes.num_items,
    k=max(settings.cutoffs),
    seed=settings.seed,
    user_block=settings.user_block,
    item_tile=settings.item_tile,
  )
  return items


MEASURED = {
  "machine": machine,
  "eval": full_evaluation,
  "pmf": pmf,
  "mmm": mmm,
  "neumf": neumf,
}


if __name__ == "__main__":
  main()
