"""Encoders of an item's content and vector helpers shared by models.

Shapes: ... any leading axes, L tokens, e width of a word vector, F filters of
one width, d latent size.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class TextCNN(nn.Module):
  """Convolution over words, maximum over time, dense layer (Eq. 1-5)."""

  widths: Sequence[int]
  filters: int
  dim: int
  dtype: str = "float32"  # of the products; weights and results are float32

  @nn.compact
  def __call__(self, words: jax.Array, mask: jax.Array) -> jax.Array:
    """words [..., L, e], mask [..., L] of real words -> [..., d]."""
    words = jnp.where(mask[..., None], words, 0)
    kernel, bias = self._filters(words.shape[-1])
    windows, kernel, bias = (
      x.astype(self.dtype) for x in (self._windows(words), kernel, bias)
    )
    features = windows @ kernel + bias
    # A window may run past the end of a text, but must start inside it.
    pooled = nn.relu(max_over_time(features, mask))
    dense = nn.Dense(self.dim, dtype=self.dtype, name="dense")
    return nn.relu(dense(pooled)).astype(jnp.float32)

  def _filters(self, size):
    """Filters of all widths side by side: [longest * e, widths * F], bias.

    Shorter ones end in zeros: one product over the longest windows takes half
    the time of one product for each width.
    """
    longest, kernels = max(self.widths), []
    for width in self.widths:
      kernel = self.param(
        f"filters_{width}",
        nn.initializers.lecun_normal(),
        (width * size, self.filters),
      )
      kernels.append(jnp.pad(kernel, ((0, (longest - width) * size), (0, 0))))
    num_filters = len(self.widths) * self.filters
    bias = self.param("bias", nn.initializers.zeros, (num_filters,))
    return jnp.concatenate(kernels, axis=1), bias

  def _windows(self, words):
    """[..., L, longest * e]: each word and those behind it."""
    length, longest = words.shape[-2], max(self.widths)
    pad = [(0, 0)] * (words.ndim - 2) + [(0, longest - 1), (0, 0)]
    padded = jnp.pad(words, pad)
    shifted = [padded[..., at : at + length, :] for at in range(longest)]
    return jnp.concatenate(shifted, -1)


@jax.custom_vjp
def max_over_time(features: jax.Array, mask: jax.Array) -> jax.Array:
  """Maximum of [..., L, F] over the L under the mask [..., L]; else -inf.

  All the gradient goes to the first of equal maxima. `jnp.max` would share it
  out, which takes a tenth of the time of an epoch longer.
  """
  return jnp.max(jnp.where(mask[..., None], features, -jnp.inf), -2)


def _max_forward(features, mask):
  best = max_over_time(features, mask)
  at, length = jnp.arange(mask.shape[-1])[:, None], mask.shape[-1]
  found = mask[..., None] & (features == best[..., None, :])
  return best, (jnp.min(jnp.where(found, at, length), -2), mask)


def _max_backward(kept, grad):
  place, mask = kept
  at = jnp.arange(mask.shape[-1])[:, None]
  return jnp.where(place[..., None, :] == at, grad[..., None, :], 0), None


max_over_time.defvjp(_max_forward, _max_backward)


class DenseEncoder(nn.Module):
  """relu(W x + b) of a fixed-length vector (Eq. 6)."""

  dim: int
  dtype: str = "float32"  # of the product; weights and results are float32

  @nn.compact
  def __call__(self, vectors: jax.Array) -> jax.Array:
    """[..., F] of any float type -> [..., d] float32."""
    dense = nn.Dense(self.dim, dtype=self.dtype)
    return nn.relu(dense(vectors.astype(self.dtype))).astype(jnp.float32)


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
  return jnp.sum(left * right, -1)


def squared_norm(rows: jax.Array) -> jax.Array:
  """|row|^2 of each row: [..., d] -> [...]."""
  return jnp.sum(rows**2, -1)


def all_pairs(left: jax.Array, right: jax.Array, dtype: str) -> jax.Array:
  """[B, d], [n, d] -> [B, n] float32 products of numbers in `dtype`."""
  return jnp.matmul(
    left.astype(dtype),
    right.astype(dtype).T,
    preferred_element_type=jnp.float32,
  )


def normalise(vectors: jax.Array) -> jax.Array:
  """Unit length along the last axis; zero stays zero, with a finite slope."""
  square = jnp.sum(vectors**2, -1, keepdims=True)
  return vectors * jax.lax.rsqrt(square + 1e-12)
