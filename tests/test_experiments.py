"""Sweeps, their records and tables, and the tests of significance in them."""

import json
import pathlib
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from scipy import stats

from mmm_jax import (
  command,
  errors,
  experiments,
  files,
  results,
  significance,
  tabulate,
)
import runs

# --- significance -------------------------------------------------------------


def test_interval_is_the_normal_one_for_many_users():
  values = np.random.default_rng(0).random((1, 4000))
  low, high = significance.interval(values, seed=0)
  error = 1.96 * values.std() / np.sqrt(4000)
  assert low == pytest.approx(values.mean() - error, abs=error / 5)
  assert high == pytest.approx(values.mean() + error, abs=error / 5)


def test_interval_sees_the_spread_between_three_seeds():
  values = np.array([[0.0] * 50, [0.5] * 50, [1.0] * 50])  # users are alike
  assert significance.interval(values, seed=0) == (0, 1)
  # Of two seeds the spread is not known; the mean of each user stays.
  assert significance.interval(values[::2], seed=0) == (0.5, 0.5)


def test_equal_models_do_not_differ():
  values = np.random.default_rng(0).random(200)
  assert significance.wilcoxon(values, values) == 1
  assert significance.bootstrap(values, values, seed=0) == 1


def test_a_shift_is_found_by_both_tests():
  rng = np.random.default_rng(0)
  one = rng.random(300)
  other = one + 0.1 + 0.2 * rng.standard_normal(300)
  assert significance.wilcoxon(one, other) < 1e-6
  assert significance.bootstrap(one, other, seed=0) < 0.002


def test_bootstrap_is_near_the_t_test():
  rng = np.random.default_rng(3)
  one, other = rng.random(500), rng.random(500) + 0.02
  expected = stats.ttest_rel(one, other).pvalue
  assert 0.01 < expected < 0.9
  found = significance.bootstrap(one, other, seed=0)
  assert found == pytest.approx(expected, abs=0.05)


def test_p_values_are_uniform_where_nothing_differs():
  rng = np.random.default_rng(0)
  pairs = [(rng.random(60), rng.random(60)) for _ in range(200)]
  found = [significance.wilcoxon(*pair) for pair in pairs]
  assert stats.kstest(found, "uniform").pvalue > 0.01


def test_holm_by_arithmetic():
  # Sorted .01, .03, .04: times 3, 2, 1 gives .03, .06, .04; never falling.
  found = significance.holm([0.04, 0.01, 0.03])
  np.testing.assert_allclose(found, [0.06, 0.03, 0.06])
  np.testing.assert_allclose(significance.holm([0.6, 0.7]), [1, 1])
  assert significance.holm([]).shape == (0,)


# --- tables -------------------------------------------------------------------


def record(
  number, model, per_user, *, seed=0, split="s", candidates="c", changes=None
):
  mean = float(np.mean(per_user))
  metrics = {"ndcg@20": mean, "recall@20": 2 * mean}
  return {
    "number": number,
    "model": model,
    "dataset": "simulated",
    "seed": seed,
    "changes": changes or {},
    "per_user": np.asarray(per_user, np.float16),
    "metrics": {
      "full": {"valid": {"ndcg@20": 0.5}, "test": metrics},
      "pooled_1024": {"test": {"ndcg@20": 0.75}},
    },
    "hashes": {"data": "d", "split": split, "candidates": candidates},
    "seconds": {"total": 90.0},
    "peak_memory_mb": 2048.0,
    "epochs": 60,
    "best_epoch": 55,
    "ended_by": "epochs",
    "clusters": {},
  }


def test_rows_of_a_table():
  better = np.tile([0.25, 0.5], 100)
  records = [
    record(0, "mmm:full", better + 0.125),
    record(1, "mmm:pmf", better, seed=0),
    record(2, "mmm:pmf", better + 0.0625, seed=1),
    record(3, "mmm:paper", better, split="another"),
  ]
  full, pmf, paper = tabulate.rows(records)
  assert full["test"] == f"{0.375 + 0.125:.4f}"
  assert pmf["test"] == f"{0.375 + 0.03125:.4f}"
  assert (full["valid"], full["pooled"]) == ("0.5000", "0.7500")
  assert (full["seeds"], pmf["seeds"]) == ("1", "2")
  assert (full["minutes"], full["memory"]) == ("1.5", "2.0")
  assert "NMI" not in tabulate.full_table(records)[0]
  assert pmf["epochs"] == "60* (55), 60* (55)"  # not ended by patience
  assert full["wilcoxon"] == "–"  # the reference
  assert pmf["wilcoxon"] == pmf["bootstrap"] == "< .001"
  # Its second run is .0625 better than its first: .03125 - .125 for everyone.
  assert pmf["difference"] == "-0.0938 (-0.0938 to -0.0938)"
  assert full["difference"] == paper["difference"] == "–"
  assert paper["wilcoxon"] == "–"  # other users' values cannot be paired


