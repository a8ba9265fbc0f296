#!/usr/bin/env bash
# Trains on Google Kubernetes Engine, as a JobSet with one pod a host.
#
#   launch/gke/launch.sh [--dry-run] [options of kubectl apply]
#     [-- flags of mmm_jax.main]
#
# See ../README.md, also for the same with xpk.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
source ../common.bash

CONFIG=${CONFIG:-configs/mmm.py}        # config file, variants behind a colon
NAME=${NAME:-mmm}                       # of the job
WORKDIR=${WORKDIR:-runs/$NAME}          # the run's folder; all hosts see it
NODES=${NODES:-1}                       # hosts
DEVICES=${DEVICES:-0}                   # accelerators of a host; 0: its CPU
ACCELERATOR=${ACCELERATOR:-ACCELERATOR} # kind of device, as it is called there
PYTHON=${PYTHON:-python}                # on the hosts
RESTARTS=${RESTARTS:-100}               # how often a stopped run is continued
SHARE=${SHARE:-SHARE}                   # HOST:/PATH, NFS for runs/; or none
SPOT=${SPOT:-0}                         # 1: cheaper, and may be taken away
IMAGE=${IMAGE:-IMAGE}                   # container made with launch/Dockerfile
TOPOLOGY=${TOPOLOGY:-TOPOLOGY}          # of a TPU slice, such as 2x4

read_arguments "$@"
check_label NAME

on_tpu() {
  ((DEVICES)) && [[ $ACCELERATOR == tpu-* ]]
}

# What every pod runs.
train() {
  local pods
  if on_tpu; then
    # GKE tells jax the hosts of a slice.
    pods="--coordinator=auto --config.parallel.platform=tpu"
  else
    # Pods of a JobSet have names, and each knows its number.
    pods="--coordinator=$NAME-hosts-0-0.$NAME:8476 --num_processes=$NODES"
    pods+=" --process_id=\$JOB_COMPLETION_INDEX"
    if ((DEVICES)); then pods+=" --config.parallel.platform=gpu"; fi
  fi
  printf '%s %s\n' "$(quote "$PYTHON" -m mmm_jax.main --config="$CONFIG" \
    --workdir="$WORKDIR" "${flags[@]}")" "$pods"
}

# Prints jobset.yaml with its variables filled in.
manifest() {
  local text limits="" selector="" volume="{name: runs, emptyDir: {}}"
  if on_tpu; then
    limits="google.com/tpu: $DEVICES"
    selector="cloud.google.com/gke-tpu-accelerator: \"$ACCELERATOR\""
    selector+=", cloud.google.com/gke-tpu-topology: \"$TOPOLOGY\""
  elif ((DEVICES)); then
    limits="nvidia.com/gpu: $DEVICES"
    selector="cloud.google.com/gke-accelerator: \"$ACCELERATOR\""
  fi
  if ((SPOT)); then
    selector+="${selector:+, }cloud.google.com/gke-spot: \"true\""
  fi
  if [[ $SHARE != none ]]; then
    volume="{name: runs, nfs: {server: \"${SHARE%%:*}\", path: \"${SHARE#*:}\"}}"
  fi
  text=$(<jobset.yaml)
  fill NAME "$NAME"
  fill NODES "$NODES"
  fill RESTARTS "$RESTARTS"
  fill IMAGE "$IMAGE"
  fill LIMITS "{$limits}"
  fill SELECTOR "{$selector}"
  fill VOLUME "$volume"
  fill COMMAND "$(train)" # the last, as it may hold any words
  printf '%s\n' "$text"
}

fill() {
  text=${text//"\${$1}"/"$2"}
}

need IMAGE SHARE
if ((DEVICES)); then need ACCELERATOR; fi
if on_tpu; then need TOPOLOGY; fi
apply=(kubectl apply --filename=- "${options[@]}")
if "$dry_run"; then
  printf "%s <<'END'\n%s\nEND\n" "$(quote "${apply[@]}")" "$(manifest)"
else
  manifest | "${apply[@]}"
fi
