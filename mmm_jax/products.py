"""Matrix products that add in the same order on every CPU.

On a CPU XLA's products cut a long sum into as many parts as suit the machine's
first cache and number of cores; a run would take another course on another
machine. Here every sum, those of gradients too, comes in parts that are short
enough to be left whole. On other devices these are XLA's products as they are.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

_LONGEST = 280  # numbers of a part: a first cache of 32 KiB takes 288


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(left: jax.Array, right: jax.Array, precision=None, dtype=None):
  """[..., k], [k, n] -> [..., n].

  Args:
    left: of a float type.
    right: of the same type.
    precision: a `lax.Precision`, here and in the gradients.
    dtype: of the result; by default that of the arguments.
  """
  product = _contract(_rows(left), right, (1, 0), precision, dtype)
  return product.reshape(*left.shape[:-1], right.shape[1])


def _forward(left, right, precision, dtype):
  return matmul(left, right, precision, dtype), (left, right)


def _backward(precision, dtype, kept, grad):
  left, right = kept
  contract = functools.partial(_contract, precision=precision, dtype=dtype)
  left_grad = contract(_rows(grad), right, (1, 1)).reshape(left.shape)
  right_grad = contract(_rows(left), _rows(grad), (0, 0))
  return left_grad.astype(left.dtype), right_grad.astype(right.dtype)


matmul.defvjp(_forward, _backward)


def dense(left, right, dimension_numbers, precision=None):
  """`matmul` with the signature that `flax.linen.Dense` calls."""
  del dimension_numbers  # the last axis of left and the first of right
  return matmul(left, right, precision)


def _rows(x):
  return x.reshape(-1, x.shape[-1])


def _contract(left, right, axes, precision, dtype):
  """The product of two matrices over one axis of each."""
  dtype = dtype or jnp.result_type(left, right)

  def whole(left, right, batch=((), ()), dtype=dtype):
    over = tuple((axis + len(each),) for axis, each in zip(axes, batch))
    return lax.dot_general(
      left, right, (over, batch), precision, preferred_element_type=dtype
    )

  def by_parts(left, right):
    count = -(-left.shape[axes[0]] // _LONGEST)
    if count == 1:
      return whole(left, right)
    left, right = (_cut(x, axis, count) for x, axis in zip((left, right), axes))
    batch = tuple((axis,) for axis in axes)
    return sum(whole(left, right, batch, jnp.float32)).astype(dtype)

  return lax.platform_dependent(left, right, cpu=by_parts, default=whole)


def _cut(matrix, axis, count):
  """Cuts an axis into `count` parts of one length; zeros fill the last."""
  length = -(-matrix.shape[axis] // count)
  padding = [(0, 0), (0, 0)]
  padding[axis] = (0, count * length - matrix.shape[axis])
  shape = list(matrix.shape)
  shape[axis : axis + 1] = [count, length]
  return jnp.pad(matrix, padding).reshape(shape)
