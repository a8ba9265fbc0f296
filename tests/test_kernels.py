"""The C++ kernels: against NumPy bit by bit, and in a run."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmm_jax import kernels, sampling, tables
from mmm_jax.models import layers
import runs
import toy

PAD = sampling.PAD
B1, B2, EPS, RATE = (np.float32(x) for x in (0.8, 0.9, 1e-3, 0.1))

pytestmark = pytest.mark.skipif(
  not kernels.load(toy.get_config()), reason="there is no C++ compiler"
)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def adam(packed, slot, ids, grads, count):
  ((slot, links, _),) = kernels.touch([(packed, slot, ids, (), 0)])
  update = packed, slot, links, ids, grads
  (new,) = kernels.adam([update], RATE, count, b1=0.8, b2=0.9, eps=1e-3)
  return new, slot


def by_numpy(packed, ids, grads, count):
  """Adam of one row after the other, each operation rounded to float32."""
  new, one = packed.copy(), np.float32(1)
  width = grads.shape[1]
  unbias = [one / (one - b ** np.float32(count)) for b in (B1, B2)]
  for row in set(ids.tolist()) - {PAD}:
    total = functools.reduce(np.add, grads[ids == row])
    old, mean, square = packed[row].reshape(3, width)
    mean = B1 * mean + np.float32(1 - 0.8) * total
    square = B2 * square + np.float32(1 - 0.9) * (total * total)
    scale = np.sqrt(square * unbias[1]) + EPS
    old = old - RATE * (mean * unbias[0]) / scale
    new[row] = np.concatenate([old, mean, square])
  return new


def table_of(rng, rows, width):
  packed = rng.standard_normal((rows, 3 * width)).astype(np.float32)
  packed[:, 2 * width :] **= 2  # mean squares
  return packed


@given(
  data=st.data(),
  rows=st.sampled_from([1, 12]),
  touched=st.sampled_from([1, 5, 700]),
  width=st.sampled_from([1, 3, 16]),
)
@settings(max_examples=40, deadline=None)
def test_adam_is_that_of_numpy_to_the_last_bit(data, rows, touched, width):
  rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
  packed = table_of(rng, rows, width)
  ids = rng.integers(0, rows, touched).astype(np.int32)
  ids[rng.random(touched) < 0.2] = PAD
  grads = rng.standard_normal((touched, width)).astype(np.float32)
  # The scratch may hold anything, places of this step among it.
  slot = rng.integers(-3, touched + 3, rows).astype(np.int32)
  count = 1  # 1 - B ** 1 has one rounding, by NumPy and by XLA alike
  expected = by_numpy(packed, ids, grads, count)
  new, _ = adam(
    jnp.array(packed), jnp.array(slot), ids, grads, jnp.int32(count)
  )
  np.testing.assert_array_equal(new, expected)


def test_many_rows_by_several_threads_are_those_of_numpy():
  rng = np.random.default_rng(0)
  rows, touched, width = 3000, 20_000, 24
  packed = table_of(rng, rows, width)
  ids = rng.integers(0, rows, touched).astype(np.int32)
  grads = rng.standard_normal((touched, width)).astype(np.float32)
  expected = by_numpy(packed, ids, grads, 1)
  for _ in range(20):
    new, _ = adam(
      jnp.array(packed),
      jnp.zeros(rows, jnp.int32),
      ids,
      grads,
      jnp.int32(1),
    )
    np.testing.assert_array_equal(new, expected)


def test_rows_are_read_and_padding_is_zero():
  packed = np.arange(18, dtype=np.float32).reshape(3, 6)
  ids = jnp.array([2, PAD, 0, 2, 1], jnp.int32)
  slot = jnp.zeros(3, jnp.int32)
  touch = jax.jit(lambda *args: kernels.touch([(*args, (3, 1), 2)]))
  ((_, _, rows),) = touch(packed, slot, ids)
  np.testing.assert_array_equal(rows[0], [[12, 13], [0, 0], [0, 1]])
  np.testing.assert_array_equal(rows[1], [[12, 13]])  # the last is not wanted


def test_places_of_a_row_are_linked():
  ids = jnp.array([2, PAD, 0, 2, 3, 2], jnp.int32)  # there is no row 3
  slot = jnp.array([4, 5, 5], jnp.int32)  # any numbers
  touch = jax.jit(
    lambda *args: kernels.touch([(jnp.ones((3, 6)), *args, (), 2)])
  )
  ((first, following, rows),) = touch(slot, ids)
  np.testing.assert_array_equal(first, [2, 5, 0])  # no place is of row 1
  np.testing.assert_array_equal(following, [3, -1, -1, 5, -1, -1])
  assert not rows


def test_tables_are_touched_and_updated_side_by_side():
  rng = np.random.default_rng(1)
  sizes = ((30, 700, 5), (4000, 900, 16))  # rows, touched, width
  packed = [table_of(rng, rows, width) for rows, _, width in sizes]
  ids = [rng.integers(0, rows, n).astype(np.int32) for rows, n, _ in sizes]
  grads = [rng.standard_normal((n, d)).astype(np.float32) for _, n, d in sizes]

  @jax.jit
  def step(packed, ids, grads, count):
    touches = [
      (table, jnp.zeros(rows, jnp.int32), each, (n - 1, 1), width)
      for table, each, (rows, n, width) in zip(packed, ids, sizes)
    ]
    found = kernels.touch(touches)
    updates = [
      (table, slot, links, each, grad)
      for table, (slot, links, _), each, grad in zip(packed, found, ids, grads)
    ]
    new = kernels.adam(updates, RATE, count, b1=0.8, b2=0.9, eps=1e-3)
    return [rows for *_, rows in found], new

  rows, new = step(packed, ids, grads, jnp.int32(1))
  for t, (_, _, width) in enumerate(sizes):
    read = np.concatenate(rows[t])
    np.testing.assert_array_equal(read, packed[t][ids[t], :width])
    expected = by_numpy(packed[t], ids[t], grads[t], 1)
    np.testing.assert_array_equal(new[t], expected)


def test_an_update_takes_the_place_of_its_table():
  rows, touched, width = 5000, 8, 16
  shapes = (
    jax.ShapeDtypeStruct((rows, 3 * width), jnp.float32),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    jax.ShapeDtypeStruct((touched,), jnp.int32),
    jax.ShapeDtypeStruct((touched, width), jnp.float32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  memory = adam.lower(*shapes).compile().memory_analysis()
  table_bytes = rows * (3 * width + 1) * 4
  assert memory.alias_size_in_bytes == table_bytes
  assert memory.temp_size_in_bytes < table_bytes / 10


def sums_by_numpy(left, right):
  """In 16 lanes side by side, which then are added half to half."""
  lanes = np.zeros((*left.shape[:-1], 16), np.float32)
  for k in range(left.shape[-1]):
    lanes[..., k % 16] += left[..., k] * right[..., k]
  while lanes.shape[-1] > 1:
    half = lanes.shape[-1] // 2
    lanes = lanes[..., :half] + lanes[..., half:]
  return lanes[..., 0]


@pytest.mark.parametrize(
  "shape", [(1,), (5, 15), (16,), (2, 3, 17), (3000, 5, 64), (0, 8)]
)
def test_dot_products_are_those_of_numpy_to_the_last_bit(shape):
  rng = np.random.default_rng(0)
  left, right = rng.standard_normal((2, *shape)).astype(np.float32)
  found = jax.jit(kernels.dot)(left, right)
  np.testing.assert_array_equal(found, sums_by_numpy(left, right))
  found = jax.jit(kernels.squared_norm)(left)
  np.testing.assert_array_equal(found, sums_by_numpy(left, left))


@pytest.mark.parametrize("name", ["dot", "squared_norm"])
def test_their_gradients_are_those_of_xla(name):
  rng = np.random.default_rng(1)
  count = {"dot": 2, "squared_norm": 1}[name]
  rows = list(rng.standard_normal((count, 7, 3, 20)).astype(np.float32))
  weight = rng.standard_normal((7, 3)).astype(np.float32)

  def gradients(module):
    function = jax.vmap(getattr(module, name))
    total = lambda *rows: jnp.sum(weight * function(*rows) ** 3)
    every = tuple(range(count))
    slope = lambda *rows: jnp.sum(jax.grad(total)(*rows) ** 2)
    return *jax.grad(total, every)(*rows), *jax.grad(slope, every)(*rows)

  for ours, theirs in zip(gradients(kernels), gradients(layers), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("other", [(4, 5), (6, 4), (3, 6)])
def test_rows_of_two_shapes_have_no_dot_product(other):
  left, right = jnp.zeros((4, 6)), jnp.zeros(other)
  with pytest.raises(jax.errors.JaxRuntimeError, match="as long"):
    jax.jit(kernels.dot)(left, right).block_until_ready()


@pytest.mark.parametrize("shape", [(1,), (700,), (3, 0), (5, 2**16 + 3)])
def test_orders_are_those_of_a_stable_sort(shape):
  keys = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
  keys.reshape(-1)[::3] &= 0xFF000003  # many are alike
  order = kernels.stable_order
  if len(shape) > 1:
    order = jax.vmap(order)
  expected = np.argsort(keys, axis=-1, kind="stable")
  np.testing.assert_array_equal(jax.jit(order)(keys), expected)


@given(
  seed=st.integers(0, 2**31),
  size=st.sampled_from([1, 40, 81, 82, 700, 5003]),
  k=st.sampled_from([1, 11, 41]),
  alike=st.sampled_from([1, 3, 10**6]),
)
@settings(max_examples=60, deadline=None)
def test_the_largest_are_those_of_a_sort(seed, size, k, alike):
  rng = np.random.default_rng(seed)
  k = min(k, size)
  values = rng.integers(0, alike, (19, size)).astype(np.float32)
  values[rng.random((19, size)) < 0.2] = -np.inf
  found, at = jax.jit(kernels.largest, static_argnums=1)(values, k)
  np.testing.assert_array_equal(found, -np.sort(-values)[:, :k])
  np.testing.assert_array_equal(found, np.take_along_axis(values, at, 1))
  assert all(len(set(places)) == k for places in np.asarray(at).tolist())


@given(
  seed=st.integers(0, 2**31),
  items=st.sampled_from([1, 2, 9, 300]),
  share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_an_unseen_item_is_the_rank_th_of_the_rest(seed, items, share):
  rng = np.random.default_rng(seed)
  seen = rng.random((3, items)) < share
  indptr = np.concatenate([[0], seen.sum(1).cumsum()]).astype(np.int32)
  indices = np.append(np.nonzero(seen)[1], PAD).astype(np.int32)
  users = rng.integers(0, 3, (2, 400)).astype(np.int32)
  rest = [np.flatnonzero(~own) for own in seen]
  left = np.array([len(each) for each in rest])[users]
  ranks = rng.integers(0, np.maximum(left, 1), (5, 2, 400)).astype(np.int32)
  ranks = np.moveaxis(ranks, 0, -1)
  find = lambda rank, user: kernels.unseen_item(rank, user, indptr, indices)
  for function in (find, jax.vmap(find)):  # with and without a batch of both
    found = np.asarray(jax.jit(function)(ranks, users))
    for user in range(3):
      own = users == user
      if len(rest[user]):
        np.testing.assert_array_equal(found[own], rest[user][ranks[own]])


def test_ranks_that_do_not_fit_their_users_are_an_error():
  call = jax.jit(kernels.unseen_item)
  two, three = jnp.zeros((2, 4), jnp.int32), jnp.zeros(3, jnp.int32)
  with pytest.raises(jax.errors.JaxRuntimeError, match="for users"):
    call(two, three, three, three).block_until_ready()


@pytest.mark.parametrize("variant", ["pmf", "full", "best"])
def test_a_run_with_kernels_is_one_without_but_for_rounding(variant):
  states = []
  for in_cpp in (True, False):
    config = toy.get_config(variant, parallel__kernels=in_cpp)
    session = toy.Session(toy.make_run(config, toy.random_data(40, 60)))
    losses = session.train_epochs(2)["loss"]
    assert session.run.model.in_cpp == in_cpp
    assert all(
      table.by_kernel == in_cpp for table in session.state.tables.values()
    )
    states.append((losses, session.state))
  (losses, state), (other_losses, other) = states
  np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
  for name, table in state.tables.items():
    np.testing.assert_allclose(
      table.packed, other.tables[name].packed, atol=1e-5
    )


@pytest.mark.parametrize("name", ["adagrad", "sgd"])
def test_other_optimizers_are_xlas(name):
  rule = tables.optimizer(name, b1=0.9, b2=0.9, eps=1e-3, in_cpp=True)
  assert not tables.create(jnp.ones((2, 3)), rule).by_kernel


# --- compiling ---------------------------------------------------------------

CALLED = """
from mmm_jax import kernels
import toy
print(kernels.{}(toy.get_config(dataset__data_dir={!r})))
"""
LOGGED = (
  "import logging; logging.basicConfig(level='INFO', format='%(message)s')"
)


def load_elsewhere(folder, path, *, call="load", then=""):
  """What a process of its own says, whose programs are those of `path`."""
  called = CALLED.format(call, str(folder))
  return subprocess.run(
    [sys.executable, "-c", f"{LOGGED}\n{called}\n{then}"],
    env={
      **os.environ,
      "PATH": str(path),
      "PYTHONPATH": os.pathsep.join(sys.path),
    },
    capture_output=True,
    text=True,
    check=True,
  )


def test_it_is_compiled_once(tmp_path):
  assert load_elsewhere(tmp_path, os.environ["PATH"]).stdout == "True\n"
  (kept,) = (tmp_path / "compiled").iterdir()
  assert kept.name.startswith("kernels-")
  # Now it needs no compiler.
  assert load_elsewhere(tmp_path, tmp_path / "nothing").stdout == "True\n"


def until(found):
  """A minute's wait for an expression, as a program."""
  return f"""
import pathlib, time
end = time.monotonic() + 60
while time.monotonic() < end and not ({found}):
  time.sleep(0.01)
"""


