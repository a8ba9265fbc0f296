"""Imports point down only."""

import ast
import graphlib

import pytest

import runs

PACKAGE = runs.ROOT / "mmm_jax"


def name_of(path):
  return ".".join(path.relative_to(runs.ROOT).with_suffix("").parts)


MODULES = {
  name_of(path): path
  for path in sorted(PACKAGE.rglob("*.py"))
  if path.name != "__init__.py"
}


def statements(path):
  """All nodes of a file, without what only a type checker executes."""
  ahead = [ast.parse(path.read_text())]
  while ahead:
    node = ahead.pop()
    yield node
    if not (
      isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ):
      ahead.extend(ast.iter_child_nodes(node))


def imports_of(path):
  """Full names of the modules that a file imports, also inside functions."""
  for node in statements(path):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in MODULES else node.module


GRAPH = {name: set(imports_of(path)) for name, path in MODULES.items()}
OWN = {name: found & set(MODULES) for name, found in GRAPH.items()}

# From the top; a module imports from the layers below its own, and from its
# own as long as there is no cycle. A module that stands in no layer is new:
# decide where it belongs.
LAYERS = (
  "main recommend experiments",
  "tune results",
  "train workdir",
  "clustering scoring",
  "assemble",
  "validate",
  "update",
  "evaluate checkpoint logs manifest command tabulate",
  "input_pipeline streams features ranking candidates",
  "models.mmm datasets.base datasets.splits datasets.networks datasets.records"
  " datasets.rawfiles datasets.crowds datasets.simulated datasets.microlens"
  " datasets.hetrec_lastfm datasets.tiktok",
  "parallel tables sampling",
  "kernels",
  "losses metrics kmeans significance models.layers files",
  "errors",
)
LEVEL = {
  f"mmm_jax.{name}": -number
  for number, layer in enumerate(LAYERS)
  for name in layer.split()
}


def under(name, package):
  return name.startswith(f"mmm_jax.{package}.")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
  assert name in LEVEL, f"{name} stands in no layer of {__file__}"
  up = {other for other in OWN[name] if LEVEL[other] > LEVEL[name]}
  assert not up, f"{name} imports from above: {sorted(up)}"


def test_there_is_no_cycle():
  graphlib.TopologicalSorter(OWN).prepare()


def test_models_do_not_import_each_other_configs_or_data():
  for name in filter(lambda name: under(name, "models"), MODULES):
    for other in GRAPH[name]:
      assert not under(other, "datasets"), f"{name} imports {other}"
      assert not other.startswith("configs"), f"{name} imports {other}"
      if under(other, "models"):
        assert other == "mmm_jax.models.layers", f"{name} imports {other}"


FRAMEWORKS = {"jax", "flax", "optax", "orbax", "tensorflow", "torch"}


def test_datasets_never_import_jax_not_even_through_others():
  for name in filter(lambda name: under(name, "datasets"), MODULES):
    reached, ahead = set(), [name]
    while ahead:
      for other in GRAPH.get(ahead.pop(), ()):
        if other not in reached:
          reached.add(other)
          ahead.append(other)
    used = {other.split(".")[0] for other in reached} & FRAMEWORKS
    assert not used, f"{name} reaches {sorted(used)}"


def test_nothing_imports_tests_or_configs():
  for name, found in GRAPH.items():
    roots = {other.split(".")[0] for other in found}
    assert not roots & {"tests", "configs", "toy"}, name


def test_the_reader_of_imports_sees_them():
  assert "jax" in GRAPH["mmm_jax.sampling"]
  assert "mmm_jax.sampling" in OWN["mmm_jax.streams"]
  assert "mmm_jax.datasets.splits" in OWN["mmm_jax.streams"]
