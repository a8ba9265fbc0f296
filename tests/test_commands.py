"""Bad input ends in one line on stderr, exit code 2 and nothing on disk."""

import fcntl
import os
import pathlib
import signal
import subprocess
import time

import pytest

import runs


@pytest.fixture(scope="module")
def main():
  warm = runs.Warm("mmm_jax.main")
  yield warm
  warm.close()


@pytest.fixture(scope="module")
def data():
  return f"--config.dataset.data_dir={runs.data_dir()}"


def assert_refused(done: runs.Done, *words: str) -> None:
  assert done.code == 2, done
  # The line of statistics may stand before it.
  *before, message = done.err.splitlines()
  assert message.startswith("error: "), done.err
  assert all(line.startswith("simulated: ") for line in before), done.err
  assert "Traceback" not in done.err
  for word in words:
    assert word in message, (word, done.err)


NAMES = {
  "interaction_loss=square": "did you mean 'squared'",
  "normalisation=sums": "mean, paper_sums",
  "tables.update=row": "did you mean 'rows'",
  "tables.optimizer=adamw": "did you mean 'adam'",
  "parallel.engine=pmapped": "did you mean 'pmap'",
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
  assert_refused(done, change.partition("=")[0], words)
  assert not workdir.exists()


@pytest.mark.parametrize(("size", "near"), [(65, "64, 72"), (3, "nearest: 8")])
def test_batch_that_does_not_divide_names_its_neighbours(
  main, data, tmp_path, size, near
):
  done = main(
    f"{runs.CONFIG}:tiny", data, f"--config.batch_size={size}",
    f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  assert_refused(done, "batch_size", near)  # of 8 shards


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
  assert_refused(done, *words)
  assert not workdir.exists()


@pytest.mark.parametrize("name", ["main", "recommend", "experiments"])
def test_help_is_no_failure(name):
  done = runs.run(f"mmm_jax.{name}", "--help")
  assert done.code == 0
  assert "--workdir" in done.out


def test_without_a_workdir_bad_input_is_still_one_message(main, tmp_path):
  done = main(f"{runs.CONFIG}:tiny", "--config.epochs=0", cwd=tmp_path)
  assert_refused(done, "epochs")
  assert not list(tmp_path.iterdir())


def test_config_is_missing(main, tmp_path):
  assert_refused(main(f"--workdir={tmp_path / 'run'}"), "--config is missing")


@pytest.mark.parametrize("name", ["microlens", "hetrec_lastfm", "tiktok"])
def test_real_set_without_its_files(main, data, tmp_path, name):
  workdir = tmp_path / "run"
  done = main(f"{runs.CONFIG}:{name}", data, f"--workdir={workdir}")
  assert_refused(done, "manual_dir", "https://")
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
  assert_refused(done, "MicroLens-50k_", "line", "https://")
  assert not (tmp_path / "run").exists()
  # The folder of compiled programs may be there, a prepared set may not.
  left = set(os.listdir(prepared)) if prepared.exists() else set()
  assert left <= {"compiled"}


def test_workdir_that_cannot_be_written(main, data, tmp_path):
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "file" / "run"
  done = main(f"{runs.CONFIG}:tiny", data, f"--workdir={workdir}")
  assert_refused(done, str(workdir), "--workdir")


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_damaged_file_of_a_run(main, data, tmp_path, name):
  (tmp_path / name).write_text("{bad")
  done = main(f"{runs.CONFIG}:tiny", data, f"--workdir={tmp_path}")
  assert_refused(done, str(tmp_path / name), "JSON object")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_training_is_resumable(tmp_path, number):
  """While the data are being made up, which takes a while at full size."""
  data_dir, workdir = tmp_path / "data", tmp_path / "run"
  process = runs.start(
    "mmm_jax.main", runs.CONFIG, f"--config.dataset.data_dir={data_dir}",
    f"--workdir={workdir}", stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  deadline = time.monotonic() + 60
  while not list(data_dir.glob(".simulated-*")):  # its lock
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(number)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 75, said
  assert said == "stopped; the same command continues\n"
  assert not workdir.exists()
  assert not list(data_dir.glob("simulated-*"))


def test_workdir_in_use(main, data, tmp_path):
  with open(tmp_path / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = main(f"{runs.CONFIG}:tiny", data, f"--workdir={tmp_path}")
  assert_refused(done, "another process", str(tmp_path))


def test_data_dir_that_cannot_be_written(main, tmp_path):
  (tmp_path / "file").write_text("")
  done = main(
    f"{runs.CONFIG}:tiny",
    f"--config.dataset.data_dir={tmp_path / 'file' / 'data'}",
    f"--workdir={tmp_path / 'run'}",
  )
  assert_refused(done, "data_dir")
  assert not (tmp_path / "run").exists()


# --- a full disk --------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
  """A function that gives a small disk its size."""
  place = tmp_path / "disk"
  place.mkdir()
  mounted = False

  def resize(size: str) -> pathlib.Path:
    nonlocal mounted
    options = f"size={size}" + (",remount" if mounted else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
      subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
      pytest.skip(f"a small disk needs the right to mount one: {error}")
    mounted = True
    return place

  yield resize
  if mounted:
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("size", ["8k", "160k", "600k"])
def test_full_disk_under_the_workdir(main, disk, size):
  """Refused at any moment; with room, the same command ends the run."""
  command = (
    f"{runs.CONFIG}:tiny,pmf", *runs.SHORT, "--config.epochs=2",
    "--config.checkpoint.every_seconds=0.1",
  )  # fmt: skip
  workdir = disk(size) / "run"
  done = main(*command, f"--workdir={workdir}")
  assert_refused(done, str(workdir.parent))
  assert not (workdir / "result.json").exists()
  disk("64m")
  done = main(*command, f"--workdir={workdir}")
  assert done.code == 0, done.err
  assert (workdir / "result.json").exists()


def test_full_disk_under_the_data(main, disk):
  data_dir = disk("100k") / "data"
  done = main(
    f"{runs.CONFIG}:tiny,pmf",
    f"--config.dataset.data_dir={data_dir}",
    f"--workdir={data_dir.parent / 'run'}",
  )
  assert_refused(done, "data_dir", "space")
  assert not list(data_dir.glob("simulated-*"))
