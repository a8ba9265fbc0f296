"""What runs on devices lowers for every platform, without one at hand.

Lowering for a platform finds primitives that have no rule there. The programs
hold no number of 64 bits and never call back to the host. Several devices are
those of `mesh`: what `pmap` maps is the same function, but jax lowers it for
the platform that is there alone.
"""

import functools

import jax
from jax import export
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from mmm_jax import (
  clustering,
  input_pipeline,
  parallel,
  ranking,
  scoring,
  streams,
  update,
)
import toy

PLATFORMS = ("cpu", "cuda", "tpu")

# A step of its own in .ci/run.
pytestmark = pytest.mark.export


def train_chunk(dtype, devices=1):
  """A chunk of the full model with all that is ours, and its arguments."""
  config = toy.get_config(
    "best", interaction_loss="softmax", compute_dtype=dtype
  )
  config.remedies.history_in_user = 0.5
  config.parallel.kernels = False  # they are of the machine at hand
  run = toy.make_run(config, toy.random_data(40, 60))
  engine = toy.make_engine(devices)
  chunk = update.make_train_chunk(
    run.model, config, run.sizes, run.weights, engine, resident=True
  )
  session = toy.Session(run)
  shards, shared = engine.shard(run.shards), engine.replicate(run.shared)
  plan = engine.map(
    functools.partial(streams.plan, sizes=run.sizes),
    (parallel.SHARDED, parallel.HOST),
    parallel.SHARDED,
  )
  content = input_pipeline.load_resident(
    run.content, run.shards.items.ids["item"], engine, config
  )
  return chunk, (
    np.int32(2),
    engine.replicate(session.state),
    shards,
    shared,
    plan(shards, np.int32(0)),
    content,
  )


def categories(name, devices=1):
  """The K-means that seeds categories, or the pass that follows them."""
  run = toy.make_run(toy.get_config("cat"), toy.random_data(40, 60))
  engine = toy.make_engine(devices)
  seed, follow = clustering.make_clustering(run, engine)
  state = engine.replicate(toy.Session(run).state)
  if name == "seed":
    return seed, (state, clustering.key(run.config))
  return follow, (state,)


def scorer():
  """The ranking of a block of users against all items."""
  config = toy.get_config("full", parallel__devices=1)
  run = toy.make_run(config, toy.random_data(40, 60))
  best = scoring.snapshot(toy.Session(run).state, -np.inf)
  made = scoring.make_scorer(run, best.params, best.rows, best.categories)
  users = np.arange(8, dtype=np.int32)

  @jax.jit
  def rank(users, items, rows, columns):
    return ranking._rank_block(
      jax.tree_util.Partial(made.score),
      made.users(users),
      items,
      users,
      rows,
      columns,
      jnp.uint32(0),
      in_cpp=False,  # as on a TPU
      num_items=60,
      k=20,
      tile=32,
    )

  pairs = np.zeros((2, 16), np.int32)
  return rank, (users, made.items, *pairs)


PROGRAMS = {
  "train": functools.partial(train_chunk, "float32"),
  "train in bfloat16": functools.partial(train_chunk, "bfloat16"),
  "train on 8": functools.partial(train_chunk, "float32", 8),
  "seed": functools.partial(categories, "seed"),
  "follow": functools.partial(categories, "follow"),
  "seed on 8": functools.partial(categories, "seed", 8),
  "rank": scorer,
}


def equations(jaxpr):
  """All equations of a program, those of its parts among them."""
  for equation in jaxpr.eqns:
    yield equation
    for part in core.jaxprs_in_params(equation.params):
      yield from equations(getattr(part, "jaxpr", part))


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_programs_lower_for_every_platform(name):
  function, arguments = PROGRAMS[name]()
  lowered = export.export(function, platforms=PLATFORMS)(*arguments)
  assert lowered.platforms == PLATFORMS
  assert lowered.nr_devices == (8 if "on 8" in name else 1)
  text = lowered.mlir_module()
  assert "callback" not in text
  found = list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))
  assert len(found) > 50  # the parts are looked into
  types = {
    variable.aval.dtype
    for equation in found
    for variable in (*equation.invars, *equation.outvars)
    if hasattr(variable.aval, "dtype")
  }
  wide = {t for t in types if not jnp.issubdtype(t, jax.dtypes.extended)}
  assert all(t.itemsize <= 4 for t in wide), wide
  assert ("bfloat16" in name) == (jnp.dtype("bfloat16") in wide)
