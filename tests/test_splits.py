"""Splits: sizes by rule, disjoint and complete, and files as they stand."""

import types

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_collections
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from mmm_jax import errors
from mmm_jax.datasets import splits

HISTORIES = st.lists(st.integers(0, 12), min_size=1, max_size=12)


def make_dataset(lengths, *, ordered=False, timestamp=None, part=None):
  """Users with histories of given lengths; item = place in the history."""
  user = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
  item = np.concatenate(
    [np.zeros(0, np.int32), *[np.arange(n, dtype=np.int32) for n in lengths]]
  )
  if timestamp is None:
    timestamp = np.full(len(user), -1, np.int64)
  return types.SimpleNamespace(
    name="toy",
    users=np.array([f"u{n}" for n in range(len(lengths))], object),
    items=np.array([f"i{n}" for n in range(max(lengths, default=0))], object),
    user=user,
    item=item,
    timestamp=np.asarray(timestamp, np.int64),
    ordered=ordered,
    part=part,
  )


def make_config(protocol, *, path="", seed=0, ratios=(0.7, 0.1, 0.2)):
  return ml_collections.ConfigDict(
    {"protocol": protocol, "path": str(path), "seed": seed, "ratios": ratios}
  )


def test_random_sizes_of_a_user_with_five():
  # round(3.5) = 4 (to even), round(.8 * 5) = 4: four train, none validates.
  split = splits.make(make_dataset([5]), make_config("random"))
  assert split.sizes == {"train": 4, "valid": 0, "test": 1, "left_out": 0}


@settings(max_examples=50, deadline=None)
@given(lengths=HISTORIES, seed=st.integers(0, 5))
def test_random_follows_the_rule_for_every_user(lengths, seed):
  dataset = make_dataset(lengths)
  part = splits.make(dataset, make_config("random", seed=seed)).part
  for user, n in enumerate(lengths):
    mine = part[dataset.user == user]
    train = min(n, max(1, round(0.7 * n)))
    valid = max(0, round(0.8 * n) - train)
    assert [int((mine == code).sum()) for code in range(3)] == [
      train,
      valid,
      n - train - valid,
    ]


def test_random_depends_on_the_seed_alone():
  dataset = make_dataset([20] * 10)
  first, again, other = (
    splits.make(dataset, make_config("random", seed=seed)) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first.part, again.part)
  assert first.fingerprint == again.fingerprint != other.fingerprint
  assert first.sizes == other.sizes


def test_random_without_validation():
  config = make_config("random", ratios=(0.7, 0.0, 0.3))
  assert splits.make(make_dataset([10]), config).sizes == {
    "train": 7,
    "valid": 0,
    "test": 3,
    "left_out": 0,
  }


@pytest.mark.parametrize("ratios", [(0.7, 0.1), (0.7, 0.1, 0.1), (0, 0.5, 0.5)])
def test_bad_ratios(ratios):
  with pytest.raises(errors.InputError, match="split.ratios"):
    splits.make(make_dataset([5]), make_config("random", ratios=ratios))


def test_leave_last_out():
  dataset = make_dataset([1, 2, 4], ordered=True)
  part = splits.make(dataset, make_config("leave_last_out")).part
  assert list(part) == [0, 0, 2, 0, 0, 1, 2]


def test_leave_last_out_needs_an_order():
  with pytest.raises(errors.InputError, match="leave_last_out.*toy"):
    splits.make(make_dataset([4]), make_config("leave_last_out"))


def test_global_time_keeps_equal_times_together():
  # Ten interactions: the cuts fall after 7 and 8; the two at time 7 stay.
  times = [1, 2, 3, 4, 5, 6, 7, 7, 9, 10]
  dataset = make_dataset([10], ordered=True, timestamp=times)
  part = splits.make(dataset, make_config("global_time")).part
  assert list(part) == [0] * 8 + [2] * 2
  dataset.timestamp[:] = range(10)
  part = splits.make(dataset, make_config("global_time")).part
  assert list(part) == [0] * 7 + [1] + [2] * 2


def test_global_time_needs_times():
  with pytest.raises(errors.InputError, match="global_time"):
    splits.make(make_dataset([4], ordered=True), make_config("global_time"))


def test_own_split_and_none():
  own = np.array([0, 1, 2], np.int8)
  dataset = make_dataset([3], part=own)
  for protocol in ("auto", "predefined"):
    split = splits.make(dataset, make_config(protocol))
    np.testing.assert_array_equal(split.part, own)
  assert splits.make(dataset, make_config("none")).sizes["train"] == 3


