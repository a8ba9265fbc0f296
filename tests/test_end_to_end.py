"""Whole runs by the command line: files, stops and resumes, recommendations."""

import collections
import csv
import json
import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from pyarrow import parquet
import pytest

import faults
from mmm_jax import input_pipeline, parallel
import runs

TINY = (f"{runs.CONFIG}:tiny", *runs.SHORT)
USERS, ITEMS, INTERACTIONS = 300, 1200, 7500  # of `tiny`
EPOCHS = 4  # of runs.SHORT
CUTOFFS = (10, 20, 30, 40)
METRICS = ("precision", "recall", "ndcg", "hit_rate", "mrr", "map")
PROTOCOLS = ("full", "pooled_1024", "sampled_100")


@pytest.fixture(scope="module")
def recommend():
  return runs.warm("mmm_jax.recommend")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The folder and the output of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  done = runs.run("mmm_jax.main", *TINY, f"--workdir={workdir}")
  assert done.code == 0, done.err
  return workdir, done


def read_json(path):
  return json.loads(path.read_text())


def read_rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_same_checkpoints(one, other):
  one, other = faults.read_checkpoint(one), faults.read_checkpoint(other)
  assert set(one) == set(other)
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- the files of a run -------------------------------------------------------


def test_files_of_a_run(finished):
  workdir, _ = finished
  assert {path.name for path in workdir.iterdir()} - {".lock"} == {
    "config.json",
    "manifest.json",
    "metrics.jsonl",
    "split.parquet",
    "result.json",
    "per_user.parquet",
    "checkpoints",
    "tensorboard",
  }
  assert read_json(workdir / "config.json")["epochs"] == EPOCHS
  assert list((workdir / "tensorboard").iterdir())


def test_result(finished):
  workdir, _ = finished
  result = read_json(workdir / "result.json")
  assert set(result) == {*PROTOCOLS, "strata", "candidates"}
  names = (*METRICS, "coverage", "gini", "mean_popularity")
  for protocol in PROTOCOLS:
    assert set(result[protocol]) == {"valid", "test"}
    for values in result[protocol].values():
      assert set(values) == {f"{name}@{k}" for name in names for k in CUTOFFS}
      assert all(
        0 <= value <= 1
        for name, value in values.items()
        if not name.startswith("mean_popularity")
      )


def test_split_is_complete_and_has_the_contracts_sizes(finished):
  table = parquet.read_table(finished[0] / "split.parquet")
  assert table.column_names == ["user", "item", "part"]
  rows = table.to_pylist()
  assert all(isinstance(row["user"], str) for row in rows)
  assert len({(row["user"], row["item"]) for row in rows}) == INTERACTIONS
  parts = collections.defaultdict(collections.Counter)
  for row in rows:
    parts[row["user"]][row["part"]] += 1
  assert len(parts) == USERS
  for count in parts.values():
    n = sum(count.values())
    train = max(1, round(0.7 * n))
    assert count["train"] == train
    assert count["valid"] == round(0.8 * n) - train


def test_per_user_values_average_to_the_result(finished):
  workdir, _ = finished
  table = parquet.read_table(workdir / "per_user.parquet")
  assert table.column_names[:3] == ["user", "protocol", "part"]
  result = read_json(workdir / "result.json")
  rows = table.to_pylist()
  for protocol in PROTOCOLS:
    for part in ("valid", "test"):
      chosen = [
        row
        for row in rows
        if (row["protocol"], row["part"]) == (protocol, part)
      ]
      mean = np.mean([row["ndcg@20"] for row in chosen])
      assert mean == pytest.approx(result[protocol][part]["ndcg@20"], abs=1e-6)


