"""Every value that all models share; the files beside this one add to it.

A config file is called with the text behind its colon, a comma-separated list
of variants that are applied in order: `configs/mmm.py:microlens,con`.
"""

import difflib

import ml_collections


class TableConfig(ml_collections.ConfigDict):
  """Holds a key `update`, of which ConfigDict would make its method.

  Attribute access is what flags use; code writes `config.tables["update"]`.
  """

  @property
  def update(self):
    return self["update"]


def base() -> ml_collections.ConfigDict:
  """The values of a run that do not depend on the model."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.epochs = 60  # the most; early stopping may end a run sooner
  c.batch_size = 1024  # positives; each brings its negatives
  c.data_shards = 8  # parts of every batch, whatever the machine
  c.interaction_loss = "squared"  # squared (the paper), bce, bpr, softmax
  c.compute_dtype = "float32"  # or bfloat16, of encoders and shared logits
  c.normalisation = "mean"  # or paper_sums, the literal Eq. 17

  c.dataset = ml_collections.ConfigDict()
  c.dataset.name = "simulated"
  c.dataset.data_dir = "~/.cache/mmm_jax"  # prepared sets
  c.dataset.manual_dir = ""  # raw files of a real set
  c.dataset.core = 5  # fewest interactions a user and an item; 0: keep all
  c.dataset.simulated = simulated()

  c.split = ml_collections.ConfigDict()
  c.split.protocol = "auto"  # the set's own, else random
  c.split.path = ""  # a Parquet file with user, item, part
  c.split.seed = 0
  c.split.ratios = (0.7, 0.1, 0.2)

  c.losses = ml_collections.ConfigDict()
  for loss in ("squared", "bce", "bpr"):
    c.losses[loss] = ml_collections.ConfigDict({"learning_rate": 1e-3})
  c.losses.softmax = ml_collections.ConfigDict()
  c.losses.softmax.learning_rate = 1e-3
  c.losses.softmax.temperature = 0.15
  c.losses.softmax.shared_negatives = 512

  c.negatives = ml_collections.ConfigDict()
  c.negatives.per_positive = 5
  c.negatives.resample = True  # anew in each epoch

  c.schedule = ml_collections.ConfigDict()
  c.schedule.decay_rate = 0.95
  c.schedule.decay_steps = 1000
  c.schedule.staircase = False

  c.optimizer = ml_collections.ConfigDict({"b1": 0.9, "b2": 0.999, "eps": 1e-8})
  c.tables = TableConfig()
  c.tables.update = "rows"  # or dense
  c.tables.optimizer = "adam"  # adam, adagrad, sgd
  c.tables.init_scale = 0.01

  c.eval = ml_collections.ConfigDict()
  c.eval.cutoffs = (10, 20, 30, 40)
  c.eval.protocols = ("full", "pooled_1024", "sampled_100")
  c.eval.every_epochs = 5
  c.eval.patience = 10  # evaluations without a better nDCG@20
  c.eval.seed = 0  # ties and candidate lists
  c.eval.user_block = 128
  c.eval.item_tile = 32768

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every_seconds = 30.0
  c.checkpoint.keep = 2

  c.log = ml_collections.ConfigDict()
  # At most; also the steps of a dispatch, for which examples are drawn ahead.
  c.log.every_steps = 25
  c.log.tensorboard = True
  c.log.gradients = False  # of every term on the tables, at each validation

  c.input = ml_collections.ConfigDict()
  c.input.content_budget_mb = 1024.0  # more than this streams
  c.input.standardise = False  # vectors to mean 0 and variance 1; ours
  c.input.threads = 4  # at most; one reads a chunk
  c.input.prefetch_batches = 16  # steps that are read ahead, in whole chunks

  c.parallel = ml_collections.ConfigDict()
  c.parallel.engine = "pmap"  # of several devices; or mesh
  c.parallel.devices = 0  # 0: all
  c.parallel.platform = ""  # that they must be of: cpu, gpu or tpu; "": any
  c.parallel.timeout_s = 100  # for other processes to come, and to be silent
  c.parallel.wait_s = 1800  # for what needs others, who may hang
  c.parallel.kernels = True  # in C++, on CPUs with a compiler
  return c


def simulated() -> ml_collections.ConfigDict:
  """The embedded set, in the size and shape of the paper's Twitter set."""
  s = ml_collections.ConfigDict()
  s.seed = 0
  s.users = 9412
  s.items = 19058
  s.interactions = 109433
  s.min_per_user = 5
  s.min_per_item = 5
  s.communities = 48
  s.categories = 32
  s.latent_dim = 8
  s.activity_tail = 1.5  # Pareto exponent; small = heavy
  s.focus = 2.0  # of a user's taste; small = few categories
  s.taste = 3.0  # weight of taste in a choice
  s.exposure = 100  # users who see a video
  s.home_share = 0.9  # of them, from the video's own community
  s.visual_dim = 4096
  s.words = 3000
  s.text_tokens = 8.0
  s.follow_degree = 12.0
  s.absent = 0.03  # videos without a source, users who follow nobody
  # 0 is pure noise, 1 all that a linear probe could recover.
  s.signal = ml_collections.ConfigDict()
  s.signal.text = 0.5
  s.signal.visual = 0.5
  s.signal.follow = 0.5
  return s


def tiny_data(c: ml_collections.ConfigDict) -> None:
  """Shrinks the embedded set so that every model runs on it in seconds."""
  s = c.dataset.simulated
  s.users, s.items, s.interactions = 300, 1200, 7500
  s.communities, s.categories = 6, 8
  s.visual_dim = 256
  s.words = 400
  s.exposure = 60


def apply_variants(
  config: ml_collections.ConfigDict, text: str, known: dict
) -> ml_collections.ConfigDict:
  """Applies the variants named in `text` in order.

  Raises:
    ValueError: a name that is not known; the message has the nearest one.
  """
  for name in filter(None, text.split(",")):
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise ValueError(
        f"unknown variant {name!r}{hint} Known: {', '.join(known)}"
      )
    known[name](config)
  return config
