"""How every command starts and ends: flags, quiet logs, exit codes."""

import contextlib
import logging as std_logging
import pathlib
import signal
import sys
import time

from absl import app, flags, logging
import jax

from mmm_jax import errors, files, parallel

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, errors.STOPPED

_LEFTOVER_S = 3600  # nobody is at a file of so few megabytes for so long


class Stopped(Exception):
  """A signal asked a run to stop; its checkpoint is written."""


class Ended(Exception):
  """A command that this one started ended with `code`, and so does this one."""

  def __init__(self, code: int, message: str):
    super().__init__(message)
    self.code = code


class NonFiniteError(FloatingPointError):
  """A loss term is NaN or infinite; the message says where."""


def run(main) -> None:
  """Runs `main(argv)`; whatever is foreseen ends in one line of stderr.

  Exit codes: 0 done, 2 bad input or config, 75 stopped and resumable, 1
  anything else; that of a command which this one started and which failed.
  """
  _quieten()
  # Whoever has something to save handles the two signals; before and after,
  # SIGTERM is what Ctrl-C is.
  _on_signals(signal.default_int_handler)
  try:
    code, message = _failure(main)
  except KeyboardInterrupt:  # another one, while this was ending
    code, message = STOPPED, errors.CONTINUES
  finally:
    _on_signals(signal.SIG_IGN)  # no further one changes how it ends
  print(" ".join(message.split()), file=sys.stderr)
  parallel.decide(code)
  sys.exit(code)


def _failure(main) -> tuple[int, str]:
  """Exit code and message of what stopped `main`; success is a SystemExit."""
  try:
    app.run(main, flags_parser=_parse)
  except errors.InputError as error:
    return BAD_INPUT, f"error: {error}"
  except FloatingPointError as error:
    return FAILED, f"error: {error}"
  except Stopped as stopped:
    return STOPPED, str(stopped)
  except Ended as ended:
    return ended.code, f"error: {ended}"
  except KeyboardInterrupt:
    return STOPPED, errors.CONTINUES
  except errors.LostError as error:
    return STOPPED, f"error: {error}; the same command continues"
  except Exception as error:
    if not parallel.is_loss(error):
      parallel.decide(FAILED)
      raise
    return STOPPED, f"{parallel.LOST} ({error})"


def _on_signals(handler) -> None:
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handler)


def _quieten() -> None:
  """Libraries only warn; our own few lines go to stderr as they are."""
  logging.set_verbosity(logging.WARNING)
  own = std_logging.getLogger("mmm_jax")
  own.setLevel(std_logging.INFO)
  own.propagate = False
  if not own.handlers:
    own.addHandler(std_logging.StreamHandler())


def cache_compilations(data_dir: str) -> None:
  """Keeps compiled programs beside the prepared data.

  JAX would write them in place, and would never replace one that a kill or a
  full disk has cut short.
  """
  folder = pathlib.Path(data_dir).expanduser() / "compiled"
  for path in folder.glob(".*.tmp"):
    with contextlib.suppress(OSError):  # another process may be the first
      if time.time() - path.stat().st_mtime > _LEFTOVER_S:
        path.unlink()
  jax.config.update("jax_compilation_cache_dir", f"{files.WHOLE}{folder}")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _parse(argv):
  """Parses flags; whatever is wrong with them is the user's to mend."""
  try:
    return flags.FLAGS(argv)
  except SystemExit:  # --help was given and has been answered
    sys.exit(OK)
  except (
    flags.Error,
    AttributeError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
  ) as error:
    raise errors.InputError(_explain(error)) from error


def _explain(error) -> str:
  """What is wrong with a flag, without the way there."""
  inner = error.args[0] if len(error.args) == 1 else error
  if isinstance(inner, KeyError):
    # The key in quotes and, where one is near, a line with a valid name.
    return f"unknown config key {inner.args[0]}"
  lines = str(inner).strip().splitlines()
  if any(line.startswith("Traceback (most recent") for line in lines):
    # A config file's complaint comes with its traceback.
    return f"--config: {lines[-1].removeprefix('ValueError: ')}"
  return " ".join(lines)