def test_rows_of_metrics(finished):
  rows = read_rows(finished[0])
  num_train = read_split(finished[0], "train").total()
  steps = [row["step"] for row in rows]
  assert steps == sorted(set(steps))
  assert steps[-1] == EPOCHS * -(-num_train // 64)  # batch_size of `tiny`
  for row in rows:
    assert {"epoch", "loss", "interaction", "learning_rate"} <= set(row)
    assert row["interactions_per_s"] > 0
  validated = [row["epoch"] for row in rows if "valid/ndcg@20" in row]
  assert validated == [2, 4]  # every second epoch


def test_manifest(finished):
  values = read_json(finished[0] / "manifest.json")
  assert values["resumed"] == values["redone_steps"] == 0
  assert values["finished"] and values["created"] <= values["finished"]
  assert values["content"] == "resident"
  assert values["device"]["platform"] == "cpu"
  assert {"jax", "python"} <= set(values["versions"])
  assert {"training", "validation", "evaluation", "checkpoints"} <= set(
    values["wall_s"]
  )
  assert values["statistics"]["interactions"] == INTERACTIONS


def test_table_has_the_results_and_the_papers_figures(finished):
  workdir, done = finished
  for protocol in PROTOCOLS:
    assert protocol in done.out
  assert "paper (private data)" in done.out
  value = read_json(workdir / "result.json")["full"]["test"]["recall@20"]
  assert f"{value:.4f}" in done.out


# --- the same command again ---------------------------------------------------


def test_finished_run_prints_its_table_again(finished, main):
  workdir, first = finished
  before = {p: p.stat().st_mtime_ns for p in workdir.iterdir()}
  started = time.monotonic()
  done = main(*TINY, f"--workdir={workdir}")
  assert time.monotonic() - started < 10
  assert done.code == 0
  assert done.out == first.out
  del before[workdir / ".lock"]
  for path, changed in before.items():
    assert path.stat().st_mtime_ns == changed, path


def test_another_config_names_the_keys(finished, main):
  workdir, _ = finished
  done = main(
    *TINY,
    "--config.seed=1",
    "--config.weights.user=0.5",
    f"--workdir={workdir}",
  )
  assert done.code == 2
  assert "seed: 0 there, 1 now" in done.err
  assert "weights.user: 0.01 there, 0.5 now" in done.err
  assert "epochs" not in done.err


def test_fresh_folder_and_the_command_that_resumes_it(tmp_path):
  done = runs.run(
    "mmm_jax.main",
    f"{runs.CONFIG}:tiny,pmf",
    *runs.SHORT,
    "--config.epochs=1",
    cwd=tmp_path,
  )
  assert done.code == 0, done.err
  (folder,) = (tmp_path / "runs").iterdir()
  assert (folder / "result.json").exists()
  (line,) = [line for line in done.err.splitlines() if "--workdir=" in line]
  command = shlex.split(line.partition(": ")[2])
  assert command[-1] == f"--workdir=runs/{folder.name}"
  again = subprocess.run(
    [sys.executable, *command[1:]],
    cwd=tmp_path,
    env=runs.environment(),
    capture_output=True,
    text=True,
  )
  assert (again.returncode, again.stdout) == (0, done.out)
  assert len(list((tmp_path / "runs").iterdir())) == 1


# --- killed, stopped, resumed -------------------------------------------------


def logged_step(workdir):
  """The last whole row's step; 0 before the first."""
  path = workdir / "metrics.jsonl"
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else 0


def checkpointed_step(workdir):
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.exists() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def interrupt(workdir, number, *, after):
  """Sends a signal once step `after` is logged and a checkpoint is there."""
  main = runs.warm("mmm_jax.main")
  process = main.start(*TINY, f"--workdir={workdir}")
  deadline = time.monotonic() + 200
  while not (checkpointed_step(workdir) and logged_step(workdir) >= after):
    assert process.poll() is None, f"ended with {process.poll()}"
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(number)
  return process.wait(60)


def test_killed_and_resumed_is_uninterrupted(finished, tmp_path):
  """Bit for bit, wherever it was killed; what is redone is counted."""
  reference, _ = finished
  workdir = tmp_path / "run"
  last = read_rows(reference)[-1]["step"]
  rng = random.Random(0)
  moments = sorted(rng.uniform(0.1, 0.8) * last for _ in range(3))
  redone = 0
  for number, after in enumerate(moments):
    assert interrupt(workdir, signal.SIGKILL, after=after) == -signal.SIGKILL
    assert not (workdir / "result.json").exists()
    redone += logged_step(workdir) - checkpointed_step(workdir)
    assert read_json(workdir / "manifest.json")["resumed"] == number
  # Asked to stop, it saves first and has nothing to redo.
  assert interrupt(workdir, signal.SIGTERM, after=0.85 * last) == 75
  assert logged_step(workdir) == checkpointed_step(workdir)
  done = runs.run("mmm_jax.main", *TINY, f"--workdir={workdir}")
  assert done.code == 0, done.err

  values = read_json(workdir / "manifest.json")
  assert values["resumed"] == 4
  assert values["redone_steps"] == redone
  for name in ("result.json", "split.parquet", "per_user.parquet"):
    assert (workdir / name).read_bytes() == (reference / name).read_bytes()
  assert_same_checkpoints(workdir, reference)
  timeless = lambda row: {
    key: value for key, value in row.items() if key != "interactions_per_s"
  }
  assert list(map(timeless, read_rows(workdir))) == list(
    map(timeless, read_rows(reference))
  )


# --- parts, splits and data ---------------------------------------------------


def short_run(main, workdir, *arguments):
  """A quick run of `pmf`; what its result holds."""
  arguments = (*runs.SHORT, "--config.epochs=2", *arguments)
  done = main(f"{runs.CONFIG}:tiny,pmf", *arguments, f"--workdir={workdir}")
  assert done.code == 0, done.err
  return read_json(workdir / "result.json")


def test_without_validation_the_last_parameters_are_reported(
  main, recommend, tmp_path
):
  workdir = tmp_path / "run"
  result = short_run(main, workdir, "--config.split.ratios=(0.7,0.0,0.3)")
  assert set(result["full"]) == {"test"}
  assert not any("valid/ndcg@20" in row for row in read_rows(workdir))
  recommend_all(recommend, workdir)  # recounts


def test_everything_may_be_trained_on(main, recommend, tmp_path):
  workdir = tmp_path / "run"
  result = short_run(main, workdir, "--config.split.protocol=none")
  assert result["full"] == {}
  assert read_split(workdir, "train").total() == INTERACTIONS
  output = tmp_path / "lists.parquet"
  done = recommend(f"--workdir={workdir}", "--k=5", f"--output={output}")
  assert done.code == 0, done.err
  assert_good_lists(workdir, parquet.read_table(output).to_pylist(), k=5)


@pytest.mark.parametrize("protocol", ["leave_last_out", "global_time"])
def test_splits_by_time(main, recommend, tmp_path, protocol):
  workdir = tmp_path / "run"
  short_run(main, workdir, f"--config.split.protocol={protocol}")
  test = read_split(workdir, "test")
  if protocol == "leave_last_out":
    assert len(test) == len({user for user, _ in test}) == USERS
  recommend_all(recommend, workdir)


def test_a_split_file_is_taken_as_it_stands(finished, main, tmp_path):
  """The split of another run, without some of its pairs, which are counted."""
  split = parquet.read_table(finished[0] / "split.parquet")
  path, workdir = tmp_path / "split.parquet", tmp_path / "run"
  parquet.write_table(split.slice(100), path)
  short_run(main, workdir, f"--config.split.path={path}", "--config.epochs=1")
  pairs = lambda table: sorted(
    (row["user"], row["item"], row["part"]) for row in table.to_pylist()
  )
  found = parquet.read_table(workdir / "split.parquet")
  assert pairs(found) == pairs(split.slice(100))
  statistics = read_json(workdir / "manifest.json")["statistics"]
  assert statistics["core"]["left_out"] == 100


def test_another_split_does_not_continue_a_run(finished, main, tmp_path):
  split = parquet.read_table(finished[0] / "split.parquet")
  path, workdir = tmp_path / "split.parquet", tmp_path / "run"
  parquet.write_table(split, path)
  arguments = (
    f"{runs.CONFIG}:tiny,pmf", *runs.SHORT, f"--config.split.path={path}",
    f"--workdir={workdir}",
  )  # fmt: skip
  assert main(*arguments).code == 0
  (workdir / "result.json").unlink()  # as if it had been killed before
  before = (workdir / "split.parquet").read_bytes()
  part = split["part"].to_pylist()
  test, train = part.index("test"), part.index("train")
  part[test], part[train] = "train", "test"
  at = split.column_names.index("part")
  parquet.write_table(split.set_column(at, "part", [part]), path)
  done = main(*arguments)
  assert done.code == 2
  assert "the split changed" in done.err
  assert (workdir / "split.parquet").read_bytes() == before


def test_recommend_takes_the_checkpoint_of_the_result_or_none(
  main, recommend, tmp_path
):
  workdir, output = tmp_path / "run", tmp_path / "lists.parquet"
  short_run(main, workdir)
  steps = sorted((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  assert len(steps) == 2
  for path in steps[-1].rglob("*"):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  done = recommend(f"--workdir={workdir}", f"--output={output}")
  assert done.code == 2, done.err
  assert f"no readable checkpoint of step {steps[-1].name}" in done.err
  assert "Traceback" not in done.err
  assert not output.exists()
  assert steps[-1].exists()  # nothing is deleted by reading
  (workdir / "manifest.json").unlink()
  done = recommend(f"--workdir={workdir}", f"--output={output}")
  assert done.code == 2 and "manifest.json" in done.err


# --- content that streams -----------------------------------------------------


def test_streamed_equals_resident(finished, main, tmp_path):
  resident, workdir = finished[0], tmp_path / "run"
  budget = "--config.input.content_budget_mb=0.0"
  done = main(*TINY, budget, f"--workdir={workdir}")
  assert done.code == 0, done.err
  values = read_json(workdir / "manifest.json")
  assert values["content"] == "streamed"
  assert (workdir / "result.json").read_bytes() == (
    resident / "result.json"
  ).read_bytes()
  assert_same_checkpoints(workdir, resident)
  # Beside what a resident run takes, a few chunks at most.
  before = read_json(resident / "manifest.json")["peak_memory_mb"]
  assert values["peak_memory_mb"] < before + 200


class _Zeros:
  """Records of 16 KiB that are made when they are asked for."""

  width = 8192

  def __getitems__(self, numbers):
    return [{"visual": np.zeros(self.width, np.float16)} for _ in numbers]


def resident_mb():
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_streaming_keeps_host_memory_flat():
  """320 MiB of content pass through; 16 MiB chunks leave 100 MiB at most."""
  num_items, shards, width, length = 20480, 8, 4, 32
  content = input_pipeline.ItemContent(
    _Zeros(), np.arange(num_items), {"visual": _Zeros.width}, None
  )
  order = np.arange(num_items, dtype=np.int32).reshape(shards, -1, width)
  config = runs.config("tiny")
  engine = parallel.Engine(tuple(jax.devices()[:1]), by_pmap=False)
  sizes = []
  for chunk in input_pipeline.stream(
    content, iter([order]), length, engine, config
  ):
    assert chunk["visual"].shape == (shards, length, width, _Zeros.width)
    sizes.append(resident_mb())
  assert len(sizes) == 20
  assert max(sizes) - sizes[2] < 100


# --- recommendations ----------------------------------------------------------


def read_split(workdir, *parts):
  """Counter of the (user, item) pairs of some parts."""
  rows = parquet.read_table(workdir / "split.parquet").to_pylist()
  return collections.Counter(
    (row["user"], row["item"]) for row in rows if row["part"] in parts
  )


def assert_good_lists(workdir, rows, *, k):
  """Ranks from 1, scores descending, nothing that was trained on."""
  known = read_split(workdir, "train", "valid")
  lists = collections.defaultdict(list)
  for row in rows:
    assert (row["user"], row["item"]) not in known
    lists[row["user"]].append(row)
  for rows in lists.values():
    assert [row["rank"] for row in rows] == list(range(1, k + 1))
    assert len({row["item"] for row in rows}) == k
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
  return lists


def assert_shares_add_up(rows):
  parts = [row["item_share"] + row["category_share"] for row in rows]
  scores = np.array([row["score"] for row in rows])
  np.testing.assert_allclose(parts, scores, rtol=1e-5, atol=1e-5)
  assert np.abs([row["category_share"] for row in rows]).max() > 0


def recommend_all(recommend, workdir):
  """Lists of 40, recounted against result.json by another program."""
  output = workdir / "lists.parquet"
  done = recommend(f"--workdir={workdir}", "--k=40", f"--output={output}")
  assert done.code == 0, done.err
  recount = pathlib.Path(__file__).with_name("recount.py")
  counted = subprocess.run(
    [sys.executable, recount, workdir, output], capture_output=True, text=True
  )
  assert counted.returncode == 0, counted.stdout + counted.stderr
  rows = parquet.read_table(output).to_pylist()
  output.unlink()
  return rows


def test_several_devices_recommend_what_one_does(finished, recommend, tmp_path):
  workdir, _ = finished
  one, four = tmp_path / "one.parquet", tmp_path / "four.parquet"
  flags = f"--workdir={workdir}", "--k=5"
  assert recommend(*flags, f"--output={one}").code == 0
  several = recommend.start(*flags, f"--output={four}", devices=4)
  assert several.wait() == 0
  assert parquet.read_table(one).equals(parquet.read_table(four))


def test_lists_for_all_users(finished, recommend):
  workdir, _ = finished
  rows = recommend_all(recommend, workdir)
  lists = assert_good_lists(workdir, rows, k=40)
  assert len(lists) == USERS
  assert_shares_add_up(rows)
  assert any(row["title"] for row in rows)


@pytest.mark.parametrize("loss", ["bce", "bpr", "softmax"])
def test_lists_under_every_loss(loss, main, recommend, tmp_path):
  workdir = tmp_path / "run"
  done = main(
    f"{runs.CONFIG}:tiny,cat",
    *runs.SHORT,
    f"--config.interaction_loss={loss}",
    f"--workdir={workdir}",
  )
  assert done.code == 0, done.err
  rows = recommend_all(recommend, workdir)
  assert_good_lists(workdir, rows, k=40)
  assert_shares_add_up(rows)


def read_lists(path):
  if path.suffix == ".parquet":
    return parquet.read_table(path).to_pylist()
  with path.open(newline="") as file:
    if path.suffix == ".jsonl":
      return [json.loads(line) for line in file]
    numbers = {"rank": int}
    numbers |= dict.fromkeys(("score", "item_share", "category_share"), float)
    return [
      {name: numbers.get(name, str)(value) for name, value in row.items()}
      for row in csv.DictReader(file)
    ]


def test_formats_agree(finished, recommend, tmp_path):
  workdir, _ = finished
  found = {}
  for kind in ("parquet", "csv", "jsonl"):
    output = tmp_path / f"lists.{kind}"
    done = recommend(
      f"--workdir={workdir}",
      "--users=u7, u3",
      "--k=5",
      f"--format={kind}",
      f"--output={output}",
    )
    assert done.code == 0, done.err
    found[kind] = read_lists(output)
    assert list(found[kind][0]) == [
      "user",
      "item",
      "rank",
      "score",
      "item_share",
      "category_share",
      "title",
    ]
  lists = assert_good_lists(workdir, found["parquet"], k=5)
  assert list(lists) == ["u7", "u3"]
  for kind in ("csv", "jsonl"):
    for row, wanted in zip(found[kind], found["parquet"], strict=True):
      for name, value in wanted.items():
        exact = isinstance(value, str)
        assert row[name] == (value if exact else pytest.approx(value, 1e-6))


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--users=u3,u30x"], ["'u30x'", "near matches: u30"]),
    (["--users=nobody-like-that"], ["nobody-like-that", "300 users"]),
    (["--k=0"], ["k"]),
    (["--format=xml"], ["format", "jsonl"]),
    (["--output=/nowhere/lists.csv"], ["/nowhere/lists.csv"]),
    (["--workdir=/nowhere"], ["/nowhere", "config.json"]),
  ],
)
def test_recommend_refuses(finished, recommend, tmp_path, arguments, words):
  output = tmp_path / "lists.parquet"
  done = recommend(f"--workdir={finished[0]}", f"--output={output}", *arguments)
  assert done.code == 2, done.err
  assert done.err.splitlines()[-1].startswith("error: "), done.err
  assert "Traceback" not in done.err
  for word in words:
    assert word in done.err
  assert not list(tmp_path.iterdir())


def test_recommend_needs_a_finished_run(finished, recommend, tmp_path):
  config = (finished[0] / "config.json").read_text()
  (tmp_path / "config.json").write_text(config)
  done = recommend(f"--workdir={tmp_path}", f"--output={tmp_path / 'lists'}")
  assert done.code == 2
  assert "result.json" in done.err
