"""Eq. 17 and its gradients, Eq. 18-22, written out by hand in NumPy.

Plain loops over users, items, networks and categories in float64, with no use
of the package: what the model is compared with. A parameter set is a dict:
`u` [M, d], `v` [N, d], `w` [C, d], `mu` [C, d], `c` [N], `network` {k: [M, d]},
`alpha` [M, K], `map` {s: [d, d]}, `x` {s: [N, d]}.
"""

import numpy as np


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def mixing(p, friends):
  """a_ik and the mixed vectors (Eq. 13); zeros for users without friends."""
  names = list(p["network"])
  weights = np.zeros_like(p["alpha"])
  for i in range(len(p["u"])):
    member = [k for k, name in enumerate(names) if len(friends[name][i])]
    shifted = np.exp(p["alpha"][i, member])
    weights[i, member] = shifted / shifted.sum()
  mixed = sum(
    weights[:, [k]] * p["network"][name] for k, name in enumerate(names)
  )
  return weights, mixed


def neighbour_mean(rows, lists, i):
  """sum_n T_in u_n (Eq. 12)."""
  return sum(rows[n] for n in lists[i]) / len(lists[i])


def loss_and_gradients(p, counts, friends, present, lam, scale):
  """Eq. 17 and its gradients.

  Args:
    p: parameters.
    counts: (positives [M, N], samples [M, N]): how often a pair is drawn.
    friends: {network: lists of neighbours}.
    present: {source: bool [N]}.
    lam: {term: weight}.
    scale: {term: factor on its sum}, all 1 in the literal equation; `user`
      and `item` are arrays, a factor for each row.

  Returns:
    The loss and a dict of gradients like p.
  """
  g = {
    key: {name: np.zeros_like(x) for name, x in value.items()}
    if isinstance(value, dict)
    else np.zeros(np.shape(value))
    for key, value in p.items()
  }
  loss = _interactions(p, g, counts, scale["interaction"])
  for row, kind in (("u", "user"), ("v", "item")):
    factor = lam[kind] * scale[kind][:, None]
    loss += 0.5 * np.sum(factor * p[row] ** 2)
    g[row] += factor * p[row]
  for source in p["map"]:
    factor = lam["content"] * scale["content"]
    loss += _content(p, g, source, present[source], factor)
  for row, kind in ((p["w"] - p["mu"], "category"), (p["w"], "category_prior")):
    factor = lam[kind] * scale["category"]
    loss += 0.5 * factor * np.sum(row**2)
    g["w"] += factor * row
  if p["network"]:
    loss += _ties(p, g, friends, lam, scale["tie"])
  return loss, g


def _interactions(p, g, counts, factor):
  loss = 0.0
  for target, drawn in zip((1.0, 0.0), counts):
    for i, j in np.argwhere(drawn):
      times = factor * drawn[i, j]
      item = p["v"][j] + p["w"][p["c"][j]]
      error = p["u"][i] @ item - target
      loss += 0.5 * times * error**2
      g["u"][i] += times * error * item  # (18)
      g["v"][j] += times * error * p["u"][i]  # (19)
      g["w"][p["c"][j]] += times * error * p["u"][i]  # (20)
  return loss


def _content(p, g, source, present, factor):
  matrix, x, v = p["map"][source], p["x"][source], p["v"]
  loss = 0.0
  for j in np.flatnonzero(present):
    s = sigmoid(v[j] @ matrix @ x[j])
    loss -= factor * np.log(s)
    g["v"][j] -= factor * (1 - s) * matrix @ x[j]  # (19)
    g["map"][source] -= factor * (1 - s) * np.outer(v[j], x[j])  # (22)
    g["x"][source][j] -= factor * (1 - s) * matrix.T @ v[j]  # (22)
  return loss


def _ties(p, g, friends, lam, factor):
  weights, mixed = mixing(p, friends)
  user_tie, tie, prior = (
    factor * lam[kind] for kind in ("user_tie", "network_tie", "network_prior")
  )
  loss = 0.0
  for i in range(len(p["u"])):
    if not weights[i].any():
      continue
    apart = p["u"][i] - mixed[i]
    loss += 0.5 * user_tie * apart @ apart
    g["u"][i] += user_tie * apart  # (18)
    for k, (name, rows) in enumerate(p["network"].items()):
      g["network"][name][i] -= user_tie * weights[i, k] * apart  # (21)
      g["alpha"][i, k] -= (
        user_tie * weights[i, k] * apart @ (rows[i] - mixed[i])
      )
  for name, rows in p["network"].items():
    gradient, lists = g["network"][name], friends[name]
    loss += 0.5 * prior * np.sum(rows**2)
    gradient += prior * rows  # (21)
    for i in range(len(rows)):
      if not len(lists[i]):
        continue
      apart = rows[i] - neighbour_mean(rows, lists, i)
      loss += 0.5 * tie * apart @ apart
      gradient[i] += tie * apart  # (21)
      for n in lists[i]:  # the last sum of (21), seen from the other side
        gradient[n] -= tie * apart / len(lists[i])
  return loss
