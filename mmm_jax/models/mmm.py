"""MMM: micro-video recommendation from many sources and user networks.

Ma, Wen, Zhong, Chen and Li, Data Science and Engineering 4(3), 2019. Equation
numbers are the paper's. The predictor is r_ij = u_i . (v_j + w_{c_j}) (Eq. 11);
content, categories and user networks enter the loss as further terms of
Eq. 17. Any of them may be missing: with no sources, no networks and no
categories this is probabilistic matrix factorisation.

Symbols: u user vector, v item vector, c_j category of item j, w category
vector, mu centroid of a category, u^k vector of a user in network k, a weight
of a network for a user, x content vector, M bilinear map.

Shapes: B interactions, n negatives of each or n' shared ones, S x W items of
the content stream (S data shards), U users of the user stream, A neighbours,
C categories, K networks, d latent size.
"""

import math
from typing import NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmm_jax import errors, kernels, losses, sampling
from mmm_jax.models import layers

_EXACT = jax.lax.Precision.HIGHEST  # of what enters a score, on any device


@flax.struct.dataclass
class Categories:
  """Result of the K-means between epochs (Eq. 8-9), constant within a step."""

  assignment: jax.Array  # [N] int32 c_j; -1 before the first K-means
  centroids: jax.Array  # [C, d] mu

  @property
  def seeded(self) -> jax.Array:
    return self.assignment[0] >= 0


class Remedies(NamedTuple):
  """Ours, not the paper's; each at its neutral value leaves Eq. 17 as it is."""

  mismatched_content: float  # H1: weight of -ln sigma(-v_j M x_j'), j' != j
  content_temperature: float  # H1: Eq. 7 among other items; see _contrast
  alpha_prior: float  # H2: weight of 1/2 |alpha|^2
  networks_in_user: float  # H3: g in u + g sum_k a_k u^k inside the predictor
  neighbours_in_user: bool  # H3: there, u^k is the neighbours' mean (Eq. 12)
  history_in_user: float  # H3: h in u + h mean_j v_j, j the user's other items
  frozen_categories: bool  # H4: w learns from its centroid, not from clicks