def test_auto_is_random_without_an_own_split():
  dataset = make_dataset([9, 7])
  np.testing.assert_array_equal(
    splits.make(dataset, make_config("auto")).part,
    splits.make(dataset, make_config("random")).part,
  )


def test_predefined_needs_a_split():
  with pytest.raises(errors.InputError, match="split.path"):
    splits.make(make_dataset([3]), make_config("predefined"))


def test_unknown_protocol_and_path_that_nobody_reads(tmp_path):
  with pytest.raises(errors.InputError, match="leave_last_out"):
    splits.make(make_dataset([3]), make_config("ramdom"))
  with pytest.raises(errors.InputError, match="reads no file"):
    splits.make(make_dataset([3]), make_config("random", path=tmp_path))


@settings(max_examples=20, deadline=None)
@given(lengths=HISTORIES.filter(sum), seed=st.integers(0, 3))
def test_written_file_reads_back(tmp_path_factory, lengths, seed):
  path = tmp_path_factory.mktemp("split") / "split.parquet"
  dataset = make_dataset(lengths)
  split = splits.make(dataset, make_config("random", seed=seed))
  splits.write(path, dataset, split)
  table = parquet.read_table(path)
  assert table.column_names == ["user", "item", "part"]
  assert all(field.type == pa.string() for field in table.schema)
  again = splits.make(dataset, make_config("predefined", path=path))
  np.testing.assert_array_equal(again.part, split.part)
  assert again.fingerprint == split.fingerprint
  assert [file.name for file in path.parent.iterdir()] == ["split.parquet"]


def write_rows(path, rows, names=("user", "item", "part")):
  columns = zip(*rows, strict=True)
  parquet.write_table(
    pa.table({n: list(c) for n, c in zip(names, columns, strict=True)}), path
  )
  return make_config("predefined", path=path)


def test_pairs_that_the_file_lacks_are_left_out(tmp_path):
  config = write_rows(
    tmp_path / "s.parquet", [("u1", "i0", "test"), ("u0", "i1", "train")]
  )
  split = splits.make(make_dataset([2, 2]), config)
  assert list(split.part) == [-1, 0, 2, -1]
  assert split.sizes == {"train": 1, "valid": 0, "test": 1, "left_out": 2}
  splits.write(tmp_path / "out.parquet", make_dataset([2, 2]), split)
  assert parquet.read_table(tmp_path / "out.parquet").num_rows == 2


GOOD = ("u0", "i0", "train")


@pytest.mark.parametrize(
  ("rows", "wanted"),
  [
    ([GOOD, ("u9", "i0", "train")], ["row 2", "u9", "unknown user"]),
    ([GOOD, ("u1", "i9", "train")], ["row 2", "i9", "unknown item"]),
    ([GOOD, ("u1", "i0", "dev")], ["row 2", "dev", "train, valid, test"]),
    ([GOOD, ("u1", "i1", "test")], ["row 2", "no interaction"]),
    ([GOOD, ("u1", "i0", "test"), GOOD], ["row 3", "again"]),
    ([GOOD, (None, "i0", "test")], ["row 2", "unknown user"]),
  ],
)
def test_bad_rows(tmp_path, rows, wanted):
  config = write_rows(tmp_path / "s.parquet", rows)
  with pytest.raises(errors.InputError) as caught:
    splits.make(make_dataset([2, 1]), config)
  for text in [*wanted, "s.parquet"]:
    assert text in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_column_of_lists_is_named(tmp_path):
  config = write_rows(tmp_path / "s.parquet", [(["u0"], "i0", "train")])
  with pytest.raises(errors.InputError, match="column 'user': found list"):
    splits.make(make_dataset([2, 1]), config)


def test_bad_files(tmp_path):
  dataset = make_dataset([2])
  with pytest.raises(errors.InputError, match="no readable file"):
    splits.make(dataset, make_config("predefined", path=tmp_path / "none"))
  (tmp_path / "text").write_text("user,item,part\n")
  with pytest.raises(errors.InputError, match="no readable file"):
    splits.make(dataset, make_config("predefined", path=tmp_path / "text"))
  config = write_rows(tmp_path / "s", [GOOD], names=("user", "item", "fold"))
  with pytest.raises(errors.InputError, match="fold"):
    splits.make(dataset, config)
