"""Memory and bytes moved a step per device: a formula, and a check of it.

    python tests/benchmarks/scale.py --out=tests/results/scale.json
    python tests/benchmarks/scale.py --table=tests/results/scale.json

The formula is for as many items as users, PER_USER interactions and, for MMM,
two networks of DEGREE neighbours a user; all other values are those of
configs/mmm.py with d = 128 and, as in weak scaling, 1,024 positives a device
and step. The check compiles the real train chunk for up to eight devices made
of one CPU, without its arrays, and reads XLA's plan of it; and it runs a small
training to see what the first device holds at other moments.

Symbols: M users, N items (as many), D devices, d latent size, n rows of a table
that a step touches (with repeats, on all devices together).
"""

import argparse
import functools
import json
import math
import pathlib
import re
import types
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from speed import PER_USER, Training, get_config, made_up, split_of

from mmm_jax import (
  assemble,
  clustering,
  evaluate,
  parallel,
  streams,
  tabulate,
  update,
)
from mmm_jax.datasets import networks

DIM = 128
PER_DEVICE = 1024  # positives a step
DEGREE = 16  # neighbours of a user in each network
NETWORKS = "follow,friend"
VISUAL = 4096  # numbers of a frame vector, of two bytes
WORDS, TOKENS = 3000, 12  # in all, and of a text
ENGINE_DEVICES = 8
NAMES = {"pmf": "PMF", "full": "MMM", "best": "MMM, `best`"}
MOMENTS = {
  "start": "the start",
  "copying": "a look at the state adds",
  "scoring": "validation adds",
  "checkpoint": "checkpoint, on the disk",
}

PAPER_SIZES = (10**6, 10**7, 10**8)
PAPER_DEVICES = (1, 8, 64, 256)
CHECKED_SIZES = (10**4, 10**5, 10**6)
CHECKED = {"pmf": (1, 2, 4, 8), "full": (1, 8), "best": (8,)}
MOMENTS_SIZE = 10**4


class Chip(NamedTuple):
  """What data sheets say; bandwidths are what comes in."""

  memory_gb: float
  memory_gb_per_s: float
  near_gb_per_s: float  # into a device, from those of its host or pod
  near: int  # how many these are
  far_gb_per_s: float  # into a host, from the others


CHIPS = {
  "TPU v5e": Chip(16, 819, 200, 256, 200),
  "TPU v6e": Chip(32, 1600, 400, 256, 400),
  "H100": Chip(80, 3350, 450, 8, 400),
  "TPU v5p": Chip(95, 2765, 600, 6144, 600),
  "H200": Chip(141, 4800, 450, 8, 400),
}
TIMED = ("H200", "TPU v5e")
# What a step takes for all that is not counted here: on an H200 MMM took .68 ms
# (tests/results/gpu.json), of which its memory explains .07.
ELSE_MS = 0.6


# --- the formula: memory ------------------------------------------------------


def settings(variant: str, devices: int):
  """The config of a variant on D devices, its batch D times PER_DEVICE."""
  config = get_config(
    variant,
    model__dim=DIM,
    batch_size=PER_DEVICE * devices,
    data_shards=max(8, devices),
    parallel__devices=devices,
    parallel__kernels=False,  # what XLA counts, on whatever device
  )
  if config.model.networks:
    config.model.networks = NETWORKS
  return config


def network_names(config) -> list[str]:
  return [name for name in config.model.networks.split(",") if name]


def tables_of(config, size: int) -> dict[str, tuple[int, int]]:
  """{table: (rows, width)} for M = N = size."""
  names = network_names(config)
  found = {"user": (size, DIM), "item": (size, DIM)}
  found |= {f"network_{name}": (size, DIM) for name in names}
  if names:
    found["alpha"] = (size, len(names))
  if config.model.sources:
    found["word"] = (WORDS, config.text.dim)
  return found


def row_bytes(width: int) -> int:
  """A packed row: the vector and Adam's two moments of it, float32."""
  return 4 * 3 * width


