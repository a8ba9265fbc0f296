"""`simulated`: a made-up platform for short videos, of any size.

One story, told three times: something is shown to a crowd, mostly of its own
community, and a few of those who see it choose it, in proportion to the
exponential of a utility (a multinomial choice, without replacement).

  Videos find audiences: users are drawn by activity and community, and choose
    by the log of the probability that their taste gives to the video.
  Users find whom to follow: by community and likeness of taste.
  Videos find hashtags: words near to the video in the latent space.

A taste is a Dirichlet mixture over categories, a category a Gaussian in the
latent space. What text and visual vectors show is sqrt(s) z + sqrt(1 - s) z',
with z the video's latent vector, z' that of another video drawn at random and
s the source's `signal`: so the best linear probe of what is shown recovers
R^2 = s of z. Vectors of 4096 numbers show it almost whole. A few hashtags show
a part only: with 8 of 3,000 hashtags on 19,058 videos a ridge probe on bags of
words recovers R^2 = .00, .40, .92 of z at s = 0, .5, 1.
A share `signal.follow` of the edges of the follow network is chosen as above,
the rest falls on anyone.

B rows of a block, P pool, M users, N videos, C categories, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import itertools

import numpy as np

from mmm_jax import errors
from mmm_jax.datasets import base, crowds

VERSION = 2
FILES = ()
PAGE = ""

_BLOCK = 512  # rows at a time
_TASTE_FLOOR = 1e-3  # of the mass of a taste: nobody rules a category out
_WORD_WIDTH = 0.5  # of a word's meaning, in standard deviations of the latents
_VISUAL_NOISE = 0.3  # of one number, beside the 1 that the video explains
_OFFERS = 4  # crowds of views shown to a user with too few
_YEAR = 365 * 24 * 3600  # seconds in which videos appear
_EPOCH = 1_500_000_000  # the first second of that year, Unix time
_DELAY = _YEAR // 12  # mean seconds from a video's release to a view


@dataclasses.dataclass(frozen=True)
class Options:
  """`dataset.simulated` of a run's config."""

  seed: int  # the set is a function of it and of the other values
  users: int
  items: int
  interactions: int  # exactly
  min_per_user: int
  min_per_item: int
  communities: int
  categories: int
  latent_dim: int
  activity_tail: float  # exponent of the Pareto law of activity; small = heavy
  focus: float  # concentration of a user's taste; small = few categories
  taste: float  # its weight in a choice; 0 = anyone who sees the video
  exposure: int  # draws of the crowd that sees a video
  home_share: float  # of those draws, from the video's community
  visual_dim: int
  words: int  # different hashtags
  text_tokens: float  # mean hashtags of a video
  follow_degree: float  # mean of how many a user follows
  absent: float  # videos without text or vector, users who follow nobody
  signal: dict  # {text, visual, follow}: 0 (noise) to 1

  def rng(self, name: str) -> np.random.Generator:
    """A stream of its own for every part: no knob shifts another part."""
    return np.random.default_rng([self.seed, *name.encode()])


def parse(manual_dir: str | None, options: dict) -> base.RawData:
  """Makes up a set; `options` are the fields of `Options`.

  Raises:
    InputError: a size that is impossible, with the values that are possible.
  """
  del manual_dir  # Nothing is read.
  o = Options(**options)
  _check(o)
  people = _people(o)
  videos = _videos(o, people)
  viewer, item = _repaired(o, people, videos, *_audiences(o, people, videos))
  user_items, timestamps = _histories(o, viewer, item)
  text = _text(o, videos)
  return base.RawData(
    user_ids=[f"u{user}" for user in range(o.users)],
    item_ids=[f"v{video}" for video in range(o.items)],
    user_items=user_items,
    timestamps=timestamps,
    ordered=True,
    networks={"follow": _follow(o, people)},
    text=text,
    title=text,
    category=videos.membership.argmax(axis=1).astype(np.int32),
    category_names=[f"category {c}" for c in range(o.categories)],
    vectors={"visual": lambda: _visual(o, videos)},
    vector_dims={"visual": o.visual_dim},
    present={"visual": _present(o, "visual")},
    extra=_truth(people, videos),
  )


