"""MMM against Eq. 17-22 written out in NumPy, and its special cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import literal
from mmm_jax import assemble, errors, kernels, sampling, streams, update
from mmm_jax.models import layers, mmm
import toy

LAMBDA = {
  "content": 0.7,
  "user": 0.3,
  "item": 0.2,
  "category": 0.9,
  "category_prior": 0.4,
  "user_tie": 0.8,
  "network_tie": 1.1,
  "network_prior": 0.6,
}
ASSIGNMENT = np.array([0, 1, 2, 0, 1, 2, 2])
SETTINGS = dict(
  model__dim=4,
  data_shards=2,
  batch_size=12,
  negatives__per_positive=2,
  negatives__resample=False,
  schedule__decay_rate=1.0,
  tables__optimizer="sgd",
)


def toy_data():
  """5 users x 7 items; user 3 has no friends, item 2 no picture, 5 no text."""
  pairs = [(0, 1), (0, 4), (1, 1), (1, 6), (2, 0), (2, 3), (2, 5), (3, 2)]
  pairs += [(4, 6), (4, 0)]
  user, item = np.array(pairs).T
  rng = np.random.default_rng(3)
  tokens = np.array(
    [
      [1, 2, 0],
      [3, 0, 0],
      [4, 5, 1],
      [2, 2, 3],
      [5, 0, 0],
      [0, 0, 0],
      [1, 4, 5],
    ]
  )
  return toy.Data(
    num_users=5,
    num_items=7,
    user=user,
    item=item,
    networks={
      "follow": [[1, 2], [0], [0, 1, 4], [], [2]],
      "friend": [[3], [], [0, 3], [], [0, 1, 2, 3]],
    },
    vectors={"visual": rng.standard_normal((7, 3)).astype(np.float16)},
    tokens=tokens.astype(np.int32),
    words=rng.standard_normal((6, 3)).astype(np.float32),
    absent={"visual": [2], "text": [5]},
  )


def toy_state(run, seed=0):
  """Parameters of a size at which every term counts."""
  state = assemble.initial_state(run)
  rng = np.random.default_rng(seed)
  noise = lambda x: (0.6 * rng.standard_normal(x.shape)).astype(np.float32)
  rule = update.row_rule(run.config)
  fresh = {
    name: update.tables.create(jnp.asarray(noise(table.rows)), rule)
    for name, table in state.tables.items()
  }
  params = jax.tree.map(noise, state.params)
  state = state.replace(tables=fresh, params=params)
  if run.config.num_categories:
    state = toy.with_categories(
      state, ASSIGNMENT, noise(state.categories.centroids)
    )
  return state


def encode(run, state, source):
  """x_j of all items and a function from dL/dx to the encoder's gradients."""
  data = run.content
  params = state.params[f"encoders_{source}"]
  if source == "text":
    module = run.model.text
    encoder = layers.TextCNN(**module, dim=run.model.dim)
    words = np.asarray(state.tables["word"].rows)[data.tokens]
    inputs = (jnp.asarray(words), jnp.asarray(data.tokens > 0))
  else:
    encoder = layers.DenseEncoder(run.model.dim)
    rows = data(np.arange(run.sizes.num_items))[source]
    inputs = (jnp.asarray(rows),)
  apply = lambda params, first: encoder.apply(
    {"params": params}, first, *inputs[1:]
  )
  first = inputs[0].astype(jnp.float32)

  @jax.jit
  def back(into):
    return jax.vjp(apply, params, first)[1](into)

  return np.asarray(jax.jit(apply)(params, first), np.float64), back


def literal_parameters(run, state):
  wide = lambda x: np.asarray(x, np.float64)
  row = lambda name: wide(state.tables[name].rows)
  sources = run.model.sources
  encoded = {source: encode(run, state, source) for source in sources}
  networks = run.model.networks
  categorised = run.model.num_categories
  zeros = np.zeros((1, run.model.dim))
  p = {
    "u": row("user"),
    "v": row("item"),
    "w": wide(state.params["category_vectors"]) if categorised else zeros,
    "mu": wide(state.categories.centroids) if categorised else zeros,
    "c": ASSIGNMENT if categorised else 0 * ASSIGNMENT,
    "network": {name: row(f"network_{name}") for name in networks},
    "alpha": row("alpha") if networks else zeros,
    "map": {s: wide(state.params[f"map_{s}"]) for s in sources},
    "x": {s: x for s, (x, _) in encoded.items()},
  }
  return p, {s: back for s, (_, back) in encoded.items()}


