"""The one error that means: the input, not the program, is wrong."""


class InputError(ValueError):
  """Bad data, config or arguments; its text is all that the user sees.

  The message says what was found and where, what is valid, and what to do.
  Commands print it on one line of stderr and exit with code 2.
  """


class LostError(RuntimeError):
  """Another process of this run is gone or did not come; it can be resumed."""