def test_it_is_compiled_before_anybody_waits_for_it(tmp_path):
  compiled = tmp_path / "compiled"
  there = until(f"list(pathlib.Path({str(compiled)!r}).glob('kernels-*'))")
  load_elsewhere(tmp_path, os.environ["PATH"], call="begin", then=there)
  assert list(compiled.glob("kernels-*"))


def test_a_compiler_that_hangs_ends_with_the_process(tmp_path):
  number, compiler = tmp_path / "number", tmp_path / "c++"
  compiler.write_text(f"#!/bin/sh\necho $$ > {number}\nexec sleep 600\n")
  compiler.chmod(0o755)
  begun = until(
    f"(p := pathlib.Path({str(number)!r})).exists() and p.read_text()"
  )
  programs = f"{tmp_path}:/bin:/usr/bin"
  load_elsewhere(tmp_path, programs, call="begin", then=begun)
  state = pathlib.Path("/proc", number.read_text().strip(), "stat")
  # Ended, if only as what nobody has asked about.
  assert not state.exists() or state.read_text().split()[2] == "Z"


def test_without_a_compiler_xla_does_it_and_says_so(tmp_path):
  done = load_elsewhere(tmp_path, tmp_path / "nothing")
  assert done.stdout == "False\n"
  assert "XLA does the work of kernels" in done.stderr
  assert "c++ is not on PATH" in done.stderr


