"""The parameters worth keeping, and how the evaluator scores with them."""

import functools
from typing import Any

import flax
import jax
import numpy as np

from mmm_jax import assemble, evaluate, kernels, parallel, update


@flax.struct.dataclass
class Best:
  """The best validated parameters so far, on the host."""

  params: dict
  rows: dict[str, np.ndarray]
  categories: Any
  metric: np.ndarray  # -inf before the first evaluation
  step: np.ndarray
  evaluations_since: np.ndarray


@functools.cache
def _vectors(model, engine):
  """Functions that give a part of the users, and all items on each device."""

  def users(params, rows, shared, user):
    return model.apply({"params": params}, rows, user, shared, method="users")

  def items(params, rows, categories):
    return model.apply({"params": params}, rows, categories, method="items")

  whole, part = parallel.REPLICATED, parallel.SHARDED
  return (
    engine.map(users, (whole, whole, whole, part), part),
    engine.map(items, (whole, whole, whole), whole),
  )


@functools.cache
def _score_function(model):
  return lambda user, item: model.score(user, item)


def make_scorer(run: assemble.Run, params, rows, categories) -> evaluate.Scorer:
  """The evaluator's view of parameters, on the devices of this process.

  Args:
    run: the run.
    params: dense parameters.
    rows: {table: [R, d]}.
    categories: the model's.
  """
  engine = parallel.make_own_engine(run.config)
  users, items = _vectors(run.model, engine)
  # Without what only training reads: this is uploaded at every validation.
  shared = run.shared._replace(seen=None, rows=None, present={})
  params, rows, categories, shared = engine.replicate(
    (params, rows, categories, shared)
  )
  return evaluate.Scorer(
    users=functools.partial(users, params, rows, shared),
    items=items(params, rows, categories),
    score=_score_function(run.model),
    engine=engine,
    in_cpp=kernels.load(run.config),
  )


def score_protocols(run: assemble.Run, best: Best, parts, protocols):
  """`evaluate.evaluate` of parameters, with the run's settings."""
  settings = run.config.eval
  return evaluate.evaluate(
    make_scorer(run, best.params, best.rows, best.categories),
    run.interactions,
    parts=parts,
    protocols=protocols,
    cutoffs=settings.cutoffs,
    seed=settings.seed,
    user_block=settings.user_block,
    item_tile=settings.item_tile,
  )


def snapshot(state: update.TrainState, metric: float) -> Best:
  """What scoring needs of a state (on one device), copied to the host."""
  rows = {name: table.rows for name, table in state.tables.items()}
  parts = jax.device_get((state.params, rows, state.categories, state.step))
  # Copies: the host's view of a CPU array ends when its memory is donated.
  params, rows, categories, step = jax.tree.map(np.array, parts)
  return Best(params, rows, categories, np.float64(metric), step, np.int32(0))


def averaged(before: Best, now: Best, decay: float) -> Best:
  """`now` with a moving average of parameters and rows; ours.

  decay * before + (1 - decay) * now: steps that still go to and fro take turns
  on both sides of where they lead.
  """

  def mix(old, new):
    return new + np.float32(decay) * (old - new)

  parts = {"params": now.params, "rows": now.rows}
  old = {"params": before.params, "rows": before.rows}
  return now.replace(**jax.tree.map(mix, old, parts))


def to_keep(state: update.TrainState, config) -> dict:
  """What a checkpoint holds, of a run that begins with `state`."""
  fresh = snapshot(state, -np.inf)
  average = {"average": fresh} if config.remedies.ema_decay else {}
  return {"state": state, "best": fresh, **average}


def current(kept: dict) -> Best:
  """The parameters to score now, of what `to_keep` names."""
  return kept.get("average") or snapshot(kept["state"], -np.inf)


def reported(kept: dict) -> Best:
  """The parameters to report: the best validated ones, else the last."""
  best = kept["best"]
  return best if np.isfinite(best.metric) else current(kept)