def dense_bytes(config) -> int:
  """Encoders, maps and category vectors, float32, without their moments."""
  numbers = config.num_categories * DIM
  if config.model.sources:
    filters, widths = config.text.filters, config.text.widths
    numbers += VISUAL * DIM + DIM  # frames
    numbers += filters * sum(widths) * config.text.dim + filters * len(widths)
    numbers += filters * len(widths) * DIM + DIM  # text
    numbers += 2 * DIM * DIM  # maps
  return 4 * numbers


def state_bytes(config, size: int) -> int:
  """All tables, dense parameters with moments, categories; on every device."""
  rows = sum(r * row_bytes(w) for r, w in tables_of(config, size).values())
  categories = 4 * (size + config.num_categories * DIM)
  return rows + 3 * dense_bytes(config) + categories


def index_bytes(config, size: int) -> int:
  """The reverse index by which a step finds repeats, while it trains."""
  return sum(4 * rows for rows, _ in tables_of(config, size).values())


def list_bytes(config, size: int) -> int:
  """`streams.Shared`, whole on every device: int32 lists, and flags.

  Training items of every user twice (sorted, shuffled), neighbours and
  membership in every network, which items have which source.
  """
  seen = 4 * (1 + PER_USER) * size
  neighbours = (4 * (1 + DEGREE) + 1) * size
  sources = 2 * bool(config.model.sources)
  return 2 * seen + len(network_names(config)) * neighbours + sources * size


def dealt_bytes(config, size: int, devices: int) -> int:
  """What is dealt to the devices: streams, an epoch's order, content.

  Content that exceeds `input.content_budget_mb` streams: a chunk of steps is
  there and the next one comes.
  """
  ids = 4 * (2 * PER_USER + 1 + 1) * size  # user and item; items; users
  order = 4 * (PER_USER + 1 + 1) * size
  content = 0
  if config.model.sources:
    of_item = 2 * VISUAL + 4 * TOKENS
    ahead = dispatch_steps(config, size) * stream_width(config, size)
    fits = size * of_item <= config.input.content_budget_mb * 2**20
    content = of_item * (size if fits else 2 * ahead)
  return (ids + order + content) // devices


def epoch_steps(config, size: int) -> int:
  return math.ceil(PER_USER * size / config.batch_size)


def dispatch_steps(config, size: int) -> int:
  """T, as `update.chunk_steps`."""
  steps = epoch_steps(config, size)
  return math.ceil(steps / math.ceil(steps / config.log.every_steps))


def stream_width(config, size: int) -> int:
  """Users, or items, that a step takes of theirs, as `streams.measure`."""
  in_shard = math.ceil(size / config.data_shards)
  in_shard = math.ceil(in_shard / epoch_steps(config, size))
  return in_shard * config.data_shards


def negatives(config, devices: int) -> int:
  """Of a step, on all devices; those that it shares are on each the same."""
  if config.interaction_loss == "softmax":
    return config.losses.softmax.shared_negatives * devices
  return config.batch_size * config.negatives.per_positive


def touched(config, size: int, devices: int) -> dict[str, int]:
  """n of every table: rows that a step of all devices reads, with repeats."""
  batch, streamed = config.batch_size, stream_width(config, size)
  cap, remedies = config.network.neighbour_cap, config.remedies
  found = {"user": batch, "item": batch + negatives(config, devices)}
  if config.model.sources:
    found["item"] += streamed
    found["word"] = streamed * TOKENS
  names = network_names(config)
  if names:
    found["user"] += streamed
    predicting = batch if remedies.networks_in_user else 0
    found["alpha"] = streamed + predicting
    if remedies.neighbours_in_user:
      predicting *= cap
    for name in names:
      found[f"network_{name}"] = streamed * (1 + cap) + predicting
  return found