class MMM(nn.Module):
  """The model of Eq. 1-17; tables live outside, their rows come in."""

  dim: int
  num_categories: int  # 0: no categories
  text: dict | None  # widths, filters of the text CNN; None: no text
  vectors: tuple[str, ...]  # names of dense sources
  networks: tuple[str, ...]
  scoring_cap: int  # most neighbours in a mean for scores
  equal_networks: bool  # a control: a_ik = 1/K
  interaction_loss: str
  temperature: float  # of the softmax loss
  prior_stream: str  # whose rows carry |u|^2 and |v|^2
  compute_dtype: str  # of encoders and of logits that a batch shares
  remedies: Remedies
  in_cpp: bool = False  # whether `kernels` are loaded, and to be used

  def setup(self):
    size = {"dim": self.dim, "dtype": self.compute_dtype}
    encoders = {name: layers.DenseEncoder(**size) for name in self.vectors}
    if self.text is not None:
      encoders["text"] = layers.TextCNN(**self.text, **size)
    self.encoders = encoders
    self.maps = {
      name: self.param(
        f"map_{name}",
        nn.initializers.xavier_uniform(),
        (self.dim, self.dim),
      )
      for name in encoders
    }
    if self.num_categories:
      self.category_vectors = self.param(
        "category_vectors",
        nn.initializers.normal(0.01),
        (self.num_categories, self.dim),
      )

  def touch_parameters(self, content):
    """Runs all that has parameters, for `start_params`."""
    for name in self.vectors:
      self.encoders[name](content[name])
    if self.text is not None:
      words = content["text"]
      self.encoders["text"](words, jnp.ones(words.shape[:-1], bool))

  @property
  def sources(self) -> tuple[str, ...]:
    return (*self.vectors, *(("text",) if self.text is not None else ()))

  # --- what a step touches -------------------------------------------------

  def lookups(self, batch) -> dict[str, dict[str, jax.Array]]:
    """Ids of every table row that `loss` reads: {table: {use: ids}}."""
    wanted = {
      "user": {"interaction": batch["user"]},
      "item": {"positive": batch["item"], "negative": batch["negatives"]},
    }
    streamed = self.prior_stream == "streams"
    if streamed or self.networks:
      wanted["user"]["stream"] = batch["stream_user"]
    if streamed or self.sources:
      wanted["item"]["stream"] = batch["stream_item"]
    if self.text is not None:
      wanted["word"] = dict(enumerate(batch["tokens"]))
    for name in self.networks:
      wanted[f"network_{name}"] = {
        "own": batch["stream_user"],
        "neighbours": batch["neighbours"][name],
      }
    if self.networks:
      wanted["alpha"] = {"stream": batch["stream_user"]}
      if self.remedies.networks_in_user:
        for name in self.networks:
          wanted[f"network_{name}"]["interaction"] = (
            batch["user_neighbours"][name]
            if self.remedies.neighbours_in_user
            else batch["user"]
          )
        wanted["alpha"]["interaction"] = batch["user"]
    if self.remedies.history_in_user:
      wanted["item"]["history"] = batch["history"]
    return wanted

  # --- the loss ------------------------------------------------------------

  def loss(self, rows, batch, categories: Categories):
    """All terms of Eq. 17, without their weights, and what to watch.

    Args:
      rows: table rows for `lookups(batch)`.
      batch: what `streams.draw_batch` returns.
      categories: the current clusters.

    Returns:
      {name: losses.Term} that the trainer weighs and adds up, and a second
      such dictionary of measurements that carry no gradient.
    """
    terms, watched = self._interactions(rows, batch, categories)
    for part in (self._content, self._networks):
      more_terms, more_watched = part(rows, batch)
      terms, watched = {**terms, **more_terms}, {**watched, **more_watched}
    if self.num_categories:
      more_terms, more_watched = self._categories(categories)
      terms, watched = {**terms, **more_terms}, {**watched, **more_watched}
    return terms, jax.lax.stop_gradient(watched)

  def _interactions(self, rows, batch, categories):
    """First term of Eq. 17 and the zero-mean priors of u and v (Eq. 11)."""
    user, item = rows["user"]["interaction"], rows["item"]["positive"]
    negative = rows["item"]["negative"]
    mask = batch["user"] != sampling.PAD
    negative_mask = batch["negatives"] != sampling.PAD
    full_user = self._predicting_user(rows, batch)
    positive_item = self._with_category(item, batch["item"], categories)
    negative_item = self._with_category(
      negative, batch["negatives"], categories
    )
    if self.interaction_loss == "softmax":
      interaction = self._softmax(
        full_user, positive_item, negative_item, batch, mask
      )
      # The shared rows are on every device; together they count once.
      share = batch["shared_fraction"]
      shared = self._half_square(negative, negative_mask)
      negatives = losses.Term(shared.total * share, shared.count * share)
    else:
      interaction = losses.PAIRWISE[self.interaction_loss](
        self._dot(full_user, positive_item),
        jnp.einsum("bd,bnd->bn", full_user, negative_item),
        mask,
        negative_mask,
        batch["weight"],
      )
      negatives = self._half_square(negative, negative_mask)
    if self.prior_stream == "interactions":
      priors = {
        "user": self._half_square(user, mask),
        "item": losses.add(self._half_square(item, mask), negatives),
      }
    else:
      priors = {
        kind: self._half_square(
          rows[kind]["stream"], batch[f"stream_{kind}"] != sampling.PAD
        )
        for kind in ("user", "item")
      }
    return {"interaction": interaction, **priors}, {}

  def _softmax(self, user, positive, shared, batch, mask):
    positive_logits = self.score_pairs(user, positive)
    logits = self._scale * layers.all_pairs(
      layers.normalise(user), layers.normalise(shared), self.compute_dtype
    )
    # Whoever has more items than are masked may still meet this one.
    own = batch["negatives"][None] == batch["item"][:, None]
    logits = jnp.where(own | batch["seen_negatives"], -jnp.inf, logits)
    return losses.softmax(positive_logits, logits, mask, batch["weight"])

  def _predicting_user(self, rows, batch):
    """u, or with our remedies for H3 u + g sum_k a_k u^k + h mean_j v_j.

    u^k is the user's own vector in network k, which the ties hold near the
    neighbours' mean, or that mean itself: Eq. 12 as an assignment. The mean of
    v is over training items of the user but for the one to be predicted.
    """
    user = rows["user"]["interaction"]
    if self.remedies.history_in_user:
      user = self._with_history(user, rows["item"]["history"], batch["history"])
    if not (self.networks and self.remedies.networks_in_user):
      return user
    vectors = {n: rows[f"network_{n}"]["interaction"] for n in self.networks}
    return self._with_networks(
      user,
      rows["alpha"]["interaction"],
      vectors,
      batch["user_neighbours"],
      batch["membership"],
    )

  def _with_history(self, user, items, history):
    mean, _ = _mean(items, history)
    return user + self.remedies.history_in_user * mean

  def _with_networks(self, user, alpha, vectors, neighbours, membership):
    if self.remedies.neighbours_in_user:
      vectors = {
        name: _mean(vectors[name], neighbours[name])[0]
        for name in self.networks
      }
    stacked = jnp.stack([vectors[name] for name in self.networks], 1)
    mixed = self._mix(alpha, stacked, membership)
    return user + self.remedies.networks_in_user * mixed

  def _with_category(self, item, ids, categories):
    """v_j + w_{c_j} (Eq. 11); just v_j before the first K-means."""
    if not self.num_categories:
      return item
    category = categories.assignment.at[ids].get(mode="fill", fill_value=-1)
    return item + self._category_offset(category)

  def _category_offset(self, category):
    vectors = self.category_vectors
    if self.remedies.frozen_categories:
      vectors = jax.lax.stop_gradient(vectors)
    # As a product with one-hot rows, the gradient is a product too; a scatter
    # into C rows would be serial.
    one_hot = jax.nn.one_hot(category, self.num_categories)
    return jnp.matmul(one_hot, vectors, precision=_EXACT)

  def _content(self, rows, batch):
    """-ln sigma(v_j M x_j) of every source that item j has (Eq. 7)."""
    terms, watched = {}, {}
    if not self.sources:
      return terms, watched
    item = rows["item"]["stream"]  # [S, W, d]
    real = batch["stream_item"] != sampling.PAD
    for name, content in self._encode(rows, batch).items():
      present = real & batch["present"][name]
      projected = content @ self.maps[name].T
      logits = self._dot(item, projected)
      # Mismatched pairs stay inside a data shard, so that they do not depend
      # on the number of devices; their texts are about as long.
      other_logits = self._dot(item, jnp.roll(projected, 1, axis=1))
      other = present & jnp.roll(present, 1, axis=1) & (item.shape[1] > 1)
      if self.remedies.content_temperature:
        matching = self._contrast(item, projected, rows, batch, present)
      else:
        matching = losses.masked_sum(jax.nn.softplus(-logits), present)
      # Averaged over the items of the stream, with this source or not.
      terms[f"content/{name}"] = matching._replace(count=jnp.sum(real * 1.0))
      if self.remedies.mismatched_content:
        terms[f"mismatched_content/{name}"] = losses.masked_sum(
          jax.nn.softplus(other_logits), other
        )
      watched[f"H1/matching_{name}"] = losses.masked_sum(
        jax.nn.sigmoid(logits), present
      )
      watched[f"H1/mismatched_{name}"] = losses.masked_sum(
        jax.nn.sigmoid(other_logits), other
      )
    return terms, watched

  def _contrast(self, item, projected, rows, batch, present):
    """Our form of Eq. 7 against H1: x_j has to tell v_j from other items.

    -ln [e^{s(v_j)} / (e^{s(v_j)} + sum_l e^{s(v_l)})] with s(v) =
    cos(v, M x_j) / temperature, over the shared negatives l of the step.
    """
    scale = 1 / self.remedies.content_temperature
    query = layers.normalise(projected) * scale
    own = self._dot(query, layers.normalise(item))
    shared = layers.normalise(rows["item"]["negative"])
    others = layers.all_pairs(
      query.reshape(-1, self.dim), shared, self.compute_dtype
    ).reshape(*query.shape[:-1], -1)
    same = batch["stream_item"][..., None] == batch["negatives"]
    others = jnp.where(same, -jnp.inf, others)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return losses.softmax(flat(own), flat(others), flat(present))

  def _encode(self, rows, batch):
    """x_j of every source: {name: [S, W, d]} (Eq. 1-6)."""
    encoded = {
      name: self.encoders[name](batch["vectors"][name]) for name in self.vectors
    }
    if self.text is not None:
      parts = [
        self.encoders["text"](rows["word"][number], tokens != sampling.PAD)
        for number, tokens in enumerate(batch["tokens"])
      ]
      encoded["text"] = jnp.concatenate(parts, axis=1)
    return encoded

  def _networks(self, rows, batch):
    """The ties between u, the u^k and the neighbours' u^k (Eq. 12-15)."""
    terms, watched = {}, {}
    if not self.networks:
      return terms, watched
    user = rows["user"]["stream"]  # [U, d]
    real = batch["stream_user"] != sampling.PAD
    num_users = jnp.sum(real * 1.0)
    vectors, membership = [], []
    for name in self.networks:
      own = rows[f"network_{name}"]["own"]
      mean, linked = _mean(
        rows[f"network_{name}"]["neighbours"], batch["neighbours"][name]
      )
      # Users without neighbours have no tie (T is undefined for them).
      tie = self._half_square(own - mean, real & linked)
      terms[f"network_tie/{name}"] = tie._replace(count=num_users)
      terms[f"network_prior/{name}"] = self._half_square(own, real)
      length = jnp.linalg.norm(jax.lax.stop_gradient(own), axis=-1)
      watched[f"H3/length_{name}"] = losses.masked_sum(length, real)
      vectors.append(own)
      membership.append(real & linked)
    membership = jnp.stack(membership, -1)  # [U, K]
    alpha = rows["alpha"]["stream"]
    mixed = self._mix(alpha, jnp.stack(vectors, 1), membership)
    tied = jnp.any(membership, -1)
    user_tie = self._half_square(user - mixed, tied)
    terms["user_tie"] = user_tie._replace(count=num_users)
    if self.remedies.alpha_prior:
      terms["alpha_prior"] = self._half_square(alpha, real)
    weights = self._network_weights(alpha, membership)
    watched["H2/largest_weight"] = losses.masked_sum(jnp.max(weights, -1), tied)
    length = jnp.linalg.norm(jax.lax.stop_gradient(user), axis=-1)
    watched["H3/length_user"] = losses.masked_sum(length, real)
    return terms, watched

  def _network_weights(self, alpha, membership):
    """a_ik: softmax over the networks in which a user has neighbours."""
    if self.equal_networks:
      alpha = jnp.zeros_like(alpha)
    alpha = jnp.where(membership, alpha, -1e9)
    return jnp.where(membership, jax.nn.softmax(alpha, axis=-1), 0)

  def _mix(self, alpha, vectors, membership):
    """sum_k a_ik u_i^k (Eq. 13): [U, K], [U, K, d], [U, K] -> [U, d]."""
    weights = self._network_weights(alpha, membership)
    return jnp.einsum("uk,ukd->ud", weights, vectors, precision=_EXACT)

  def _categories(self, categories):
    """The two priors of w (Eq. 10), once there are categories."""
    vectors, count = self.category_vectors, jnp.float32(self.num_categories)
    on = categories.seeded * 1.0
    apart = vectors - categories.centroids
    half = lambda rows: 0.5 * on * jnp.sum(rows**2)
    distance = jnp.linalg.norm(jax.lax.stop_gradient(apart), axis=-1)
    terms = {
      "category": losses.Term(half(apart), count, replicated=True),
      "category_prior": losses.Term(half(vectors), count, replicated=True),
    }
    return terms, {
      "H4/category_to_centroid": losses.Term(
        on * jnp.sum(distance), count, replicated=True
      )
    }

  def _half_square(self, rows, mask) -> losses.Term:
    """1/2 |row|^2 of each row [..., d] under its mask [...]."""
    squared_norm = (kernels if self.in_cpp else layers).squared_norm
    return losses.masked_sum(0.5 * squared_norm(rows), mask)

  def _dot(self, left, right):
    return (kernels if self.in_cpp else layers).dot(left, right)

  # --- scoring -------------------------------------------------------------

  def users(self, tables, user, shared) -> jax.Array:
    """What describes users to `score`: [B] ids -> [B, d].

    Args:
      tables: {name: rows}.
      user: ids.
      shared: the `streams.Shared` of the run.
    """
    vectors = tables["user"][user]
    if self.remedies.history_in_user:
      history = sampling.fixed_neighbours(
        user, shared.history, cap=self.scoring_cap
      )
      items = tables["item"].at[history].get(mode="fill", fill_value=0)
      vectors = self._with_history(vectors, items, history)
    if self.networks and self.remedies.networks_in_user:
      neighbours = {
        name: sampling.fixed_neighbours(
          user, shared.networks[name], cap=self.scoring_cap
        )
        for name in self.networks
      }
      wanted = neighbours
      if not self.remedies.neighbours_in_user:
        wanted = dict.fromkeys(self.networks, user)
      vectors = self._with_networks(
        vectors,
        tables["alpha"][user],
        {
          name: tables[f"network_{name}"].at[ids].get(mode="fill", fill_value=0)
          for name, ids in wanted.items()
        },
        neighbours,
        shared.membership[user],
      )
    return self._as_ranked(vectors)

  def items(self, tables, categories: Categories) -> jax.Array:
    """What describes all items to `score`: [N, d]."""
    return self._as_ranked(sum(self.item_parts(tables, categories)))

  def item_parts(self, tables, categories: Categories):
    """v and w_{c} of all items, [N, d] each (the two parts of Eq. 11)."""
    item = tables["item"]
    if not self.num_categories:
      return item, jnp.zeros_like(item)
    return item, self._category_offset(categories.assignment)

  def _as_ranked(self, vectors):
    cosine = self.interaction_loss == "softmax"
    return layers.normalise(vectors) if cosine else vectors

  @property
  def _scale(self):
    return 1 / self.temperature if self.interaction_loss == "softmax" else 1.0

  def score(self, user: jax.Array, item: jax.Array) -> jax.Array:
    """[B, d] from `users`, [T, d] from `items` -> [B, T] logits."""
    return jnp.matmul(user, item.T, precision=_EXACT) * self._scale

  def score_pairs(self, user: jax.Array, item: jax.Array) -> jax.Array:
    """The score of each user with the item of the same row, [B, d] twice."""
    return self._dot(self._as_ranked(user), self._as_ranked(item)) * self._scale

  def shares(self, user, item, offset):
    """The parts of a score that stem from v and from w.

    Args:
      user: [B, d] from `users`.
      item: [B, k, d] v of the listed items.
      offset: [B, k, d] w of their categories.

    Returns:
      Two arrays [B, k] that add up to the score.
    """
    scale = self._scale
    if self.interaction_loss == "softmax":
      square = layers.squared_norm(item + offset)
      scale = scale * jax.lax.rsqrt(square + 1e-12)
    part = lambda rows: jnp.einsum("bd,bkd->bk", user, rows, precision=_EXACT)
    return part(item) * scale, part(offset) * scale


