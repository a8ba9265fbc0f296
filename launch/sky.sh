#!/usr/bin/env bash
# Trains with SkyPilot, on whatever cloud it finds cheapest or is told.
#
#   launch/sky.sh [--dry-run] [options of sky jobs launch]
#     [-- flags of mmm_jax.main]
#
# See README.md.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
source launch/common.bash

CONFIG=${CONFIG:-configs/mmm.py}        # config file, variants behind a colon
NAME=${NAME:-mmm}                       # of the job
WORKDIR=${WORKDIR:-runs/$NAME}          # the run's folder; all hosts see it
NODES=${NODES:-1}                       # hosts
DEVICES=${DEVICES:-0}                   # accelerators of a host; 0: its CPU
ACCELERATOR=${ACCELERATOR:-ACCELERATOR} # kind of device, as it is called there
PYTHON=${PYTHON:-.venv/bin/python}      # on the hosts
SHARE=${SHARE:-SHARE}                   # HOST:/PATH, NFS for runs/; or none
SPOT=${SPOT:-0}                         # 1: cheaper, and may be taken away

read_arguments "$@"
check_label NAME

# What every host runs; SkyPilot tells it of the others when it is there.
train() {
  local hosts
  hosts="--coordinator=\$(head -n1 <<<\"\$SKYPILOT_NODE_IPS\"):8476"
  hosts+=" --num_processes=\$SKYPILOT_NUM_NODES"
  hosts+=" --process_id=\$SKYPILOT_NODE_RANK"
  if ((DEVICES)); then hosts+=" --config.parallel.platform=gpu"; fi
  printf '%s %s\n' "$(quote "$PYTHON" -m mmm_jax.main --config="$CONFIG" \
    --workdir="$WORKDIR" "${flags[@]}")" "$hosts"
}

need SHARE
wanted=(--name="$NAME" --num-nodes="$NODES" --env=SHARE="$SHARE")
if ((DEVICES)); then
  need ACCELERATOR
  [[ $ACCELERATOR != tpu-* ]] || fail "TPUs are for tpu_vm.sh or gke/launch.sh"
  wanted+=(--gpus="$ACCELERATOR:$DEVICES" --env=EXTRA=cuda)
fi
if ((SPOT)); then wanted+=(--use-spot); fi
act sky jobs launch "${wanted[@]}" --env=COMMAND="$(train)" "${options[@]}" \
  launch/sky.yaml
