"""One device, several, and both engines: the same numbers."""

import functools
import os
import subprocess
import sys

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from mmm_jax import errors, parallel
import toy

STEPS = 54  # six epochs of nine


@functools.cache
def trained(devices, kind, changes):
  """The values of every step, and the state after the last."""
  variant, *rest = changes
  config = toy.get_config(variant, **dict(rest))
  run = toy.make_run(config, toy.random_data(40, 60))
  session = toy.Session(run, engine=toy.make_engine(devices, kind))
  if config.num_categories:
    session.state = toy.with_categories(
      session.state, np.arange(60) % 3, np.linspace(-1, 1, 24).reshape(3, 8)
    )
  values = session.train_epochs(6)
  assert len(values["loss"]) == STEPS
  return values, session.state


def assert_same(engine, other, changes):
  values, state = trained(*engine, changes)
  other_values, other_state = trained(*other, changes)
  assert values.keys() == other_values.keys()
  for name, series in values.items():
    np.testing.assert_allclose(
      series, other_values[name], rtol=1e-5, atol=1e-9, err_msg=name
    )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
    (state.tables["user"].rows, state.tables["item"].rows),
    (other_state.tables["user"].rows, other_state.tables["item"].rows),
  )


@pytest.mark.parametrize("engine", [(2, "mesh"), (8, "mesh"), (8, "pmap")])
def test_one_device_is_several(engine):
  assert_same((1, "mesh"), engine, ("full",))


@pytest.mark.parametrize(
  ("engine", "normalisation"),
  [((8, "mesh"), "mean"), ((2, "pmap"), "paper_sums")],
)
def test_what_every_device_holds_counts_once(engine, normalisation):
  # Shared negatives, in the loss and in the prior of v, and categories.
  loss = ("interaction_loss", "softmax")
  changes = ("cat", loss, ("normalisation", normalisation))
  assert_same((1, "mesh"), engine, changes)


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
def test_engine_reduces_over_all_devices(kind):
  engine = toy.make_engine(4, kind)

  def function(factor, whole, part):
    total = lax.psum(jnp.sum(part), parallel.AXIS)
    return factor * total * whole, part + 1

  mapped = engine.map(
    function,
    (parallel.HOST, parallel.REPLICATED, parallel.SHARDED),
    (parallel.REPLICATED, parallel.SHARDED),
  )
  part = np.arange(16.0).reshape(8, 2)
  whole, changed = mapped(
    np.float32(3), engine.replicate(np.float32(2)), engine.shard(part)
  )
  assert engine.first(whole) == 3 * 120 * 2
  np.testing.assert_array_equal(engine.local(changed), part + 1)


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
def test_replicated_and_sharded_values_come_back(kind):
  engine = toy.make_engine(4, kind)
  tree = {"a": np.arange(6).reshape(2, 3), "b": np.float32(1.5)}
  back = engine.first(engine.replicate(tree))
  np.testing.assert_array_equal(back["a"], tree["a"])
  assert back["b"] == 1.5 and back["b"].shape == ()
  part = {"a": np.arange(24).reshape(8, 3)}
  np.testing.assert_array_equal(
    engine.local(engine.shard(part))["a"], part["a"]
  )


def test_make_engine_takes_all_devices():
  engine = parallel.make_engine(toy.get_config())
  assert engine.num_devices == 8
  assert engine.by_pmap
  one = parallel.make_engine(toy.get_config(parallel__devices=1))
  assert not one.by_pmap  # nothing to map


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    (dict(parallel__devices=9), "sees 8 cpu device"),
    (dict(parallel__devices=3), r"multiple of 3, or .* \[1, 2\]"),
  ],
)
def test_impossible_engines_are_explained(changes, told):
  with pytest.raises(errors.InputError, match=told):
    parallel.make_engine(toy.get_config(**changes))


def test_programs_are_compiled_alike_for_every_cpu_unless_the_user_says_so():
  program = (
    "import mmm_jax, os, jax, numpy as np\n"
    "x = np.random.default_rng(0).random((512, 256), np.float32)\n"
    "print(os.environ['XLA_FLAGS'])\n"
    "print(np.array_equal(jax.jit(jax.lax.rsqrt)(x), 1 / np.sqrt(x)))\n"
    "total = jax.jit(lambda x: jax.numpy.sum(x * x, 1))\n"
    "print(total.lower(x).compile().as_text())"
  )

  def printed(flags):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    said = subprocess.check_output(
      [sys.executable, "-c", program], env=environment, text=True
    )
    return said.split("\n", 2)

  own = "--xla_cpu_multi_thread_eigen=true"
  flags, exact, compiled = printed(own)
  assert flags.startswith(f"{own} --xla_cpu_")
  assert exact == "True"  # and no processor's estimate
  assert "__ynn_fusion" not in compiled
  own = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
  flags, _, compiled = printed(own)
  assert flags.count("ynn_fusion_type") == 1
  assert "__ynn_fusion" in compiled