def count_pairs(run, batches):
  """How often every pair occurs as a positive and as a negative."""
  counts = np.zeros((2, run.sizes.num_users, run.sizes.num_items))
  for batch in batches:
    real = batch["user"] != sampling.PAD
    user, item = batch["user"][real], batch["item"][real]
    np.add.at(counts[0], (user, item), 1)
    negatives = batch["negatives"][real]
    user = np.broadcast_to(user[:, None], negatives.shape)
    np.add.at(counts[1], (user.ravel(), negatives.ravel()), 1)
  return counts


def literal_scale(counts, sizes, normalisation, num_categories):
  if normalisation == "paper_sums":
    one = dict.fromkeys(("interaction", "content", "tie", "category"), 1.0)
    rows = {"user": np.ones(sizes.num_users), "item": np.ones(sizes.num_items)}
    return one | rows
  positives, all_pairs = counts[0].sum(), counts.sum()
  return {
    "interaction": 1 / all_pairs,
    "user": counts[0].sum(1) / positives,
    "item": counts.sum((0, 1)) / all_pairs,
    "content": 1 / sizes.num_items,
    "tie": 1 / sizes.num_users,
    "category": 1 / num_categories,
  }


def expected(run, state, batches):
  """Loss, gradients by table and gradients of dense parameters."""
  data = toy_data()
  p, backs = literal_parameters(run, state)
  counts = count_pairs(run, batches)
  present = {s: data.dataset.present[s] for s in run.model.sources}
  scale = literal_scale(
    counts, run.sizes, run.config.normalisation, max(1, len(p["w"]))
  )
  loss, g = literal.loss_and_gradients(
    p, counts, data.networks, present, LAMBDA, scale
  )
  rows = {"user": g["u"], "item": g["v"], "alpha": g["alpha"]}
  rows |= {f"network_{name}": x for name, x in g["network"].items()}
  params = {f"map_{source}": x for source, x in g["map"].items()}
  if run.model.num_categories:
    params["category_vectors"] = g["w"]
  for source, back in backs.items():
    into_params, into_input = back(jnp.asarray(g["x"][source], jnp.float32))
    params[f"encoders_{source}"] = into_params
    if source == "text":
      rows["word"] = np.zeros(data.words.shape)
      np.add.at(rows["word"], data.tokens, np.asarray(into_input, np.float64))
      rows["word"][0] = 0  # padding is no word
  return loss, {name: rows[name] for name in state.tables}, params


def weighted(config):
  for name, value in LAMBDA.items():
    config.weights[name] = value
  return config


@pytest.fixture
def unit_steps(monkeypatch):
  """Makes an update the negative gradient of every parameter."""
  monkeypatch.setattr(update, "dense_optimizer", lambda config: optax.sgd(1.0))
  return dict(SETTINGS, losses__squared__learning_rate=1.0)


@pytest.mark.parametrize(
  ("variant", "normalisation"),
  [("full", "mean"), ("full", "paper_sums"), ("pmf", "mean")],
)
def test_one_step_follows_eq_18_to_22(unit_steps, variant, normalisation):
  # `pmf` has no sources, networks and categories: then nothing is left of
  # Eq. 17 but probabilistic matrix factorisation, exactly.
  config = toy.get_config(variant, normalisation=normalisation, **unit_steps)
  run = toy.make_run(weighted(config), toy_data())
  before = toy.to_host(toy_state(run))
  session = toy.Session(run, state=before)
  values = session.train(1)
  loss, rows, params = expected(run, before, toy.draw_epoch(run))
  np.testing.assert_allclose(values["loss"][0], loss, rtol=1e-5)
  if variant == "pmf":
    assert set(before.tables) == {"user", "item"}
    assert not before.params
  for name, gradient in rows.items():
    moved = before.tables[name].rows - session.state.tables[name].rows
    np.testing.assert_allclose(moved, gradient, atol=3e-6, err_msg=name)
  moved = jax.tree.map(np.subtract, before.params, session.state.params)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), moved, params
  )


