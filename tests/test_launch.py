"""Launchers: what dry runs show, what real ones call, and valid files.

Nothing here reaches a cloud or a cluster: where a launcher is run for real, the
platform's commands are stand-ins that write down how they were called.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

from kubeflow_trainer_api.models import jobset_v1alpha2_job_set
import pytest
import yaml

import runs

LAUNCH = runs.ROOT / "launch"
LAUNCHERS = ("slurm.sh", "tpu_vm.sh", "gke/launch.sh", "sky.sh")
README = (LAUNCH / "README.md").read_text()
VARIABLE = re.compile(r"^([A-Z]+)=\$\{\1:-(.*)\} +# (.+)$", re.MULTILINE)


def text_of(launcher):
  return (LAUNCH / launcher).read_text()


NAMES = {
  name for each in LAUNCHERS for name, *_ in VARIABLE.findall(text_of(each))
}


def run(launcher, *arguments, path=None, **variables):
  """Runs a launcher with these variables and no others of its own."""
  kept = {
    key: value
    for key, value in os.environ.items()
    if key not in NAMES and not key.startswith(("SLURM_", "SRUN_"))
  }
  if path is not None:
    kept["PATH"] = f"{path}:{kept['PATH']}"
  return subprocess.run(
    [LAUNCH / launcher, *arguments],
    env=kept | variables,
    capture_output=True,
    text=True,
    timeout=60,
  )


def dry_run(launcher, *arguments, **variables) -> str:
  done = run(launcher, "--dry-run", *arguments, **variables)
  assert done.returncode == 0, done
  assert not done.stderr
  return done.stdout


def main_flags(output: str) -> list[str]:
  """The flags of mmm_jax.main in the one line that calls it.

  The call may be a word of another command, quoted once more.
  """
  lines = output.splitlines()
  [line] = [each for each in lines if "python -m mmm_jax.main" in each]
  words = shlex.split(line)
  while "mmm_jax.main" not in words:
    [inner] = [word for word in words if "mmm_jax.main" in word]
    words = shlex.split(inner)
  return words[words.index("mmm_jax.main") + 1 :]


def manifest(output: str) -> dict:
  text = re.search(r"^kubectl apply .*<<'END'\n(.*)\nEND$", output, re.M | re.S)
  return yaml.safe_load(text[1])


def pod(jobset: dict) -> dict:
  [job] = jobset["spec"]["replicatedJobs"]
  return job["template"]["spec"]["template"]["spec"]


# --- dry runs ----------------------------------------------------------------


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dry_run_needs_nothing_and_shows_the_command(launcher):
  flags = main_flags(dry_run(launcher))
  assert flags[:2] == ["--config=configs/mmm.py", "--workdir=runs/mmm"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_is_the_launchers_own(launcher):
  text = run(launcher, "--help").stdout
  assert f"launch/{launcher} [--dry-run]" in text and "SBATCH" not in text
  folder = LAUNCH / "gke"
  shown = subprocess.run(
    ["./" + os.path.relpath(LAUNCH / launcher, folder), "-h"],
    cwd=folder,
    capture_output=True,
    text=True,
  )
  assert shown.stdout == text


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("NODES", "two"),
    ("NODES", "0"),
    ("DEVICES", "08"),
    ("DEVICES", "-1"),
    ("RESTARTS", "x"),
    ("SPOT", "yes"),
    ("SHARE", "10.0.0.2"),
    ("SHARE", "10.0.0.2:/a: b"),
    ("SHARE", "10.0.0.2:/a,b"),
    ("ACCELERATOR", "a b"),
    ("TOPOLOGY", "2x4,"),
    ("IMAGE", "a: b"),
  ],
)
def test_values_that_mean_nothing_are_refused(name, value):
  read = [each for each in LAUNCHERS if f"{name}=" in text_of(each)]
  assert read
  for launcher in read:
    done = run(launcher, "--dry-run", **{name: value})
    assert done.returncode == 2 and not done.stdout
    assert f"error: {name}: found '{value}', valid: " in done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
@pytest.mark.parametrize("name", ["a/b", "Mmm", "1", "a: b", "a" * 41])
def test_clouds_need_a_plain_name(launcher, name):
  done = run(launcher, "--dry-run", NAME=name)
  assert done.returncode == 2 and not done.stdout
  assert f"error: NAME: found '{name}', valid: " in done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_flags_before_the_dashes_are_refused(launcher):
  done = run(launcher, "--dry-run", "--config.epochs=2")
  assert done.returncode == 2 and not done.stdout
  assert "found '--config.epochs=2', valid: " in done.stderr
  broken = run(launcher, "--dry-run", "--", "--config.x=a\nb")
  assert broken.returncode == 2 and "line break" in broken.stderr
  broken = run(launcher, "--dry-run", CONFIG="a\nb")
  assert broken.returncode == 2 and "CONFIG holds a line" in broken.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_run_through_a_link(launcher, tmp_path):
  link = tmp_path / "link"
  link.symlink_to(LAUNCH / launcher)
  assert dry_run(link) == dry_run(launcher)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_accelerators_that_are_asked_for_have_to_be_there(launcher):
  wanted = "tpu" if launcher == "tpu_vm.sh" else "gpu"
  flags = main_flags(dry_run(launcher, DEVICES="1", ACCELERATOR="h100"))
  assert f"--config.parallel.platform={wanted}" in flags
  if launcher != "tpu_vm.sh":
    assert "parallel.platform" not in dry_run(launcher)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_variables_and_flags_reach_main_as_they_are(launcher):
  extra = ["--config.eval.cutoffs=(10, 20)", "--config.x=it's $5 & more"]
  flags = main_flags(
    dry_run(
      launcher,
      "--",
      *extra,
      CONFIG="configs/mmm.py:tiny,con",
      WORKDIR="/a b/run",
      NAME="other",
    )
  )
  assert flags[:2] == ["--config=configs/mmm.py:tiny,con", "--workdir=/a b/run"]
  assert [flag for flag in flags if flag in extra] == extra


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_name_is_the_jobs_and_by_default_the_folders(launcher):
  output = dry_run(launcher, NAME="other")
  assert "--workdir=runs/other" in main_flags(output)
  assert re.search(r"(--job-name=|create |name: \"|--name=)other\b", output)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_python_and_options_of_the_platform(launcher):
  output = dry_run(launcher, "--zone-or-so=x", PYTHON="/opt/py/bin/python")
  assert "/opt/py/bin/python -m mmm_jax.main" in output
  assert "--zone-or-so=x" in output.splitlines()[0]
  assert "--zone-or-so=x" not in main_flags(output)


def test_slurm_starts_a_task_for_every_gpu():
  output = dry_run("slurm.sh", NODES="2", DEVICES="8", ACCELERATOR="a100")
  words = shlex.split(output.splitlines()[0])
  assert words[0] == "sbatch"
  assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=a100:8"} < {
    *words
  }
  assert "--ntasks-per-node=1" in dry_run("slurm.sh", NODES="2")


def test_slurm_runs_a_cell_in_each_task_of_an_array():
  output = dry_run(
    "slurm.sh", "--", "--manual_dir=tiktok=DIR", SWEEP="losses", CELLS="0-9%2"
  )
  submitted, ran = map(shlex.split, output.splitlines())
  assert {"--array=0-9%2", "--ntasks=1"} < {*submitted}
  start = ran.index("mmm_jax.experiments")
  assert ran[start + 1 :] == [
    "run",
    "--sweep=losses",
    "--cell=CELL",
    "--workdir=runs/mmm",
    "--manual_dir=tiktok=DIR",
  ]


def test_a_tpu_vm_is_made_filled_used_and_deleted():
  output = dry_run(
    "tpu_vm.sh", ACCELERATOR="v6e-16", SHARE="10.0.0.2:/share", SPOT="1"
  )
  steps = re.findall(
    r"^g.*?(?:tpu-vm|queued-resources|git) (\w+)", output, re.M
  )
  assert steps == ["create", "describe", "scp", "ssh", "ssh", "delete"]
  assert "--accelerator-type=v6e-16" in output and "--spot" in output
  assert "sudo mount -t nfs 10.0.0.2:/share runs" in output
  assert "--coordinator=auto" in main_flags(output)
  assert "nfs" not in dry_run("tpu_vm.sh", SHARE="none")


@pytest.mark.parametrize("step", ["create", "install", "run", "delete"])
def test_steps_of_a_tpu_vm_are_those_of_the_whole(step):
  assert dry_run("tpu_vm.sh", step) in dry_run("tpu_vm.sh")


def test_gke_numbers_the_pods_of_gpus_and_lets_tpus_find_each_other():
  gpus = dry_run(
    "gke/launch.sh", NODES="2", DEVICES="8", ACCELERATOR="nvidia-l4", SPOT="1"
  )
  assert main_flags(gpus)[2:] == [
    "--coordinator=mmm-hosts-0-0.mmm:8476",
    "--num_processes=2",
    "--process_id=$JOB_COMPLETION_INDEX",
    "--config.parallel.platform=gpu",
  ]
  spec = pod(manifest(gpus))
  assert spec["nodeSelector"] == {
    "cloud.google.com/gke-accelerator": "nvidia-l4",
    "cloud.google.com/gke-spot": "true",
  }
  assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
  tpus = dry_run(
    "gke/launch.sh",
    NODES="4",
    DEVICES="4",
    ACCELERATOR="tpu-v5-lite-podslice",
    TOPOLOGY="4x4",
  )
  assert main_flags(tpus)[2:] == [
    "--coordinator=auto",
    "--config.parallel.platform=tpu",
  ]
  spec = pod(manifest(tpus))
  assert spec["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
  assert spec["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }


def test_sky_asks_for_hosts_and_tells_each_its_number():
  output = dry_run(
    "sky.sh", NODES="2", DEVICES="8", ACCELERATOR="A100", SHARE="h:/s", SPOT="1"
  )
  words = shlex.split(output)
  assert {"--num-nodes=2", "--gpus=A100:8", "--use-spot"} < {*words}
  [command] = [word for word in words if word.startswith("--env=COMMAND=")]
  # What SkyPilot sets on the second host, whose shell completes the line.
  done = subprocess.run(
    ["bash", "-c", f'printf "%s\\n" {command.removeprefix("--env=COMMAND=")}'],
    env={
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
      "SKYPILOT_NUM_NODES": "2",
      "SKYPILOT_NODE_RANK": "1",
      "PATH": os.environ["PATH"],
    },
    capture_output=True,
    text=True,
  )
  assert done.stdout.splitlines()[-4:] == [
    "--coordinator=10.0.0.1:8476",
    "--num_processes=2",
    "--process_id=1",
    "--config.parallel.platform=gpu",
  ]


def test_sky_does_not_take_tpus_for_gpus():
  done = run("sky.sh", "--dry-run", DEVICES="1", ACCELERATOR="tpu-v5e-8")
  assert done.returncode == 2 and "tpu_vm.sh" in done.stderr


# --- real runs, with stand-ins -----------------------------------------------


@pytest.fixture
def stand_in(tmp_path):
  """Makes commands that only note their words in `calls`, a line a call."""

  def make(name, body=""):
    path = tmp_path / name
    path.write_text(
      f'#!/usr/bin/env bash\necho "{name} $*" >> {tmp_path}/calls\n{body}\n'
    )
    path.chmod(0o755)
    return tmp_path

  return make


def calls(folder, word=""):
  return [
    line for line in (folder / "calls").read_text().splitlines() if word in line
  ]


@pytest.mark.parametrize(
  "launcher, variables",
  [
    ("slurm.sh", {"SWEEP": "losses"}),
    ("tpu_vm.sh", {}),
    ("tpu_vm.sh", {"PROJECT": "p", "ZONE": "z"}),
    ("gke/launch.sh", {"IMAGE": "i"}),
    ("gke/launch.sh", {"IMAGE": "i", "SHARE": "none", "DEVICES": "1"}),
    ("sky.sh", {}),
  ],
)
def test_what_only_the_user_knows_is_asked_for(launcher, variables, stand_in):
  for name in ("sbatch", "gcloud", "kubectl", "sky"):
    path = stand_in(name)
  done = run(launcher, path=path, **variables)
  assert done.returncode == 2
  assert re.fullmatch(r"error: [A-Z]+ is not set\n", done.stderr)
  assert not (path / "calls").exists()


def test_real_runs_call_what_dry_runs_show(stand_in):
  variables = {"SHARE": "h:/s", "IMAGE": "i"}
  for launcher, name in (("slurm.sh", "sbatch"), ("sky.sh", "sky")):
    path = stand_in(name)
    assert run(launcher, path=path, **variables).returncode == 0
    shown = shlex.split(dry_run(launcher, **variables).splitlines()[0])
    assert calls(path, f"{name} ") == [" ".join(shown)]
  path = stand_in("kubectl", f"cat > {stand_in('kubectl')}/manifest")
  assert run("gke/launch.sh", path=path, **variables).returncode == 0
  applied = yaml.safe_load((path / "manifest").read_text())
  assert applied == manifest(dry_run("gke/launch.sh", **variables))


@pytest.mark.parametrize(
  "code, state, restarts, requeued",
  [
    (0, "RUNNING", 0, False),
    (1, "RUNNING", 0, False),
    (2, "RUNNING", 0, False),
    (75, "RUNNING", 0, True),
    (137, "RUNNING", 2, True),
    (75, "RUNNING", 3, False),
    (75, "COMPLETING", 0, False),  # cancelled, or SLURM requeues it anyway
  ],
)
def test_slurm_requeues_what_can_go_on(
  code, state, restarts, requeued, stand_in
):
  stand_in("srun", f"exit {code}")
  stand_in("squeue", f"echo {state}")
  path = stand_in("scontrol")
  done = run(
    "slurm.sh",
    path=path,
    SLURM_JOB_ID="7",
    SLURM_RESTART_COUNT=str(restarts),
    RESTARTS="3",
  )
  assert done.returncode == code
  assert calls(path, "scontrol") == ["scontrol requeue 7"] * requeued


def test_the_code_is_the_runs_even_if_the_job_cannot_be_requeued(stand_in):
  """As inside an allocation that salloc made."""
  stand_in("srun", "exit 75")
  stand_in("squeue", "echo RUNNING")
  path = stand_in("scontrol", "exit 1")
  done = run("slurm.sh", path=path, SLURM_JOB_ID="7")
  assert done.returncode == 75
  assert "the same command continues" in done.stderr


def test_the_copy_that_slurm_runs_finds_what_it_reads(stand_in, tmp_path):
  """sbatch copies the script to a folder of its own and names the first."""
  path = stand_in("srun")
  spooled = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
  done = run(
    spooled, path=path, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(runs.ROOT)
  )
  assert done.returncode == 0, done
  assert "-m mmm_jax.main --config=configs/mmm.py" in calls(path, "srun")[0]
  assert "--kill-on-bad-exit=0 --wait=900" in calls(path, "srun")[0]


def test_slurm_refuses_options_inside_a_job(stand_in):
  path = stand_in("srun")
  done = run("slurm.sh", "--time=1:00:00", path=path, SLURM_JOB_ID="7")
  assert done.returncode == 2 and "--time=1:00:00" in done.stderr
  assert not (path / "calls").exists()


def test_slurm_knows_of_gpus_that_sbatch_was_asked_for(stand_in):
  path = stand_in("srun")
  run("slurm.sh", path=path, SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="2")
  run("slurm.sh", path=path, SLURM_JOB_ID="7")
  of_gpus, of_cpus = calls(path, "srun")
  assert "--config.parallel.platform=gpu" in of_gpus.split()
  assert "platform" not in of_cpus


def test_slurm_requeues_one_task_of_an_array(stand_in):
  stand_in("srun", "exit 75")
  stand_in("squeue", "echo RUNNING")
  path = stand_in("scontrol")
  run(
    "slurm.sh",
    path=path,
    SWEEP="losses",
    SLURM_JOB_ID="7",
    SLURM_ARRAY_JOB_ID="7",
    SLURM_ARRAY_TASK_ID="4",
  )
  assert "--sweep=losses --cell=4 " in calls(path, "srun")[0]
  assert calls(path, "scontrol") == ["scontrol requeue 7_4"]


def run_tpu_vm(path, *arguments, **variables):
  given = {"PROJECT": "p", "ZONE": "z", "SHARE": "none", "TMPDIR": str(path)}
  return run("tpu_vm.sh", *arguments, path=path, **given, **variables)


@pytest.mark.parametrize(
  "codes, machine, ends, machines",
  [
    ("0", "ACTIVE", 0, 1),
    ("2", "ACTIVE", 2, 1),
    ("75 255 0", "ACTIVE", 0, 3),
    ("75 75 75", "ACTIVE", 75, 2),  # one restart is allowed
    ("1 0", "SUSPENDED", 0, 2),  # the machine was taken away
  ],
)
def test_a_tpu_vm_goes_on_and_is_always_deleted(
  codes, machine, ends, machines, stand_in, tmp_path
):
  (tmp_path / "codes").write_text("\n".join(codes.split()))
  stand_in("git")  # the tree may be a copy, and no checkout
  # Whatever has run last, the machine is there while it is waited for.
  path = stand_in(
    "gcloud",
    f"""cd {tmp_path}
    case "$*" in
      *create*) echo ACTIVE > state ;;
      *describe*) cat state ;;
      *mmm_jax.main*)
        code=$(head -n1 codes)
        sed -i 1d codes
        if ((code)); then echo {machine} > state; fi
        exit "$code" ;;
    esac""",
  )
  restarts = max(1, len(codes.split()) - 1) if ends == 0 else 1
  done = run_tpu_vm(path, RESTARTS=str(restarts))
  assert done.returncode == ends, done
  assert len(calls(path, "create")) == machines
  assert len(calls(path, "queued-resources delete")) == machines
  assert "delete" in calls(path)[-1]


def test_the_code_is_the_runs_even_if_the_machine_cannot_be_deleted(stand_in):
  stand_in("git")
  path = stand_in(
    "gcloud",
    """case "$*" in
      *describe*) echo ACTIVE ;;
      *mmm_jax.main*) exit 2 ;;
      *delete*) exit 1 ;;
    esac""",
  )
  assert run_tpu_vm(path).returncode == 2
  assert len(calls(path, "delete")) == 1


def test_a_machine_that_somebody_else_made_is_not_deleted(stand_in):
  stand_in("git")
  path = stand_in("gcloud", 'case "$*" in *create*) exit 1 ;; esac')
  assert run_tpu_vm(path).returncode == 1
  assert len(calls(path, "create")) == 1 and not calls(path, "delete")


def test_a_tpu_vm_that_gcloud_does_not_tell_of_is_not_made_again(
  stand_in, tmp_path
):
  stand_in("git")
  path = stand_in(
    "gcloud",
    f"""cd {tmp_path}
    case "$*" in
      *describe*) if [[ -e over ]]; then exit 1; else echo ACTIVE; fi ;;
      *mmm_jax.main*) touch over && exit 2 ;;
    esac""",
  )
  assert run_tpu_vm(path, RESTARTS="2").returncode == 2
  assert len(calls(path, "create")) == len(calls(path, "delete")) == 1


def test_a_tpu_vm_that_is_never_told_of_is_not_awaited_for_ever(stand_in):
  stand_in("git")
  stand_in("sleep")
  path = stand_in("gcloud", 'case "$*" in *describe*) exit 1 ;; esac')
  done = run_tpu_vm(path)
  assert done.returncode == 1 and "nothing of the machine" in done.stderr
  assert len(calls(path, "create")) == len(calls(path, "delete")) == 1


def test_a_tpu_vm_may_refuse_the_first_connections(stand_in, tmp_path):
  stand_in("git")
  stand_in("sleep")
  path = stand_in(
    "gcloud",
    f"""case "$*" in
      *describe*) echo ACTIVE ;;
      *scp*) (($(grep -c " scp " {tmp_path}/calls) > 2)) || exit 255 ;;
    esac""",
  )
  assert run_tpu_vm(path).returncode == 0
  assert len(calls(path, " scp ")) == 3 and len(calls(path, "create")) == 1
  assert len(calls(path, "mmm_jax.main")) == len(calls(path, "delete")) == 1
  assert not list(tmp_path.glob("tmp.*"))  # the archive


def test_a_tpu_vm_taken_away_while_waiting_is_asked_for_again(stand_in):
  stand_in("git")
  path = stand_in("sleep")
  stand_in(
    "gcloud",
    f"""case "$*" in *describe*)
      if (($(grep -c " create " {path}/calls) > 1))
      then echo ACTIVE; else echo SUSPENDED; fi ;;
    esac""",
  )
  assert run_tpu_vm(path).returncode == 0
  assert len(calls(path, "create")) == len(calls(path, "delete")) == 2


@pytest.mark.parametrize("step", ["install", "run", "delete"])
def test_steps_of_a_tpu_vm_take_no_options(step, stand_in):
  path = stand_in("gcloud")
  done = run_tpu_vm(path, step, "--labels=a=b")
  assert done.returncode == 2 and "--labels=a=b" in done.stderr
  assert not (path / "calls").exists()


# --- the files ---------------------------------------------------------------


def test_there_are_no_other_scripts():
  found = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*.sh")}
  assert found == {*LAUNCHERS}
  assert all(os.access(LAUNCH / path, os.X_OK) for path in found)


def test_variables_are_the_same_everywhere():
  meanings = {}
  for launcher in LAUNCHERS:
    for name, default, meaning in VARIABLE.findall(text_of(launcher)):
      assert meanings.setdefault(name, meaning) == meaning, (launcher, name)
      row = re.search(rf"^\| `{name}` \| (.*?) \| (.*?) \|", README, re.M)
      assert row and row[1].replace("`", "") == meaning, name
      assert default in {row[2].strip("`"), "python", "v5litepod-8", name, ""}
  common = {"CONFIG", "NAME", "WORKDIR", "ACCELERATOR", "PYTHON"}
  for launcher in LAUNCHERS:
    assert common <= {name for name, *_ in VARIABLE.findall(text_of(launcher))}


@pytest.mark.parametrize(
  "script", [*LAUNCHERS, "common.bash", "../.ci/run", "../.ci/slurm"]
)
def test_scripts_are_clean(script):
  path = LAUNCH / script
  subprocess.run(["bash", "-n", path], check=True)
  beside = os.path.dirname(sys.executable)
  shellcheck = shutil.which("shellcheck", path=beside) or shutil.which(
    "shellcheck"
  )
  if shellcheck is None:
    pytest.skip("shellcheck is not installed")
  done = subprocess.run([shellcheck, path], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "variables",
  [
    {},
    {"SHARE": "none"},
    {"NODES": "2", "DEVICES": "8", "ACCELERATOR": "nvidia-l4", "SPOT": "1"},
    {
      "NODES": "4",
      "DEVICES": "4",
      "ACCELERATOR": "tpu-v5-lite-podslice",
      "TOPOLOGY": "4x4",
      "SHARE": "10.0.0.2:/share",
    },
  ],
)
def test_the_manifest_is_a_jobset(variables):
  jobset = manifest(dry_run("gke/launch.sh", "--", "--x=a: b #c", **variables))
  # Models made from the schema check types, and drop what is not in it.
  model = jobset_v1alpha2_job_set.JobsetV1alpha2JobSet
  assert model.from_dict(jobset).to_dict() == jobset
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert "${" not in yaml.safe_dump(jobset)
  hosts = int(variables.get("NODES", "1"))
  [job] = jobset["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == hosts
  # 75 and signals restart all pods; 1 and 2 end the JobSet at once.
  [rule] = spec["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [1, 2]
  assert pod(jobset)["restartPolicy"] == "Never"  # a failure policy needs it
  [container] = pod(jobset)["containers"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  [mount] = container["volumeMounts"]
  [volume] = pod(jobset)["volumes"]
  assert mount["name"] == volume["name"]
  subprocess.run(["bash", "-n", "-c", *container["args"]], check=True)


def test_the_template_is_yaml_too():
  assert yaml.safe_load(text_of("gke/jobset.yaml"))["kind"] == "JobSet"


def test_the_sky_task_has_what_it_needs():
  """The parts that it uses of SkyPilot's schema (checked with 0.14.1)."""
  task = yaml.safe_load(text_of("sky.yaml"))
  assert set(task) == {"name", "workdir", "resources", "envs", "setup", "run"}
  assert task["resources"] == {
    "job_recovery": {"strategy": "FAILOVER", "recover_on_exit_codes": [75]}
  }
  given = re.findall(r"--env=(\w+)=", text_of("sky.sh"))
  assert set(task["envs"]) == set(given)
  assert all(isinstance(each, str | None) for each in task["envs"].values())
  for part in ("setup", "run"):
    subprocess.run(["bash", "-n", "-c", task[part]], check=True)


