"""Training, from a config to the files of a run.

`train_and_evaluate` reads as the story of a run: assemble, restore, train
epoch by epoch with K-means and validation in between, test once at the end.
"""

import contextlib
import functools
import json
import logging
import pathlib
import signal
import time

import jax
import numpy as np

from mmm_jax import (
  assemble,
  checkpoint,
  clustering,
  command,
  input_pipeline,
  kernels,
  logs,
  manifest,
  parallel,
  sampling,
  scoring,
  streams,
  update,
  validate,
)
from mmm_jax import (
  workdir as folders,
)
from mmm_jax.datasets import splits

SELECT = "ndcg@20"  # of `full` validation, for every model

_LOG = logging.getLogger("mmm_jax")


class Trainer:
  """The running state of a run, and the acts that its loop consists of."""

  def __init__(
    self, run: assemble.Run, workdir: pathlib.Path, engine: parallel.Engine
  ):
    self.run, self.workdir, self.engine = run, workdir, engine
    self.config, self.sizes = run.config, run.sizes
    self.has_valid = bool((run.split.part == splits.VALID).any())
    # First, because it refuses a folder of other data.
    self.manifest = manifest.Manifest(
      workdir,
      data=run.dataset.fingerprint,
      split=run.split.fingerprint,
      primary=jax.process_index() == 0,
    )
    self.manifest.values["statistics"] = run.dataset.statistics
    self.manifest.values["facts"] = run.facts
    # Before signals wait for a checkpoint, as it may wait for a compiler.
    self._first_state = assemble.initial_state(run)
    self.checkpoints = checkpoint.open_manager(
      workdir.absolute() / "checkpoints", keep=run.config.checkpoint.keep
    )
    self.log = logs.RunLog(
      workdir,
      tensorboard=run.config.log.tensorboard,
      primary=jax.process_index() == 0,
    )
    self._contents = self._contents_ahead()
    self.stop_asked = False
    self._saved_at = time.monotonic()

  # -- start

  def start(self):
    """Puts data and the state, new or restored, on the devices."""
    run, engine = self.run, self.engine
    template = scoring.to_keep(self._first_state, self.config)
    del self._first_state  # a run holds no second one
    found = checkpoint.restore(self.checkpoints, template)
    kept = template if found is None else found
    state, self.best = kept["state"], kept["best"]
    self.average = kept.get("average")
    self.step = int(state.step)
    parallel.check_alike("the checkpoint they read", str(self.step))
    last = self.log.last_step()
    if found is not None or last:
      self.manifest.resumed(step=self.step, last_step=last)
      redo = max(last - self.step, 0)
      _LOG.info("resumed at step %d; %d to redo", self.step, redo)
    self.log.resume(self.step)
    self.state = engine.replicate(state)
    self.shards = engine.shard(engine.own(run.shards))
    self.shared = engine.replicate(run.shared)
    resident = run.content.fits(self.config.input.content_budget_mb)
    self._make_functions(resident)
    self.resident = None
    if resident:
      self.resident = parallel.together(
        lambda: input_pipeline.load_resident(
          run.content,
          engine.own(run.shards.items.ids["item"]),
          engine,
          self.config,
        )
      )
    if not self.step and self._categories_due(0):
      self.cluster(0)
    self.manifest.values["content"] = "resident" if resident else "streamed"
    self.manifest.write()

  def _make_functions(self, resident):
    run, engine = self.run, self.engine
    part = parallel.SHARDED
    self._plan = engine.map(
      functools.partial(
        streams.plan, sizes=run.sizes, in_cpp=kernels.load(self.config)
      ),
      (part, parallel.HOST),
      part,
    )
    model = (run.model, self.config, run.sizes, run.weights, engine)
    self._chunk = update.make_train_chunk(*model, resident=resident)
    self._gradients = update.make_table_gradients(*model, resident=resident)
    self._seed, self._follow = clustering.make_clustering(run, engine)

  # -- an epoch

  def finished(self) -> bool:
    late = int(self.best.evaluations_since) >= self.config.eval.patience
    return late or self.step >= self.config.epochs * self.sizes.steps

  def train_epoch(self, progress: logs.Progress):
    """The steps that are left of the current epoch, chunk by chunk."""
    epoch, at = divmod(self.step, self.sizes.steps)
    with parallel.bounded("drawing the order of an epoch"):
      plan = self._plan(self.shards, np.int32(epoch))
    for num_steps in self._chunks_ahead(at):
      started = time.perf_counter()  # the wait for content counts
      content = next(self._contents)
      with parallel.bounded(f"training from step {self.step}"):
        self.state, series = self._chunk(
          np.int32(num_steps),
          self.state,
          self.shards,
          self.shared,
          plan,
          content,
        )
        values, watched = self.engine.first(series).by_name()
        row = self._read(values, watched, num_steps)
      self.step += num_steps
      trained = self._positives(num_steps)
      row["interactions_per_s"] = trained / (time.perf_counter() - started)
      at_end = self.step % self.sizes.steps == 0
      if at_end and self.gradients_due(epoch + 1):
        row |= self.measure_gradients(num_steps, plan, content)
      if at_end:
        row |= self.between_epochs(epoch + 1)
      self.log.write(self.step, {"epoch": self.step / self.sizes.steps, **row})
      progress.update(trained, self._note(row))
      self.save_if_due()

  def _read(self, values, watched, num_steps) -> dict:
    """A row to log of what the steps of a chunk say."""
    values = {name: series[:num_steps] for name, series in values.items()}
    self._check_finite(values)
    row = {name: float(np.mean(series)) for name, series in values.items()}
    row["learning_rate"] = float(values["learning_rate"][-1])
    return row | update.average(watched)

  def _positives(self, num_steps):
    """Training positives of the last steps; an epoch's last step is short."""
    size = self.config.batch_size
    end = (self.step - 1) % self.sizes.steps + 1
    first = (end - num_steps) * size
    return min(end * size, self.sizes.num_train) - first

  def _chunks_ahead(self, at):
    """Numbers of steps of the chunks from step `at` of an epoch on."""
    length = update.chunk_steps(self.config, self.sizes)
    starts = range(at, self.sizes.steps, length)
    return [min(length, self.sizes.steps - start) for start in starts]

  def _contents_ahead(self):
    """Yields the content of every chunk from the current step on."""
    while self.resident is not None:
      yield self.resident
    yield from input_pipeline.stream(
      self.run.content,
      self._orders_ahead(),
      update.chunk_steps(self.config, self.sizes),
      self.engine,
      self.config,
    )

  def _orders_ahead(self):
    """Yields the item ids of every epoch from the current step on.

    So the first chunk of an epoch is fetched while the last one of the epoch
    before is trained and validated.
    """
    ids = self.engine.own(self.run.shards.items.ids["item"])
    shard = np.arange(len(ids))[:, None, None]
    first, at = divmod(self.step, self.sizes.steps)
    for epoch in range(first, self.config.epochs):
      plan = self._plan(self.shards, np.int32(epoch))
      places = self.engine.local(plan.items)
      order = np.where(
        places < 0, sampling.PAD, ids[shard, np.maximum(places, 0)]
      )
      yield order[:, at:]
      at = 0

  def _check_finite(self, values):
    bad = update.first_non_finite(values)
    if bad is None:
      return
    at, name = bad
    self._stop_diverged(
      f"{name} became {values[name][at]} in step {self.step + at + 1}"
    )

  def _check_state(self):
    """The losses of a step are of the parameters before its update."""
    bad = update.not_finite(self.engine.first(self.state))
    if bad:
      self._stop_diverged(f"{bad} is not finite after step {self.step}")

  def _stop_diverged(self, what):
    good = self.checkpoints.latest_step()
    where = "none" if good is None else f"step {good}"
    raise command.NonFiniteError(
      f"{what}; last good checkpoint: {where}. Lower"
      f" losses.{self.config.interaction_loss}.learning_rate, or look at the"
      " weights of that term."
    )

  def _note(self, row):
    metric = float(self.best.metric)
    best = f", best {SELECT} {metric:.4f}" if np.isfinite(metric) else ""
    epoch = self.step / self.sizes.steps
    return f"epoch {epoch:.1f}, loss {row['loss']:.4g}{best}"

  # -- between epochs

  def between_epochs(self, epoch: int) -> dict:
    """K-means and validation after `epoch` epochs; returns a row to log."""
    row = dict(self.run.facts)
    if self._categories_due(epoch):
      row |= self.cluster(epoch)
    if self.config.remedies.ema_decay:
      self.average = self._average(epoch)
    if self.validation_due(epoch):
      row |= self.validate()
    return row

  def _average(self, epoch):
    now = scoring.snapshot(self.engine.first(self.state), -np.inf)
    # First values say nothing, those of categories until there are some.
    seeded = self.config.kmeans.warmup_epochs * bool(self.config.num_categories)
    if epoch <= max(1, seeded):
      return now
    decay = self.config.remedies.ema_decay
    return scoring.averaged(self.average, now, decay)

  def gradients_due(self, epoch: int) -> bool:
    return self.config.log.gradients and self.validation_due(epoch)

  def measure_gradients(self, num_steps, plan, content) -> dict:
    """How much each term pulls at the tables, in a batch of the last chunk."""
    with parallel.bounded("measuring gradients"):
      norms = self._gradients(
        np.int32(num_steps), self.state, self.shards, self.shared, plan, content
      )
      norms = jax.device_get(self.engine.first(norms))
    return {f"gradient/{term}": float(norm) for term, norm in norms.items()}

  def validation_due(self, epoch: int) -> bool:
    """Whether the parameters are scored after `epoch` epochs."""
    last = epoch == self.config.epochs
    due = last or epoch % self.config.eval.every_epochs == 0
    return self.has_valid and due

  def _categories_due(self, epoch):
    wanted = self.config.num_categories
    return wanted and epoch >= self.config.kmeans.warmup_epochs

  def cluster(self, epoch: int) -> dict:
    before = np.array(self.engine.first(self.state).categories.assignment)
    warm = epoch > self.config.kmeans.warmup_epochs
    with parallel.bounded("K-means"):
      if warm:
        self.state, found = self._follow(self.state)
      else:
        self.state, found = self._seed(self.state, clustering.key(self.config))
      found = jax.device_get(self.engine.first(found))
    return clustering.describe_clusters(
      found, before, self.run.dataset.category
    )

  def validate(self) -> dict:
    """Scores the validation part; keeps the parameters if they are the best."""
    self._check_state()
    with self.manifest.timed("validation"):
      now = scoring.current(self.kept())
      result, _ = scoring.score_protocols(self.run, now, ("valid",), ("full",))
    metrics = result["full"]["valid"]
    if metrics[SELECT] > self.best.metric:
      self.best = now.replace(metric=np.float64(metrics[SELECT]))
    else:
      since = self.best.evaluations_since + np.int32(1)
      self.best = self.best.replace(evaluations_since=since)
    return {f"valid/{name}": value for name, value in metrics.items()}

  # -- saving

  def kept(self) -> dict:
    """What a checkpoint holds, as `scoring.to_keep` has it."""
    average = {} if self.average is None else {"average": self.average}
    state = self.engine.first(self.state)
    return {"state": state, "best": self.best, **average}

  def save(self):
    self._check_state()
    parallel.on_first(lambda: folders.check_there(self.workdir))
    with self.manifest.timed("checkpoints"):
      checkpoint.save(self.checkpoints, self.step, self.kept())
    self.manifest.values["step"] = self.step
    self.manifest.values["best_step"] = int(self.best.step)
    self.manifest.write()
    self._saved_at = time.monotonic()

  def save_if_due(self):
    """Saves after a while, and before stopping if a signal asked to."""
    waited = time.monotonic() - self._saved_at
    due = waited >= self.config.checkpoint.every_seconds
    # A signal may have reached one process alone, and clocks differ.
    stop, due = parallel.any_process([self.stop_asked, due])
    if stop or due:
      self.save()
    if stop:
      raise command.Stopped(
        f"stopped at step {self.step}; the same command continues"
      )

  def close(self):
    self._contents.close()
    self.log.close()
    self.checkpoints.close()