def test_differences_are_taken_seed_by_seed():
  first = [record(n, "mmm:full", [0.5, 0.5], seed=n) for n in range(3)]
  rest = [
    record(3 + n, "mmm:pmf", np.array([0.25, 0.375]) + shift, seed=n)
    for n, shift in enumerate((0.0, 0.0625, 0.125))
  ]
  for run, shift in zip(first, (0.0, 0.0625, 0.125)):
    run["per_user"] = run["per_user"] + np.float16(shift)
  # A user loses .25 and the other .125, in every run alike.
  row = tabulate.rows([*first, *rest])[1]
  assert row["difference"] == "-0.1875 (-0.2500 to -0.1250)"


def test_likeness_to_the_set_s_own_categories():
  runs = [record(seed, "mmm:cat", [0.25, 0.5], seed=seed) for seed in range(3)]
  for nmi, run in zip((0.2, 0.25, 0.3), runs):
    run["clusters"] = {"nmi": nmi, "ari": nmi / 2}
  plain = record(3, "mmm:pmf", [0.25, 0.5])
  table = tabulate.rows([*runs, plain])
  # Student's t of 2 degrees of freedom: 4.303 * 0.05 / sqrt(3) = .124.
  assert table[0]["nmi"] == "0.250 ± 0.124"
  assert table[0]["ari"] == "0.125 ± 0.062"
  assert table[1]["nmi"] == "–"
  heads, (first, last) = tabulate.full_table([*runs, plain])
  assert heads[-2:] == ["NMI", "ARI"] and first[-1] == "0.125 ± 0.062"
  assert last[-2:] == ["–", "–"]
  # Two runs say nothing of the spread.
  assert tabulate.rows(runs[:2])[0]["nmi"] == "0.225"


def test_changes_of_data_make_another_set_and_others_another_row():
  table = tabulate.rows(
    [
      record(0, "a", [0, 1], changes={"dataset.simulated.signal.text": 0.0}),
      record(1, "a", [0, 1], changes={"num_categories": 8, "epochs": 7}),
      record(2, "a", [0, 1], changes={"num_categories": 16}),
    ]
  )
  assert [(row["dataset"], row["model"]) for row in table] == [
    ("simulated signal.text=0.0", "a"),
    ("simulated", "a num_categories=8"),
    ("simulated", "a num_categories=16"),
  ]


def test_one_split_with_other_candidates_is_an_error():
  records = [record(0, "a", [0, 1]), record(1, "b", [0, 1], candidates="x")]
  with pytest.raises(errors.InputError, match="different candidate lists"):
    tabulate.rows(records)


def test_seeds_of_a_model_share_data_and_split():
  records = [record(0, "a", [0, 1]), record(1, "a", [0, 1], split="x", seed=1)]
  with pytest.raises(errors.InputError, match="different data or splits"):
    tabulate.rows(records)


def test_formats_hold_the_same_cells():
  table = tabulate.full_table(
    [record(0, "mmm:full", [0.5, 1]), record(1, "mmm:pmf", [0.25, 0.5])]
  )
  markdown = tabulate.markdown(*table).splitlines()
  cells = [
    [cell.strip() for cell in line[1:-1].split("|")] for line in markdown
  ]
  lines = tabulate.as_csv(*table).splitlines()
  assert len(lines) == len(cells) - 1 == 3  # CSV has no rule below the head
  assert lines[1].split(",")[:4] == cells[2][:4]
  latex = tabulate.latex(*table)
  assert r"pooled\_1024" in latex and r"95 \% interval" in latex
  assert latex.count(r"\\") == 3