@pytest.mark.parametrize(
  ("command", "code"),
  [
    ("true", 0),
    ("(exit 1)", 1),
    ("(exit 2)", 2),
    ("(exit 75)", 75),
    ("bash -c 'kill -9 $$'", 75),
  ],
)
def test_a_host_of_sky_asks_for_what_can_go_on(command, code):
  """137 is no such word: SkyPilot writes it for hosts that it ends itself."""
  script = yaml.safe_load(text_of("sky.yaml"))["run"]
  variables = os.environ | {"COMMAND": command}
  done = subprocess.run(["bash", "-c", script], env=variables)
  assert done.returncode == code


def test_images_are_made_of_what_is_there():
  text = text_of("Dockerfile")
  copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
  sources = {source for line in copied for source in line.split()}
  allowed = re.findall(r"^!(.+)$", text_of("Dockerfile.dockerignore"), re.M)
  assert sources == {*allowed}
  assert all((runs.ROOT / source).exists() for source in sources)
  project = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]
  extras = re.search(r"^# (\w+), (\w+) or (\w+): the extra", text, re.M)
  assert set(extras.groups()) <= set(project["optional-dependencies"])
  assert 'ENTRYPOINT ["python", "-m", "mmm_jax.main"]' in text


def commands_of_readme():
  blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
  lines = [line for block in blocks for line in block.splitlines()]
  return [line for line in lines if re.search(r"(^| )launch/\S+\.sh", line)]


@pytest.mark.parametrize("line", commands_of_readme())
def test_commands_of_the_readme_are_understood(line):
  line = re.sub(r"^sbatch .*(?=launch/)", "", line)
  line = re.sub(r"(launch/\S+\.sh)", r"\1 --dry-run", line)
  done = subprocess.run(
    ["bash", "-c", line], cwd=runs.ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done
  assert done.stdout
