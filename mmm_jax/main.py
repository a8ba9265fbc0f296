"""Trains and evaluates a model.

python -m mmm_jax.main --config=configs/mmm.py[:variant,...]
    [--config.key=value ...] [--workdir=DIR]
    [--coordinator=HOST:PORT --num_processes=N --process_id=I]

The same command with the same --workdir continues an unfinished run. Several
processes are told of one another by the scheduler or by the last three flags.
Exit codes: 0 done, 2 bad input or config, 75 stopped and resumable, 1 else.
"""

import signal

from mmm_jax import errors

if __name__ == "__main__":
  # While the rest is imported, for seconds, there is nothing to save.
  for _signal in (signal.SIGTERM, signal.SIGINT):
    signal.signal(_signal, errors.stop_at_once)

import datetime
import shlex
import sys

from absl import flags
import jax
from ml_collections import config_flags

from mmm_jax import command, logs, parallel, train, validate

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with variants behind a colon."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; a fresh one under runs/ if not given."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of the first of several processes; auto: as JAX finds them.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Of this run.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Of this one, from 0.", lower_bound=0
)


def main(argv):
  if len(argv) > 1:
    raise errors.InputError(f"unexpected argument {argv[1]!r}; see --help")
  config = _read_config()
  parallel.join(
    _COORDINATOR.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    timeout_s=config.parallel.timeout_s,
    wait_s=config.parallel.wait_s,
  )
  if _WORKDIR.value is None and jax.process_count() > 1:
    raise errors.InputError(
      "--workdir is missing: the processes of a run share one folder"
    )
  command.cache_compilations(config.dataset.data_dir)
  workdir = _WORKDIR.value or _fresh_folder(config)

  def say_how_to_continue():
    if _WORKDIR.value is None:
      again = shlex.join([*sys.orig_argv, f"--workdir={workdir}"])
      print(f"To continue this run later: {again}", file=sys.stderr)

  result = train.train_and_evaluate(
    config, workdir, started=say_how_to_continue
  )
  if jax.process_index() == 0:
    print(logs.final_table(result, dataset=config.dataset.name))


def _read_config():
  config = _CONFIG.value
  if config is None:
    raise errors.InputError("--config is missing: --config=configs/mmm.py")
  try:
    config.dataset  # noqa: B018, a file that is absent only tells now
  except OSError as error:
    reason = str(error).strip().splitlines()[-1]
    raise errors.InputError(f"--config: {reason}") from error
  validate.check(config)  # what it says of other processes is used at once
  return config


def _fresh_folder(config) -> str:
  now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
  return f"runs/{config.dataset.name}-{config.model.name}-{now}"


if __name__ == "__main__":
  command.run(main)
