"""Search for a config by validation alone, with Optuna.

A trial is a run that ends before the test part is scored. The study is a
journal to which any number of processes may write; stopped at any moment, the
same command goes on with it.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import pathlib
import platform
import tempfile
import time

import jax
import optuna
from optuna.storages import journal

from mmm_jax import (
  assemble,
  command,
  errors,
  files,
  logs,
  parallel,
  tabulate,
  train,
  validate,
)

_LOG = logging.getLogger("mmm_jax")
_STARTS = 5  # trials at random before TPE guesses, and before any is pruned
_NAME = "study"  # of the only one in a journal
_STATE = optuna.trial.TrialState
_NEVER = 1e9  # seconds
_AFTER = (1, 5, 10, 20, 30)  # trials, in the table
_HEADS = ("study", "of", "on", "trials (pruned)", "hours", "keys searched")


def open_study(path: str) -> optuna.Study:
  """The study in a journal, new or as it was left."""
  with files.explained(path):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  storage = _storage(path)
  try:  # to create one writes a line, even if it is there
    return optuna.load_study(study_name=_NAME, storage=storage)
  except KeyError:
    return optuna.create_study(
      storage=storage,
      study_name=_NAME,
      direction="maximize",
      load_if_exists=True,  # another process may have been faster
    )


class _JournalLock(journal.JournalFileSymlinkLock):
  """Drops the beginning of a line that a kill or a full disk has cut short.

  Who holds the lock is alone. With the next line appended to it, Optuna could
  read none of what follows.
  """

  def __init__(self, path, **options):
    # The lock is a link to it, which from its own folder leads elsewhere if the
    # path is relative; of one that leads nowhere Optuna waits for ever.
    self._path = os.path.abspath(path)
    super().__init__(self._path, **options)

  def acquire(self) -> bool:
    held = super().acquire()
    try:
      self._drop_cut_line()
    except BaseException:
      self.release()
      raise
    return held

  def _drop_cut_line(self):
    with open(self._path, "rb+") as file:
      end = file.seek(0, os.SEEK_END)
      file.seek(max(end - 1, 0))
      if file.read() not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _storage(path):
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  try:
    return optuna.storages.JournalStorage(
      journal.JournalFileBackend(path, _JournalLock(path))
    )
  except (json.JSONDecodeError, KeyError, OSError) as error:
    raise errors.InputError(
      f"--study: {path} is not a journal of trials ({error})"
    ) from error


def search(
  make_config, space: dict, about: dict, path, *, trials: int, budget: float
) -> optuna.Study:
  """Runs trials until `trials` have begun or `budget` seconds are over.

  Args:
    make_config: function that gives the config from which trials start.
    space: {key: ("log" or "uniform", low, high), or a list of choices}.
    about: what the study is of, names and a hash of the config; a journal of
      something else, or with another space, is refused.
    path: the journal.
    trials: how many, with those of earlier calls and of other processes.
    budget: no trial begins after so many seconds; the one under way finishes.

  Returns:
    The study.

  Raises:
    errors.InputError: the journal holds another study.
  """
  study = open_study(path)
  _check_same(study, {**about, "space": _plain(space)}, path)
  end = time.monotonic() + budget
  while time.monotonic() < end:
    with _alone(path):
      _give_up_dead_trials(study)
      if _begun(study) >= trials:
        break
      config = make_config()
      trial = _ask(study, config, space)
    started = time.monotonic()
    value, state = _run_trial(trial, config, space)
    trial.set_user_attr("seconds", time.monotonic() - started)
    study.tell(trial, value, state)
    _LOG.info(_trial_line(study, trial.number))
    jax.clear_caches()  # the next trial has other shapes
  return study


@contextlib.contextmanager
def _alone(path):
  """Of all processes on a study, one at a time begins a trial."""
  with open(path, "ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _check_same(study, about, path):
  known = study.user_attrs.get("about")
  if known is None:
    study.set_user_attr("about", about)
  elif known != about:
    differing = [key for key in about if known.get(key) != about[key]]
    raise errors.InputError(
      f"{path} is a study with another {', '.join(differing)}; give another"
      " --study"
    )


def _plain(space):
  """As it comes back from the journal."""
  return {key: list(values) for key, values in space.items()}


def _begun(study) -> int:
  begun = (_STATE.RUNNING, _STATE.COMPLETE, _STATE.PRUNED)
  return sum(trial.state in begun for trial in study.get_trials(False))


def _give_up_dead_trials(study):
  """Trials whose process is gone are tried again from the beginning."""
  for trial in study.get_trials(deepcopy=False):
    if trial.state == _STATE.RUNNING and not _alive(trial.user_attrs):
      study.tell(trial.number, state=_STATE.FAIL)
      study.enqueue_trial(trial.params)


def _alive(attributes) -> bool:
  if "pid" not in attributes:  # killed before `sign`, as who asks is alone
    return False
  if attributes.get("host") != platform.node():
    return True  # of another machine: who knows
  try:
    os.kill(attributes["pid"], 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # somebody else's
    return True
  return attributes["pid"] != os.getpid()


def _ask(study, config, space):
  """The next trial: the config as it stands, then what TPE proposes."""
  number = len(study.get_trials(deepcopy=False))
  if not number:
    study.enqueue_trial(_values_now(config, space))
  # Anew for every trial, so that a study that was stopped goes on alike.
  study.sampler = optuna.samplers.TPESampler(
    n_startup_trials=_STARTS,
    constant_liar=True,
    seed=config.seed + number,
  )
  study.pruner = optuna.pruners.MedianPruner(
    n_startup_trials=_STARTS,
    n_warmup_steps=config.eval.patience * config.eval.every_epochs,
  )
  trial = study.ask()
  sign(trial)
  return trial


def sign(trial) -> None:
  """Says whose trial it is, for the day on which its process is gone."""
  trial.set_user_attr("host", platform.node())
  trial.set_user_attr("pid", os.getpid())


def _values_now(config, space) -> dict:
  """What the config has for the keys of the space, where it lies inside."""
  values = dict(validate.leaves(config))
  now = {}
  for key, wanted in space.items():
    if isinstance(wanted, list):
      inside = values[key] in wanted
    else:
      inside = wanted[1] <= values[key] <= wanted[2]
    if inside:
      now[key] = values[key]
  return now


def suggest(trial, space: dict) -> dict:
  """A value for every key of the space."""
  values = {}
  for key, wanted in space.items():
    if isinstance(wanted, list):
      values[key] = trial.suggest_categorical(key, wanted)
    else:
      scale, low, high = wanted
      values[key] = trial.suggest_float(key, low, high, log=scale == "log")
  return values


def _run_trial(trial, config, space):
  """Trains to early stopping; the best validation metric and how it ended."""
  config.update_from_flattened_dict(suggest(trial, space))
  config.checkpoint.every_seconds = _NEVER
  config.log.tensorboard = config.log.gradients = False
  validate.check(config)
  run = assemble.assemble(config)
  with tempfile.TemporaryDirectory(prefix="mmm_jax-trial-") as workdir:
    engine = parallel.make_engine(config)
    trainer = train.Trainer(run, pathlib.Path(workdir), engine)
    with contextlib.closing(trainer):
      if not trainer.has_valid:
        raise errors.InputError(
          f"split {config.split.protocol!r} has no validation part to tune on"
        )
      try:
        return _train(trial, trainer)
      except command.NonFiniteError as error:
        _LOG.info("trial %d: %s", trial.number, error)
        return None, _STATE.PRUNED


def _train(trial, trainer):
  progress = logs.Progress(
    trainer.config.epochs * trainer.sizes.num_train, done=0, primary=True
  )
  trainer.start()
  with contextlib.closing(progress):
    while not trainer.finished():
      trainer.train_epoch(progress)
      epoch = trainer.step // trainer.sizes.steps
      if not trainer.validation_due(epoch):
        continue
      trial.report(float(trainer.best.metric), epoch)
      if trial.should_prune():
        return None, _STATE.PRUNED  # Optuna takes the value just reported
  trial.set_user_attr(
    "best_epoch", int(trainer.best.step) // trainer.sizes.steps
  )
  return float(trainer.best.metric), _STATE.COMPLETE


def _trial_line(study, number) -> str:
  trial = study.get_trials(deepcopy=False)[number]
  value = "-" if trial.value is None else f"{trial.value:.4f}"
  return (
    f"trial {number} {trial.state.name.lower()}: {value} in"
    f" {trial.user_attrs['seconds']:.0f} s; best so far"
    f" {best_so_far(study)[-1]:.4f}"
  )


def summary(study) -> str:
  """The best trial, as flags of `mmm_jax.main`."""
  try:
    best = study.best_trial
  except ValueError:
    return "no trial has been completed"
  lines = [
    f"trial {best.number}: {best.value:.4f} after"
    f" {best.user_attrs['best_epoch']} epochs, of"
    f" {len(best_so_far(study))} trials",
    *(f"--config.{key}={value}" for key, value in best.params.items()),
  ]
  return "\n".join(lines)


def read_studies(paths: list[str]) -> list[optuna.Study]:
  """The studies of journals.

  Raises:
    errors.InputError: there is none, or it is something else.
  """
  return [_read_study(path) for path in paths]


def _read_study(path):
  if not pathlib.Path(path).exists():
    raise errors.InputError(f"--study: {path} is not there")
  storage = _storage(path)
  try:
    study = optuna.load_study(study_name=_NAME, storage=storage)
  except KeyError:
    study = None
  if study is None or "about" not in study.user_attrs:
    raise errors.InputError(f"--study: {path} holds no study of `tune` yet")
  return study


def sizes_table(studies: list[optuna.Study]) -> tabulate.Table:
  """Sizes of studies, and the best validated metric as they went on."""
  heads = [*_HEADS, *(f"best after {n}" for n in _AFTER), "after all"]
  return heads, [_study_line(n, study) for n, study in enumerate(studies, 1)]


def _study_line(number, study):
  about, curve = study.user_attrs["about"], best_so_far(study)
  trials = study.get_trials(deepcopy=False)
  pruned = sum(trial.state == _STATE.PRUNED for trial in trials)
  seconds = sum(trial.user_attrs.get("seconds", 0) for trial in trials)
  return [
    str(number),
    about["model"],
    about["dataset"],
    f"{len(curve)} ({pruned})",
    f"{seconds / 3600:.1f}",
    str(len(about["space"])),
    *(f"{curve[n - 1]:.4f}" if n <= len(curve) else "–" for n in _AFTER),
    f"{curve[-1]:.4f}" if curve else "–",
  ]


def spaces_table(studies: list[optuna.Study]) -> tabulate.Table:
  """What was searched: keys, their ranges, and by which of the studies."""
  found = {}
  for number, study in enumerate(studies, 1):
    for key, wanted in study.user_attrs["about"]["space"].items():
      found.setdefault((key, _range(wanted)), []).append(str(number))
  lines = [
    [
      key,
      wanted,
      "all" if len(numbers) == len(studies) else ", ".join(numbers),
    ]
    for (key, wanted), numbers in found.items()
  ]
  return ["key", "range", "studies"], lines


def _range(wanted) -> str:
  if wanted[0] in ("log", "uniform"):
    scale, low, high = wanted
    return f"{low:g} to {high:g}, {scale}"
  return ", ".join(map(str, wanted))


def best_so_far(study) -> list[float]:
  """The best value of complete trials after each ended trial, in order."""
  best, curve = -math.inf, []
  for trial in study.get_trials(deepcopy=False):
    if trial.state == _STATE.COMPLETE:
      best = max(best, trial.value)
    if trial.state in (_STATE.COMPLETE, _STATE.PRUNED):
      curve.append(best)
  return curve