def test_pairs_are_less_what_they_are_named_with():
  users = np.tile([0.25, 0.5], 100)
  records = [
    record(0, "mmm:full", users + 0.25),
    record(1, "mmm:con", users + 0.125),
    record(2, "mmm:pmf", users),
  ]
  pairs = [
    ("simulated", "mmm:con", "mmm:pmf"),
    ("simulated", "mmm:full", "mmm:con"),
  ]
  heads, lines = tabulate.pairs_table(records, pairs)
  assert heads[:4] == ["set", "model", "less", "test nDCG@20"]
  assert lines == [
    # Holm: the smallest p of 2,000 draws, 2 / 2,001, times the two tests.
    [*pair, "+0.1250 (+0.1250 to +0.1250)", "< .001", "0.002"]
    for pair in pairs
  ]
  with pytest.raises(errors.InputError, match="no mmm:cat on simulated"):
    tabulate.pairs_table(records, [("simulated", "mmm:cat", "mmm:pmf")])
  other = record(3, "mmm:paper", users, split="another")
  with pytest.raises(errors.InputError, match="cannot be paired"):
    tabulate.pairs_table(
      [*records, other], [("simulated", "mmm:paper", "mmm:pmf")]
    )


# --- the command --------------------------------------------------------------

SWEEP = """
def short():
  yield {{"model": "mmm:tiny,pmf", "dataset": "simulated", "seed": {seed},
          "changes": {{"epochs": 2, "eval.every_epochs": 1,
                       "dataset.data_dir": {folder!r}}}}}

SWEEPS = {{"short": short}}
"""


def test_values_that_are_searched_do_not_bind_a_study():
  config = runs.config("tiny")
  rest = lambda: experiments.hash_config(config, without=["model.dim"])
  whole, before = experiments.hash_config(config), rest()
  config.model.dim += 1
  assert rest() == before
  assert experiments.hash_config(config) != whole
  config.model.networks = ""
  assert rest() != before


def test_what_changes_no_result_does_not_make_a_record_stale():
  config = runs.config("tiny")
  before = experiments.hash_config(config)
  config.dataset.data_dir = "elsewhere"
  config.parallel.engine = "mesh"
  config.log.every_steps += 1
  config.checkpoint.keep += 1
  assert experiments.hash_config(config) == before
  config.compute_dtype = "bfloat16"
  assert experiments.hash_config(config) != before


def test_a_later_key_counts_only_where_it_changes_a_run():
  config = runs.config("tiny")
  before = experiments.hash_config(config)
  config.remedies.count_power = 0.5
  assert experiments.hash_config(config) != before
  with config.unlocked():
    del config.remedies.count_power
  assert experiments.hash_config(config) == before


def test_the_record_tells_of_the_best_epoch(tmp_path):
  rows = [
    {"epoch": 1.0, "valid/ndcg@20": 0.1},  # before the first K-means
    {
      "epoch": 2.0,
      **{"valid/ndcg@20": 0.3, "kmeans/nmi": 0.4, "kmeans/ari": 0.2},
      **{"gradient/interaction": 8.0, "gradient/item": 2.0},
    },
    {"epoch": 2.5, "loss": 1.0},
    {"epoch": 3.0, "valid/ndcg@20": 0.3, "kmeans/nmi": 0.6, "kmeans/ari": 0.5},
  ]
  path = tmp_path / "metrics.jsonl"
  config = runs.config("tiny")
  config.epochs, config.eval.patience = 9, 1
  path.write_text("\n".join(map(json.dumps, rows)))
  found = results.progress(tmp_path, config)
  assert found == {
    "epochs": 3,
    "best_epoch": 2,
    "ended_by": "patience",
    "clusters": {"nmi": 0.4, "ari": 0.2},
    "gradients": {"item": 2 / 8},
  }
  config.epochs = 3  # both at once: it would have ended all the same
  assert results.progress(tmp_path, config) == found
  config.eval.patience = 2
  cut_off = results.progress(tmp_path, config)
  assert cut_off == found | {"ended_by": "epochs"}
  path.write_text(json.dumps({"epoch": 9.0, "kmeans/nmi": 0.5}))
  found = results.progress(tmp_path, config)  # without validation
  assert (found["best_epoch"], found["ended_by"]) == (9, "epochs")
  assert found["clusters"] == {"nmi": 0.5}
  assert found["gradients"] == {}


