"""Interrupts a small run over and over; it must end as if nothing had been.

    python tests/faults.py --kills=200 [--seed=0] [--log=FILE]

A run that nothing disturbs comes first. Then the same run is interrupted at
random moments, mostly by `kill -9`, and resumed; after every interruption its
files must be whole, and at its end all of them equal to the undisturbed ones.
Then another one begins, until there were enough kills. Ends with a summary,
and with exit code 1 if anything differed. Linux only.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import pathlib
import random
import select
import shutil
import signal
import sys
import tempfile
import time

import orbax.checkpoint as ocp
from pyarrow import parquet
import tqdm

from mmm_jax import checkpoint, command, files
import runs

# Every kind of state (tables, parameters, categories, the best so far), but so
# small that starting, which is mostly tracing, takes longest.
SMALL = (
  f"{runs.CONFIG}:tiny,cat",
  *runs.SHORT,
  "--config.epochs=6",
  "--config.batch_size=128",
  "--config.log.every_steps=4",
  "--config.checkpoint.every_seconds=0.2",
  "--config.model.dim=8",
  "--config.num_categories=4",
  "--config.dataset.simulated.visual_dim=16",
  "--config.eval.protocols=('full','pooled_1024')",
)

KILL, TERM, INT = "kill -9", "SIGTERM", "SIGINT"
SIGNALS = {KILL: signal.SIGKILL, TERM: signal.SIGTERM, INT: signal.SIGINT}
START, TRAINING = "start", "training"
WRITING, EVALUATION = "checkpoint write", "evaluation"
PHASES = (START, TRAINING, WRITING, EVALUATION)

_POLL_S = 0.003
_LIMIT_S = 280  # a session's; the warm process ends it soon after


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0, help="of kinds, moments")
  parser.add_argument("--log", type=pathlib.Path, help="a line for every kill")
  flags = parser.parse_args()
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mmm_jax-faults-"))
    log = stack.enter_context(open(flags.log or os.devnull, "w"))
    bar = stack.enter_context(tqdm.tqdm(total=flags.kills, disable=None))
    faults = Faults(folder, flags.kills, flags.seed, log, bar)
    stack.callback(faults.close)
    faults.run()
  summary = faults.summary()
  print(summary)
  if flags.log:
    with open(flags.log, "a") as file:
      file.write(summary + "\n")
  if faults.differences:
    sys.exit(f"What differs is kept in {folder}")
  shutil.rmtree(folder)


class Watch:
  """What can be seen of a session from outside, while it goes on."""

  def __init__(self, workdir, last_step):
    self._workdir, self._last_step = workdir, last_step
    self._started = time.monotonic()
    self._before = self._stamp("manifest.json")
    self._lock_before = self._stamp(".lock")
    self._metrics = self._stamp("metrics.jsonl")
    self._first_size = None  # of the rows that an earlier session left
    self._temporary = set()
    # Of an earlier session, until this one clears them away.
    self._leftover = set(temporary_checkpoints(workdir))
    self._since = {}  # {phase: when it was first seen}
    self.rows = self.writes = 0
    self.phase = START

  def look(self):
    self._count_rows()
    now = set(temporary_checkpoints(self._workdir))
    self._leftover &= now
    now -= self._leftover
    if now - self._temporary:
      self.writes += 1
      self._since.pop(WRITING, None)
    self._temporary = now
    self.phase = self._find_phase()
    self._since.setdefault(self.phase, time.monotonic())

  def seconds(self) -> float:
    return time.monotonic() - self._started

  def seconds_in(self, phase) -> float:
    """Since the phase was first seen (the latest write); below 0 if never."""
    return time.monotonic() - self._since.get(phase, float("inf"))

  def start_seconds(self) -> float | None:
    """Until there was something else than the start."""
    others = [at for phase, at in self._since.items() if phase != START]
    return min(others) - self._started if others else None

  def locked(self) -> bool:
    """The folder is taken: whoever takes it has its signals in order."""
    return self._stamp(".lock") != self._lock_before

  def resumed(self) -> bool:
    """The session has read its checkpoint, if there was one."""
    return self._stamp("manifest.json") != self._before

  def _find_phase(self):
    if self._temporary:
      return WRITING
    if not self.resumed():
      return START
    if self._last_step and self._last_step in steps(self._workdir):
      return EVALUATION
    return TRAINING if self.rows else START

  def _count_rows(self):
    path = self._workdir / "metrics.jsonl"
    stamp = self._stamp("metrics.jsonl")
    if stamp == self._metrics:
      return
    # A resumed session begins with a file of the rows that it keeps.
    text = path.read_bytes()
    if self._first_size is None:
      fresh = self._metrics is None
      self._first_size = 0 if fresh else len(text)
    self.rows = text[self._first_size :].count(b"\n")
    self._metrics = stamp

  def _stamp(self, name):
    with contextlib.suppress(FileNotFoundError):
      found = os.stat(self._workdir / name)
      return found.st_ino, found.st_mtime_ns, found.st_size


class Faults:
  """Runs that are interrupted, and what was seen of them."""

  def __init__(self, folder, kills, seed, log, bar):
    self.folder, self.kills, self.log, self.bar = folder, kills, log, bar
    self.rng = random.Random(seed)
    self.main = runs.Warm("mmm_jax.main")
    self.close = self.main.close
    self.reference = folder / "undisturbed"
    self.last_step = None  # of a finished run
    self.damaged = {}  # {step: its folder, which was damaged}
    self.start_s = self.evaluation_s = 0.0
    # What the summary tells.
    self.killed = collections.Counter()  # (kind, phase)
    self.finished = self.resumes = self.redone = self.passed_over = 0
    self.longest_resume_s = self.sessions_s = 0.0
    self.differences = []

  def run(self):
    began = time.monotonic()
    for _ in range(2):  # the first one compiles; the second has its times
      shutil.rmtree(self.reference, ignore_errors=True)
      self.session(self.reference, None)
      if self.differences:
        return
    self.last_step = max(steps(self.reference))
    self.session(self.reference.with_name("timed"), None)
    self.check_end(self.reference.with_name("timed"))
    number = 0
    while self.killed.total() < self.kills:
      number += 1
      self.interrupted_run(self.folder / f"run{number}")
    self.sessions_s = time.monotonic() - began

  def interrupted_run(self, workdir):
    """One run from its first session to its end."""
    before = len(self.differences)
    self.damaged = {}
    while not (workdir / "result.json").exists():
      enough = self.killed.total() >= self.kills
      self.session(workdir, None if enough else self.draw(workdir))
      if len(self.differences) > before:
        return  # and leave its files as they are
    self.check_end(workdir)
    if len(self.differences) == before:
      shutil.rmtree(workdir)

  # -- a session

  def draw(self, workdir):
    """Kind of an interruption, whether damage follows, and its moment."""
    phases = {START: 4, TRAINING: 8, WRITING: 7, EVALUATION: 1}
    if self.last_step in steps(workdir):
      # Cheap now. What cannot come any more lets the run end.
      phases = {START: 1, TRAINING: 1, EVALUATION: 4}
    kind = self.choose({KILL: 8, TERM: 1, INT: 1})
    phase = self.choose(phases)
    # Those are the ones in which a newest checkpoint is worth damaging.
    damage = kind == KILL and phase != START and self.rng.random() < 0.25
    return kind, damage, self.moment(phase)

  def choose(self, weights):
    return self.rng.choices(list(weights), list(weights.values()))[0]

  def moment(self, phase):
    """A function of a `Watch`: whether the moment has come."""
    share, count = self.rng.random(), self.rng.randint(1, 8)
    if phase == START:
      return lambda watch: watch.seconds() >= share * self.start_s
    if phase == TRAINING:
      return lambda watch: watch.rows >= count
    if phase == WRITING:
      # In its tenths of a second, or a little after them.
      return lambda watch: (
        watch.writes > count % 3 and watch.seconds_in(WRITING) >= 0.3 * share
      )
    wait = share * self.evaluation_s
    return lambda watch: watch.seconds_in(EVALUATION) >= wait

  def session(self, workdir, fault):
    """Starts the command; ends it as `fault` says, or lets it end."""
    kind, damage, moment = fault or (None, False, lambda watch: False)
    resuming = bool(steps(workdir))
    watch = Watch(workdir, self.last_step)
    process = self.main.start(*SMALL, f"--workdir={workdir}")
    sent = self.play(process, watch, SIGNALS.get(kind), moment)
    done = process.done()
    self.judge(done, kind if sent else None, watch, workdir)
    self.check_damaged(done, watch, workdir)
    if resuming and watch.start_seconds() is not None:
      self.resumes += 1
      self.longest_resume_s = max(self.longest_resume_s, watch.start_seconds())
    if sent:
      self.count(kind, watch, workdir)
      self.check_files(workdir)
      # The signal may have come after the last file, when none is read again.
      if damage and not (workdir / "result.json").exists():
        self.damage(workdir)

  def play(self, process, watch, number, moment) -> bool:
    """Watches a session to its end; whether the signal was sent."""
    sent = False
    with opened(process.pid) as ended:
      while not ended(_POLL_S):
        watch.look()
        if not sent and watch.locked() and moment(watch):
          process.send_signal(number)
          sent = True
        if watch.seconds() > _LIMIT_S:
          process.kill()
    self.start_s = watch.start_seconds() or self.start_s
    if not sent and watch.seconds_in(EVALUATION) > 0:
      self.evaluation_s = watch.seconds_in(EVALUATION)
    return sent

  def count(self, kind, watch, workdir):
    self.killed[kind, watch.phase] += 1
    self.bar.update()
    print(
      f"{self.killed.total()}: {workdir.name}, {kind} in {watch.phase} after"
      f" {watch.seconds():.1f} s; {watch.rows} rows, checkpoints"
      f" {steps(workdir)}",
      file=self.log,
      flush=True,
    )

  def differs(self, workdir, what):
    self.differences.append(f"{workdir.name}: {what}")
    print(f"DIFFERENCE {self.differences[-1]}", file=self.log, flush=True)

  # -- what must hold

  def judge(self, done, kind, watch, workdir):
    """A session may only end as it was asked to, or well."""
    allowed = {command.OK}  # it may just have been finished
    if kind:
      allowed.add(-signal.SIGKILL if kind == KILL else command.STOPPED)
    if done.code not in allowed:
      self.differs(
        workdir,
        f"{kind or 'no signal'} in {watch.phase}: code {done.code}, {done.err}",
      )

  def check_damaged(self, done, watch, workdir):
    """A damaged checkpoint is passed over, and that is said."""
    if not self.damaged or not watch.resumed():
      return
    for step in self.damaged:
      if f"checkpoint {step} of" not in done.err:
        self.differs(workdir, f"damaged {step} not named: {done.err}")
      self.passed_over += 1
    self.damaged = {}

  def check_files(self, workdir):
    """No file is half there under its final name."""
    for path in workdir.glob("*.json"):
      self.guard(workdir, path, lambda path=path: files.read_json(path))
    for path in workdir.glob("*.parquet"):
      self.guard(workdir, path, lambda path=path: parquet.read_table(path))
    rows = workdir / "metrics.jsonl"
    if rows.exists():
      self.guard(workdir, rows, lambda: read_rows(workdir))
    # An older one may be on its way out.
    for step in steps(workdir)[-2:]:
      if step not in self.damaged:
        self.guard(
          workdir,
          f"checkpoint {step}",
          lambda step=step: self.load(workdir, step),
        )

  def guard(self, workdir, what, read):
    try:
      read()
    except Exception as error:  # whatever half a file makes a reader raise
      self.differs(workdir, f"{what}: {type(error).__name__}: {error}")

  def check_end(self, workdir):
    """Everything is what the undisturbed run has, but for times."""
    self.finished += 1
    values = files.read_json(workdir / "manifest.json")
    self.redone += values["redone_steps"]
    for name in ("config.json", "result.json", "per_user.parquet"):
      if not same_bytes(workdir / name, self.reference / name):
        self.differs(workdir, f"{name} differs")
    if names(workdir) != names(self.reference):
      odd = sorted(names(workdir) ^ names(self.reference))
      self.differs(workdir, f"files differ: {odd}")
    if read_rows(workdir) != read_rows(self.reference):
      self.differs(workdir, "rows of metrics.jsonl differ")
    if steps(workdir)[-1:] != [self.last_step]:
      self.differs(workdir, f"checkpoints {steps(workdir)}")
      return
    found = self.load(workdir, self.last_step)
    for name, leaf in self.final_checkpoint.items():
      if found[name].tobytes() != leaf.tobytes():
        self.differs(workdir, f"{name} of the last checkpoint differs")

  @functools.cached_property
  def final_checkpoint(self):
    return read_checkpoint(self.reference)

  def load(self, workdir, step):
    """The leaves of a checkpoint, read and checked as a run does."""
    with checkpoint.open_manager(workdir / "checkpoints", keep=2) as manager:
      return checkpoint.load(manager, step, self.final_checkpoint)

  # -- damage

  def damage(self, workdir):
    """Spoils the newest checkpoint if the one before it can be used."""
    whole = steps(workdir)
    if len(whole) < 2:
      return
    step = whole[-1]
    metadata = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    folder = metadata.with_name("default")
    data = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    act, path = self.rng.choice(
      [
        (flip, data),
        (truncate, data),
        (truncate, folder / "manifest.ocdbt"),
        (truncate, folder / "_METADATA"),
        (truncate, metadata),
      ]
    )
    before = read_checkpoint(workdir)
    act(path, self.rng)
    # A bit may lie where nobody reads, and then there is nothing to be said.
    # Checksums are in the metadata, and not what Orbax reads arrays by.
    if path == metadata or altered(workdir, before):
      self.damaged[step] = True
    what = "" if step in self.damaged else ", which changes nothing"
    print(f"  then {act.__name__} {path}{what}", file=self.log, flush=True)

  def summary(self) -> str:
    kinds, phases = collections.Counter(), collections.Counter()
    for (kind, phase), count in self.killed.items():
      kinds[kind] += count
      phases[phase] += count
    listed = lambda counts, order: ", ".join(
      f"{counts[name]} {name}" for name in order
    )
    lines = [
      f"kills: {self.killed.total()} ({listed(kinds, SIGNALS)})",
      f"they fell in: {listed(phases, PHASES)}",
      f"runs finished and compared: {self.finished} of {self.last_step} steps",
      f"resumes: {self.resumes}; steps redone: {self.redone}",
      f"damaged newest checkpoints passed over: {self.passed_over}",
      f"longest resume: {self.longest_resume_s:.1f} s to the first step",
      f"minutes: {self.sessions_s / 60:.1f}",
      f"differences: {len(self.differences)}",
    ]
    return "\n".join([*lines, *self.differences])


@contextlib.contextmanager
def opened(pid):
  """A function that waits for a process to end, and says whether it has."""
  try:
    descriptor = os.pidfd_open(pid)
  except ProcessLookupError:
    yield lambda seconds: True
    return
  try:
    yield lambda seconds: bool(select.select([descriptor], [], [], seconds)[0])
  finally:
    os.close(descriptor)


def steps(workdir) -> list[int]:
  """Of the checkpoints that have their final names, ascending."""
  return sorted(
    int(name) for name in listed(workdir / "checkpoints") if name.isdigit()
  )


def temporary_checkpoints(workdir) -> list[str]:
  return [n for n in listed(workdir / "checkpoints") if "orbax" in n]


def listed(folder) -> list[str]:
  try:
    return os.listdir(folder)
  except FileNotFoundError:
    return []


def read_checkpoint(workdir) -> dict:
  """{path of a leaf: array} of the newest checkpoint."""
  folder = workdir.absolute() / "checkpoints"
  with ocp.CheckpointManager(folder) as manager:
    return manager.restore(
      manager.latest_step(), args=ocp.args.StandardRestore()
    )


def altered(workdir, before) -> bool:
  """Whether the newest checkpoint no longer has the leaves `before`.

  As Orbax alone reads it, without the checksums of `mmm_jax.checkpoint`.
  """
  try:
    with checkpoint.quiet():
      found = read_checkpoint(workdir)
  except Exception:  # whatever a damaged file makes Orbax raise
    return True
  same = [found[name].tobytes() == before[name].tobytes() for name in before]
  return set(found) != set(before) or not all(same)


def names(workdir) -> set[str]:
  """Of all that a run leaves; times are in the names of events."""
  inside = {f"checkpoints/{name}" for name in listed(workdir / "checkpoints")}
  numbers = {f"checkpoints/{step}" for step in steps(workdir)}
  return {*listed(workdir), *(inside - numbers)}


def read_rows(workdir) -> list[dict]:
  """Whole rows without their times; one that is no JSON raises."""
  lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")
  rows = [json.loads(line) for line in lines[:-1]]
  for row in rows:
    del row["interactions_per_s"]
  return rows


def same_bytes(one, other) -> bool:
  return one.read_bytes() == other.read_bytes()


def flip(path, rng):
  """One bit of a file."""
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def truncate(path, rng):
  os.truncate(path, rng.randrange(path.stat().st_size))


if __name__ == "__main__":
  main()
