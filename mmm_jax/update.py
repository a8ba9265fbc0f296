"""One training step on one device, chunks of steps, and the state they change.

Shapes: S data shards of this device, T steps of a chunk.
"""

import math

import flax
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from mmm_jax import (
  input_pipeline,
  kernels,
  losses,
  parallel,
  sampling,
  streams,
  tables,
)


@flax.struct.dataclass
class TrainState:
  """Everything that training changes; with the config it is the run."""

  step: jax.Array  # finished updates
  params: dict  # encoders, maps, category vectors: under optax
  opt_state: optax.OptState
  tables: dict[str, tables.Table]  # one row a user, an item, a word, ...
  categories: object  # the model's, constant within an epoch


@flax.struct.dataclass
class Series:
  """What the steps of a chunk say, a row for each: one write and one copy."""

  packed: jax.Array  # [chunk_steps, numbers]
  names: jax.tree_util.PyTreeDef = flax.struct.field(pytree_node=False)

  def by_name(self):
    """On the host: what `train_step` says, each number as [chunk_steps]."""
    return jax.tree.unflatten(self.names, np.asarray(self.packed).T)


def learning_rate(config) -> optax.Schedule:
  """Exponential decay, from the rate that belongs to the loss."""
  return optax.exponential_decay(
    config.losses[config.interaction_loss].learning_rate,
    transition_steps=config.schedule.decay_steps,
    decay_rate=config.schedule.decay_rate,
    staircase=config.schedule.staircase,
  )


def dense_optimizer(config) -> optax.GradientTransformation:
  """Adam; weight decay on encoders and maps is a remedy of ours for H1."""
  adam, decay = config.optimizer, config.remedies.encoder_decay
  decayed = lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: path[0].key != "category_vectors", params
  )
  return optax.chain(
    optax.scale_by_adam(b1=adam.b1, b2=adam.b2, eps=adam.eps),
    optax.add_decayed_weights(decay, mask=decayed) if decay
    else optax.identity(),
    optax.scale_by_learning_rate(learning_rate(config)),
  )  # fmt: skip


def row_rule(config) -> tables.Optimizer:
  adam = config.optimizer
  return tables.optimizer(
    config.tables.optimizer,
    b1=adam.b1,
    b2=adam.b2,
    eps=adam.eps,
    in_cpp=kernels.load(config),
  )


def create_state(config, *, params, rows: dict, categories) -> TrainState:
  """The state before the first step.

  Args:
    config: the run's config.
    params: dense parameters.
    rows: {table: [R, d]} starting values of the tables.
    categories: the model's, before the first K-means.
  """
  rule = row_rule(config)

  @jax.jit  # one compilation instead of one for every shape
  def with_moments(params, rows):
    packed = {name: tables.create(start, rule) for name, start in rows.items()}
    return dense_optimizer(config).init(params), packed

  opt_state, packed = with_moments(params, rows)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=opt_state,
    tables=packed,
    categories=categories,
  )


def train_step(
  state: TrainState, slots, batch, *, model, config, steps, weights
):
  """One update; to be mapped over devices on the axis "data".

  Differentiates Eq. 17 with respect to the dense parameters and to the table
  rows that the batch touches, adds the gradients of all devices, and applies
  them everywhere alike.

  Args:
    state: replicated.
    slots: scratch of the row updates, {table: [R]}.
    batch: this device's part.
    model: the Flax module.
    config: the run's config.
    steps: steps of an epoch.
    weights: {term: weight in Eq. 17}.

  Returns:
    The new state, the scratch, {name: value} of the loss and its terms over
    all devices, and {name: (sum, number of rows)} of what is only watched:
    a step may hold no such row.
  """

  def objective(params, rows):
    values, watched = term_values(
      params, rows, batch, state, model=model, config=config, steps=steps
    )
    loss = sum(weights[name] * value for name, value in values.items())
    sums = {name: (term.total, term.count) for name, term in watched.items()}
    return loss, ({"loss": loss, **values}, sums)

  rows, touched = tables.read(state.tables, slots, model.lookups(batch))
  grads, seen = jax.grad(objective, argnums=(0, 1), has_aux=True)(
    state.params, rows
  )
  dense_grads, (values, watched) = lax.psum((grads[0], seen), parallel.AXIS)
  updates, opt_state = dense_optimizer(config).update(
    dense_grads, state.opt_state, state.params
  )
  new_tables, slots = _update_tables(state, slots, touched, grads[1], config)
  values["learning_rate"] = learning_rate(config)(state.step)
  state = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    tables=new_tables,
  )
  return state, slots, (values, watched)