def work_bytes(config, size: int, devices: int) -> int:
  """Scratch of a chunk: what is drawn ahead for it, and a step's packed rows.

  Of its steps the users, positives and negatives of this device; of one the
  rows that it read, and their new values.
  """
  ids = (2 * config.batch_size + negatives(config, devices)) // devices
  drawn = 4 * dispatch_steps(config, size) * ids
  widths = {name: width for name, (_, width) in tables_of(config, size).items()}
  rows = touched(config, size, devices)
  return drawn + sum(
    2 * n * row_bytes(widths[name]) for name, n in rows.items()
  )


def training_bytes(config, size: int, devices: int) -> int:
  """Memory of a device while it trains."""
  return (
    state_bytes(config, size)
    + index_bytes(config, size)
    + list_bytes(config, size)
    + dealt_bytes(config, size, devices)
    + work_bytes(config, size, devices)
  )


def kmeans_bytes(config, size: int) -> int:
  """What K-means adds between epochs.

  The items' vectors cut out of their table, again in blocks, and the centroid
  of each beside it.
  """
  return 3 * 4 * DIM * size if config.num_categories else 0


def copying_bytes(config, size: int, devices: int) -> int:
  """What a look at the state adds on the first device of each process.

  Before validation the vectors of all tables are cut out of their rows. What
  pmap has replicated is copied as a whole first, for a checkpoint, too.
  """
  vectors = sum(4 * r * w for r, w in tables_of(config, size).values())
  return vectors + state_bytes(config, size) * (devices > 1)


def scoring_bytes(config, size: int) -> int:
  """What validation adds on the first device of each process.

  The vectors of all tables without moments, those that items are scored by,
  and another copy of the lists but for the sorted one.
  """
  vectors = sum(4 * r * w for r, w in tables_of(config, size).values())
  lists = list_bytes(config, size) - 4 * (1 + PER_USER) * size
  lists -= 2 * bool(config.model.sources) * size
  return vectors + 4 * DIM * size + lists


def peak_bytes(config, size: int, devices: int) -> int:
  """The most that the first device ever holds.

  At the start the state is there twice: as it was made, and as the replica
  that training changes.
  """
  state = state_bytes(config, size)
  resting = state + list_bytes(config, size)
  resting += dealt_bytes(config, size, devices)
  return max(
    training_bytes(config, size, devices),
    resting + kmeans_bytes(config, size),
    resting + copying_bytes(config, size, devices),
    resting + scoring_bytes(config, size),
    2 * state,
  )


def checkpoint_bytes(config, size: int) -> int:
  """The state, and the best vectors so far, which lie on the host."""
  best = sum(4 * r * w for r, w in tables_of(config, size).values())
  return state_bytes(config, size) + best + dense_bytes(config)


# --- the formula: bytes moved a step ------------------------------------------


def moved_bytes(config, size: int, devices: int) -> int:
  """Bytes that a device reads and writes in its own memory in a step.

  In vectors of d float32 a touched row. On the device that needs it: packed row
  read and written down (3 + 3), vector read by the loss, gradient written. On
  every device: gradient read and written as the sum of repeats (1 + 1), packed
  row and sum read (3 + 1), new row written (3), and put into the table, which
  reads it, finds its place and writes it (3 + 3). With several devices, before
  that: gradient received (1), packed row read and written down anew (3 + 3).
  """
  own, everywhere = 8, 15 + 7 * (devices > 1)
  rows, width_of = touched(config, size, devices), tables_of(config, size)
  vectors = sum(4 * n * width_of[name][1] for name, n in rows.items())
  # Of dense parameters: gradient written, received and read, parameter and
  # moments read and written.
  dense = 9 * dense_bytes(config)
  return round(vectors * (own / devices + everywhere)) + dense


def gathered_bytes(config, size: int, devices: int) -> int:
  """Results of a step's all-gathers: an id and a gradient a touched row."""
  if devices == 1:
    return 0
  rows, width_of = touched(config, size, devices), tables_of(config, size)
  return sum(4 * n * (1 + width_of[name][1]) for name, n in rows.items())


