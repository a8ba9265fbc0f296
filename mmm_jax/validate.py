"""Checks the values of a config before anything is read, made or compiled.

What depends on the data (names of sources and networks, the split) is checked
where the data are read.
"""

import difflib
import functools
import json
import math
import pkgutil

from mmm_jax import errors, evaluate, losses, models, parallel, tables
from mmm_jax.datasets import base, splits

# Where a host has its files; and all that changes no result but for rounding:
# that, when a run says and saves how it stands, on which devices it is.
PLACES = ("dataset.data_dir", "dataset.manual_dir", "split.path")
NO_RESULT = (*PLACES, "checkpoint", "log", "parallel")
# Keys that came after results were recorded, with the values at which a run is
# what it was without them.
LATER = {
  "parallel.kernels": False,
  "remedies.count_power": 0.0,
  "remedies.ema_decay": 0.0,
  "remedies.history_around": False,
}

_SELECTED_CUTOFF = 20  # early stopping looks at nDCG@20
_LAST_SEED = 2**31 - 1
_BELOW_ONE = 0.9999999
_HELPERS = ("layers",)  # in mmm_jax.models, and no models

CHOICES = {
  "interaction_loss": (*losses.PAIRWISE, "softmax"),
  "compute_dtype": ("float32", "bfloat16"),
  "normalisation": ("mean", "paper_sums"),
  "model.name": tuple(
    module.name
    for module in pkgutil.iter_modules(models.__path__)
    if module.name not in _HELPERS
  ),
  "dataset.name": base.SETS,
  "split.protocol": splits.PROTOCOLS,
  "tables.update": ("rows", "dense"),
  "tables.optimizer": tables.NAMES,
  "parallel.engine": parallel.ENGINES,
  "parallel.platform": ("", *parallel.PLATFORMS),
  "controls.content": ("real", "permuted"),
  "controls.networks": ("real", "rewired"),
  "controls.network_weights": ("learnt", "equal"),
  "controls.categories": ("learnt", "random", "content"),
}

# Least and greatest value, both valid.
RANGES = {
  "seed": (0, _LAST_SEED),
  "epochs": (1, math.inf),
  "batch_size": (1, math.inf),
  "data_shards": (1, math.inf),
  "num_categories": (0, math.inf),
  "dataset.core": (0, math.inf),
  "split.seed": (0, _LAST_SEED),
  "losses.softmax.shared_negatives": (1, math.inf),
  "negatives.per_positive": (1, math.inf),
  "tables.init_scale": (0, math.inf),
  "optimizer.b1": (0, _BELOW_ONE),
  "optimizer.b2": (0, _BELOW_ONE),
  "eval.every_epochs": (1, math.inf),
  "eval.patience": (1, math.inf),
  "eval.seed": (0, _LAST_SEED),
  "eval.user_block": (1, math.inf),
  "eval.item_tile": (1, math.inf),
  "checkpoint.every_seconds": (0, math.inf),
  "checkpoint.keep": (1, math.inf),
  "log.every_steps": (1, math.inf),
  "input.content_budget_mb": (0, math.inf),
  "input.threads": (1, math.inf),
  "input.prefetch_batches": (1, math.inf),
  "parallel.devices": (0, math.inf),
  "parallel.timeout_s": (1, math.inf),
  "parallel.wait_s": (1, 10**9),
  "model.dim": (1, math.inf),
  "text.dim": (1, math.inf),
  "text.max_tokens": (1, math.inf),
  "text.filters": (1, math.inf),
  "network.neighbour_cap": (1, math.inf),
  "network.scoring_cap": (1, math.inf),
  "network.co_like_degree": (1, math.inf),
  "kmeans.warmup_epochs": (0, math.inf),
  "kmeans.restarts": (1, math.inf),
  "kmeans.seeding_iterations": (1, math.inf),
  "kmeans.iterations": (1, math.inf),
  "kmeans.block": (1, math.inf),
  "remedies.encoder_decay": (0, math.inf),
  "remedies.mismatched_content": (0, math.inf),
  "remedies.content_temperature": (0, math.inf),
  "remedies.alpha_prior": (0, math.inf),
  "remedies.networks_in_user": (0, math.inf),
  "remedies.history_in_user": (0, math.inf),
  "remedies.count_power": (0, 10),
  "remedies.ema_decay": (0, _BELOW_ONE),
}