def test_paper_sums_estimate_the_literal_sum_over_an_epoch():
  # 10 positives in steps of 4, without moving: an epoch's mean is Eq. 17.
  settings = SETTINGS | dict(batch_size=4, losses__squared__learning_rate=0.0)
  config = toy.get_config("full", normalisation="paper_sums", **settings)
  run = toy.make_run(weighted(config), toy_data())
  assert run.sizes.steps == 3
  state = toy.to_host(toy_state(run))
  session = toy.Session(run, state=state)
  values = session.train(3)
  loss, _, _ = expected(run, state, toy.draw_epoch(run))
  # The encoders move by Adam with the same rate, 0.
  np.testing.assert_allclose(np.mean(values["loss"]), loss, rtol=1e-5)
  assert np.ptp(values["loss"]) > 1e-2 * loss  # the steps do differ


# --- the loss alone --------------------------------------------------------


NEUTRAL = mmm.Remedies(
  mismatched_content=0.0,
  content_temperature=0.0,
  alpha_prior=0.0,
  networks_in_user=0.0,
  history_in_user=0.0,
  neighbours_in_user=False,
  frozen_categories=False,
)


def small_model(**changes):
  values = dict(
    dim=3,
    num_categories=0,
    text=None,
    vectors=(),
    networks=(),
    scoring_cap=2,
    equal_networks=False,
    interaction_loss="squared",
    temperature=0.5,
    prior_stream="interactions",
    compute_dtype="float32",
    in_cpp=False,
    remedies=NEUTRAL,
  )
  return mmm.MMM(**values | changes)


def make_batch(**changes):
  """One positive and one negative of user 0; users 0-2 in the stream."""
  batch = {
    "user": np.array([0]),
    "item": np.array([0]),
    "weight": None,
    "negatives": np.array([[1]]),
    "shared_fraction": 1.0,
    "stream_item": np.array([[0, 1, 2]]),
    "vectors": {},
    "tokens": (),
    "present": {},
    "stream_user": np.array([0, 1, 2]),
    "neighbours": {},
    "user_neighbours": {},
    "history": np.full((1, 2), sampling.PAD),
    "membership": np.zeros((1, 0), bool),
  }
  return jax.tree.map(jnp.asarray, batch | changes)


@functools.partial(jax.jit, static_argnames="model")
def loss_terms(model, tables, batch, categories=None, params=None):
  """{term: sum} for tables given as {name: [R, d]}."""
  rule = update.tables.optimizer("sgd", b1=0.0, b2=0.0, eps=0.0)
  whole = {
    name: update.tables.create(jnp.asarray(rows), rule)
    for name, rows in tables.items()
  }
  slots = update.tables.new_slots(whole)
  rows, _ = update.tables.read(whole, slots, model.lookups(batch))
  terms, _ = model.apply(
    {"params": params or {}}, rows, batch, categories, method="loss"
  )
  return terms


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FRIENDS = np.array([[1, 2], [0, sampling.PAD], [sampling.PAD, sampling.PAD]])


def social_terms(u, own, alpha=None):
  model = small_model(networks=("follow",))
  batch = make_batch(
    neighbours={"follow": FRIENDS}, membership=np.ones((1, 1), bool)
  )
  tables = {
    "user": u,
    "item": normal(3, 3, seed=9),
    "network_follow": own,
    "alpha": np.zeros((3, 1), np.float32) if alpha is None else alpha,
  }
  return loss_terms(model, tables, batch)


def test_one_network_with_a_hard_tie_is_social_mf():
  # l_U1 -> infinity makes u = u^1. What remains of the ties is then the
  # social term of SocialMF, 1/2 sum_i |u_i - mean of friends|^2 (Jamali and
  # Ester 2010), and its prior; the tie itself costs nothing.
  u = normal(3, 3)
  terms = social_terms(u, u, alpha=normal(3, 1, seed=5))
  social = 0.5 * np.sum((u[0] - (u[1] + u[2]) / 2) ** 2)
  social += 0.5 * np.sum((u[1] - u[0]) ** 2)  # user 2 follows nobody
  np.testing.assert_allclose(
    terms["network_tie/follow"].total, social, rtol=1e-6
  )
  np.testing.assert_allclose(
    terms["network_prior/follow"].total, 0.5 * np.sum(u**2), rtol=1e-6
  )
  assert terms["user_tie"].total == 0


