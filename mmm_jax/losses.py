"""The terms of Eq. 17, each as a sum over rows and the number of rows.

The trainer turns a sum into a mean over the global batch, or into the unbiased
estimate of the literal Eq. 17; so no function here divides.

Shapes: B positives, n negatives of each, n' negatives shared by the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Term(NamedTuple):
  """A sum over the rows that this device holds."""

  total: jax.Array  # scalar
  count: jax.Array  # scalar, number of rows in the sum
  replicated: bool = False  # the rows are the same on every device


def masked_sum(values: jax.Array, mask: jax.Array, weight=None) -> Term:
  """Sum and number of the values whose mask holds; shapes must agree.

  Args:
    values: any shape.
    mask: bool of that shape.
    weight: of each value in the sum, but not in the number; None: all 1.
  """
  chosen = jnp.where(mask, values if weight is None else weight * values, 0)
  return Term(jnp.sum(chosen), jnp.sum(mask.astype(jnp.float32)))


def add(*terms: Term) -> Term:
  total = sum(term.total for term in terms)
  return Term(total, sum(term.count for term in terms), terms[0].replicated)


def squared(
  positive: jax.Array,
  negative: jax.Array,
  positive_mask: jax.Array,
  negative_mask: jax.Array,
  weight: jax.Array | None = None,
) -> Term:
  """1/2 (R - r)^2 with R = 1 for positives [B] and 0 for negatives [B, n].

  The first term of Eq. 17. A positive's weight [B], ours, is that of its
  negatives, too, as in all of these losses.
  """
  return add(
    masked_sum(0.5 * (1 - positive) ** 2, positive_mask, weight),
    masked_sum(0.5 * negative**2, negative_mask, _column(weight)),
  )


def bce(
  positive: jax.Array,
  negative: jax.Array,
  positive_mask: jax.Array,
  negative_mask: jax.Array,
  weight: jax.Array | None = None,
) -> Term:
  """Sigmoid cross-entropy of the same pairs."""
  return add(
    masked_sum(jax.nn.softplus(-positive), positive_mask, weight),
    masked_sum(jax.nn.softplus(negative), negative_mask, _column(weight)),
  )


def bpr(
  positive: jax.Array,
  negative: jax.Array,
  positive_mask: jax.Array,
  negative_mask: jax.Array,
  weight: jax.Array | None = None,
) -> Term:
  """-ln sigma(r+ - r-) of each positive against its own negatives.

  Rendle et al., UAI 2009.
  """
  del positive_mask  # a padded positive has no negatives
  margin = positive[:, None] - negative
  return masked_sum(jax.nn.softplus(-margin), negative_mask, _column(weight))


def softmax(
  positive: jax.Array,
  shared: jax.Array,
  mask: jax.Array,
  weight: jax.Array | None = None,
) -> Term:
  """Cross-entropy of each positive [B] among the shared negatives [B, n']."""
  logits = jnp.concatenate([positive[:, None], shared], axis=1)
  return masked_sum(jax.nn.logsumexp(logits, axis=1) - positive, mask, weight)


def _column(weight):
  return None if weight is None else weight[:, None]


PAIRWISE = {"squared": squared, "bce": bce, "bpr": bpr}