POSITIVE = (
  *(f"losses.{name}.learning_rate" for name in (*losses.PAIRWISE, "softmax")),
  "losses.softmax.temperature",
  "schedule.decay_rate",
  "schedule.decay_steps",
  "optimizer.eps",
)


def check(config) -> None:
  """Checks names and ranges.

  Keys that the config of another model does not have are passed over.

  Raises:
    errors.InputError: a value that no run could work with.
  """
  values = dict(leaves(config))
  for key, valid in CHOICES.items():
    if key in values and values[key] not in valid:
      near = difflib.get_close_matches(str(values[key]), valid, n=1)
      hint = f" (did you mean {near[0]!r}?)" if near else ""
      _fail(key, values[key], f"one of {', '.join(valid)}{hint}")
  for key, (low, high) in RANGES.items():
    if key in values and not low <= values[key] <= high:
      wanted = f"{low} to {high}" if high < math.inf else f"{low} or more"
      _fail(key, values[key], wanted)
  for key in POSITIVE:
    if key in values and not 0 < values[key] < math.inf:
      _fail(key, values[key], "a number above 0")
  for key, value in values.items():
    weight = key.startswith("weights.") and not isinstance(value, str)
    if weight and not 0 <= value < math.inf:
      _fail(key, value, "0 or more")
  if not values["dataset.data_dir"]:
    _fail("dataset.data_dir", "", "a folder for prepared sets")
  _check_lists(values)
  _check_batch(config)


def plain(config, *, without=()) -> dict:
  """The values of a config as JSON has them.

  Args:
    config: a ConfigDict, or what this gave of one.
    without: dotted keys that are left out, with all below them.
  """
  text = config.to_json() if hasattr(config, "to_json") else json.dumps(config)
  values = json.loads(text)
  for key in without:
    *folders, name = key.split(".")
    inner = functools.reduce(lambda d, each: d.get(each, {}), folders, values)
    inner.pop(name, None)
  return values


def completed(values: dict) -> dict:
  """The dictionary of a config, with the keys of LATER if it has none."""
  for key, value in LATER.items():
    *folders, name = key.split(".")
    inner = functools.reduce(lambda d, each: d.get(each, {}), folders, values)
    inner.setdefault(name, value)
  return values


def leaves(config, prefix: str = ""):
  """Yields (dotted key, value) of a config, or of its dictionary."""
  for key in config:
    value = config[key]
    if hasattr(value, "items"):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _check_lists(values):
  cutoffs = values["eval.cutoffs"]
  if _SELECTED_CUTOFF not in cutoffs or not _all_positive(cutoffs):
    wanted = f"numbers from 1 on, {_SELECTED_CUTOFF} among them (for nDCG@20)"
    _fail("eval.cutoffs", cutoffs, wanted)
  protocols = values["eval.protocols"]
  if not protocols or set(protocols) - set(evaluate.PROTOCOLS):
    wanted = f"one or more of {', '.join(evaluate.PROTOCOLS)}"
    _fail("eval.protocols", protocols, wanted)
  widths = values.get("text.widths", (1,))
  if not widths or not _all_positive(widths):
    _fail("text.widths", widths, "one or more numbers from 1 on")


def _all_positive(numbers):
  return all(isinstance(number, int) and number > 0 for number in numbers)


def _check_batch(config):
  """A batch is dealt to the data shards in equal parts."""
  size, shards = config.batch_size, config.data_shards
  if size % shards:
    below = size // shards * shards
    near = [str(each) for each in (below, below + shards) if each]
    _fail(
      "batch_size",
      size,
      f"a multiple of data_shards={shards}; nearest: {', '.join(near)}",
    )


def check_categories(config, num_items: int) -> None:
  """K-means needs an item for every category.

  Raises:
    errors.InputError: more categories than items.
  """
  if config.num_categories > num_items:
    _fail("num_categories", config.num_categories, f"0 to {num_items} (items)")


def _fail(key, found, wanted):
  raise errors.InputError(f"config.{key}: found {found!r}, valid: {wanted}")
