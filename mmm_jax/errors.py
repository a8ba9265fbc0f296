"""How things end that are foreseen: bad input, a lost process, a stop."""

import os

STOPPED = 75  # exit code of what the same command continues
CONTINUES = "stopped; the same command continues"


class InputError(ValueError):
  """Bad data, config or arguments; its text is all that the user sees.

  The message says what was found and where, what is valid, and what to do.
  Commands print it on one line of stderr and exit with code 2.
  """


class LostError(RuntimeError):
  """Another process of this run is gone or did not come; it can be resumed."""


def stop_at_once(*_) -> None:
  """Ends the process; a handler of signals where there is nothing to save."""
  try:
    os.write(2, f"{CONTINUES}\n".encode())
  finally:
    os._exit(STOPPED)