def _check(o):
  """Everything that would make the numbers impossible."""
  least = max(o.min_per_user * o.users, o.min_per_item * o.items)
  bounds = {
    "seed": (o.seed, 0, np.inf),
    "users": (o.users, 2, np.inf),
    "items": (o.items, 2, np.inf),
    "interactions": (o.interactions, least, o.users * o.items),
    "min_per_user": (o.min_per_user, 0, o.items),
    "min_per_item": (o.min_per_item, 0, o.users),
    "communities": (o.communities, 1, o.users),
    "categories": (o.categories, 1, np.inf),
    "latent_dim": (o.latent_dim, 1, np.inf),
    "activity_tail": (o.activity_tail, 0.1, np.inf),
    "focus": (o.focus, 0.01, np.inf),
    "taste": (o.taste, 0, np.inf),
    "exposure": (o.exposure, 1, np.inf),
    "home_share": (o.home_share, 0, 1),
    "visual_dim": (o.visual_dim, 1, np.inf),
    "words": (o.words, 1, np.inf),
    "text_tokens": (o.text_tokens, 1, o.words),
    "follow_degree": (o.follow_degree, 1, o.users),
    "absent": (o.absent, 0, 1),
    **{f"signal.{key}": (s, 0, 1) for key, s in o.signal.items()},
  }
  for key, (value, low, high) in bounds.items():
    if not low <= value <= high:
      valid = f"{low} to {high}" if high < np.inf else f"{low} or more"
      raise errors.InputError(
        f"dataset.simulated.{key}: found {value}, wanted {valid} (with "
        f"{o.users} users of at least {o.min_per_user} interactions and "
        f"{o.items} items of at least {o.min_per_item})"
      )


def _blocks(total) -> Iterator[slice]:
  for start in range(0, total, _BLOCK):
    yield slice(start, min(start + _BLOCK, total))


# ---- Users and videos.


@dataclasses.dataclass(frozen=True)
class _People:
  """community [M], activity [M], taste [M, C], profile [communities, C]."""

  community: np.ndarray
  activity: np.ndarray
  taste: np.ndarray
  profile: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Videos:
  """community [N], latent [N, D], membership [N, C], centres [C, D]."""

  community: np.ndarray
  latent: np.ndarray
  membership: np.ndarray
  centres: np.ndarray


def _people(o):
  rng = o.rng("people")
  profile = rng.dirichlet(np.ones(o.categories), size=o.communities)
  # One user each first: no community is empty.
  community = np.arange(o.users) % o.communities
  moved = np.arange(o.users) >= o.communities
  community[moved] = rng.choice(
    o.communities, moved.sum(), p=rng.dirichlet(np.full(o.communities, 10.0))
  )
  taste = rng.standard_gamma(o.focus * profile[community])
  taste += _TASTE_FLOOR * o.focus / o.categories
  return _People(
    community=community,
    activity=1 + rng.pareto(o.activity_tail, o.users),
    taste=(taste / taste.sum(axis=1, keepdims=True)).astype(np.float32),
    profile=profile,
  )


def _videos(o, people):
  rng = o.rng("videos")
  # Communities make as many videos as they watch.
  demand = np.bincount(people.community, people.activity, o.communities)
  community = rng.choice(o.communities, o.items, p=demand / demand.sum())
  category = _categorical(rng, people.profile[community])
  centres = rng.standard_normal((o.categories, o.latent_dim))
  latent = centres[category] + rng.standard_normal((o.items, o.latent_dim))
  # Posterior of the unit Gaussians around the centres.
  logits = _product(latent, centres.T) - 0.5 * (centres**2).sum(axis=1)
  mean, scale = latent.mean(axis=0), latent.std(axis=0) + 1e-9
  return _Videos(
    community=community,
    latent=((latent - mean) / scale).astype(np.float32),
    membership=_softmax(logits).astype(np.float32),
    centres=((centres - mean) / scale).astype(np.float32),
  )


