"""Embedding tables whose updates cost as much as the batch, not the table.

A step gathers the rows that it touches, differentiates with respect to those
rows, and writes back only them. The optimisers are the lazy forms of the usual
ones: a row that a step does not touch keeps its moments. With Adam on a CPU,
`kernels` read and update rows where they are loaded.

Shapes: R rows of a table, d their width, n rows touched by a step (with
repeats).
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mmm_jax import kernels, sampling


@flax.struct.dataclass
class Table:
  """Rows and their moments side by side.

  An update then needs one gather and one scatter, and what belongs to a row
  lies together in memory: it takes half the time of separate arrays.
  """

  packed: jax.Array  # [R, (1 + moments) * d]
  width: int = flax.struct.field(pytree_node=False)  # d
  by_kernel: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def rows(self) -> jax.Array:
    return self.packed[:, : self.width]


class Optimizer(NamedTuple):
  """`step(rows, moments, grads, rate, count) -> rows, moments`, row by row.

  `kernel([(packed, slot, links, ids, grads)], rate, count) -> [packed]` does
  all of `update_rows`, where there is one.
  """

  num_moments: int
  step: Callable
  kernel: Callable | None = None


NAMES = ("adam", "adagrad", "sgd")


def optimizer(
  name: str, *, b1: float, b2: float, eps: float, in_cpp: bool = False
) -> Optimizer:
  """The row-wise optimiser called `name`, one of NAMES.

  Args:
    name: "adam", "adagrad" or "sgd".
    b1: Adam's decay of the mean.
    b2: Adam's decay of the mean square.
    eps: added to the root that divides, Adam's or Adagrad's.
    in_cpp: whether `kernels` are loaded, and to be used.
  """

  def adam(rows, moments, grads, rate, count):
    mean = b1 * moments[0] + (1 - b1) * grads
    square = b2 * moments[1] + (1 - b2) * grads**2
    # Bias correction counts the run's steps, as dense Adam does.
    unbiased = mean / (1 - b1**count)
    scale = jnp.sqrt(square / (1 - b2**count)) + eps
    return rows - rate * unbiased / scale, (mean, square)

  def adagrad(rows, moments, grads, rate, count):
    square = moments[0] + grads**2
    return rows - rate * grads / (jnp.sqrt(square) + eps), (square,)

  def sgd(rows, moments, grads, rate, count):
    return rows - rate * grads, ()

  kernel = functools.partial(kernels.adam, b1=b1, b2=b2, eps=eps)
  known = {
    "adam": Optimizer(2, adam, kernel if in_cpp else None),
    "adagrad": Optimizer(1, adagrad),
    "sgd": Optimizer(0, sgd),
  }
  return known[name]


def create(rows: jax.Array, rule: Optimizer) -> Table:
  """A table that starts with `rows` [R, d] and zero moments."""
  zeros = [jnp.zeros_like(rows)] * rule.num_moments
  packed = jnp.concatenate([rows, *zeros], axis=1)
  return Table(packed, rows.shape[1], by_kernel=rule.kernel is not None)


class Touched(NamedTuple):
  """What a step knows of the rows of a table that it touches, to update them.

  XLA has read them with their moments. A kernel comes back for the moments; it
  has found out where the repeats are.
  """

  ids: jax.Array  # [n], PAD for none
  packed: jax.Array | None  # [n, (1 + moments) * d], zeros where an id is PAD
  slot: jax.Array  # [R] scratch
  links: jax.Array | None = None  # [n]


def touch(
  tables: dict[str, Table], slots: dict[str, jax.Array], ids: dict
) -> dict[str, Touched]:
  """What the update of the rows {table: ids [n]} needs."""
  if _by_kernel(tables):
    nothing = {name: () for name in ids}
    return _touch_by_kernel(tables, slots, ids, nothing)[1]
  read = lambda name: (
    tables[name].packed.at[ids[name]].get(mode="fill", fill_value=0)
  )
  return {name: Touched(ids[name], read(name), slots[name]) for name in ids}


def read(
  tables: dict[str, Table],
  slots: dict[str, jax.Array],
  lookups: dict[str, dict],
) -> tuple[dict[str, dict], dict[str, Touched]]:
  """Rows for {table: {use: ids [...]}}, and what their update needs.

  Returns:
    {table: {use: [..., d]}}, and `Touched` with the uses' ids one after the
    other.
  """
  uses = {name: jax.tree.leaves(each) for name, each in lookups.items()}
  sizes = {name: [ids.size for ids in each] for name, each in uses.items()}
  joined = lambda each: jnp.concatenate([ids.reshape(-1) for ids in each])
  ids = {name: joined(each) for name, each in uses.items()}
  if _by_kernel(tables):
    arrays, touched = _touch_by_kernel(tables, slots, ids, sizes)
  else:
    touched = touch(tables, slots, ids)
    arrays = {
      name: _cut(each.packed[:, : tables[name].width], sizes[name])
      for name, each in touched.items()
    }
  rows = {name: _shaped(arrays[name], lookups[name]) for name in lookups}
  return rows, touched


def _by_kernel(tables):
  return any(table.by_kernel for table in tables.values())


def _touch_by_kernel(tables, slots, ids, sizes):
  """For each table the arrays of rows of these sizes, and `Touched`."""
  found = kernels.touch(
    [
      (tables[name].packed, slots[name], ids[name], each, tables[name].width)
      for name, each in sizes.items()
    ]
  )
  arrays, touched = {}, {}
  for name, (slot, links, arrays[name]) in zip(sizes, found):
    touched[name] = Touched(ids[name], None, slot, links)
  return arrays, touched


def _cut(rows, sizes):
  return jnp.split(rows, np.cumsum(sizes)[:-1])


def _shaped(arrays, uses):
  each, structure = jax.tree.flatten(uses)
  shaped = [x.reshape(*ids.shape, -1) for x, ids in zip(arrays, each)]
  return jax.tree.unflatten(structure, shaped)


def new_slots(tables: dict[str, Table]) -> dict[str, jax.Array]:
  """The reverse index of each table, [R] int32; its content never matters."""
  return {
    name: jnp.zeros(table.packed.shape[0], jnp.int32)
    for name, table in tables.items()
  }


def update_rows(
  tables: dict[str, Table],
  touched: dict[str, Touched],
  grads: dict[str, jax.Array],
  *,
  rule: Optimizer,
  rate: jax.Array,
  count: jax.Array,
) -> tuple[dict[str, Table], dict[str, jax.Array]]:
  """Updates the touched rows, each once, with the sum of its gradients.

  Args:
    tables: by name.
    touched: rows of the tables.
    grads: [n, d] of each.
    rule: row-wise optimiser.
    rate: learning rate.
    count: this update's number, from 1.

  Returns:
    The tables, and the scratch of those that were touched.
  """
  if rule.kernel:
    updates = [
      (tables[name].packed, each.slot, each.links, each.ids, grads[name])
      for name, each in touched.items()
    ]
    packed = dict(zip(touched, rule.kernel(updates, rate, count)))
    slots = {name: each.slot for name, each in touched.items()}
  else:
    packed, slots = {}, {}
    for name, each in touched.items():
      ids, sums, slots[name] = sum_repeats(each.slot, each.ids, grads[name])
      width = tables[name].width
      new = _stepped(each.packed, sums, width, rule, rate, count)
      packed[name] = tables[name].packed.at[ids].set(new, mode="drop")
  new = {name: tables[name].replace(packed=packed[name]) for name in touched}
  return {**tables, **new}, slots


def sum_repeats(slot: jax.Array, ids: jax.Array, grads: jax.Array):
  """Adds the gradients of a row's repeats to the one that owns it.

  Repeats are found by a reverse index instead of a sort: every occurrence
  writes its place to `slot[id]`, and the one that is found there afterwards
  owns the row.

  Args:
    slot: [R] int32 scratch; any content.
    ids: [n], PAD for none.
    grads: [n, d].

  Returns:
    ids [n], PAD for all but the owners; grads [n, d], sums where an owner is;
    the scratch.
  """
  place = jnp.arange(ids.shape[0], dtype=jnp.int32)
  slot = slot.at[ids].set(place, mode="drop")
  owner = slot.at[ids].get(mode="fill", fill_value=sampling.PAD)
  owned = owner == place
  # An owner has its own gradient already.
  others = jnp.where(owned, sampling.PAD, owner)
  grads = grads.at[others].add(grads, mode="drop")
  return jnp.where(owned, ids, sampling.PAD), grads, slot


def update_dense(
  table: Table,
  ids: jax.Array,
  grads: jax.Array,
  *,
  rule: Optimizer,
  rate: jax.Array,
  count: jax.Array,
) -> Table:
  """The textbook update of every row; for comparison and whole-graph models."""
  dense = jnp.zeros_like(table.rows).at[ids].add(grads, mode="drop")
  return table.replace(
    packed=_stepped(table.packed, dense, table.width, rule, rate, count)
  )


def _stepped(packed, grads, width, rule, rate, count):
  """`rule` applied to packed rows: [n, (1 + moments) * d] -> the same."""
  rows, *moments = jnp.split(packed, 1 + rule.num_moments, axis=1)
  rows, moments = rule.step(rows, tuple(moments), grads, rate, count)
  return jnp.concatenate([rows, *moments], axis=1)