def write_sweep(folder, *, seed):
  text = SWEEP.format(seed=seed, folder=str(runs.data_dir()))
  (folder / "configs" / "sweeps.py").write_text(text)


@pytest.fixture
def root(tmp_path):
  """A repository with a sweep of one short cell."""
  shutil.copytree(runs.ROOT / "configs", tmp_path / "configs")
  write_sweep(tmp_path, seed=5)
  return tmp_path


def call(root, *arguments):
  run = runs.warm("mmm_jax.experiments")
  return run(*arguments, "--sweep=short", cwd=root)


def test_a_cell_is_run_once_recorded_and_tabled(root):
  assert call(root, "run", "--list").out == "0 mmm:tiny,pmf simulated 5\n"
  missing = call(root, "table")
  assert missing.code == 2
  assert "run --sweep=short --cell=0" in missing.err
  done = call(root, "run")
  assert done.code == 0, done.err
  folder = root / "tests" / "results" / "short"
  found = json.loads((folder / "0.json").read_text())
  (workdir,) = (root / "runs" / "sweeps" / "short").iterdir()
  result = json.loads((workdir / "result.json").read_text())
  assert found["metrics"]["full"] == result["full"]
  assert found["hashes"]["candidates"] == result["candidates"]
  assert found["epochs"] == 2 and found["ended_by"] == "epochs"
  # The values of the users, without their ids, average to the metric.
  values_of_users = np.load(folder / "0.npy")
  assert values_of_users.dtype == np.float16
  mean = result["full"]["test"]["ndcg@20"]
  assert values_of_users.mean(dtype=float) == pytest.approx(mean, abs=1e-4)

  again = call(root, "run")
  assert again.code == 0 and "recorded already" in again.err
  # Another cell may be the same run, of this sweep or of another.
  for other in ("short/9", "other/0"):
    path = folder.parent / other
    path.parent.mkdir(exist_ok=True)
    for kind in (".json", ".npy"):
      (folder / f"0{kind}").rename(path.with_suffix(kind))
    taken = call(root, "run")
    assert taken.code == 0 and f"tests/results/{other}.json" in taken.err
    for kind in (".json", ".npy"):
      own, its = folder / f"0{kind}", path.with_suffix(kind)
      assert own.read_bytes() == its.read_bytes()
      if other == "short/9":
        its.unlink()
  # Who asks for a cell gets a run, whatever has been recorded elsewhere.
  (folder / "0.json").unlink()
  alone = call(root, "run", "--cell=0", "--workdir=again")
  assert alone.code == 0 and "recorded" not in alone.err
  assert (root / "again" / "short").is_dir()
  values = json.loads((folder / "0.json").read_text())
  assert values["metrics"] == found["metrics"]
  readme = root / "README.md"
  readme.write_text("a\n<!-- table: short -->\nold\n<!-- end -->\nb\n")
  assert call(root, "table", "--into=README.md").code == 0
  table = call(root, "table").out
  assert f"{mean:.4f}" in table
  assert table in readme.read_text() and "old" not in readme.read_text()

  # Values of other users than the metric's.
  np.save(folder / "0.npy", values_of_users + np.float16(0.01))
  torn = call(root, "table")
  assert torn.code == 2 and "as the mean of 0.npy" in torn.err
  np.save(folder / "0.npy", values_of_users)

  # Half a record is none.
  (folder / "0.npy").unlink()
  half = call(root, "table")
  assert half.code == 2 and "0.npy is not there" in half.err
  assert "recorded already" not in call(root, "run").err
  assert (folder / "0.npy").exists()

  # The folder's run is of other data: nothing is recorded of it.
  shutil.rmtree(folder.parent / "other")
  (folder / "0.json").unlink()
  path = workdir / "manifest.json"
  path.write_text(path.read_text().replace(found["hashes"]["data"], "other"))
  refused = call(root, "run")
  assert refused.code == 2 and "the data changed" in refused.err
  assert not (folder / "0.json").exists()
  files.write_json(folder / "0.json", found)

  # Another config: the record no longer stands for the cell.
  write_sweep(root, seed=6)
  stale = call(root, "table")
  assert stale.code == 2 and "another config" in stale.err


