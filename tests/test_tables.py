"""Row-wise updates against NumPy, and against the textbook dense ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmm_jax import sampling, tables

ROWS, DIM, TOUCHED = 6, 2, 5
B1, B2, EPS, RATE = 0.8, 0.9, 1e-3, 0.1
PAD = sampling.PAD
RULES = ("adam", "adagrad", "sgd")


def rule_of(name):
  return tables.optimizer(name, b1=B1, b2=B2, eps=EPS)


@functools.partial(jax.jit, static_argnames="name")
def by_rows(table, slot, ids, grads, count, *, name):
  all_tables = {"any": table}
  new, slots = tables.update_rows(
    all_tables,
    tables.touch(all_tables, {"any": slot}, {"any": ids}),
    {"any": grads},
    rule=rule_of(name),
    rate=RATE,
    count=count,
  )
  return new["any"], slots["any"]


@functools.partial(jax.jit, static_argnames="name")
def by_table(table, ids, grads, count, *, name):
  return tables.update_dense(
    table, ids, grads, rule=rule_of(name), rate=RATE, count=count
  )


def start(name, seed=0):
  rows = np.random.default_rng(seed).standard_normal((ROWS, DIM))
  return tables.create(jnp.asarray(rows, jnp.float32), rule_of(name))


def updates(ids, seed=1):
  """Ids of every step with random gradients."""
  rng = np.random.default_rng(seed)
  ids = np.array(ids, np.int32)
  return list(zip(ids, rng.standard_normal((*ids.shape, DIM)).astype("f4")))


def by_hand(rows, steps, name):
  """The lazy optimisers, one row after the other."""
  rows = np.array(rows, np.float64)
  mean, square = np.zeros_like(rows), np.zeros_like(rows)
  for count, (ids, grads) in enumerate(steps, 1):
    for row in set(ids) - {PAD}:
      g = sum(grad for i, grad in zip(ids, grads) if i == row)
      if name == "sgd":
        rows[row] -= RATE * g
      elif name == "adagrad":
        square[row] += g**2
        rows[row] -= RATE * g / (np.sqrt(square[row]) + EPS)
      else:
        mean[row] = B1 * mean[row] + (1 - B1) * g
        square[row] = B2 * square[row] + (1 - B2) * g**2
        unbiased = mean[row] / (1 - B1**count)
        scale = np.sqrt(square[row] / (1 - B2**count)) + EPS
        rows[row] -= RATE * unbiased / scale
  return rows


# Repeats, padding, a row that pauses, and row 5, which is never touched.
SOME = [[0, 1, 1, 2, PAD], [3, 3, 3, 0, 4], [1, PAD, PAD, PAD, 0]]


@pytest.mark.parametrize("name", RULES)
def test_row_updates_are_the_lazy_optimisers(name):
  table = start(name)
  expected = by_hand(table.rows, updates(SOME), name)
  # The scratch may hold anything.
  slot = jnp.asarray([7, -3, PAD, 0, 4, 1], jnp.int32)
  for count, (ids, grads) in enumerate(updates(SOME), 1):
    table, slot = by_rows(table, slot, ids, grads, count, name=name)
  np.testing.assert_allclose(table.rows, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_untouched_rows_keep_values_and_moments(name):
  table = start(name)
  table = table.replace(packed=table.packed + 0.5)  # moments that are not zero
  ids, grads = updates(SOME)[1]  # touches 0, 3 and 4
  new, _ = by_rows(table, jnp.zeros(ROWS, jnp.int32), ids, grads, 3, name=name)
  for row in (1, 2, 5):
    assert (new.packed[row] == table.packed[row]).all()
  for row in (0, 3, 4):
    assert (new.rows[row] != table.rows[row]).all()


def test_padding_is_dropped():
  table = start("adam")
  ids = np.full(TOUCHED, PAD, np.int32)
  grads = np.ones((TOUCHED, DIM), np.float32)
  new, _ = by_rows(
    table, jnp.zeros(ROWS, jnp.int32), ids, grads, 1, name="adam"
  )
  assert (new.packed == table.packed).all()
  dense = by_table(table, ids, grads, 1, name="adam")
  assert (dense.rows == table.rows).all()


# Every step touches each of the rows 0-2, some of them twice.
ALWAYS = [[0, 1, 2, 2, 0], [2, 1, 0, 1, PAD], [0, 0, 0, 1, 2], [1, 2, 0, 2, 2]]


@pytest.mark.parametrize("name", RULES)
def test_row_updates_are_dense_ones_for_rows_touched_in_every_step(name):
  sparse = dense = start(name)
  slot = jnp.zeros(ROWS, jnp.int32)
  for count, (ids, grads) in enumerate(updates(ALWAYS), 1):
    sparse, slot = by_rows(sparse, slot, ids, grads, count, name=name)
    dense = by_table(dense, ids, grads, count, name=name)
  np.testing.assert_allclose(sparse.packed, dense.packed, atol=1e-6)
  assert (sparse.rows[:3] != start(name).rows[:3]).all()


def test_dense_adam_moves_a_row_that_pauses_and_the_lazy_one_does_not():
  sparse = dense = start("adam")
  slot = jnp.zeros(ROWS, jnp.int32)
  for count, (ids, grads) in enumerate(updates([[0] * 5, [1] * 5]), 1):
    before = sparse, dense
    sparse, slot = by_rows(sparse, slot, ids, grads, count, name="adam")
    dense = by_table(dense, ids, grads, count, name="adam")
  assert (sparse.rows[0] == before[0].rows[0]).all()
  assert (dense.rows[0] != before[1].rows[0]).all()


def test_touching_reads_rows_and_moments_and_zeros_for_padding():
  table = start("adam")
  table = table.replace(packed=table.packed + 0.5)
  slots = tables.new_slots({"any": table})
  ids = {"any": jnp.array([1, PAD, 5])}
  found = tables.touch({"any": table}, slots, ids)["any"]
  assert (found.ids == jnp.array([1, PAD, 5])).all()
  assert (found.packed[0] == table.packed[1]).all()
  assert (found.packed[1] == 0).all()
  assert (found.packed[2] == table.packed[5]).all()


def test_rows_come_back_in_the_shapes_of_their_uses():
  table = start("adam")
  uses = {"b": jnp.array([[0, PAD], [2, 2]]), "a": jnp.array([1])}
  slots = tables.new_slots({"any": table})
  rows, touched = tables.read({"any": table}, slots, {"any": uses})
  assert (touched["any"].ids == jnp.array([1, 0, PAD, 2, 2])).all()
  found = rows["any"]
  assert found["a"].shape == (1, DIM)
  assert found["b"].shape == (2, 2, DIM)
  assert (found["a"][0] == table.rows[1]).all()
  assert (found["b"][1, 0] == table.rows[2]).all()
  assert (found["b"][0, 1] == 0).all()


def test_scratch_is_as_long_as_the_table():
  assert tables.new_slots({"user": start("adam")})["user"].shape == (ROWS,)