def wire_bytes(config, size: int, devices: int) -> int:
  """What comes into a device in a step: all-gather, and psum as a ring."""
  psum = 2 * dense_bytes(config)
  rows = gathered_bytes(config, size, devices)
  return round((devices - 1) / devices * (rows + psum))


def step_ms(config, size: int, devices: int, chip: Chip) -> tuple[float, float]:
  """Milliseconds of a step for memory and for the wire at full speed."""
  near = devices <= chip.near
  wire = (
    chip.near_gb_per_s if near else min(chip.near_gb_per_s, chip.far_gb_per_s)
  )
  return (
    moved_bytes(config, size, devices) / chip.memory_gb_per_s / 1e6,
    wire_bytes(config, size, devices) / wire / 1e6,
  )


# --- the check ----------------------------------------------------------------


def check_chunk(variant: str, size: int, devices: int) -> dict:
  config = settings(variant, devices)
  run = made_up_run(config, size)
  engine = parallel.make_engine(config)
  arguments, resident = shapes(config, run, engine)
  plan = (
    update.make_train_chunk(
      run.model, config, run.sizes, run.weights, engine, resident=resident
    )
    .lower(np.int32(1), *arguments)
    .compile()
  )
  memory = plan.memory_analysis()
  index = index_bytes(config, size)
  gathered, reduced = collectives(plan.as_text())
  found = {
    "variant": variant,
    "size": size,
    "devices": devices,
    "arguments": [
      state_bytes(config, size)
      + list_bytes(config, size)
      + dealt_bytes(config, size, devices),
      memory.argument_size_in_bytes,
    ],
    "scratch": [
      index + work_bytes(config, size, devices),
      memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes,
    ],
    "gathered": [gathered_bytes(config, size, devices), gathered],
    "reduced": [dense_bytes(config), reduced],
    "moved": [moved_bytes(config, size, devices), accessed(plan)],
  }
  if config.num_categories and devices == 1:
    _, follow = clustering.make_clustering(run, engine)
    temp = follow.lower(arguments[0]).compile().memory_analysis()
    found["kmeans"] = [kmeans_bytes(config, size), temp.temp_size_in_bytes]
  print(json.dumps(found), flush=True)
  return found


@functools.cache
def made_up_parts(size: int):
  """Networks and texts without structure for `speed.made_up`'s users."""
  rng = np.random.default_rng(1)
  indptr = DEGREE * np.arange(size + 1, dtype=np.int64)
  draw = lambda: rng.integers(size, size=size * DEGREE, dtype=np.int32)
  nets = {n: networks.Network(indptr, draw()) for n in NETWORKS.split(",")}
  tokens = rng.integers(1, WORDS, size=(size, TOKENS), dtype=np.int32)
  return nets, tokens


def made_up_run(config, size: int) -> assemble.Run:
  """A run of M = N = size; its content is never read."""
  data, text = vars(made_up(size, size)).copy(), assemble.Text()
  if config.model.sources:
    config.input.standardise = False
    nets, tokens = made_up_parts(size)
    there = np.ones(size, bool)
    data |= {"networks": nets, "vectors": {"visual": VISUAL}}
    data["present"] = {"visual": there, "text": there}
    words = np.zeros((WORDS, config.text.dim), np.float32)
    text = assemble.Text(tokens, words)
  dataset = types.SimpleNamespace(**data)
  return assemble.build(config, dataset, split_of(size), text)


