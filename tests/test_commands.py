"""Bad input ends in one line on stderr, exit code 2 and nothing on disk."""

import errno
import fcntl
import os

import pytest

from mmm_jax import errors, files, validate
from mmm_jax import workdir as folders
import runs


@pytest.fixture(scope="module")
def data():
  return f"--config.dataset.data_dir={runs.data_dir()}"


NAMES = {
  "interaction_loss=square": "did you mean 'squared'",
  "normalisation=sums": "mean, paper_sums",
  "tables.update=row": "did you mean 'rows'",
  "tables.optimizer=adamw": "did you mean 'adam'",
  "parallel.engine=pmapped": "did you mean 'pmap'",
  "parallel.platform=gpus": "did you mean 'gpu'",
  "split.protocol=randm": "did you mean 'random'",
  "dataset.name=simulate": "did you mean 'simulated'",
  "model.name=mnm": "did you mean 'mmm'",
  "eval.protocols=('ful',)": "full, pooled_1024, sampled_100",
  "eval.protocols=()": "full, pooled_1024, sampled_100",
  "eval.cutoffs=()": "20 among them",
  "eval.cutoffs=(0,20)": "numbers from 1 on",
  "text.widths=()": "one or more numbers",
}

NUMBERS = (
  "epochs=0",
  "epochs=-1",
  "batch_size=0",
  "batch_size=-8",
  "data_shards=0",
  "data_shards=-8",
  "model.dim=0",
  "num_categories=-1",
  "seed=-1",
  "split.seed=-1",
  "eval.seed=-1",
  "eval.every_epochs=0",
  "eval.user_block=0",
  "eval.item_tile=0",
  "eval.patience=0",
  "negatives.per_positive=0",
  "parallel.devices=-1",
  "parallel.timeout_s=0",
  "parallel.wait_s=0",
  "dataset.core=-1",
  "log.every_steps=0",
  "checkpoint.keep=0",
  "input.threads=0",
  "kmeans.restarts=0",
  "kmeans.iterations=0",
  "network.neighbour_cap=0",
  "network.co_like_degree=0",
  "weights.user=nan",
  "weights.content=-0.1",
  "schedule.decay_steps=0",
  "losses.squared.learning_rate=0.0",
  "losses.softmax.temperature=-1.0",
  "optimizer.b1=1.0",
  "remedies.networks_in_user=-3.0",
  "remedies.networks_in_user=nan",
  "dataset.data_dir=",
)

# What only the data can tell.
READ = {
  "num_categories=5000": "0 to 1200",
  "model.sources=txt": "visual, text",
  "model.networks=folow": "follow, co_like",
  "text.glove=/nowhere/glove.txt": "no such file",
  "split.path=/nowhere/split.parquet": "no readable file",
  "split.ratios=(1.0,2.0,3.0)": "three shares",
  "parallel.devices=64": "sees",
  "parallel.platform=tpu": "JAX finds only cpu devices",
  "data_shards=3": "nearest: 63, 66",
  "weights.overrides=content.sound=1": "content.text",
  "weights.overrides=user=-1": "from 0 on",
  "dataset.core=500": "leaves nothing",
  "dataset.simulated.users=0": "2 or more",
}


@pytest.mark.parametrize("change", [*NAMES, *NUMBERS, *READ])
def test_value(main, data, tmp_path, change):
  workdir = tmp_path / "run"
  done = main(
    f"{runs.CONFIG}:tiny", data, f"--config.{change}", f"--workdir={workdir}"
  )
  words = {**NAMES, **READ}.get(change, "valid:")
  runs.assert_refused(done, change.partition("=")[0], words)
  assert not workdir.exists()


@pytest.mark.parametrize(("size", "near"), [(65, "64, 72"), (3, "nearest: 8")])
def test_batch_that_does_not_divide_names_its_neighbours(
  main, data, tmp_path, size, near
):
  done = main(
    f"{runs.CONFIG}:tiny", data, f"--config.batch_size={size}",
    f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  runs.assert_refused(done, "batch_size", near)  # of 8 shards


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--config.epoch=3", ["'epoch'", '"epochs"']),
    ("--config.dataset.nme=x", ["'nme'", '"name"']),
    ("--config.epochs=many", ["epochs", "many"]),
    (f"{runs.CONFIG}:tny", ["'tny'", "'tiny'"]),
    ("--config=nowhere.py", ["nowhere.py"]),
    ("--confg=x", ["confg", "config"]),
    ("surplus", ["surplus"]),
  ],
)
def test_argument(main, tmp_path, argument, words):
  workdir = tmp_path / "run"
  done = main(f"{runs.CONFIG}:tiny", argument, f"--workdir={workdir}")
  runs.assert_refused(done, *words)
  assert not workdir.exists()


