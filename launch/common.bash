# shellcheck shell=bash
# What the launchers share. Each of them reads this file before anything else.

# Before `--` stands what is for the platform, behind it what is for mmm_jax.
# Sets dry_run, options and flags, once the variables' values prove valid.
# shellcheck disable=SC2034 # the launchers use them
read_arguments() {
  dry_run=false options=() flags=()
  while (($#)); do
    case $1 in
      --dry-run) dry_run=true ;;
      -h | --help) explain && exit ;;
      --) shift && break ;;
      --config.*) fail "found '$1', valid: flags of mmm_jax.main behind --" ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  flags=("$@")
  check_values
}

# Prints what stands at the head of the launcher.
explain() {
  # The launcher may have gone to another folder.
  [[ -e $0 ]] || cd "$OLDPWD" || exit
  awk 'NR > 1 { if (!/^#/) exit; if (sub(/^# ?/, "") && !/^SBATCH/) print }' "$0"
}

# Refuses what the platform would misread, or find wrong when it costs money.
check_values() {
  local name
  for name in NODES DEVICES RESTARTS; do
    [[ ${!name-0} =~ ^(0|[1-9][0-9]{0,5})$ ]] || wrong "$name" "a whole number"
  done
  [[ ${NODES-1} != 0 ]] || wrong NODES "1 or more"
  [[ ${SPOT-0} == [01] ]] || wrong SPOT "0 or 1"
  local host="[^][:space:],:'\"{}#]+" path="/[^][:space:],'\"{}#]*"
  [[ ${SHARE-none} =~ ^(none|SHARE|$host:$path)$ ]] ||
    wrong SHARE "HOST:/PATH, without blanks or quotes, or none"
  [[ ${TOPOLOGY-TOPOLOGY} =~ ^(TOPOLOGY|[0-9]+(x[0-9]+)+)$ ]] ||
    wrong TOPOLOGY "such as 2x4"
  for name in ACCELERATOR IMAGE; do
    [[ ${!name-x} != *[^A-Za-z0-9_./:@-]* ]] ||
      wrong "$name" "letters, digits and _ . / : @ -"
  done
  for name in CONFIG WORKDIR PYTHON SWEEP CELLS PROJECT ZONE RUNTIME; do
    [[ ${!name-} != *$'\n'* ]] || fail "$name holds a line break"
  done
  [[ ${flags[*]-} != *$'\n'* ]] || fail "a flag holds a line break"
}

# What clouds take as the name of a job or a machine.
check_label() {
  local LC_ALL=C # in others [a-z] may hold capitals
  [[ ${!1} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    wrong "$1" "lower-case letters, digits and -, a letter first, at most 40"
}

wrong() {
  fail "$1: found '${!1}', valid: $2"
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints words the way a shell has to be given them.
quote() {
  local word mark="'" line=
  for word in "$@"; do
    if ! [[ $word =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]]; then
      word=$mark${word//$mark/$mark\\$mark$mark}$mark
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command; a dry run only shows it.
act() {
  if "$dry_run"; then quote "$@"; else "$@"; fi
}

# What a real launch has to be told; a dry run shows the name in its place.
need() {
  local name
  for name in "$@"; do
    [[ ${!name} != "$name" ]] || "$dry_run" || fail "$name is not set"
  done
}
