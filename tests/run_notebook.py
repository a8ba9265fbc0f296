"""Executes launch/colab.ipynb from start to end.

python tests/run_notebook.py [--cwd=FOLDER] [--save]

Its installation does nothing where the package is installed.
"""

import argparse
import os
import pathlib
import re
import tempfile
import time

import nbclient
import nbformat

PATH = pathlib.Path(__file__).parents[1] / "launch" / "colab.ipynb"
_LIMIT_S = 600


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--cwd", default=".", help="folder of the kernel")
  parser.add_argument("--save", action="store_true", help="store the outputs")
  arguments = parser.parse_args()
  notebook = nbformat.read(PATH, as_version=4)
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    os.environ["TMPDIR"] = folder  # the run goes when the notebook has ended
    nbclient.NotebookClient(
      notebook,
      timeout=_LIMIT_S,
      kernel_name="python3",
      record_timing=False,
      resources={"metadata": {"path": arguments.cwd}},
    ).execute()
  faults = list(problems(notebook))
  seconds = time.monotonic() - started
  if seconds > _LIMIT_S:
    faults.append(f"it took {seconds:.0f} s, more than {_LIMIT_S}")
  if faults:
    raise SystemExit("\n".join(faults))
  if arguments.save:
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, PATH)
  print(f"{PATH.name} in {arguments.cwd}: {seconds:.0f} s")


def problems(notebook):
  """What is wrong with the outputs, a line each."""
  outputs = [
    output for cell in notebook.cells for output in cell.get("outputs", [])
  ]
  for output in outputs:
    if output.output_type == "error" or output.get("name") == "stderr":
      yield f"an error or a warning: {output}"
    for text in _texts(output):
      if found := re.search(r"(?<![\w.:/])/\w+/\w+", text):
        yield f"a path of this machine: {found[0]}"
  figures = sum("image/png" in output.get("data", {}) for output in outputs)
  if figures < 3:
    yield f"{figures} pictures, wanted 3 or more"


def _texts(output):
  """All that an output shows but pictures."""
  shown = {"stream": output.get("text", "")} | output.get("data", {})
  return ["".join(t) for kind, t in shown.items() if kind != "image/png"]


if __name__ == "__main__":
  main()