def train(trainer: Trainer) -> scoring.Best:
  """Trains to the end or to early stopping; the parameters to report."""
  total = trainer.config.epochs * trainer.sizes.num_train
  progress = logs.Progress(
    total,
    done=int(
      total * trainer.step / (trainer.config.epochs * trainer.sizes.steps)
    ),
    primary=jax.process_index() == 0,
  )
  with contextlib.closing(progress), trainer.manifest.timed("training"):
    while not trainer.finished():
      trainer.train_epoch(progress)
  trainer.save()
  return scoring.reported(trainer.kept())


def train_and_evaluate(config, workdir, *, started=lambda: None) -> dict:
  """Trains what a config describes and writes the files of the run.

  Args:
    config: a full config, as `configs/mmm.py` gives it.
    workdir: the run's folder; an unfinished run in it continues.
    started: called once the input proved good and training is to begin.

  Returns:
    What `result.json` holds.

  Raises:
    errors.InputError: data, config or folder are wrong.
    command.NonFiniteError: a loss term is not finite.
    command.Stopped: SIGTERM or SIGINT came; the checkpoint is written.
  """
  workdir = pathlib.Path(workdir)
  validate.check(config)
  _check_alike(config)
  with contextlib.ExitStack() as held:

    def enter():
      held.enter_context(folders.locked(workdir))
      folders.check_config(config, workdir)
      return folders.look(workdir), folders.read_result(workdir)

    # What the folder holds, others might see late on a shared file system.
    seen, result = parallel.on_first(enter)
    if result is not None:
      return result
    timeout_s = config.parallel.timeout_s
    parallel.together(
      lambda: folders.check_shared(workdir, seen, timeout_s=timeout_s)
    )
    engine = parallel.make_engine(config)
    run = assemble.assemble(config)
    fingerprints = run.dataset.fingerprint, run.split.fingerprint
    parallel.check_alike("their data or split", json.dumps(fingerprints))
    trainer = Trainer(run, workdir, engine)
    parallel.on_first(lambda: folders.write_inputs(run, workdir))
    started()
    with contextlib.closing(trainer):
      with stopping(trainer):
        trainer.start()
        best = train(trainer)
      with trainer.manifest.timed("evaluation"):
        result, per_user = scoring.score_protocols(
          run, best, ("valid", "test"), config.eval.protocols
        )
      trainer.manifest.write(finished=True)
      return parallel.on_first(
        lambda: folders.write_results(run, result, per_user, workdir)
      )


def _check_alike(config):
  """Raises InputError if other processes of the run have another config."""
  values = validate.plain(config, without=validate.PLACES)
  parallel.check_alike("their config", json.dumps(values, sort_keys=True))


@contextlib.contextmanager
def stopping(trainer: Trainer):
  """SIGTERM and SIGINT ask the trainer to save and stop after its chunk."""

  def ask(*_):
    trainer.stop_asked = True

  try:
    old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # not in the main thread, as in some notebooks
    old = {}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