def _product(left, right):
  """`left @ right`, [A, D] times [D, B], one term after the other.

  NumPy leaves `@` to a library whose order depends on the processor.
  """
  total = np.zeros((len(left), right.shape[1]), left.dtype)
  for column, row in zip(left.T, right):
    total += column[:, None] * row
  return total


def _categorical(rng, probabilities):
  """One column of every row [B, C], by its probability."""
  point = rng.random((len(probabilities), 1))
  ends = probabilities.cumsum(axis=1)[:, :-1]
  return (point > ends).sum(axis=1)


def _softmax(logits):
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  return weights / weights.sum(axis=1, keepdims=True)


# ---- Who watches what.


def _utility(o, tastes, categories):
  """Of a choice to each of a pool: float64 [B, P].

  By the probability that their tastes [B, P, C] give to its categories [B, C].
  Logarithms of float32 are not the same ones on all processors.
  """
  liking = np.einsum("bpc,bc->bp", tastes, categories)
  return o.taste * np.log(liking, dtype=np.float64)


def _audience_sizes(o):
  """Audience of every video [N]: the fewest, and a little more for some."""
  rng = o.rng("sizes")
  appeal = rng.gamma(2.0, size=o.items)
  sizes = np.full(o.items, o.min_per_item)
  while rest := o.interactions - sizes.sum():
    open_ = appeal * (sizes < o.users)
    sizes = sizes + rng.multinomial(rest, open_ / open_.sum())
    sizes = np.minimum(sizes, o.users)
  return sizes


def _audiences(o, people, videos):
  """Interactions as users and videos, ints [E], by video."""
  rng = o.rng("audiences")
  sizes = _audience_sizes(o)
  crowd = crowds.Crowd(people.community, people.activity, o.communities)
  viewers, items = [], []
  for block in _blocks(o.items):
    pool = crowd.draw(
      rng, videos.community[block], size=o.exposure, home_share=o.home_share
    )
    # As many different ones as the largest audience: a pool never runs out.
    others = crowds.strangers(rng, len(pool), sizes.max(), total=o.users)
    pool = np.hstack([pool, others])
    utility = _utility(o, people.taste[pool], videos.membership[block])
    utility = crowds.without_repeats(pool, utility)
    rows, columns = crowds.choose(rng, utility, sizes[block])
    viewers.append(pool[rows, columns])
    items.append(rows + block.start)
  return np.concatenate(viewers), np.concatenate(items)


def _repaired(o, people, videos, viewer, item):
  """Gives users with too few views some of the more active ones' views.

  They take those that suit them best among a crowd of views as it would be
  shown to them. Videos keep the sizes of their audiences.
  """
  rng = o.rng("repair")
  degree = np.bincount(viewer, minlength=o.users)
  crowd = crowds.Crowd(
    videos.community[item], np.ones(len(item)), o.communities
  )
  pairs = set(zip(viewer.tolist(), item.tolist()))
  for user in rng.permutation(np.flatnonzero(degree < o.min_per_user)).tolist():
    shown = crowd.draw(
      rng,
      people.community[[user]],
      size=_OFFERS * o.exposure,
      home_share=o.home_share,
    )[0]
    liking = np.einsum(
      "sc,c->s", videos.membership[item[shown]], people.taste[user]
    )
    best = shown[np.argsort(-liking, kind="stable")]
    # All views stand in line behind those shown: then it cannot fail.
    line = itertools.chain(best, range(len(item)))
    while degree[user] < o.min_per_user:
      view = next(line)
      giver, pair = int(viewer[view]), (user, int(item[view]))
      if degree[giver] > o.min_per_user and pair not in pairs:
        pairs ^= {(giver, pair[1]), pair}
        degree[[giver, user]] += [-1, 1]
        viewer[view] = user
  return viewer, item