def _mean(vectors, ids):
  """sum_n T_in u_n^k of neighbours (Eq. 12), or a mean of items.

  Args:
    vectors: [B, A, d], zeros where there is none.
    ids: [B, A], PAD where there is none.

  Returns:
    [B, d], and [B] whether there is any.
  """
  degree = jnp.sum(ids != sampling.PAD, -1)
  return jnp.sum(vectors, 1) / jnp.maximum(degree, 1)[:, None], degree > 0


# --- from a config ---------------------------------------------------------


def create(config, sources: tuple[str, ...], networks: tuple[str, ...]) -> MMM:
  """The module that a config and the parts of a data set ask for.

  Raises:
    errors.InputError: a remedy needs another interaction_loss.
  """
  if config.remedies.content_temperature and (
    config.interaction_loss != "softmax"
  ):
    raise errors.InputError(
      "remedies.content_temperature: found"
      f" {config.remedies.content_temperature}, valid: 0 (Eq. 7), as"
      f" interaction_loss={config.interaction_loss} draws no negatives that"
      " items share; only softmax does"
    )
  text = {"widths": config.text.widths, "filters": config.text.filters}
  remedies = config.remedies
  return MMM(
    dim=config.model.dim,
    num_categories=config.num_categories,
    text=flax.core.freeze(text) if "text" in sources else None,
    vectors=tuple(name for name in sources if name != "text"),
    networks=networks,
    scoring_cap=config.network.scoring_cap,
    equal_networks=config.controls.network_weights == "equal",
    interaction_loss=config.interaction_loss,
    temperature=config.losses.softmax.temperature,
    prior_stream="streams"
    if config.normalisation == "paper_sums"
    else "interactions",
    compute_dtype=config.compute_dtype,
    remedies=Remedies(
      **{name: getattr(remedies, name) for name in Remedies._fields}
    ),
  )


