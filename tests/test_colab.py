"""The notebook as it is stored; `run_notebook.py` executes it."""

import subprocess

import nbformat
import pytest

import run_notebook


@pytest.fixture
def notebook():
  return nbformat.read(run_notebook.PATH, as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_a_notebook_for_any_python(notebook):
  nbformat.validate(notebook)
  assert notebook.metadata.kernelspec.name == "python3"
  assert notebook.metadata.language_info == {"name": "python"}


def test_it_was_executed_from_start_to_end(notebook):
  counts = [cell.execution_count for cell in code_cells(notebook)]
  assert counts == list(range(1, len(counts) + 1))


def test_the_installation_does_nothing_where_the_package_imports(
  notebook, monkeypatch
):
  def refuse(*_, **__):
    raise AssertionError("it wants to install")

  install = code_cells(notebook)[0].source
  monkeypatch.setattr(subprocess, "run", refuse)
  exec(install, {})
  with pytest.raises(AssertionError, match="wants to install"):
    exec(install.replace('"mmm_jax"', '"not_there"').replace('""', '"x"'), {})


def test_outputs_are_pictures_without_warnings_and_paths(notebook):
  assert not list(run_notebook.problems(notebook))


@pytest.mark.parametrize(
  ("output", "problem"),
  [
    ({"output_type": "stream", "name": "stderr", "text": "x"}, "a warning"),
    ({"output_type": "stream", "text": "in /home/me/run"}, "/home/me"),
    ({"output_type": "error", "ename": "KeyError"}, "KeyError"),
  ],
)
def test_a_problem_is_seen(notebook, output, problem):
  cell = code_cells(notebook)[0]
  cell.outputs = [nbformat.from_dict(output)]
  (found,) = run_notebook.problems(notebook)
  assert problem in found


def test_pictures_are_counted():
  (found,) = run_notebook.problems(nbformat.v4.new_notebook())
  assert found == "0 pictures, wanted 3 or more"