def shapes(config, run, engine):
  """What the chunk takes, as shapes, and whether content is resident."""
  copies = engine.num_devices if engine.by_pmap else None

  def whole(x):
    lead = (copies,) if copies else ()
    return jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype)

  def part(x):
    lead = (copies, len(x) // copies) if copies else (len(x),)
    return jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype)

  plan = functools.partial(streams.plan, sizes=run.sizes)
  dealt = {
    "shards": jax.tree.map(np.asarray, run.shards),
    "plan": jax.eval_shape(plan, run.shards, np.int32(0)),
  }
  resident = run.content.fits(config.input.content_budget_mb)
  places = run.shards.items.ids["item"].shape
  if not resident:
    width = sum(each.width for each in run.sizes.item_bins)
    places = (places[0], update.chunk_steps(config, run.sizes), width)
  content = {
    name: jax.ShapeDtypeStruct((*places, *x.shape), x.dtype)
    for name, x in run.content.nothing().items()
  }
  state = jax.eval_shape(lambda: assemble.initial_state(run))
  return (
    jax.tree.map(whole, state),
    jax.tree.map(part, dealt["shards"]),
    jax.tree.map(whole, run.shared),
    jax.tree.map(part, dealt["plan"]),
    jax.tree.map(part, content),
  ), resident


def accessed(plan) -> float:
  cost = plan.cost_analysis()
  return (cost[0] if isinstance(cost, list) else cost)["bytes accessed"]


def collectives(text: str) -> tuple[int, int]:
  """Bytes of the results of all-gathers and all-reduces of an HLO text."""
  total = {"all-gather": 0, "all-reduce": 0}
  for line in text.splitlines():
    found = re.search(r"= (.*?) (all-gather|all-reduce)(-start)?\(", line)
    if found:
      arrays = re.findall(r"[fsu]32\[([\d,]*)\]", found[1])
      numbers = [
        math.prod(map(int, filter(None, x.split(",")))) for x in arrays
      ]
      total[found[2]] += 4 * sum(numbers)
  return total["all-gather"], total["all-reduce"]