@pytest.mark.parametrize(
  ("says", "found"),
  [("no such option", "no such option"), (r"\n", "c++"), (r"\377", "\ufffd")],
)
def test_a_compiler_that_fails_is_no_compiler(tmp_path, says, found):
  broken = tmp_path / "c++"
  broken.write_text(f"#!/bin/sh\nprintf '{says}' >&2\nexit 1\n")
  broken.chmod(0o755)
  done = load_elsewhere(tmp_path, f"{tmp_path}:/bin:/usr/bin")
  assert done.stdout == "False\n"
  assert found in done.stderr
  assert not list((tmp_path / "compiled").iterdir())


def test_a_library_that_is_none_is_passed_over(tmp_path):
  load_elsewhere(tmp_path, os.environ["PATH"])
  (kept,) = (tmp_path / "compiled").iterdir()
  kept.write_bytes(b"cut short")
  done = load_elsewhere(tmp_path, os.environ["PATH"])
  assert done.stdout == "False\n"
  assert kept.name in done.stderr


def test_the_profile_knows_kernels_and_what_they_move():
  path = runs.ROOT / "tests" / "benchmarks" / "programs.py"
  spec = importlib.util.spec_from_file_location("programs", path)
  programs = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(programs)
  ids, grads = jnp.array([3, 1, 3, PAD]), jnp.ones((4, 8))
  arguments = jnp.zeros((5, 24)), jnp.zeros(5, jnp.int32), ids, grads, 1
  text = adam.lower(*arguments).compile().as_text()
  # Gradients read, rows and two moments read and written, 4 bytes a number.
  assert programs.bytes_of_kernels(text) == 7 * 4 * 8 * 4
  of_dots = jax.jit(lambda x, y: kernels.dot(x, y) + kernels.squared_norm(x))
  dots = of_dots.lower(*jnp.ones((2, 5, 3, 8))).compile().as_text()
  # Two arrays are read, and one.
  assert programs.bytes_of_kernels(dots) == 3 * 5 * 3 * 8 * 4
  calls = re.findall(r'%(\S+) = .*custom_call_target="(mmm_jax_\w+)', text)
  spans = {("jit_adam", name): 3.0 for name, _ in calls}
  spans["jit_other", calls[0][0]] = 2.0
  assert programs.shares_of_files(spans, text) == {
    "kernels.py, touch": 3 / 8,
    "kernels.py, adam": 3 / 8,
    "program other": 2 / 8,
  }
  (program,) = re.findall(r"HloModule (\w+),", dots)
  (call, _) = re.findall(r"%(\S+) = .*custom_call_target=", dots)
  spans = {(program, call): 1.0}
  assert programs.shares_of_files(spans, dots) == {"kernels.py, dot": 1.0}