def start_params(
  model: MMM, content: dict, words: jax.Array | None, rng: jax.Array
) -> dict:
  """Starting values of the dense parameters.

  Args:
    model: the module.
    content: {source: array} of one item; only shapes matter.
    words: [V, e] word vectors, if there is text.
    rng: key.
  """

  def start(rng):
    inputs = {name: jnp.zeros((1, *x.shape)) for name, x in content.items()}
    if words is not None:
      text = content["text"].shape
      inputs["text"] = jnp.zeros((1, *text, words.shape[1]))
    return model.init(rng, inputs, method="touch_parameters")

  return _compiled_to_run_once(start)(rng).get("params", {})


def _compiled_to_run_once(function):
  """`function`, compiled in less time to code that may take longer."""
  on_cpu = jax.default_backend() == "cpu"
  options = {"xla_backend_optimization_level": 2} if on_cpu else None
  return jax.jit(function, compiler_options=options)


def table_rows(
  model: MMM, sizes, words: jax.Array | None, rng: jax.Array, scale: float
) -> dict[str, jax.Array]:
  """Starting values of the tables.

  Args:
    model: the module.
    sizes: a `streams.Sizes`.
    words: [V, e] starting values of the word vectors, if there is text.
    rng: key.
    scale: standard deviation of the normal start.
  """
  num_rows = {"user": sizes.num_users, "item": sizes.num_items}
  num_rows |= {f"network_{name}": sizes.num_users for name in model.networks}

  def normals(rng):
    return {
      name: jax.random.normal(
        jax.random.fold_in(rng, number), (size, model.dim)
      )
      for number, (name, size) in enumerate(num_rows.items())
    }

  # Products apart: XLA would join this one with one of the draw.
  drawn = _compiled_to_run_once(normals)(rng)
  rows = {name: scale * drawn[name] for name in num_rows}
  if model.networks:
    rows["alpha"] = jnp.zeros((sizes.num_users, len(model.networks)))
  if model.text is not None:
    rows["word"] = words
  return rows


