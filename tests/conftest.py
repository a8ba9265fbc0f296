"""What holds for every test: eight devices made of one CPU, strict warnings."""

import os
import pathlib
import signal
import warnings

import jax
import pytest

import runs

# Half of a cold suite's time goes into compiling small programs that run for a
# moment; with these about a quarter. The code means the same and is slower,
# here and in commands that tests start. .ci/run compiles the rest as users do.
_FLAGS = [
  "--xla_backend_optimization_level=0",
  "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later ones have no such flag, and say so
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

# Before anything asks JAX for its devices. Set here and not in XLA_FLAGS, which
# commands that tests start would inherit.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)

_CACHE = pathlib.Path("~/.cache/mmm_jax/tests-compiled").expanduser()
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
# Small programs, too: a test waits for hundreds of them.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# A shell starts what is to go on in the background deaf to Ctrl-C; the commands
# that tests start must not inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
  config.addinivalue_line("filterwarnings", r"error:::mmm_jax(\..*)?")
  warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")


@pytest.fixture(scope="session")
def main():
  """A process that runs command lines of `mmm_jax.main`."""
  return runs.warm("mmm_jax.main")