def _histories(o, viewer, item):
  """Videos and times of every user, oldest first."""
  rng = o.rng("times")
  release = _EPOCH + rng.integers(_YEAR, size=o.items)
  delay = rng.exponential(_DELAY, len(item)).astype(np.int64)
  time = release[item] + delay
  order = np.lexsort((item, time, viewer))
  ends = np.cumsum(np.bincount(viewer, minlength=o.users))[:-1]
  return np.split(item[order], ends), np.split(time[order], ends)


# ---- What is known beside.


def _shown(o, videos, source):
  """What a source shows of the latent vectors: float32 [N, D]."""
  other = o.rng(f"{source} noise").permutation(o.items)
  s = o.signal[source]
  return (
    np.float32(s**0.5) * videos.latent
    + np.float32((1 - s) ** 0.5) * videos.latent[other]
  )


def _present(o, source):
  return o.rng(f"{source} present").random(o.items) >= o.absent


def _text(o, videos):
  """Hashtags of every video, joined; '' where absent."""
  rng = o.rng("text")
  places = rng.standard_normal((o.words, o.latent_dim)).astype(np.float32)
  counts = 1 + rng.poisson(o.text_tokens - 1, o.items)
  counts = np.minimum(counts, o.words) * _present(o, "text")
  shown = _shown(o, videos, "text")
  text = []
  for block in _blocks(o.items):
    closeness = _product(shown[block], places.T)
    closeness -= 0.5 * (places**2).sum(axis=1)
    rows, words = crowds.choose(rng, closeness / _WORD_WIDTH**2, counts[block])
    ends = np.searchsorted(rows, np.arange(1, len(shown[block])))
    for each in np.split(words, ends):
      text.append(" ".join(f"#word{word}" for word in each))
  return text


def _visual(o, videos) -> Iterator[np.ndarray]:
  """Rows [visual_dim], never negative, as after a ReLU."""
  rng = o.rng("visual")
  maps = rng.standard_normal((o.latent_dim, o.visual_dim), np.float32)
  maps /= np.float32(o.latent_dim**0.5)
  shown = _shown(o, videos, "visual")
  for block in _blocks(o.items):
    values = _product(shown[block], maps)
    values += _VISUAL_NOISE * rng.standard_normal(values.shape, np.float32)
    yield from np.maximum(values, 0).astype(np.float16)


def _follow(o, people):
  """Whom every user follows: ascending users, none twice, never oneself."""
  rng = o.rng("follow")
  degree = rng.geometric(1 / o.follow_degree, o.users)
  degree *= rng.random(o.users) >= o.absent
  alike = rng.binomial(degree, o.signal["follow"])
  crowd = crowds.Crowd(people.community, people.activity, o.communities)
  edges = [_anyone(rng, o.users, degree - alike)]
  for block in _blocks(o.users):
    pool = crowd.draw(
      rng, people.community[block], size=o.exposure, home_share=o.home_share
    )
    utility = _utility(o, people.taste[pool], people.taste[block])
    utility = crowds.without_repeats(pool, utility)
    utility[pool == np.arange(o.users)[block, None]] = -np.inf
    rows, columns = crowds.choose(rng, utility, alike[block])
    edges.append(np.stack([rows + block.start, pool[rows, columns]]))
  return _neighbours(np.concatenate(edges, axis=1), o.users)


def _anyone(rng, users, degree):
  source = np.repeat(np.arange(users), degree)
  return np.stack([source, rng.integers(users, size=len(source))])


def _neighbours(edges, users):
  source, target = np.unique(edges[:, edges[0] != edges[1]], axis=1)
  ends = np.cumsum(np.bincount(source, minlength=users))[:-1]
  return np.split(target, ends)


def _truth(people, videos):
  return {
    "user_community": people.community,
    "user_activity": people.activity,
    "user_taste": people.taste,
    "item_community": videos.community,
    "item_latent": videos.latent,
    "item_membership": videos.membership,
    "item_category": videos.membership.argmax(axis=1),
    "category_centres": videos.centres,
  }
