"""Recommends short videos from all that is known about them, in JAX.

A run is to take the same course on every CPU. So, before JAX compiles anything,
XLA is told to use no more instructions than all CPUs have (and so is oneDNN,
which it takes products from), to compute reciprocal roots instead of taking a
processor's estimate, and to leave no sums to YNN, a library with an order of
its own for each kind of processor. Long sums of products are the matter of
`products`. Processes that are started from here inherit these settings; all
releases of JAX that pyproject.toml admits know the flags.
"""

import os
import platform

_ALIKE = {
  "--xla_cpu_experimental_ynn_fusion_type": "",
  "--xla_cpu_enable_platform_dependent_math": "false",
}
if platform.machine() in ("x86_64", "AMD64"):
  _ALIKE["--xla_cpu_max_isa"] = "AVX2"
  os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

_given = os.environ.get("XLA_FLAGS", "")
_added = [
  f"{name}={value}" for name, value in _ALIKE.items() if name not in _given
]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()
