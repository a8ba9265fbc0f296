"""Products in parts are products, and the same ones on every machine."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmm_jax import products

# Whole, cut evenly, cut with zeros at the end; in the middle axis or others.
SHAPES = [(3, 5, 4), (7, 560, 2), (5, 283, 6), (600, 4, 3), (2, 3, 700)]


def numbers(*shape):
  values = np.random.default_rng(0).standard_normal(shape)
  return values.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients_are_those_of_numpy(shape):
  m, k, n = shape
  left, right, grad = numbers(m, k), numbers(k, n), numbers(m, n)
  product, pull_back = jax.vjp(products.matmul, left, right)
  left_grad, right_grad = pull_back(jnp.asarray(grad))
  wide = lambda x: x.astype(np.float64)
  for found, a, b in (
    (product, left, right),
    (left_grad, grad, right.T),
    (right_grad, left.T, grad),
  ):
    np.testing.assert_allclose(found, wide(a) @ wide(b), rtol=1e-4, atol=1e-4)


def test_leading_axes_are_rows():
  left, right = numbers(2, 3, 300), numbers(300, 4)
  product, pull_back = jax.vjp(products.matmul, left, right)
  flat, pull_flat = jax.vjp(products.matmul, left.reshape(6, 300), right)
  np.testing.assert_array_equal(product.reshape(6, 4), flat)
  grad = jnp.asarray(numbers(2, 3, 4))
  for found, wanted in zip(pull_back(grad), pull_flat(grad.reshape(6, 4))):
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def test_types_of_results_and_gradients():
  left, right = (numbers(3, 300), numbers(300, 2))
  left, right = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
  assert products.matmul(left, right).dtype == jnp.bfloat16
  wide = lambda *both: products.matmul(*both, None, jnp.float32)
  product, pull_back = jax.vjp(wide, left, right)
  assert product.dtype == jnp.float32
  assert all(x.dtype == jnp.bfloat16 for x in pull_back(product))
  exact = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
  np.testing.assert_allclose(product, exact, rtol=1e-4, atol=1e-4)


def test_one_core_adds_as_two_do():
  # XLA cuts 330 numbers in two ways; NPROC is how many cores it thinks it has.
  program = (
    "import mmm_jax, jax, numpy as np\n"
    "from mmm_jax import products\n"
    "rng = np.random.default_rng(0)\n"
    "for m, k, n in [(256, 330, 256), (33, 9000, 96), (1024, 8, 2048)]:\n"
    "  a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))\n"
    "  product, back = jax.vjp(products.matmul, *map(np.float32, (a, b)))\n"
    "  for x in (product, *back(product)):\n"
    "    print(np.asarray(x).tobytes().hex())"
  )

  def printed(cores):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.check_output(
      [sys.executable, "-c", program], env={**environment, "NPROC": cores}
    )

  one = printed("1")
  assert len(one.split()) == 9
  assert one == printed("2")
