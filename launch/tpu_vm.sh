#!/usr/bin/env bash
# Trains on a Cloud TPU VM, of one host or several.
#
#   launch/tpu_vm.sh [--dry-run] [create|install|run|delete]
#     [options of queued-resources create] [-- flags of mmm_jax.main]
#
# Without a step it takes all four: what was stopped or preempted goes on on a
# new machine, and however the run ends, the machine is deleted; see README.md.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
source launch/common.bash

CONFIG=${CONFIG:-configs/mmm.py}        # config file, variants behind a colon
NAME=${NAME:-mmm}                       # of the job
WORKDIR=${WORKDIR:-runs/$NAME}          # the run's folder; all hosts see it
ACCELERATOR=${ACCELERATOR:-v5litepod-8} # kind of device, as it is called there
PYTHON=${PYTHON:-.venv/bin/python}      # on the hosts
RESTARTS=${RESTARTS:-100}               # how often a stopped run is continued
SHARE=${SHARE:-SHARE}                   # HOST:/PATH, NFS for runs/; or none
SPOT=${SPOT:-0}                         # 1: cheaper, and may be taken away
PROJECT=${PROJECT:-PROJECT}             # of Google Cloud
ZONE=${ZONE:-ZONE}                      # where the machine is
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # the machine's software

read_arguments "$@"
check_label NAME
step=all_steps
case ${options[0]:-} in create | install | run | delete)
  step=${options[0]} options=("${options[@]:1}")
  ;;
esac
if [[ $step != all_steps && $step != create ]] && ((${#options[@]})); then
  fail "found '${options[*]}', valid: nothing behind $step but -- and flags"
fi
made=false # whether there is a machine that this script asked for

tpu() {
  act gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"
}

on_all_hosts() {
  tpu tpu-vm ssh "$NAME" --worker=all --command="$1"
}

state() {
  tpu queued-resources describe "$NAME" --format="value(state.state)"
}

create() {
  local wanted=(--node-id="$NAME" --accelerator-type="$ACCELERATOR"
    --runtime-version="$RUNTIME")
  if ((SPOT)); then wanted+=(--spot); fi
  tpu queued-resources create "$NAME" "${wanted[@]}" "${options[@]}" || return
  made=true
  if "$dry_run"; then state; else await_machine; fi
}

# The request stands in a queue until there is a machine for it.
await_machine() {
  local now silent=0
  until now=$(state) && [[ $now == ACTIVE ]]; do
    if [[ -n $now ]]; then silent=0; else ((++silent)); fi
    if ((silent == 20)); then
      echo "error: gcloud has said nothing of the machine for 10 minutes" >&2
      return 1
    fi
    case $now in
      FAILED) echo "error: the request for a machine failed" >&2 && return 1 ;;
      SUSPENDED) echo "the machine was taken away" >&2 && return 75 ;;
    esac
    sleep 30
  done
}

# The last commit, on every host. A machine that has just come up may refuse
# the first connections.
install() {
  local archive=ARCHIVE code=1 try
  "$dry_run" || archive=$(mktemp)
  act git archive --format=tar.gz --output="$archive" HEAD || return
  for ((try = 1; code && try <= 5; try++)); do
    if ((try > 1)); then sleep 30; fi
    code=0
    tpu tpu-vm scp "$archive" "$NAME:mmm_jax.tar.gz" --worker=all &&
      on_all_hosts "$(setup)" || code=$?
  done
  "$dry_run" || rm -f "$archive"
  return "$code"
}

setup() {
  # The machine's own Python is too old; uv brings one along.
  cat <<'END'
set -e
mkdir -p mmm_jax/runs
tar -xzf mmm_jax.tar.gz -C mmm_jax
cd mmm_jax
curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --allow-existing --python=">=3.11" .venv
~/.local/bin/uv pip install --python=.venv --editable=".[tpu,all]"
END
  if [[ $SHARE != none ]]; then
    cat <<END
sudo apt-get -o DPkg::Lock::Timeout=600 update
sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common
mountpoint -q runs || sudo mount -t nfs $(quote "$SHARE") runs
sudo chmod 1777 runs
END
  fi
}

run() {
  local command
  command=$(quote "$PYTHON" -m mmm_jax.main --config="$CONFIG" \
    --workdir="$WORKDIR" --coordinator=auto --config.parallel.platform=tpu \
    "${flags[@]}")
  on_all_hosts "cd mmm_jax && exec $command"
}

delete() {
  tpu queued-resources delete "$NAME" --force --quiet
  made=false
}

# 75: stopped and resumable; above 128: killed, or the connection was lost. Any
# other code is the run's own, unless the machine is no longer there.
resumable() {
  local now
  (($1 == 75 || $1 > 128)) || { now=$(state) && [[ $now != ACTIVE ]]; }
}

all_steps() {
  local code restart
  if "$dry_run"; then
    create && install && run && delete
    return
  fi
  git rev-parse --quiet --verify HEAD >/dev/null ||
    fail "this folder has no commit, which is what hosts get"
  # A forgotten machine costs money.
  trap 'if "$made"; then delete || true; fi' EXIT
  for ((restart = 0; restart <= RESTARTS; restart++)); do
    if "$made"; then delete; fi
    code=0
    create || code=$?
    if ((code == 75)); then continue; fi
    if ((code)); then break; fi
    { install && run; } || code=$?
    if ((code == 0)) || ! resumable "$code"; then break; fi
  done
  exit "$code"
}

need PROJECT ZONE SHARE
"$step"