def test_the_hard_tie_is_the_limit_of_the_soft_one():
  # For u fixed, the u^1 that minimises l_U1 * user_tie + network_tie goes to
  # u as l_U1 grows, and the gap to it falls as 1 / l_U1.
  u = normal(3, 3)

  def objective(own, weight):
    terms = social_terms(u, own)
    tie = terms["network_tie/follow"].total
    return weight * terms["user_tie"].total + tie

  @jax.jit
  def gap(weight):
    # User 2 has no friends, hence no tie: its vector stays at u. The rest is
    # a quadratic in six unknowns, for which one Newton step is exact.
    start = jnp.asarray(u[:2]).ravel()
    cost = lambda x: objective(
      jnp.concatenate([x.reshape(2, 3), jnp.asarray(u[2:])]), weight
    )
    move = jnp.linalg.solve(jax.hessian(cost)(start), jax.grad(cost)(start))
    return jnp.linalg.norm(move)

  soft, hard = gap(100.0), gap(1000.0)
  assert soft > 1e-3
  # (1000 + a) / (100 + a), with the tie's curvature a between 0 and 4.
  assert 0.99 * 1004 / 104 < soft / hard < 1.01 * 1000 / 100


@pytest.mark.parametrize("in_cpp", [False, True])
def test_half_squares_under_a_mask(in_cpp):
  if in_cpp and not kernels.load(toy.get_config()):
    pytest.skip("there is no C++ compiler")
  rows = jnp.array([[3.0, 4.0], [1.0, 0.0], [np.nan, 5.0]])
  mask = jnp.array([True, True, False])
  term = small_model(in_cpp=in_cpp)._half_square(rows, mask)
  assert term.total == 0.5 * (9 + 16) + 0.5 * 1
  assert term.count == 2


def test_users_without_neighbours_are_masked():
  u, own = normal(3, 3), normal(3, 3, seed=1)
  terms = social_terms(u, own)
  shifted = u.copy()
  shifted[2] += 10  # user 2 follows nobody
  same = social_terms(shifted, own)
  assert same["user_tie"].total == terms["user_tie"].total
  assert same["network_tie/follow"].total == terms["network_tie/follow"].total
  # The average is over all users of the stream, masked ones included.
  assert terms["user_tie"].count == terms["network_tie/follow"].count == 3


def test_a_network_without_neighbours_leaves_the_mixture():
  model = small_model(networks=("a", "b"))
  alpha = np.array([[0.3, -0.2], [5.0, 1.0], [1.0, 2.0]], np.float32)
  member = np.array([[True, True], [False, True], [False, False]])
  weights = model.apply({}, alpha, member, method="_network_weights")
  even = np.exp(0.3) / (np.exp(0.3) + np.exp(-0.2))
  np.testing.assert_allclose(
    weights, [[even, 1 - even], [0, 1], [0, 0]], rtol=1e-6
  )


def test_items_without_a_source_are_masked():
  model = small_model(vectors=("visual",))
  params = {
    "encoders_visual": {
      "Dense_0": {"kernel": normal(2, 3), "bias": np.zeros(3, np.float32)}
    },
    "map_visual": normal(3, 3, seed=1),
  }
  v, f = normal(4, 3, seed=2), normal(1, 3, 2, seed=3)

  def content(features, present):
    batch = make_batch(
      vectors={"visual": features}, present={"visual": np.array([present])}
    )
    tables = {"user": normal(3, 3), "item": v}
    return loss_terms(model, tables, batch, params=params)["content/visual"]

  x = np.maximum(f[0] @ params["encoders_visual"]["Dense_0"]["kernel"], 0)
  logit = [v[j] @ params["map_visual"] @ x[j] for j in range(3)]
  cost = np.log1p(np.exp(-np.array(logit)))
  all_of_them = content(f, [True, True, True])
  np.testing.assert_allclose(all_of_them.total, cost.sum(), rtol=1e-5)
  without = content(f, [True, False, True])
  np.testing.assert_allclose(without.total, cost[0] + cost[2], rtol=1e-5)
  changed = f.copy()
  changed[0, 1] = 100  # what an absent source holds is never read
  assert content(changed, [True, False, True]).total == without.total
  assert without.count == all_of_them.count == 3


