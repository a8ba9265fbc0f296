"""Recommends short videos from all that is known about them, in JAX.

A run is to take the same course on every CPU as far as that costs no time. So
XLA is told, before JAX compiles anything, to use no more instructions than all
CPUs have, to compute reciprocal roots instead of taking a processor's estimate,
and to leave no sums to YNN, a library with an order of its own for each kind of
processor (but for the scores of runs with kernels, `ranking.py`). Processes
that are started from here inherit the flags; all releases of JAX that
pyproject.toml admits know them.
"""

import os
import platform

_ALIKE = {
  "--xla_cpu_experimental_ynn_fusion_type": "",
  "--xla_cpu_enable_platform_dependent_math": "false",
}
if platform.machine() in ("x86_64", "AMD64"):
  _ALIKE["--xla_cpu_max_isa"] = "AVX2"

_given = os.environ.get("XLA_FLAGS", "")
_added = [
  f"{name}={value}" for name, value in _ALIKE.items() if name not in _given
]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()
