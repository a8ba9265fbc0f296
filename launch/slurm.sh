#!/usr/bin/env bash
# Trains under SLURM, on one node or several, or runs the cells of a sweep.
#
#   sbatch [sbatch's options] launch/slurm.sh [-- flags of mmm_jax.main]
#   launch/slurm.sh [--dry-run] [sbatch's options] [-- flags of mmm_jax.main]
#
# The second form submits the first with what the variables say; see README.md.
#SBATCH --job-name=mmm
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
# sbatch runs a copy of this file, in the folder that it was called from.
here=$(dirname "$(readlink -f "$0")")
[[ -e $here/common.bash ]] || here=$SLURM_SUBMIT_DIR/launch
source "$here/common.bash"

CONFIG=${CONFIG:-configs/mmm.py}   # config file, variants behind a colon
NAME=${NAME:-mmm}                  # of the job
WORKDIR=${WORKDIR:-runs/$NAME}     # the run's folder; all hosts see it
NODES=${NODES:-1}                  # hosts
DEVICES=${DEVICES:-0}              # accelerators of a host; 0: its CPU
ACCELERATOR=${ACCELERATOR:-}       # kind of device, as it is called there
PYTHON=${PYTHON:-.venv/bin/python} # on the hosts
RESTARTS=${RESTARTS:-100}          # how often a stopped run is continued
SWEEP=${SWEEP:-}                   # of configs/sweeps.py, in place of CONFIG
CELLS=${CELLS:-CELLS}              # of the sweep, such as 0-9

read_arguments "$@"

submit() {
  cd "$here/.."
  local wanted=(--job-name="$NAME")
  if [[ -n $SWEEP ]]; then
    need CELLS
    wanted+=(--array="$CELLS" --ntasks=1)
  else
    # jax gives each task of a node one of its GPUs.
    wanted+=(--nodes="$NODES" --ntasks-per-node="$((DEVICES ? DEVICES : 1))")
  fi
  if ((DEVICES)); then
    wanted+=(--gpus-per-node="${ACCELERATOR:+$ACCELERATOR:}$DEVICES")
  fi
  act sbatch "${wanted[@]}" "${options[@]}" launch/slurm.sh -- "${flags[@]}"
}

# What every task runs; jax finds the other tasks in SLURM's environment.
train() {
  local command=(-m mmm_jax.main --config="$CONFIG")
  if [[ -n $SWEEP ]]; then
    command=(-m mmm_jax.experiments run --sweep="$SWEEP"
      --cell="${SLURM_ARRAY_TASK_ID:-CELL}")
  elif ((DEVICES)) || [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    command+=(--config.parallel.platform=gpu)
  fi
  # A task that ends first must not take the others' checkpoint with it. One
  # that hangs, and cannot end, must not keep the job.
  act srun --kill-on-bad-exit=0 --wait=900 "$PYTHON" "${command[@]}" \
    --workdir="$WORKDIR" "${flags[@]}"
}

# Puts the job back into the queue, unless SLURM is ending it anyway: then it
# was cancelled, or SLURM requeues it by itself.
requeue() {
  local job=$SLURM_JOB_ID
  # The id of an array's first task is that of the whole array, too.
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  fi
  [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING ]] || return 0
  if ((${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
    # Not what salloc made.
    scontrol requeue "$job" ||
      echo "this job cannot be queued again; the same command continues" >&2
  else
    echo "stopped after $RESTARTS restarts; the same command continues" >&2
  fi
}

run_job() {
  ((${#options[@]} == 0)) ||
    fail "found '${options[*]}' inside a job; its flags stand behind --"
  trap : TERM # the tasks get it, too; this shell has to see how they end
  # Since SLURM 22.05 srun does not take this over from sbatch.
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  fi
  local code=0
  train || code=$?
  # 75: stopped and resumable; above 128: killed by a signal.
  if ((code == 75 || code > 128)); then requeue; fi
  exit "$code"
}

if "$dry_run"; then
  submit
  train
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
  run_job
else
  submit
fi