def test_relabelling_clusters_leaves_the_loss_unchanged():
  model = small_model(num_categories=3)
  w, mu = normal(3, 3), normal(3, 3, seed=1)
  tables = {"user": normal(3, 3, seed=2), "item": normal(4, 3, seed=3)}
  assignment, new_name = np.array([0, 2, 1, 0]), np.array([2, 0, 1])

  def terms(w, mu, assignment):
    categories = mmm.Categories(
      jnp.asarray(assignment, jnp.int32), jnp.asarray(mu)
    )
    found = loss_terms(
      model, tables, make_batch(), categories, {"category_vectors": w}
    )
    return {name: float(term.total) for name, term in found.items()}

  before = terms(w, mu, assignment)
  old_name = np.argsort(new_name)
  after = terms(w[old_name], mu[old_name], new_name[assignment])
  assert before == pytest.approx(after, rel=1e-6)
  assert before["category"] > 0
  wrong = terms(w, mu, new_name[assignment])  # moved items, not vectors
  assert wrong["interaction"] != pytest.approx(before["interaction"], rel=1e-3)


def test_categories_are_silent_before_the_first_clustering():
  model = small_model(num_categories=3)
  tables = {"user": normal(3, 3, seed=2), "item": normal(4, 3, seed=3)}
  off = mmm.start_categories(model, toy_sizes(num_items=4))
  terms = loss_terms(
    model, tables, make_batch(), off, {"category_vectors": normal(3, 3)}
  )
  plain = loss_terms(small_model(), tables, make_batch())
  assert terms["interaction"].total == plain["interaction"].total
  assert terms["category"].total == terms["category_prior"].total == 0


def toy_sizes(**changes):
  return dataclasses.make_dataclass("Sizes", changes)(**changes)


def test_shared_negatives_are_masked_where_the_user_has_seen_them():
  model = small_model(interaction_loss="softmax")
  u, v = normal(2, 3), normal(3, 3, seed=1)
  batch = make_batch(
    user=np.array([0, 1]),
    item=np.array([0, 2]),
    negatives=np.array([0, 1, 2]),
    seen_negatives=np.array([[False, True, False], [False, False, True]]),
  )
  term = loss_terms(model, {"user": u, "item": v}, batch)["interaction"]
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  logit = unit(u) @ unit(v).T / 0.5
  # Each row's own target stands once, beside the items it has not seen: user
  # 0 has seen item 1, user 1 only the target.
  rows = [(0, 0, [0, 2]), (1, 2, [0, 1, 2])]
  cost = [
    np.log(np.sum(np.exp(logit[i, among]))) - logit[i, j]
    for i, j, among in rows
  ]
  np.testing.assert_allclose(term.total, np.sum(cost), rtol=1e-5)
  assert term.count == 2


def test_remedies_at_their_neutral_values_add_no_term():
  run = toy.make_run(toy.get_config("full"), toy_data())
  weights = mmm.term_weights(run.model, run.config)
  assert weights["alpha_prior"] == 0
  assert weights["mismatched_content/visual"] == 0


def test_networks_in_the_predictor_add_the_mixture_to_the_user():
  remedies = NEUTRAL._replace(networks_in_user=0.25)
  model = small_model(networks=("follow",), remedies=remedies)
  check_user_with_network(model, lambda own: own[0])


def test_neighbours_in_the_predictor_are_eq_12_as_an_assignment():
  remedies = NEUTRAL._replace(networks_in_user=0.25, neighbours_in_user=True)
  model = small_model(networks=("follow",), remedies=remedies)
  check_user_with_network(model, lambda own: (own[1] + own[2]) / 2)


def test_history_in_the_predictor_is_the_mean_of_other_items():
  remedies = NEUTRAL._replace(history_in_user=0.25)
  model = small_model(remedies=remedies)
  # User 0 has seen the items 0, 1 and 2 and is asked about item 0.
  batch = make_batch(
    negatives=np.array([[3]]), history=np.array([[sampling.PAD, 1, 2]])
  )
  u, v = normal(2, 3), normal(4, 3, seed=2)
  tables = {"user": u, "item": v}
  term = loss_terms(model, tables, batch)["interaction"]
  full = u[0] + 0.25 * (v[1] + v[2]) / 2
  cost = 0.5 * (1 - full @ v[0]) ** 2 + 0.5 * (full @ v[3]) ** 2
  np.testing.assert_allclose(term.total, cost, rtol=1e-5)
  shared = streams.Shared(
    seen=None,
    history=sampling.Adjacency(jnp.array([0, 3, 3]), jnp.array([0, 1, 2])),
    rows=None,
    networks={},
    membership=jnp.zeros((2, 0), bool),
    present={},
  )
  tables = jax.tree.map(jnp.asarray, tables)
  scored = model.apply({}, tables, jnp.array([0, 1]), shared, method="users")
  # No more than scoring_cap = 2 of them in a mean.
  np.testing.assert_allclose(scored[0], u[0] + 0.25 * (v[0] + v[1]) / 2)
  np.testing.assert_allclose(scored[1], u[1])  # has seen nothing


