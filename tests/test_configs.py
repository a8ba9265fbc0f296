"""Configs: every variant builds, every key is read, a slip is caught."""

import ast

from absl import flags
import ml_collections
from ml_collections import config_flags
import pytest

import runs

CONFIG = runs.ROOT / "configs" / "mmm.py"


def parse(*arguments, variants=""):
  """The config that the command line makes."""
  values = flags.FlagValues()
  suffix = f":{variants}" if variants else ""
  command = ["main", f"--config={CONFIG}{suffix}", *arguments]
  config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=command
  )
  values(command)
  return values["config"].value


def leaves(config, prefix=()):
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from leaves(value, (*prefix, key))
    else:
      yield (*prefix, key), value


VARIANTS = tuple(runs.config_module().VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds_with_the_same_keys(variant):
  plain, config = parse(), parse(variants=variant)
  assert {key for key, _ in leaves(config)} == {key for key, _ in leaves(plain)}


def test_the_variants_that_users_rely_on_are_there():
  wanted = "con cat net pmf full paper fair tiny"
  wanted += " microlens hetrec_lastfm tiktok"
  assert set(wanted.split()) <= set(VARIANTS)


def test_full_is_plain():
  assert parse(variants="full").to_dict() == parse().to_dict()


def test_variants_apply_in_order():
  config = parse(variants="tiny,cat,microlens")
  assert config.dataset.name == "microlens"
  assert config.dataset.simulated.users == 300
  assert config.model.networks == ""
  assert config.num_categories == 23
  assert parse(variants="microlens,tiny").num_categories == 8


@pytest.mark.parametrize(
  ("variant", "sources", "networks", "categories"),
  [
    ("con", "*", "", 0),
    ("cat", "", "", 32),
    ("net", "", "*", 0),
    ("pmf", "", "", 0),
    ("fair", "text", "follow", 32),
  ],
)
def test_what_a_variant_leaves_out(variant, sources, networks, categories):
  config = parse(variants=variant)
  found = config.model.sources, config.model.networks, config.num_categories
  assert found == (sources, networks, categories)


def test_paper_is_the_literal_reading():
  config = parse(variants="paper")
  assert config.split.ratios == (0.7, 0.0, 0.3)
  assert config.normalisation == "paper_sums"
  assert not config.negatives.resample
  samples = config.batch_size * (1 + config.negatives.per_positive)
  assert samples == 1008
  assert config.batch_size % config.data_shards == 0


def test_batches_divide_into_the_shards():
  for variant in VARIANTS:
    config = parse(variants=variant)
    assert config.batch_size % config.data_shards == 0


def test_an_unknown_variant_names_the_nearest():
  with pytest.raises(ValueError, match="'tinny'; did you mean 'tiny'"):
    runs.config_module().get_config("pmf,tinny")


@pytest.mark.parametrize(
  ("slip", "near"),
  [
    ("epohcs=3", "epochs"),
    ("split.protocl=none", "protocol"),
    ("weights.network_ti=1", "network_tie"),
  ],
)
def test_a_misspelt_key_fails_with_the_nearest_name(slip, near):
  with pytest.raises((AttributeError, KeyError)) as caught:
    parse(f"--config.{slip}")
  assert f'Did you mean "{near}"' in str(caught.value)


def test_a_value_of_the_wrong_type_fails():
  with pytest.raises((TypeError, ValueError, flags.Error)):
    parse("--config.epochs=many")


def test_a_right_override_is_taken():
  assert parse("--config.weights.user=0.5").weights.user == 0.5


# --- no key is there for nothing -------------------------------------------


def words_of(path):
  """Names that code can read a key by: attributes, strings, fields."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.value
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      yield node.target.id


def test_every_key_is_read_by_some_code():
  read = set()
  for path in (runs.ROOT / "mmm_jax").rglob("*.py"):
    read.update(words_of(path))
  unread = [".".join(key) for key, _ in leaves(parse()) if not set(key) <= read]
  assert not unread, f"nobody reads {unread}"
  assert "epohcs" not in read


def test_the_code_never_asks_for_a_key_with_a_default():
  for path in (runs.ROOT / "mmm_jax").rglob("*.py"):
    assert "config.get(" not in path.read_text(), path
    assert "settings.get(" not in path.read_text(), path