def check_moments(size: int, devices: int) -> dict:
  """What lies on the first device at the start and in validation, `pmf`."""
  config = settings("pmf", devices)
  seen = {}

  def note(name, real, count=lambda: on_first_device()):
    def noting(*args, **kwargs):
      seen[name] = max(seen.get(name, 0), count())
      return real(*args, **kwargs)

    return noting

  nothing = lambda *_, **__: ({"full": {"valid": {"ndcg@20": 0.0}}}, None)
  # Where devices are made of the host, a replica may share the memory of what
  # it was made from; elsewhere it cannot.
  start = note("start", parallel.Engine.shard, lambda: on_first_device(False))
  with (
    mock.patch.object(parallel.Engine, "shard", start),
    mock.patch.object(evaluate, "evaluate", note("scoring", nothing)),
    Training(config, made_up_run(config, size)) as training,
  ):
    resting = on_first_device()
    with mock.patch.object(jax, "device_get", note("copying", jax.device_get)):
      training.trainer.validate()
    training.epoch()
    training.trainer.save()
    folder = pathlib.Path(training._folder, "checkpoints")
    files = [path for path in folder.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
  copying = copying_bytes(config, size, devices)
  found = {
    "size": size,
    "devices": devices,
    "start": [2 * state_bytes(config, size), seen["start"]],
    "copying": [copying, seen["copying"] - resting],
    "scoring": [scoring_bytes(config, size), seen["scoring"] - resting],
    "checkpoint": [checkpoint_bytes(config, size), written],
  }
  print(json.dumps(found), flush=True)
  return found


def on_first_device(once: bool = True) -> int:
  """Bytes of the arrays on the first device; shared memory counts once."""
  first, found = jax.devices()[0], {}
  for x in jax.live_arrays():
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
      continue
    for part in x.addressable_shards:
      if part.device == first:
        key = part.data.unsafe_buffer_pointer() if once else id(x)
        found[key] = part.data.nbytes
  return sum(found.values())


def measure() -> dict:
  chunks = [
    row
    for size in CHECKED_SIZES
    for variant, counts in CHECKED.items()
    if variant != "best" or size in CHECKED_SIZES[:2]
    for devices in counts
    for row in [check_chunk(variant, size, devices)]
  ]
  moments = [check_moments(MOMENTS_SIZE, devices) for devices in (1, 8)]
  return {"chunks": chunks, "moments": moments}


# --- tables -------------------------------------------------------------------


def markdown(found: dict) -> str:
  """All tables, each between the marks under which a page holds it."""
  made = {
    "memory": memory_table(),
    "limits": limits_table(),
    "moved": moved_table(),
    "checked memory": checked_memory(found["chunks"]),
    "checked moments": checked_moments(found),
    "checked bytes": checked_bytes(found["chunks"]),
  }
  mark = "<!-- scale: {} -->\n\n{}\n\n<!-- end -->"
  return "\n\n".join(mark.format(name, made[name]) for name in made)


def each(numbers, form="{:.2f}") -> str:
  """Bytes as GB in one cell."""
  return " / ".join(form.format(number / 1e9) for number in numbers)


def memory_table() -> str:
  """GB of a device; four numbers are for PAPER_DEVICES."""
  heads = ["model", "users = items", "state", "index, lists", "dealt"]
  heads += ["scratch", "in training", "at the most", "checkpoint"]
  lines = []
  for variant in ("pmf", "full"):
    for size in PAPER_SIZES:
      whole = settings(variant, 1)
      lists = index_bytes(whole, size) + list_bytes(whole, size)
      by_devices = [
        each(
          [f(settings(variant, n), size, n) for n in PAPER_DEVICES],
          "{:.2f}" if f in (dealt_bytes, work_bytes) else "{:.1f}",
        )
        for f in (dealt_bytes, work_bytes, training_bytes, peak_bytes)
      ]
      line = [NAMES[variant], power(size)]
      line += [each([state_bytes(whole, size)]), each([lists]), *by_devices]
      lines.append([*line, each([checkpoint_bytes(whole, size)])])
  return tabulate.markdown(heads, lines)


def limits_table() -> str:
  """Most users, with as many items, that a device holds, in millions."""
  cases = [
    (variant, what, function, devices)
    for variant in ("pmf", "full")
    for what, function, devices in (
      ("training", training_bytes, 1),
      ("all of a run, 1 device", peak_bytes, 1),
      ("8", peak_bytes, 8),
      ("256", peak_bytes, 256),
    )
  ]
  heads = ["device", "GB", *(f"{NAMES[v]}, {what}" for v, what, *_ in cases)]
  lines = []
  for name, chip in CHIPS.items():
    cells = [
      f"{largest(variant, function, devices, chip) / 1e6:.1f}"
      for variant, _, function, devices in cases
    ]
    lines.append([name, f"{chip.memory_gb:.0f}", *cells])
  return tabulate.markdown(heads, lines)


def largest(variant, function, devices, chip) -> int:
  """The largest size whose bytes fit, to 10,000; 0 if none does."""
  config = settings(variant, devices)
  low, high = 0, 10**5  # in ten thousands; the first fits, the last does not
  while high - low > 1:
    middle = (low + high) // 2
    fits = function(config, middle * 10**4, devices) <= 1e9 * chip.memory_gb
    low, high = (middle, high) if fits else (low, middle)
  return low * 10**4


def moved_table() -> str:
  heads = ["model", "devices", "rows touched", "MB in memory", "MB by wire"]
  for name in TIMED:
    heads += [f"{name}: ms memory + wire", "M positives/s", "speed-up"]
  lines = []
  for variant in NAMES:
    for devices in PAPER_DEVICES:
      config, size = settings(variant, devices), PAPER_SIZES[1]
      rows = sum(touched(config, size, devices).values())
      bytes_of = (moved_bytes, wire_bytes)
      line = [NAMES[variant], str(devices), f"{rows:,}"]
      line += [f"{f(config, size, devices) / 1e6:,.0f}" for f in bytes_of]
      for name in TIMED:
        line += times(variant, size, devices, CHIPS[name])
      lines.append(line)
  return tabulate.markdown(heads, lines)


def times(variant, size, devices, chip) -> list[str]:
  """Of a step: time, the most positives a second, and what devices gain."""
  memory, wire = step_ms(settings(variant, devices), size, devices, chip)
  alone = sum(step_ms(settings(variant, 1), size, 1, chip))
  most = PER_DEVICE * devices / (memory + wire) / 1e3
  gain = devices * (ELSE_MS + alone) / (ELSE_MS + memory + wire)
  return [f"{memory:.2f} + {wire:.2f}", f"{most:.1f}", f"{gain:.1f}"]


def pair(row, name) -> list[str]:
  """Megabytes by the formula and as measured, and the second by the first."""
  formula, measured = row[name]
  ratio = f"{measured / formula:.3f}" if formula else "–"
  return [f"{formula / 1e6:,.1f}", f"{measured / 1e6:,.1f}", ratio]


def checked_memory(chunks) -> str:
  heads = ["model", "users = items", "devices"]
  heads += ["arguments: formula", "XLA", "ratio"]
  heads += ["index and scratch: formula", "XLA", "ratio", "all: ratio"]
  lines, ratios = [], {}
  for row in chunks:
    formula, measured = np.add(row["arguments"], row["scratch"])
    name = [NAMES[row["variant"]], power(row["size"]), str(row["devices"])]
    ratios["{}, {}, devices: {}".format(*name)] = measured / formula
    parts = [*pair(row, "arguments"), *pair(row, "scratch")]
    lines.append([*name, *parts, f"{measured / formula:.3f}"])
  return f"{tabulate.markdown(heads, lines)}\n\n{furthest(ratios)}"


def furthest(ratios: dict[str, float]) -> str:
  """A line about the largest discrepancy."""
  name, ratio = max(ratios.items(), key=lambda pair: abs(math.log(pair[1])))
  return f"Furthest from the formula: {ratio:.2f} of it ({name})."


def checked_moments(found) -> str:
  heads = ["moment", "model", "users = items", "devices"]
  heads += ["formula", "measured", "ratio"]
  lines = [
    [text, NAMES["pmf"], power(row["size"]), str(row["devices"])]
    + pair(row, name)
    for name, text in MOMENTS.items()
    for row in found["moments"]
  ]
  lines += [
    ["K-means adds", NAMES["full"], power(row["size"]), "1"]
    + pair(row, "kmeans")
    for row in found["chunks"]
    if "kmeans" in row
  ]
  return tabulate.markdown(heads, lines)


def checked_bytes(chunks) -> str:
  """Of the smallest size; what XLA counts, less what grows with the tables."""
  small, next_size = CHECKED_SIZES[:2]
  moved = {
    (row["variant"], row["size"], row["devices"]): row["moved"][1]
    for row in chunks
  }
  heads = ["model", "devices", "all-gather: formula", "HLO", "ratio"]
  heads += ["psum: formula", "HLO", "ratio", "memory: formula", "XLA", "ratio"]
  lines, ratios = [], {}
  for row in chunks:
    key = row["variant"], next_size, row["devices"]
    if row["size"] != small or key not in moved:
      continue
    formula, counted = row["moved"]
    counted -= small * (moved[key] - counted) / (next_size - small)
    line = [NAMES[row["variant"]], str(row["devices"])]
    ratios["{}, devices: {}".format(*line)] = counted / formula
    cells = {**row, "moved": [formula, counted]}
    for name in ("gathered", "reduced", "moved"):
      line += pair(cells, name)
    lines.append(line)
  return f"{tabulate.markdown(heads, lines)}\n\n{furthest(ratios)}"


def power(size: int) -> str:
  return f"10^{round(math.log10(size))}"


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--table", type=pathlib.Path, help="JSON file to print")
  flags = parser.parse_args()
  if flags.table:
    print(markdown(json.loads(flags.table.read_text())))
    return
  jax.config.update("jax_num_cpu_devices", ENGINE_DEVICES)
  found = measure()
  if flags.out:
    flags.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