def check_user_with_network(model, in_network):
  """User 0, whose neighbours are 1 and 2, in the loss and in the scores."""
  batch = make_batch(
    neighbours={"follow": FRIENDS},
    user_neighbours={"follow": FRIENDS[:1]},
    membership=np.ones((1, 1), bool),
  )
  u, own, v = normal(3, 3), normal(3, 3, seed=1), normal(3, 3, seed=2)
  tables = {"user": u, "item": v, "network_follow": own}
  tables["alpha"] = np.zeros((3, 1), np.float32)
  term = loss_terms(model, tables, batch)["interaction"]
  full = u[0] + 0.25 * in_network(own)
  cost = 0.5 * (1 - full @ v[0]) ** 2 + 0.5 * (full @ v[1]) ** 2
  np.testing.assert_allclose(term.total, cost, rtol=1e-5)
  shared = streams.Shared(
    seen=None,
    history=None,
    rows=None,
    networks={
      "follow": sampling.Adjacency(
        jnp.array([0, 2, 3, 3]), jnp.array([1, 2, 0])
      )
    },
    membership=jnp.array([[True], [True], [False]]),
    present={},
  )
  tables = jax.tree.map(jnp.asarray, tables)
  scored = model.apply({}, tables, jnp.array([0, 2]), shared, method="users")
  np.testing.assert_allclose(scored[0], full, rtol=1e-6)
  np.testing.assert_allclose(scored[1], u[2], rtol=1e-6)  # knows nobody


def test_contrasted_content_picks_its_item_among_the_negatives():
  remedies = NEUTRAL._replace(content_temperature=0.5)
  model = small_model(
    vectors=("visual",), remedies=remedies, interaction_loss="softmax"
  )
  item, content = normal(6, 3), normal(1, 3, 3, seed=1)
  negatives = [5, 1, 3]  # 1 is in the stream, and no negative of itself
  batch = make_batch(
    negatives=np.array(negatives),
    seen_negatives=np.zeros((1, 3), bool),
    vectors={"visual": content},
    present={"visual": np.array([[True, True, False]])},
  )
  eye = np.eye(3, dtype=np.float32)
  # 10 lifts the content beyond the ReLU.
  dense = {"kernel": eye, "bias": np.full(3, 10, np.float32)}
  params = {"map_visual": 2 * eye, "encoders_visual": {"Dense_0": dense}}
  tables = {"user": normal(1, 3), "item": item}
  found = loss_terms(model, tables, batch, params=params)["content/visual"]
  unit = lambda x: x / np.linalg.norm(x)
  cost = 0
  for j in (0, 1):
    query = unit(content[0, j] + 10) / 0.5
    score = lambda other, query=query: query @ unit(item[other])
    others = [np.exp(score(other)) for other in negatives if other != j]
    cost -= score(j) - np.log(np.exp(score(j)) + sum(others))
  np.testing.assert_allclose(found.total, cost, rtol=1e-5)
  assert found.count == 3  # a mean over all items, with the source or not


def test_equal_network_weights_are_one_over_k():
  model = small_model(networks=("a", "b"), equal_networks=True)
  alpha = jnp.array([[5.0, -5.0], [5.0, -5.0]])
  member = jnp.array([[True, True], [False, True]])
  vectors = jnp.asarray(normal(2, 2, 3))
  found = model._mix(alpha, vectors, member)
  np.testing.assert_allclose(found[0], vectors[0].mean(0), rtol=1e-6)
  np.testing.assert_allclose(found[1], vectors[1, 1], rtol=1e-6)


def test_permuted_content_is_that_of_other_items():
  data = toy.random_data(40, 60)
  real = toy.make_run(toy.get_config("con"), data)
  config = toy.get_config("con", controls__content="permuted")
  run = toy.make_run(config, data)
  assert (run.content.records != real.content.records).all()
  every = np.arange(60)
  visual = run.content(every)["visual"]
  real_visual = real.content(every)["visual"]
  for j in range(60):
    (k,) = np.flatnonzero(real.content.records == run.content.records[j])
    assert (run.content.tokens[j] == real.content.tokens[k]).all()
    assert (visual[j] == real_visual[k]).all()
    for name, present in run.shared.present.items():
      assert present[j] == real.shared.present[name][k]


