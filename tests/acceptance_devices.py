"""Any number of devices and processes trains the same model.

  python tests/acceptance_devices.py [--folder=DIR]

Trains plain `configs/mmm.py` for 5 epochs on 1, 2 and 8 devices that are made
of the CPU, and in 2 and 4 processes; and on 8 devices until it is stopped, to
continue that once on 1 device and once in 2 processes of 2 devices. Compares
every run with the first one: all losses of the first 50 steps, in which the
stop falls, and all `full` metrics at the end. Prints the largest differences
and exits with 1 if one is too large. On two cores that others used as well it
took 35 minutes; in the same --folder it continues where it was stopped.
"""

import argparse
import json
import pathlib
import shutil
import signal
import sys
import tempfile
import time

from mmm_jax import command
import runs

STEPS, STOP_AFTER = 50, 20
LOSS_BOUND, METRIC_BOUND = 1e-5, 1e-3  # relative, absolute
PATIENCE_S = 3600
NO_LOSSES = ("step", "epoch", "learning_rate", "interactions_per_s")

FIRST = "1 device"
# Processes, and devices of each.
WHOLE = {
  FIRST: (1, 1),
  "2 devices": (1, 2),
  "8 devices": (1, 8),
  "2 processes": (2, 1),
  "4 processes": (4, 1),
}
STOPPED = "8 devices, stopped"
CONTINUED = {
  "8 devices, then 1 device": (1, 1),
  "8 devices, then 2 processes of 2": (2, 2),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--folder", type=pathlib.Path, help="of the runs")
  folder = parser.parse_args().folder or pathlib.Path(tempfile.mkdtemp())
  folder = folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  for name, shape in WHOLE.items():
    train(folder / name, *shape)
  for name, shape in CONTINUED.items():
    if not (folder / name).exists():
      stop(folder / STOPPED)
      shutil.copytree(folder / STOPPED, folder / name)
    train(folder / name, *shape)
  sys.exit(compare(folder))


def start(folder, processes, devices):
  return runs.start_together(
    folder,
    runs.CONFIG,
    f"--config.dataset.data_dir={folder.parent / 'data'}",
    "--config.epochs=5",
    "--config.log.every_steps=1",
    '--config.eval.protocols=("full",)',
    "--config.parallel.timeout_s=600",  # the machine may be busy
    processes=processes,
    devices=devices,
    limit_s=PATIENCE_S,
  )


def train(folder, processes, devices):
  """A run to its end, if it is not there yet."""
  started = time.monotonic()
  found = runs.codes(start(folder, processes, devices), patience_s=PATIENCE_S)
  if found != [command.OK] * processes:
    sys.exit(f"{folder}: exit codes {found}\n{runs.said(folder, 0)[-2000:]}")
  print(f"{folder.name}: {time.monotonic() - started:.0f} s", flush=True)


def stop(folder):
  """A run on 8 devices that SIGTERM ends after a few steps."""
  if runs.rows(folder):
    return
  processes = start(folder, *WHOLE["8 devices"])
  runs.wait_for_rows(processes, folder, STOP_AFTER, patience_s=PATIENCE_S)
  processes[0].send_signal(signal.SIGTERM)
  found = runs.codes(processes, patience_s=PATIENCE_S)
  step = len(runs.rows(folder))
  if found != [command.STOPPED] or not STOP_AFTER <= step < STEPS:
    sys.exit(f"{folder}: exit codes {found} after step {step}")
  print(f"{folder.name}: after step {step}", flush=True)


def compare(folder) -> int:
  """Prints the table; whether a difference is too large."""
  wanted = read(folder / FIRST)
  print("\n| run | losses, relative | of | metrics, absolute | of |")
  print("|---|---:|---|---:|---|")
  bad = False
  for name in [*WHOLE, *CONTINUED][1:]:
    losses, metrics = read(folder / name)
    loss, of_loss = largest(losses, wanted[0], relative=True)
    metric, of_metric = largest(metrics, wanted[1], relative=False)
    print(f"| {name} | {loss:.1e} | {of_loss} | {metric:.1e} | {of_metric} |")
    bad |= loss > LOSS_BOUND or metric > METRIC_BOUND
  print(f"\nallowed: {LOSS_BOUND:.0e}, {METRIC_BOUND:.0e}")
  return int(bad)


def read(folder) -> tuple[dict, dict]:
  """{name and step: loss} of the first steps, {name: metric} of `full`."""
  losses = {
    f"{name}, step {row['step']}": value
    for row in runs.rows(folder)[:STEPS]
    for name, value in row.items()
    if name not in NO_LOSSES and not name.startswith("H")  # only watched
  }
  full = json.loads((folder / "result.json").read_text())["full"]
  metrics = {
    f"{part} {name}": value
    for part, values in full.items()
    for name, value in values.items()
  }
  return losses, metrics


def largest(found, wanted, *, relative) -> tuple[float, str]:
  """The largest difference, and where it is."""
  assert found.keys() == wanted.keys()
  scale = lambda value: max(abs(value), 1e-9) if relative else 1.0
  difference, name = max(
    (abs(found[name] - value) / scale(value), name)
    for name, value in wanted.items()
  )
  return difference, name if difference else "all are equal"


if __name__ == "__main__":
  main()