def term_values(params, rows, batch, state, *, model, config, steps):
  """The terms of Eq. 17 without their weights, and what is only watched.

  Returns:
    {name: this device's share of the term} and {name: losses.Term}.
  """
  terms, watched = model.apply(
    {"params": params}, rows, batch, state.categories, method="loss"
  )
  if config.normalisation == "paper_sums":
    return {name: _sums(term, steps) for name, term in terms.items()}, watched
  return _means(terms), watched


def table_gradients(state, slots, batch, *, model, config, steps, weights):
  """How much each weighted term pulls at the tables in one batch.

  Arguments are those of `train_step`.

  Returns:
    {term: norm of its weighted gradient over all rows of all tables, the
    category vectors among them}.
  """
  rows, touched = tables.read(state.tables, slots, model.lookups(batch))
  small = {n: x for n, x in state.params.items() if n == "category_vectors"}

  def weighted(small, rows):
    values, _ = term_values(
      {**state.params, **small},
      rows,
      batch,
      state,
      model=model,
      config=config,
      steps=steps,
    )
    return {name: weights[name] * value for name, value in values.items()}

  values, pull_back = jax.vjp(weighted, small, rows)

  def square(chosen):
    one = {n: jnp.where(chosen == at, 1.0, 0.0) for at, n in enumerate(values)}
    small_grads, grads = pull_back(one)
    small_grads = lax.psum(small_grads, parallel.AXIS)
    total = sum(jnp.sum(grad**2) for grad in small_grads.values())
    for name, read in touched.items():
      width = state.tables[name].width
      ids, grad = lax.all_gather(
        (read.ids, _side_by_side(grads[name], width)), parallel.AXIS, tiled=True
      )
      ids, grad, _ = tables.sum_repeats(slots[name], ids, grad)
      owned = ids != sampling.PAD
      total += jnp.sum(jnp.where(owned[:, None], grad, 0) ** 2)
    return total

  squares = lax.map(square, jnp.arange(len(values)))
  return dict(zip(values, jnp.sqrt(squares)))


def _side_by_side(grads, width):
  """Gradients of the uses of a table as [n, d]."""
  parts = jax.tree.leaves(grads)
  return jnp.concatenate([part.reshape(-1, width) for part in parts])


def _means(terms: dict[str, losses.Term]):
  """This device's share of each term's mean over the global batch."""
  # Side by side, as an operation on a single number is a kernel of its own.
  totals = jnp.stack([term.total for term in terms.values()])
  counts = jnp.stack([term.count for term in terms.values()])
  counts = lax.psum(counts, parallel.AXIS)
  return dict(zip(terms, totals / jnp.maximum(counts, 1e-9)))


def _sums(term: losses.Term, steps: int):
  """This device's share of an unbiased estimate of the literal Eq. 17.

  An epoch visits everything once, so a step sees a `steps`-th of each sum.
  """
  if term.replicated:
    return term.total / lax.axis_size(parallel.AXIS)
  return term.total * steps


def _update_tables(state, slots, touched, grads, config):
  rule, rate = row_rule(config), learning_rate(config)(state.step)
  settings = dict(rule=rule, rate=rate, count=state.step + 1)
  grads = {n: _side_by_side(grads[n], state.tables[n].width) for n in touched}
  if lax.axis_size(parallel.AXIS) > 1:
    ids = {name: each.ids for name, each in touched.items()}
    ids, grads = lax.all_gather((ids, grads), parallel.AXIS, tiled=True)
    # The scratch that was used, or XLA would copy it to keep the other.
    slots = {**slots, **{name: each.slot for name, each in touched.items()}}
    touched = tables.touch(state.tables, slots, ids)
  if config.tables["update"] == "dense":
    new = {
      n: tables.update_dense(state.tables[n], each.ids, grads[n], **settings)
      for n, each in touched.items()
    }
    return {**state.tables, **new}, slots
  new, used = tables.update_rows(state.tables, touched, grads, **settings)
  return new, {**slots, **used}


