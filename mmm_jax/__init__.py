"""Recommends short videos from all that is known about them, in JAX.

XLA may leave sums and products on CPUs to YNN, a library that adds in an order
of its own for each kind of processor: a run would take another course on
another machine. It is turned off here, before JAX compiles anything; the
programs are as fast without it. Processes started from here inherit it. All
releases of JAX that pyproject.toml admits know the flag.
"""

import os

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=".strip()
  )