def test_a_stopped_sweep_lets_its_run_save(root):
  sweeps = root / "configs" / "sweeps.py"
  sweeps.write_text(sweeps.read_text().replace('"epochs": 2', '"epochs": 9999'))
  pipes = {"stderr": subprocess.PIPE, "text": True}
  sweep = ("mmm_jax.experiments", "run", "--sweep=short")
  with runs.start(*sweep, cwd=root, **pipes) as process:
    end = time.monotonic() + 120
    while not list(root.glob("runs/sweeps/short/*/metrics.jsonl")):
      assert process.poll() is None and time.monotonic() < end
      time.sleep(0.05)
    process.terminate()  # as a scheduler might, without telling its run
    time.sleep(0.2)
    process.terminate()
    _, said = process.communicate(timeout=60)
  assert process.returncode == command.STOPPED
  assert "stopped in 0 mmm:tiny,pmf" in said
  saved = [path.name for path in root.glob("runs/*/short/*/checkpoints/*")]
  assert any(f"stopped at step {step};" in said for step in saved)


def test_a_sweep_that_is_stopped_too_late_begins_no_other_cell(root):
  script = textwrap.dedent("""
    import sys
    from mmm_jax import command, experiments
    call = experiments._call
    experiments._call = lambda line: (call(line)[0], True)
    sys.argv = ["experiments", "run", "--sweep=short"]
    command.run(experiments.main)
  """)
  pipes = {"stderr": subprocess.PIPE, "text": True}
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=root, env=runs.environment(), **pipes
  )
  assert done.returncode == command.STOPPED, done.stderr
  assert "stopped after 0 mmm:tiny,pmf" in done.stderr
  assert (root / "tests" / "results" / "short" / "0.json").exists()


@pytest.mark.parametrize(
  ("code", "own", "words"),
  [
    (1, 1, "ended with 1; the message above"),
    (-9, 128 + 9, "signal 9 killed it"),  # as a shell says it
  ],
)
def test_a_sweep_ends_as_its_run_does(root, code, own, words):
  """Launchers continue what a signal killed, and not what failed."""
  script = textwrap.dedent(f"""
    import sys
    from mmm_jax import command, experiments
    experiments._call = lambda command_line: ({code}, False)
    sys.argv = ["experiments", "run", "--sweep=short"]
    command.run(experiments.main)
  """)
  pipes = {"stderr": subprocess.PIPE, "text": True}
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=root, env=runs.environment(), **pipes
  )
  assert done.returncode == own and words in done.stderr


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["run", "--sweep=shrt"], "'shrt', wanted one of short"),
    (
      ["tune", "--model=mm", "--dataset=tiktok", "--study=s"],
      "found 'mm', want",
    ),
    (["walk"], "'walk', wanted one of tune, run, table"),
    (["tune", "--dataset=simulated", "--study=s"], "--model is missing"),
    (["tune", "--model=mmm:pfm", "--dataset=simulated", "--study=s"], "'pmf'?"),
    (["tune", "--model=mmm", "--dataset=nothing"], "dataset"),
    (["run", "--cell=1"], "wanted 0 to 0"),
    (["run", "--list", "--cell=1"], "wanted 0 to 0"),
    (["tune", "--model=common", "--dataset=tiktok", "--study=s"], "common.py"),
    (["table", "--study=configs/mmm.py"], "is not a journal"),
    (["table", "--study=configs"], "is not a journal"),
    (["table", "--study=empty"], "holds no study"),
    (["table", "--study=empty", "--pairs"], "found both"),
    (["table", "--study=empty", "--sweep=short"], "found both"),
    (["table", "--into=missing.md"], "wanted a file that has a block"),
    (["table", "--pairs"], "has none for short, but for nothing"),
    (["table", "--into=a.md", "--format=csv"], "--into is for Markdown"),
    (["run", "--manual_dir=nowhere"], "NAME=DIR"),
    (["table", "--into=missing.md", "--format=word"], "format"),
  ],
)
def test_wrong_arguments_are_one_message(root, arguments, words):
  (root / "empty").touch()
  if not any(each.startswith(("--sweep", "--study")) for each in arguments):
    arguments = [*arguments, "--sweep=short"]
  done = runs.warm("mmm_jax.experiments")(*arguments, cwd=root)
  assert done.code == 2
  assert words in done.err and "Traceback" not in done.err


def test_outside_of_the_repository_it_says_so(tmp_path):
  done = call(tmp_path, "run", "--list")
  assert done.code == 2 and "repository's root" in done.err


