"""Categories between epochs, and the controls that replace them."""

import jax
import numpy as np
import pytest

from mmm_jax import clustering, errors, kmeans
import toy


def categories(control, data, variant="full"):
  """Assignments after seeding and after a further epoch; the clusterings."""
  config = toy.get_config(variant, controls__categories=control)
  run = toy.make_run(config, data)
  engine = toy.make_engine()
  seed, follow = clustering.make_clustering(run, engine)
  state = engine.replicate(toy.Session(run).state)
  state, first = seed(state, clustering.key(config))
  first = jax.device_get(first)
  # The items move: learnt categories would follow them.
  rows = np.random.default_rng(5).standard_normal((60, 8))
  table = state.tables["item"]
  packed = table.packed.at[:, :8].set(rows)
  state = state.replace(
    tables={**state.tables, "item": table.replace(packed=packed)}
  )
  _, second = follow(state)
  return first, jax.device_get(second), rows


def test_learnt_categories_follow_the_items():
  first, second, rows = categories("learnt", toy.random_data(40, 60))
  assert (first.assignment != second.assignment).any()


def test_random_categories_have_the_sizes_of_the_learnt_ones():
  data = toy.random_data(40, 60)
  learnt, _, _ = categories("learnt", data)
  first, second, rows = categories("random", data)
  assert (first.sizes == learnt.sizes).all()
  assert (first.assignment != learnt.assignment).any()
  assert (second.assignment == first.assignment).all()
  for c in range(3):
    mean = rows[second.assignment == c].mean(0)
    np.testing.assert_allclose(second.centroids[c], mean, atol=1e-5)


def test_categories_of_content_need_content():
  with pytest.raises(errors.InputError, match="no source"):
    categories("content", toy.random_data(40, 60), "cat")


def test_categories_of_content_are_those_of_the_sources():
  data = toy.random_data(40, 60)
  group = np.arange(60) % 3
  data.vectors["visual"] = np.eye(6, dtype=np.float16)[2 * group]
  data.absent = {}
  data.tokens = (1 + 4 * group[:, None] + np.zeros((1, 5))).astype(np.int32)
  first, second, _ = categories("content", data)
  assert kmeans.adjusted_rand_index(first.assignment, group) == 1
  assert (second.assignment == first.assignment).all()