def test_contrasted_content_needs_shared_negatives():
  config = toy.get_config("full", remedies__content_temperature=0.2)
  with pytest.raises(errors.InputError, match="only softmax does"):
    toy.make_run(config, toy.random_data(40, 60))


def test_mismatched_content_is_the_next_item_of_the_shard():
  remedies = NEUTRAL._replace(mismatched_content=0.5)
  model = small_model(vectors=("visual",), remedies=remedies)
  item, content = normal(3, 3), normal(1, 3, 3, seed=1)
  batch = make_batch(
    vectors={"visual": content}, present={"visual": np.ones((1, 3), bool)}
  )
  eye = np.eye(3, dtype=np.float32)
  # 10 lifts the content beyond the ReLU.
  dense = {"kernel": eye, "bias": np.full(3, 10, np.float32)}
  params = {"map_visual": eye, "encoders_visual": {"Dense_0": dense}}
  tables = {"user": normal(1, 3), "item": item}
  terms = loss_terms(model, tables, batch, params=params)
  found = terms["mismatched_content/visual"]
  # -ln sigma(-x) = ln(1 + exp(x))
  logits = [item[j] @ (content[0, j - 1] + 10) for j in range(3)]
  np.testing.assert_allclose(
    found.total, np.sum(np.log1p(np.exp(logits))), rtol=1e-5
  )
  assert found.count == 3


def test_alpha_prior_and_frozen_categories():
  config = toy.get_config(
    "full", remedies__alpha_prior=0.5, remedies__frozen_categories=True
  )
  session = toy.Session(toy.make_run(weighted(config), toy.random_data(40, 60)))
  centroids = np.ones((3, 8))
  session.state = toy.with_categories(
    session.state, np.arange(60) % 3, centroids, centroids
  )
  session.state.tables["alpha"].packed[:, :2] = 2.0
  values = session.train(1)
  assert values["alpha_prior"][0] == pytest.approx(0.5 * (2**2 + 2**2))
  # w = mu: without the clicks only its zero-mean prior moves it, all numbers
  # by the same step of Adam.
  moved = session.state.params["category_vectors"] - centroids
  assert (moved < 0).all()
  np.testing.assert_allclose(moved, moved[0, 0], rtol=1e-5)


def test_a_network_of_nobody_is_a_network_without_ties():
  data = toy.random_data(40, 60)
  data.networks["friend"] = [[] for _ in range(40)]
  session = toy.Session(toy.make_run(toy.get_config("full"), data))
  values = session.train(2)
  assert (values["network_tie/friend"] == 0).all()
  assert (values["network_tie/follow"] > 0).all()
  assert np.isfinite(values["loss"]).all()


def test_a_text_without_a_word_is_absent():
  data = toy.random_data(40, 60)
  data.tokens[7] = 0
  run = toy.make_run(toy.get_config("full"), data)
  present = run.shared.present["text"]
  assert not present[7]
  assert present.sum() == 60 - len({7, *data.absent["text"]})


# --- encoders and scores ---------------------------------------------------


def test_text_cnn_is_eq_1_to_5_in_loops():
  widths, filters, dim, length = (2, 3), 4, 3, 5
  cnn = layers.TextCNN(widths=widths, filters=filters, dim=dim)
  words = normal(2, length, 2)
  real = [3, 5]  # words of each text; a window starts at a word
  mask = np.arange(length) < np.array(real)[:, None]
  params = cnn.init(jax.random.key(0), words, mask)["params"]
  # No bias is 0, so that one in the wrong place is seen.
  params = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape, seed=7), params)
  found = cnn.apply({"params": params}, words, mask)
  for text, count in enumerate(real):
    padded = np.zeros((length + 2, 2))
    padded[:count] = words[text, :count]
    pooled = []
    for width, bias in zip(widths, np.split(params["bias"], len(widths))):
      kernel = params[f"filters_{width}"]
      windows = [padded[t : t + width].ravel() for t in range(count)]
      z = [np.maximum(window @ kernel + bias, 0) for window in windows]
      pooled.append(np.max(z, 0))
    dense = params["dense"]
    x = np.concatenate(pooled) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(found[text], np.maximum(x, 0), atol=1e-5)


