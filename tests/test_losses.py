"""Loss terms against sums that one can check by eye."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmm_jax import losses

POSITIVE = jnp.array([2.0, 0.5, 9.0])
NEGATIVE = jnp.array([[1.0, -1.0], [0.0, 3.0], [9.0, 9.0]])
REAL = jnp.array([True, True, False])  # the third row is padding
ALL = REAL[:, None] & jnp.array([[True, True]])
log, exp = np.log, np.exp


def softplus(x):
  return log(1 + exp(x))


def test_squared():
  term = losses.squared(POSITIVE, NEGATIVE, REAL, ALL)
  expected = 0.5 * ((1 - 2) ** 2 + (1 - 0.5) ** 2 + 1 + 1 + 0 + 3**2)
  assert term.total == pytest.approx(expected)
  assert term.count == 2 + 4


def test_bce():
  term = losses.bce(POSITIVE, NEGATIVE, REAL, ALL)
  expected = softplus(-2) + softplus(-0.5)
  expected += softplus(1) + softplus(-1) + softplus(0) + softplus(3)
  assert term.total == pytest.approx(expected, rel=1e-6)
  assert term.count == 2 + 4


def test_bpr():
  term = losses.bpr(POSITIVE, NEGATIVE, REAL, ALL)
  expected = softplus(-(2 - 1)) + softplus(-(2 + 1))
  expected += softplus(-(0.5 - 0)) + softplus(-(0.5 - 3))
  assert term.total == pytest.approx(expected, rel=1e-6)
  assert term.count == 4


def test_a_missing_negative_is_no_pair():
  mask = ALL.at[1, 1].set(False)
  term = losses.bpr(POSITIVE, NEGATIVE, REAL, mask)
  expected = softplus(-(2 - 1)) + softplus(-(2 + 1)) + softplus(-0.5)
  assert term.total == pytest.approx(expected, rel=1e-6)
  assert term.count == 3


def test_softmax():
  term = losses.softmax(POSITIVE, NEGATIVE, REAL)
  expected = log(exp(2) + exp(1) + exp(-1)) - 2
  expected += log(exp(0.5) + exp(0) + exp(3)) - 0.5
  assert term.total == pytest.approx(expected, rel=1e-6)
  assert term.count == 2


def test_a_positive_s_weight_is_that_of_its_negatives():
  weight = jnp.array([2.0, 0.5, 7.0])
  total = lambda name: (
    losses.PAIRWISE[name](POSITIVE, NEGATIVE, REAL, ALL, weight).total
  )
  first, second = 0.5 * ((1 - 2) ** 2 + 1 + 1), 0.5 * ((1 - 0.5) ** 2 + 9)
  assert total("squared") == pytest.approx(2 * first + 0.5 * second)
  first = softplus(-2) + softplus(1) + softplus(-1)
  second = softplus(-0.5) + softplus(0) + softplus(3)
  assert total("bce") == pytest.approx(2 * first + 0.5 * second, rel=1e-6)
  first = softplus(-(2 - 1)) + softplus(-(2 + 1))
  second = softplus(-(0.5 - 0)) + softplus(-(0.5 - 3))
  assert total("bpr") == pytest.approx(2 * first + 0.5 * second, rel=1e-6)
  first = log(exp(2) + exp(1) + exp(-1)) - 2
  second = log(exp(0.5) + exp(0) + exp(3)) - 0.5
  softmax = losses.softmax(POSITIVE, NEGATIVE, REAL, weight)
  assert softmax.total == pytest.approx(2 * first + 0.5 * second, rel=1e-6)
  assert softmax.count == 2


def test_softmax_without_a_negative_costs_nothing_and_has_a_slope():
  none = jnp.full((3, 2), -jnp.inf)
  total = lambda positive: losses.softmax(positive, none, REAL).total
  assert total(POSITIVE) == 0
  assert (jax.grad(total)(POSITIVE) == 0).all()


@pytest.mark.parametrize("name", losses.PAIRWISE)
def test_extreme_logits_stay_finite(name):
  far = 1e4 * jnp.array([-1.0, 1.0])
  pairs = far[:, None] * jnp.array([[1.0, -1.0]])
  real, both = jnp.ones(2, bool), jnp.ones((2, 2), bool)
  total = lambda x: losses.PAIRWISE[name](x, pairs, real, both).total
  assert np.isfinite(total(far))
  assert np.isfinite(jax.grad(total)(far)).all()


def test_nothing_at_all_is_zero_of_zero():
  term = losses.masked_sum(jnp.array([1.0, 2.0]), jnp.zeros(2, bool))
  assert term.total == term.count == 0


def test_add_sums_totals_and_counts():
  term = losses.add(losses.Term(1.0, 2.0), losses.Term(10.0, 20.0))
  assert term == losses.Term(11.0, 22.0, replicated=False)
