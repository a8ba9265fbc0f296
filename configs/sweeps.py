"""Sweeps: lists of runs whose results are recorded and tabled together.

  python -m mmm_jax.experiments run --sweep=variants --list

A function here is a sweep and yields its cells. A cell names a model (a file
beside this one with its variants behind a colon), a data set and a seed, and
may change single values of that config. Rows of a table are compared with the
first model that a sweep yields for the set.
"""

SEEDS = {"hetrec_lastfm": 3, "tiktok": 3, "microlens": 1}
REAL_SETS = tuple(SEEDS)
LOSSES = ("squared", "bce", "bpr", "softmax")
PARTS = ("con", "cat", "net", "pmf")
KNOBS = ("text", "visual", "follow")
CONTROLS = (
  "permuted_content",
  "rewired_networks",
  "random_categories",
  "content_categories",
)


def cell(model, dataset, seed=0, **changes):
  """One run; `changes` are keys of the config with __ for every dot."""
  values = {key.replace("__", "."): value for key, value in changes.items()}
  return {"model": model, "dataset": dataset, "seed": seed, "changes": values}


def variants():
  """The paper's variants on the embedded set, and MMM on the real ones."""
  for variant in ("full", "con", "cat", "net", "pmf", "paper", "fair"):
    yield cell(f"mmm:{variant}", "simulated")
  for dataset in REAL_SETS:
    yield cell("mmm:full", dataset)


def variants_pairs():
  """MMM and each part of it alone, less plain factorisation."""
  for part in ("full", *PARTS[:-1]):
    yield "simulated", f"mmm:{part}", "mmm:pmf"


def ablation():
  """What the parts add, under the paper's loss and under the best one."""
  for dataset, seeds in SEEDS.items():
    models = [f"mmm:{dataset}", f"mmm:{dataset}_pmf"]
    models += [f"mmm:{dataset},{part}" for part in PARTS]
    models += [f"mmm:{part}" for part in ("full", *PARTS)]
    # All rows of a set have the number of epochs of its own variant.
    budget = {"epochs": 18} if dataset == "microlens" else {}
    for model in models:
      for seed in range(seeds):
        yield cell(model, dataset, seed, **budget)


def ablation_pairs():
  """All of MMM and each part alone, less two factorisations.

  With the part's own values, then with what a study of its own found; under the
  paper's loss less that with the paper's values.
  """
  parts = [part for part in PARTS if part != "pmf"]
  for dataset in SEEDS:
    tuned = [f"mmm:{dataset}", *(f"mmm:{dataset},{part}" for part in parts)]
    for reference in (f"mmm:{dataset},pmf", f"mmm:{dataset}_pmf"):
      for model in tuned:
        yield dataset, model, reference
    for part in ("full", *parts):
      yield dataset, f"mmm:{part}", "mmm:pmf"


def controls():
  """MMM, and MMM with one part made meaningless."""
  for dataset in ("hetrec_lastfm", "tiktok"):
    for control in ("", *CONTROLS):
      for seed in range(SEEDS[dataset]):
        yield cell(f"mmm:{dataset}{control and ','}{control}", dataset, seed)
  # Only Last.fm has two networks.
  for control in ("equal_networks", "one_network"):
    for seed in range(SEEDS["hetrec_lastfm"]):
      yield cell(f"mmm:hetrec_lastfm,{control}", "hetrec_lastfm", seed)


def _signals(on: str) -> dict:
  """Knobs of `simulated`: the one named stands at 1, the others at 0."""
  return {f"dataset__simulated__signal__{k}": float(k == on) for k in KNOBS}


def planted_choices():
  """What to use where one source was given something to say, for validation.

  Each part has four choices; not to use it is one of them, which is `pmf`.
  """
  for on in ("", *KNOBS):
    shared = {"dataset": "simulated", "epochs": 30, **_signals(on)}
    yield cell("mmm:best,pmf", **shared)
    # Interactions are the same under all knobs, content under `follow`, and
    # users under the knobs of content.
    if not on:
      for weight in (0.005, 0.08, 0.32):
        priors = {"weights__user": weight, "weights__item": weight}
        yield cell("mmm:best,pmf", **shared, **priors)
    if on != "follow":
      for sources in ("*", "text", "visual"):
        yield cell("mmm:best,con", **shared, model__sources=sources)
    if on in ("", "follow"):
      for share in (0.17, 0.5, 1.5):
        yield cell(
          "mmm:best,net",
          **shared,
          model__networks="follow",
          remedies__networks_in_user=share,
        )


def planted():
  """Whether a source helps where it was given something to say, and only there.

  The other knobs stand at 0, so that nothing else helps. Each part has what it
  chose in `planted_choices`, by validation: where no content was better than
  any, `con` is `pmf`.
  """
  priors = {"weights__user": 0.08, "weights__item": 0.08}
  network = {"model__networks": "follow", "remedies__networks_in_user": 1.5}
  for on in ("", *KNOBS):
    content = {"model__sources": on if on in ("text", "visual") else ""}
    parts = {
      "pmf": priors,
      "con": content | (priors if not content["model__sources"] else {}),
      "cat": {},
      "net": network,
      "full": content | network,
    }
    for part, chosen in parts.items():
      changes = {"epochs": 30, **_signals(on), **chosen}
      for seed in range(3):
        yield cell(f"mmm:best,{part}", "simulated", seed, **changes)


def num_categories():
  """The paper's Fig. 3, whose values are 10 to 50."""
  for dataset in ("hetrec_lastfm", "tiktok"):
    for number in (5, 10, 20, 30, 40, 50):
      for seed in range(SEEDS[dataset]):
        model = f"mmm:{dataset}"
        yield cell(model, dataset, seed, num_categories=number)


def clusters():
  """MMM's categories against those of MicroLens, over ten seeds."""
  for seed in range(10):
    yield cell("mmm:microlens", "microlens", seed)


def losses():
  """The losses, for plain matrix factorisation and for MMM."""
  for dataset in ("hetrec_lastfm", "tiktok"):
    for model in ("mmm:full", "mmm:pmf"):
      for loss in LOSSES:
        for seed in range(SEEDS[dataset]):
          yield cell(model, dataset, seed, interaction_loss=loss)


def losses_pairs():
  """MMM less factorisation under each loss, and this less the paper's loss."""
  model = "mmm:{} interaction_loss={}".format
  for dataset in ("hetrec_lastfm", "tiktok"):
    for loss in LOSSES:
      yield dataset, model("full", loss), model("pmf", loss)
    for loss in LOSSES[1:]:
      yield dataset, model("pmf", loss), model("pmf", LOSSES[0])


def precision():
  """Encoders and shared logits in float32 and in bfloat16."""
  for dtype in ("float32", "bfloat16"):
    for seed in range(SEEDS["hetrec_lastfm"]):
      yield cell(
        "mmm:hetrec_lastfm", "hetrec_lastfm", seed, compute_dtype=dtype
      )


SWEEPS = {
  function.__name__: function
  for function in (
    variants,
    ablation,
    controls,
    planted_choices,
    planted,
    num_categories,
    clusters,
    losses,
    precision,
  )
}

# What `table --sweep=NAME --pairs` compares: (set, model, less which model).
PAIRS = {
  "variants": variants_pairs,
  "ablation": ablation_pairs,
  "losses": losses_pairs,
}