@pytest.mark.parametrize("empty", [False, True])
def test_bfloat16_is_near_float32(empty):
  cnn = {"widths": (2, 3), "filters": 4, "dim": 3}
  words, mask = normal(2, 5, 2), np.full((2, 5), not empty)
  dense, vectors = {"dim": 3}, normal(2, 6)
  left, right = normal(4, 8), normal(5, 8)
  for module, values, *inputs in (
    (layers.TextCNN, cnn, words, mask),
    (layers.DenseEncoder, dense, vectors),
  ):
    exact, coarse = module(**values), module(**values, dtype="bfloat16")
    params = coarse.init(jax.random.key(0), *inputs)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    found, wanted = coarse.apply(params, *inputs), exact.apply(params, *inputs)
    assert found.dtype == jnp.float32
    # Eight bits of a number: an error of up to 1/256 of every factor.
    np.testing.assert_allclose(found, wanted, atol=0.05)
    assert empty or (found != wanted).any()
  found = layers.all_pairs(left, right, "bfloat16")
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, left @ right.T, atol=0.1)
  assert (found != left @ right.T).any()


def test_an_empty_text_gives_finite_values_and_gradients():
  cnn = layers.TextCNN(widths=(2,), filters=2, dim=2)
  words, mask = jnp.zeros((1, 3, 2)), jnp.zeros((1, 3), bool)
  params = cnn.init(jax.random.key(0), words, mask)["params"]
  slopes = jax.grad(
    lambda p: jnp.sum(cnn.apply({"params": p}, words, mask)), allow_int=True
  )(params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_normalise_keeps_zero_with_a_finite_slope():
  np.testing.assert_allclose(
    layers.normalise(jnp.array([3.0, 4.0])), [0.6, 0.8]
  )
  slope = jax.jacobian(layers.normalise)(jnp.zeros(2))
  assert np.isfinite(slope).all()


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_item_and_category_share_add_up_to_the_score(loss):
  model = small_model(num_categories=2, interaction_loss=loss)
  params = {"params": {"category_vectors": normal(2, 3, seed=4)}}
  tables = {"user": normal(2, 3), "item": normal(4, 3, seed=1)}
  categories = mmm.Categories(jnp.array([0, 1, 1, 0]), jnp.zeros((2, 3)))
  users = model.apply(
    params, tables, jnp.array([0, 1]), jnp.zeros((2, 0)), method="users"
  )
  items = model.apply(params, tables, categories, method="items")
  item, offset = model.apply(params, tables, categories, method="item_parts")
  scores = model.score(users, items)
  top = np.array([[3, 0], [1, 2]])
  parts = model.shares(users, item[top], offset[top])
  listed = np.take_along_axis(np.asarray(scores), top, 1)
  np.testing.assert_allclose(sum(parts), listed, rtol=1e-5)
  u, full = (
    tables["user"][0],
    tables["item"][1] + params["params"]["category_vectors"][1],
  )
  expected = u @ full
  if loss == "softmax":  # a cosine over the temperature
    expected /= np.linalg.norm(u) * np.linalg.norm(full) * 0.5
  np.testing.assert_allclose(scores[0, 1], expected, rtol=1e-5)


# --- weights ---------------------------------------------------------------


def test_every_term_has_a_weight_of_its_kind():
  run = toy.make_run(weighted(toy.get_config("full")), toy_data())
  weights = mmm.term_weights(run.model, run.config)
  assert weights["interaction"] == 1
  for name, value in weights.items():
    kind = name.split("/")[0]
    if kind in LAMBDA:
      assert value == LAMBDA[kind]
  assert {"content/text", "network_tie/friend", "category"} <= set(weights)


def test_overrides_change_one_source_or_network():
  config = weighted(toy.get_config("full"))
  config.weights.overrides = "content.text=2.5, network_tie.friend=0"
  run = toy.make_run(config, toy_data())
  weights = mmm.term_weights(run.model, run.config)
  assert weights["content/text"] == 2.5
  assert weights["content/visual"] == LAMBDA["content"]
  assert weights["network_tie/friend"] == 0


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("content.sound=1", "user, item, content.visual, content.text"),
    ("content.text=loud", "'loud'"),
    ("user=-1", "'-1'"),
    ("user=nan", "'nan'"),
  ],
)
def test_wrong_overrides_name_what_is_valid(text, told):
  config = toy.get_config("full", weights__overrides=text)
  with pytest.raises(errors.InputError, match=told):
    toy.make_run(config, toy_data())
