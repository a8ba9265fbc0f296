"""From a config to a `Run`: data loaded and split, model built for them.

Of several hosts, each reads the content (vectors of items) of its own data
shards only, and of interactions, networks and texts one part, which it tells
the others (`parallel.by_parts`). So each host has all of them: the core filter,
dense ids and `co_like` are of all interactions at once; and a data shard has
interactions of nearly all users, of whom drawing negatives and ranking need
everything they have seen. An interaction takes about 35 bytes of a host, and up
to 85 while the data are split; what lies on the devices is by shard again.
"""

import importlib
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mmm_jax import (
  evaluate,
  features,
  input_pipeline,
  kernels,
  parallel,
  sampling,
  streams,
  update,
  validate,
)
from mmm_jax.datasets import base, splits

_LOG = logging.getLogger("mmm_jax")


class Run(NamedTuple):
  """What stays the same from the first step to the last."""

  config: ml_collections.ConfigDict
  dataset: base.Dataset
  split: splits.Split
  interactions: evaluate.Interactions
  sizes: streams.Sizes
  module: Any  # the Python module of the model
  plain_model: Any  # the Flax module, without kernels
  weights: dict[str, float]  # of the model's terms
  content: input_pipeline.ItemContent
  shards: streams.Shards
  shared: streams.Shared
  words: np.ndarray | None  # [V, e] starting word vectors
  facts: dict[str, float]  # found at the start, for the log

  @property
  def model(self):
    """The Flax module that trains and scores; waits for kernels to be compiled,
    so what can be done without it comes first."""
    return self.plain_model.clone(in_cpp=kernels.load(self.config))


class Text(NamedTuple):
  """What a run reads of its items' texts; nothing where it reads none."""

  tokens: np.ndarray | None = None  # [N, L]
  words: np.ndarray | None = None  # [V, e]
  facts: dict[str, float] = {}


def assemble(config) -> Run:
  """Loads and splits the data, and builds the model for them.

  Raises:
    errors.InputError: data or config are wrong; the message says where.
  """
  kernels.begin(config)
  dataset = base.load(config.dataset, config.split, parallel)
  return parallel.together(lambda: _split_and_build(config, dataset))


def _split_and_build(config, dataset):
  split = splits.make(dataset, config.split)
  _LOG.info("%s; %s", base.statistics_line(dataset), split.line)
  sources = streams.choose_sources(dataset, config)
  return build(
    config, dataset, split, _read_text(dataset, split, sources, config)
  )


def build(config, dataset, split, text: Text) -> Run:
  """The run of a data set that is loaded, split and read.

  Raises:
    errors.InputError: the config asks for what the set does not have.
  """
  validate.check_categories(config, len(dataset.items))
  sources = streams.choose_sources(dataset, config)
  records, present = dataset.records, {n: dataset.present[n] for n in sources}
  if config.controls.content == "permuted":
    records, text, present = _permute_content(
      records, text, present, config.seed
    )
  lengths = None
  if text.tokens is not None:
    lengths = (text.tokens != features.PADDING).sum(1)
    # A text without a word says as little as none.
    present["text"] = present["text"] & (lengths > 0)
  sizes = streams.measure(dataset, split, lengths, config)
  networks, facts = streams.choose_networks(dataset, split, config)
  shards, shared = streams.build(
    dataset, split, sizes, networks, present, lengths, config
  )
  content = input_pipeline.ItemContent(
    item_source=dataset.item_source,
    records=records,
    vectors={n: d for n, d in dataset.vectors.items() if n in sources},
    tokens=text.tokens,
  )
  if config.input.standardise:
    content = input_pipeline.standardised(content, shared.present)
  module = importlib.import_module(f"mmm_jax.models.{config.model.name}")
  model = module.create(config, sources, tuple(networks))
  return Run(
    config=config,
    dataset=dataset,
    split=split,
    interactions=evaluate.Interactions(
      dataset.user, dataset.item, split.part, sizes.num_users, sizes.num_items
    ),
    sizes=sizes,
    module=module,
    plain_model=model,
    weights=module.term_weights(model, config),
    content=content,
    shards=shards,
    shared=shared,
    words=text.words,
    facts=facts | text.facts,
  )


def _permute_content(records, text, present, seed):
  """A control: every item has the content of some other one."""
  cycle = np.random.default_rng(seed).permutation(len(records))
  order = np.empty_like(cycle)
  order[cycle] = np.roll(cycle, 1)
  present = {name: there[order] for name, there in present.items()}
  if text.tokens is not None:
    text = text._replace(tokens=text.tokens[order])
  return records[order], text, present


def _read_text(dataset, split, sources, config) -> Text:
  if "text" not in sources:
    return Text()
  texts = features.item_texts(dataset, split)
  trained = np.unique(dataset.item[split.part == splits.TRAIN])
  vocabulary = features.build_vocabulary(texts[trained])
  tokens = features.encode(texts, vocabulary, config.text.max_tokens)
  # No column is kept that is padding for all.
  longest = max(int((tokens != features.PADDING).sum(1).max()), 1)
  tokens = tokens[:, :longest]
  words, coverage = features.word_vectors(
    vocabulary, config.text.glove, config.text.dim, config.seed
  )
  if config.text.glove != "none":
    _LOG.info("GloVe covers %.1f %% of the words", 100 * coverage)
  return Text(tokens, words, {"word_coverage": coverage})


def initial_state(run: Run) -> update.TrainState:
  """The state before the first step, on the default device."""
  rng = jax.random.fold_in(jax.random.key(run.config.seed), sampling.PAD)
  params_rng, rows_rng = jax.random.split(rng)
  words = None if run.words is None else jnp.asarray(run.words)
  return update.create_state(
    run.config,
    params=run.module.start_params(
      run.plain_model, run.content.nothing(), words, params_rng
    ),
    rows=run.module.table_rows(
      run.plain_model, run.sizes, words, rows_rng, run.config.tables.init_scale
    ),
    categories=run.module.start_categories(run.plain_model, run.sizes),
  )
