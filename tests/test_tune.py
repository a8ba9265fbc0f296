"""Searches: what a trial may see, and how a study goes on."""

import os
import platform

import numpy as np
import optuna
import pytest

from mmm_jax import errors, tune, validate
from mmm_jax.datasets import splits
import runs

SPACE = {
  "model.dim": [8, 16],
  "losses.squared.learning_rate": ("log", 1e-3, 1e-1),
}
SPACES = [  # as a table
  ["model.dim", "8, 16", "all"],
  ["losses.squared.learning_rate", "0.001 to 0.1, log", "all"],
]


def make_config():
  config = runs.config("tiny,pmf")
  config.dataset.data_dir = str(runs.data_dir())
  config.epochs, config.eval.every_epochs = 2, 1
  config.parallel.devices = 1
  return config


def search(path, trials, **changes):
  about = {"model": "m", "dataset": "simulated"}
  settings = {"space": SPACE, "about": about, "budget": 1e6} | changes
  return tune.search(
    make_config,
    settings["space"],
    settings["about"],
    str(path),
    trials=trials,
    budget=settings["budget"],
  )


def values_of(study):
  return [(trial.params, trial.value) for trial in study.trials]


def test_a_stopped_study_goes_on_as_if_it_had_not_stopped(tmp_path):
  search(tmp_path / "stopped", 1)
  search(tmp_path / "stopped", 1)  # has its trial already
  stopped = search(tmp_path / "stopped", 3)
  whole = search(tmp_path / "whole", 3)
  assert values_of(stopped) == values_of(whole)
  assert len(whole.trials) == 3
  curve = tune.best_so_far(whole)
  assert curve == sorted(curve)
  assert curve[-1] == whole.best_value == max(t.value for t in whole.trials)
  before = (tmp_path / "whole").read_bytes()
  studies = tune.read_studies([str(tmp_path / "whole")])
  _, (line,) = tune.sizes_table(studies)
  assert (tmp_path / "whole").read_bytes() == before
  assert line[3:5] == ["3 (0)", "0.0"] and line[6] == f"{curve[0]:.4f}"
  assert line[7:] == ["–", "–", "–", "–", f"{curve[-1]:.4f}"]
  heads, lines = tune.spaces_table(studies)
  assert heads == ["key", "range", "studies"] and lines == SPACES
  best = whole.best_trial
  text = tune.summary(whole)
  assert f"--config.model.dim={best.params['model.dim']}" in text


def test_trials_never_see_the_test_part(tmp_path, monkeypatch):
  expected = values_of(search(tmp_path / "real", 1))
  make = splits.make

  def with_other_test_items(dataset, config):
    split = make(dataset, config)
    test = split.part == splits.TEST
    items = np.random.default_rng(0).permutation(dataset.item[test])
    assert (items != dataset.item[test]).any()
    dataset.item[test] = items
    return split

  monkeypatch.setattr(splits, "make", with_other_test_items)
  assert values_of(search(tmp_path / "changed", 1)) == expected


def test_the_first_trial_is_the_config_as_it_stands(tmp_path):
  space = {"losses.squared.learning_rate": ("log", 1e-4, 1e-1)}
  study = search(tmp_path / "study", 1, space=space)
  assert study.trials[0].params == {"losses.squared.learning_rate": 1e-3}


def test_a_study_of_something_else_is_refused(tmp_path):
  search(tmp_path / "study", 1)
  before = (tmp_path / "study").read_bytes()
  with pytest.raises(errors.InputError, match="another model; give another"):
    search(
      tmp_path / "study", 2, about={"model": "another", "dataset": "simulated"}
    )
  with pytest.raises(errors.InputError, match="another space"):
    search(tmp_path / "study", 2, space={"model.dim": [8]})
  assert (tmp_path / "study").read_bytes() == before


def test_no_trial_begins_when_the_budget_is_spent(tmp_path):
  study = search(tmp_path / "study", 5, budget=0.0)
  assert study.trials == []
  assert tune.summary(study) == "no trial has been completed"


def test_a_trial_whose_process_died_is_tried_again(tmp_path):
  path = tmp_path / "study"
  study = tune.open_study(str(path))
  study.enqueue_trial({"model.dim": 8})
  dead = study.ask()
  dead.suggest_categorical("model.dim", [8, 16])
  tune.sign(dead)
  dead.set_user_attr("pid", 2**22 + 1)  # above the largest there is
  alive = study.ask()
  tune.sign(alive)
  alive.set_user_attr("pid", os.getppid())
  study = search(path, 2)
  states = [trial.state.name for trial in study.trials]
  assert states == ["FAIL", "RUNNING", "COMPLETE"]
  assert study.trials[2].params["model.dim"] == 8


def test_a_run_that_diverges_is_a_pruned_trial(tmp_path):
  space = {"losses.squared.learning_rate": ("log", 1e30, 1e31)}
  study = search(tmp_path / "study", 1, space=space)
  assert study.trials[0].state == optuna.trial.TrialState.PRUNED


def test_nothing_to_validate_on(tmp_path):
  def make():
    config = make_config()
    config.split.protocol = "none"
    return config

  with pytest.raises(errors.InputError, match="no validation part"):
    tune.search(make, SPACE, {}, str(tmp_path / "study"), trials=1, budget=1e6)


def test_spaces_name_keys_of_the_config():
  for variants in ("", "pmf", "softmax", "best", "best,con", "cat", "net"):
    config = runs.config(variants)
    known = dict(validate.leaves(config))
    space = runs.config_module().search_space(config)
    assert set(space) <= set(known)


@pytest.mark.parametrize("signed", [{}, {"host": platform.node()}])
def test_a_trial_killed_while_it_began_is_tried_again(tmp_path, signed):
  path = tmp_path / "study.log"
  search(path, 1)
  study = tune.open_study(str(path))
  trial = study.ask()
  for name, value in signed.items():
    trial.set_user_attr(name, value)
  assert tune._begun(study) == 2
  tune._give_up_dead_trials(study)
  assert tune._begun(study) == 1


def test_the_lock_of_a_dead_process_is_given_up(tmp_path, monkeypatch):
  """Optuna does so after a while, but not where it cannot find the lock."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "studies").mkdir()
  path = "studies/study.log"
  tune.open_study(path)
  lock = tune._JournalLock(path, grace_period=1)
  assert lock.acquire()
  other = tune._JournalLock(path, grace_period=1)
  assert other.acquire()
  other.release()


@pytest.mark.parametrize("rest", ['{"op_code":', ""])
def test_a_line_that_was_cut_short_is_dropped(tmp_path, rest):
  """By a full disk or a kill; a journal of nothing else is a new one."""
  path = str(tmp_path / "study.log")
  tune.open_study(path).set_user_attr("kept", 1)
  whole = (tmp_path / "study.log").read_bytes()
  (tmp_path / "study.log").write_bytes(whole + rest.encode())
  tune.open_study(path).set_user_attr("more", 2)
  assert tune.open_study(path).user_attrs == {"kept": 1, "more": 2}
  assert (tmp_path / "study.log").read_bytes().startswith(whole)
  (tmp_path / "cut.log").write_bytes(whole[:20])
  tune.open_study(str(tmp_path / "cut.log")).set_user_attr("new", 3)
  assert tune.open_study(str(tmp_path / "cut.log")).user_attrs == {"new": 3}
