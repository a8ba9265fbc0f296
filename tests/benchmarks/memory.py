"""Memory of `full` evaluation against the number of items.

    python tests/benchmarks/memory.py --out=memory.json

Ranks 512 users against 20 k, 200 k and 1 M items of 64 dimensions, each in a
process of its own, and measures how far the peak of resident memory rises
above what stood there with the item table in place. Ends with an error if a
million items need 64 MB more than 20 k. Linux only.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mmm_jax import evaluate, parallel

DIMENSION = 64
NUM_USERS = 512
NUM_ITEMS = (20_000, 200_000, 1_000_000)
ALLOWED_GROWTH_MB = 64.0


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--num_items", type=int, help="measure this size only")
  flags = parser.parse_args()
  if flags.num_items:
    print(json.dumps(measure(flags.num_items)))
    return
  rows = [measure_apart(num_items) for num_items in NUM_ITEMS]
  text = json.dumps(rows, indent=2)
  print(text)
  if flags.out:
    flags.out.write_text(text + "\n")
  growth = rows[-1]["peak_above_table_mb"] - rows[0]["peak_above_table_mb"]
  if growth > ALLOWED_GROWTH_MB:
    sys.exit(f"Peak memory grows by {growth:.0f} MB with the items.")


def measure_apart(num_items: int) -> dict:
  """`measure` in a fresh process, so that nothing is left from the last."""
  command = [sys.executable, __file__, f"--num_items={num_items}"]
  output = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(output.stdout)


def measure(num_items: int) -> dict:
  table = jax.random.normal(jax.random.key(0), (num_items, DIMENSION))
  users = jax.random.normal(jax.random.key(1), (NUM_USERS, DIMENSION))
  jax.block_until_ready((table, users))
  engine = parallel.Engine(tuple(jax.devices()[:1]), by_pmap=False)
  scorer = evaluate.Scorer(lambda ids: users[ids], table, score, engine)
  before = reset_peak()
  start = time.perf_counter()
  evaluate.rank(
    scorer,
    np.arange(NUM_USERS),
    np.arange(NUM_USERS + 1) * 10,
    np.tile(np.arange(10, dtype=np.int32), NUM_USERS),
    num_items=num_items,
    k=40,
    seed=0,
    user_block=128,
    item_tile=16_384,
  )
  seconds = time.perf_counter() - start
  return {
    "num_items": num_items,
    "item_table_mb": round(table.nbytes / 2**20, 1),
    "peak_above_table_mb": round(resident_mb("VmHWM") - before, 1),
    "seconds_with_compilation": round(seconds, 2),
  }


def score(u, v):
  return jnp.matmul(u, v.T, precision=lax.Precision.HIGHEST)


def reset_peak() -> float:
  """Forgets the peak of resident memory so far -> MB resident now."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return resident_mb("VmRSS")


def resident_mb(key: str) -> float:
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (line for line in lines if line.startswith(key + ":"))
  return int(line.split()[1]) / 2**10


if __name__ == "__main__":
  main()