def make_train_chunk(model, config, sizes, weights, engine, *, resident: bool):
  """Compiles a dispatch of up to `chunk_steps` steps, and of their examples.

  Returns:
    A function of (num_steps, state, shards, shared, plan, content) that gives
    the state after `num_steps` steps, and the `Series` of what `train_step`
    says of each (zeros behind them). The state's memory is given back to it.
    A scan whose length is an argument, so that a short last chunk of an epoch
    is not compiled again.
  """
  draw = _batch_drawer(config, sizes, engine, resident)
  length = chunk_steps(config, sizes)

  @jax.jit  # so that it is traced once, for its shapes and for the loop
  def step_at(at, state, slots, ahead, *data):
    examples = jax.tree.map(lambda each: each[at], ahead)
    batch = draw(at, state.step, examples, *data)
    return train_step(
      state,
      slots,
      batch,
      model=model,
      config=config,
      steps=sizes.steps,
      weights=weights,
    )

  def train_chunk(num_steps, state, *data):
    # All at once: step by step, a draw's many small operations take longer to
    # start than to run. What lies behind `num_steps` is not used.
    draw_ahead = lambda step: _examples(step, config, sizes, *data)
    ahead = jax.vmap(draw_ahead)(state.step + jnp.arange(length))

    def body(at, carry):
      state, slots, series = carry
      state, slots, values = step_at(at, state, slots, ahead, *data)
      row = jnp.stack(jax.tree.leaves(values))
      return state, slots, series.at[at].set(row)

    # Of one type with the loop's, or the step is traced a second time.
    first = jnp.int32(0)
    slots = tables.new_slots(state.tables)
    values = jax.eval_shape(step_at, first, state, slots, ahead, *data)[2]
    numbers, names = jax.tree.flatten(values)
    series = jnp.zeros((length, len(numbers)))
    carry = (state, slots, series)
    state, _, series = lax.fori_loop(first, num_steps, body, carry)
    return state, Series(series, names)

  whole, part = parallel.REPLICATED, parallel.SHARDED
  return engine.map(
    train_chunk,
    (parallel.HOST, whole, part, whole, part, part),
    (whole, whole),
    donate=(1,),
  )


def make_table_gradients(
  model, config, sizes, weights, engine, *, resident: bool
):
  """Compiles `table_gradients` for the first batch of a chunk.

  Returns:
    A function of (num_steps, state, shards, shared, plan, content): the length
    of the chunk, the state behind it, and the chunk's data.
  """
  draw = _batch_drawer(config, sizes, engine, resident)

  def gradients(num_steps, state, *data):
    step = state.step - num_steps
    examples = _examples(step, config, sizes, *data)
    return table_gradients(
      state,
      tables.new_slots(state.tables),
      draw(jnp.int32(0), step, examples, *data),
      model=model,
      config=config,
      steps=sizes.steps,
      weights=weights,
    )

  whole, part = parallel.REPLICATED, parallel.SHARDED
  return engine.map(
    gradients, (parallel.HOST, whole, part, whole, part, part), whole
  )


def _batch_drawer(config, sizes, engine, resident):
  """A function that draws the rest of a step's batch, at a place in a chunk."""
  cut = input_pipeline.at_places if resident else input_pipeline.at_step

  def draw(at, step, examples, shards, shared, plan, content):
    places = plan.items[:, lax.rem(step, sizes.steps)]
    return streams.draw_batch(
      shards,
      shared,
      plan,
      examples,
      cut(content, places, at),
      step,
      sizes=sizes,
      config=config,
      num_devices=engine.num_devices,
    )

  return draw


def _examples(step, config, sizes, shards, shared, plan, content):
  del content
  return streams.draw_examples(
    shards, shared, plan, step, sizes=sizes, config=config
  )


def chunk_steps(config, sizes) -> int:
  """Steps of a dispatch, at most `log.every_steps`; the last may have fewer.

  As equal as they can be: for a short one, too, this many are drawn ahead.
  """
  dispatches = math.ceil(sizes.steps / config.log.every_steps)
  return math.ceil(sizes.steps / dispatches)


def average(watched: dict[str, tuple]) -> dict[str, float | None]:
  """Means over all rows of a chunk, None where it held none.

  Args:
    watched: {name: (sums, numbers of rows)} of its steps.
  """
  return {
    name: float(np.sum(total) / np.sum(count)) if np.sum(count) else None
    for name, (total, count) in watched.items()
  }


@jax.jit
def _finite(leaves):
  return [jnp.isfinite(leaf).all() for leaf in leaves]


def not_finite(state: TrainState) -> str:
  """Path of a leaf of a state on one device that is not finite, or ''."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  good = jax.device_get(_finite([leaf for _, leaf in leaves]))
  bad = [path for (path, _), fine in zip(leaves, good) if not fine]
  return jax.tree_util.keystr(bad[0], simple=True, separator=".") if bad else ""


def first_non_finite(values: dict[str, np.ndarray]) -> tuple[int, str] | None:
  """Place in the chunk and name of the first value that is not finite."""
  bad = {
    name: int(np.argmin(np.isfinite(series)))
    for name, series in values.items()
    if not np.isfinite(series).all()
  }
  if not bad:
    return None
  name = min(bad, key=lambda name: (bad[name], name == "loss"))
  return bad[name], name