def start_categories(model: MMM, sizes) -> Categories:
  """No item has a category before the first K-means."""
  return Categories(
    assignment=jnp.full(sizes.num_items, -1, jnp.int32),
    centroids=jnp.zeros((model.num_categories, model.dim)),
  )


def term_weights(model: MMM, config) -> dict[str, float]:
  """The weight in Eq. 17 of every term that `MMM.loss` returns.

  Raises:
    errors.InputError: `weights.overrides` is not a list of kind=value or
      kind.name=value with kinds and names that this run has.
  """
  kinds = {"user": (), "item": ()}
  if model.sources:
    kinds["content"] = model.sources
  if model.num_categories:
    kinds |= {"category": (), "category_prior": ()}
  if model.networks:
    kinds["user_tie"] = ()
    kinds |= {kind: model.networks for kind in ("network_tie", "network_prior")}
  weights = {"interaction": 1.0}
  for kind, names in kinds.items():
    value = config.weights[kind]
    weights |= {f"{kind}/{name}": value for name in names} or {kind: value}
  for name in model.sources:
    weights[f"mismatched_content/{name}"] = config.remedies.mismatched_content
  weights["alpha_prior"] = config.remedies.alpha_prior
  return weights | _overrides(config.weights.overrides, weights)


def _overrides(text: str, weights: dict) -> dict[str, float]:
  found = {}
  for part in filter(None, text.split(",")):
    name, _, value = part.partition("=")
    term = name.strip().replace(".", "/", 1)
    if term not in weights:
      known = ", ".join(name.replace("/", ".") for name in weights)
      raise errors.InputError(
        f"weights.overrides: {part!r} names no term of this run; valid:"
        f" name=value with one of {known}"
      )
    try:
      found[term] = float(value)
    except ValueError:
      found[term] = math.nan
    if not 0 <= found[term] < math.inf:
      raise errors.InputError(
        f"weights.overrides: {part!r} has {value!r} where a number from 0 on"
        " should be"
      )
  return found