@pytest.mark.parametrize("name", ["main", "recommend", "experiments"])
def test_help_is_no_failure(name):
  done = runs.run(f"mmm_jax.{name}", "--help")
  assert done.code == 0
  assert "--workdir" in done.out


def test_without_a_workdir_bad_input_is_still_one_message(main, tmp_path):
  done = main(f"{runs.CONFIG}:tiny", "--config.epochs=0", cwd=tmp_path)
  runs.assert_refused(done, "epochs")
  assert not list(tmp_path.iterdir())


def test_config_is_missing(main, tmp_path):
  runs.assert_refused(
    main(f"--workdir={tmp_path / 'run'}"), "--config is missing"
  )


@pytest.mark.parametrize("name", ["microlens", "hetrec_lastfm", "tiktok"])
def test_real_set_without_its_files(main, data, tmp_path, name):
  workdir = tmp_path / "run"
  done = main(f"{runs.CONFIG}:{name}", data, f"--workdir={workdir}")
  runs.assert_refused(done, "manual_dir", "https://")
  assert not workdir.exists()


def test_damaged_raw_file(main, tmp_path):
  raw, prepared = tmp_path / "raw", tmp_path / "prepared"
  raw.mkdir()
  (raw / "MicroLens-50k_titles.csv").write_text("item,title\n1,first\n")
  (raw / "MicroLens-50k_pairs.tsv").write_text("7\t1\n8\tone\n")
  (raw / "tags_to_summary.csv").write_text("video_id,tag\n1,sport\n")
  done = main(
    f"{runs.CONFIG}:microlens",
    f"--config.dataset.manual_dir={raw}",
    f"--config.dataset.data_dir={prepared}",
    f"--workdir={tmp_path / 'run'}",
  )
  runs.assert_refused(done, "MicroLens-50k_", "line", "https://")
  assert not (tmp_path / "run").exists()
  # The folder of compiled programs may be there, a prepared set may not.
  left = set(os.listdir(prepared)) if prepared.exists() else set()
  assert left <= {"compiled"}


def test_workdir_that_cannot_be_written(main, data, tmp_path):
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "file" / "run"
  done = main(f"{runs.CONFIG}:tiny", data, f"--workdir={workdir}")
  runs.assert_refused(done, str(workdir), "--workdir")


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_damaged_file_of_a_run(main, data, tmp_path, name):
  (tmp_path / name).write_text("{bad")
  done = main(f"{runs.CONFIG}:tiny", data, f"--workdir={tmp_path}")
  runs.assert_refused(done, str(tmp_path / name), "JSON object")


def test_a_run_goes_on_with_what_changes_no_result_and_nothing_else(tmp_path):
  config = runs.config("tiny")
  files.write_json(tmp_path / "config.json", validate.plain(config))
  config.parallel.timeout_s = 600
  config.dataset.data_dir = "elsewhere"
  config.checkpoint.every_seconds = 5.0
  folders.check_config(config, tmp_path)
  config.weights.user = 0.25
  with pytest.raises(errors.InputError, match="weights.user: 0.01 there, 0.25"):
    folders.check_config(config, tmp_path)


def test_a_run_of_before_some_keys_is_one_with_their_neutral_values(tmp_path):
  config = runs.config("tiny")
  old = validate.plain(config, without=validate.LATER)
  assert "count_power" not in old["remedies"]
  files.write_json(tmp_path / "config.json", old)
  folders.check_config(config, tmp_path)
  found = validate.completed(old)
  assert found["remedies"]["count_power"] == 0
  assert not found["parallel"]["kernels"]  # as it was trained
  config.remedies.count_power = 1.0
  with pytest.raises(errors.InputError, match="count_power: 0.0 there, 1.0"):
    folders.check_config(config, tmp_path)


def test_file_systems_without_locks_are_refused(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", refuse)
  refused = pytest.raises(errors.InputError, match="No locks available; choose")
  with refused, folders.locked(tmp_path / "run"):
    pass


def test_data_dir_that_cannot_be_written(main, tmp_path):
  (tmp_path / "file").write_text("")
  done = main(
    f"{runs.CONFIG}:tiny",
    f"--config.dataset.data_dir={tmp_path / 'file' / 'data'}",
    f"--workdir={tmp_path / 'run'}",
  )
  runs.assert_refused(done, "data_dir")
  assert not (tmp_path / "run").exists()
