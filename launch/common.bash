# shellcheck shell=bash
# What the launchers share. Each of them reads this file before anything else.

# Before `--` stands what is for the platform, behind it what is for mmm_jax.
# Sets dry_run, options and flags.
# shellcheck disable=SC2034 # the launchers use them
read_arguments() {
  dry_run=false options=() flags=()
  while (($#)); do
    case $1 in
      --dry-run) dry_run=true ;;
      --) shift && break ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  flags=("$@")
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