STUDIES = "tests/results/studies/*.journal"

# --- what is committed --------------------------------------------------------


def test_the_readme_has_the_tables_of_the_records(monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  readme = (runs.ROOT / "README.md").read_text()
  blocks = readme.split("<!-- table: ")[1:]
  assert blocks
  for block in blocks:
    name, _, rest = block.partition(" -->")
    sweep, _, pairs = name.partition(" ")
    if name == "studies":
      studies = sorted(map(str, pathlib.Path().glob(STUDIES)))
      tables = experiments.study_tables(studies)
    elif pairs:
      tables = [experiments.pairs_table(sweep)]
    else:
      tables = [tabulate.full_table(experiments.read_records(name))]
    text = "\n\n".join(tabulate.markdown(*table) for table in tables)
    assert rest.partition("<!-- end -->")[0].strip() == text


def test_what_is_one_run_has_one_record():
  runs_of = {}
  for path in sorted((runs.ROOT / "tests" / "results").glob("*/*.json")):
    found = json.loads(path.read_text())
    names = ("config", "data", "split")
    hashes = tuple(found["hashes"][name] for name in names)
    users = path.with_suffix(".npy").read_bytes()
    first, metrics, theirs = runs_of.setdefault(
      hashes, (path, found["metrics"], users)
    )
    assert (found["metrics"], users) == (metrics, theirs), (first, path)
  assert len(runs_of) > 200


def test_records_of_one_split_have_its_hash(tmp_path, monkeypatch):
  shutil.copytree(runs.ROOT / "configs", tmp_path / "configs")
  folder = tmp_path / "tests" / "results" / "losses"
  shutil.copytree(runs.ROOT / "tests" / "results" / "losses", folder)
  monkeypatch.chdir(tmp_path)
  assert experiments.read_records("losses")
  for name in ("split", "data"):
    for number in (6, 7, 8):
      found = json.loads((folder / f"{number}.json").read_text())
      found["hashes"][name] = "another"
      files.write_json(folder / f"{number}.json", found)
    with pytest.raises(errors.InputError, match=f"of one {name} by their"):
      experiments.read_records("losses")


def test_a_damaged_record_is_named(tmp_path):
  path = tmp_path / "3.json"
  record = dict.fromkeys(results.FIELDS - {"ended_by"})
  record["metrics"] = {"full": {"test": {"ndcg@20": 0.5}}}
  files.write_json(path, record)
  with pytest.raises(errors.InputError, match="no ended_by; remove"):
    results.read(path)
  np.save(path.with_suffix(".npy"), np.full(9, 0.5, np.float16))
  assert results.read_users(path, record).tolist() == [0.5] * 9
  whole = path.with_suffix(".npy").read_bytes()
  for damaged in (b"", whole[:50], whole[:-2], b"nonsense"):
    path.with_suffix(".npy").write_bytes(damaged)
    with pytest.raises(errors.InputError, match="3.npy: .* and run it again"):
      results.read_users(path, record)
  np.save(path.with_suffix(".npy"), np.full(9, 0.25, np.float16))
  with pytest.raises(errors.InputError, match="0.50000, and 0.25000 as the"):
    results.read_users(path, record)


def printed_by(benchmark):
  """What a script in tests/benchmarks makes of its file of results."""
  script = runs.ROOT / "tests" / "benchmarks" / f"{benchmark}.py"
  flag = f"--table={runs.ROOT}/tests/results/{benchmark}.json"
  return subprocess.check_output(
    [sys.executable, script, flag],
    text=True,
    env=runs.environment(),
    cwd=runs.ROOT,
  )


@pytest.mark.parametrize(
  ("benchmark", "least"), [("speed", 900), ("gpu", 900), ("simple", 600)]
)
def test_the_readme_has_what_was_measured(benchmark, least):
  table = printed_by(benchmark).strip()
  assert len(table) > least
  assert table in (runs.ROOT / "README.md").read_text()


def test_the_page_on_launching_has_the_figures_of_scale():
  page = (runs.ROOT / "launch" / "README.md").read_text()
  printed = printed_by("scale")
  blocks = printed.split("<!-- scale: ")[1:]
  assert len(blocks) == page.count("<!-- scale: ") == 6
  for block in blocks:
    assert f"<!-- scale: {block.strip()}" in page
