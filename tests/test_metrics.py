"""Metrics against written-out arithmetic, ir-measures, and their properties."""

from hypothesis import given
from hypothesis import strategies as st
import ir_measures
import numpy as np
import pytest

from mmm_jax import metrics

HITS = np.array([[0, 1, 0, 1, 0]], bool)  # places 2 and 4
THREE = np.array([3])


@pytest.mark.parametrize(
  ("name", "k", "expected"),
  [
    ("precision", 2, 1 / 2),
    ("precision", 5, 2 / 5),
    ("recall", 2, 1 / 3),
    ("recall", 5, 2 / 3),
    ("hit_rate", 1, 0),
    ("hit_rate", 2, 1),
    ("mrr", 1, 0),
    ("mrr", 5, 1 / 2),
    ("map", 2, (1 / 2) / 2),
    ("map", 5, (1 / 2 + 2 / 4) / 3),
    ("ndcg", 2, (1 / np.log2(3)) / (1 + 1 / np.log2(3))),
    (
      "ndcg",
      5,
      (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3) + 1 / 2),
    ),
  ],
)
def test_ranking_metric_is_its_arithmetic(name, k, expected):
  value = metrics.RANKING[name](HITS, THREE, k=k)
  np.testing.assert_allclose(value, [expected], rtol=1e-12)


@pytest.mark.parametrize("name", metrics.RANKING)
def test_nothing_relevant_is_undefined(name):
  value = metrics.RANKING[name](np.zeros((2, 4), bool), np.array([0, 1]), k=4)
  np.testing.assert_array_equal(value, [np.nan, 0])


def test_list_shorter_than_k_has_empty_places():
  hits, count = np.array([[1, 1]], bool), np.array([2])
  assert metrics.precision(hits, count, k=10) == 2 / 10
  assert metrics.ndcg(hits, count, k=10) == 1
  assert metrics.average_precision(hits, count, k=10) == 1


rankings = st.lists(st.booleans(), min_size=1, max_size=30).flatmap(
  lambda hits: st.tuples(
    st.just(np.array([hits])),
    st.integers(max(1, sum(hits)), sum(hits) + 20).map(lambda n: np.array([n])),
    st.integers(1, 30),
  )
)


@given(rankings)
def test_ranking_metrics_agree_with_ir_measures(ranking):
  hits, count, k = ranking
  ours = {
    name: float(function(hits, count, k=k)[0])
    for name, function in metrics.RANKING.items()
  }
  # trec_eval divides AP by all relevant items; ours only by those that fit.
  ours["map"] *= min(k, count[0]) / count[0]
  for name, value in _ir_measures(hits[0], int(count[0]), k).items():
    np.testing.assert_allclose(ours[name], value, atol=1e-9, err_msg=name)


def _ir_measures(hits, num_relevant, k):
  measures = {
    "precision": ir_measures.P @ k,
    "recall": ir_measures.R @ k,
    "ndcg": ir_measures.nDCG @ k,
    "hit_rate": ir_measures.Success @ k,
    "mrr": ir_measures.RR @ k,
    "map": ir_measures.AP @ k,
  }
  run = {"q": {f"d{place:03}": -float(place) for place in range(len(hits))}}
  relevant = [f"d{place:03}" for place in np.flatnonzero(hits)]
  missing = [f"x{n}" for n in range(num_relevant - len(relevant))]
  qrels = {"q": dict.fromkeys(relevant + missing, 1)}
  found = ir_measures.calc_aggregate(measures.values(), qrels, run)
  return {name: found[measure] for name, measure in measures.items()}


@given(rankings)
def test_ranking_metrics_lie_between_0_and_1(ranking):
  hits, count, k = ranking
  for function in metrics.RANKING.values():
    assert 0 <= function(hits, count, k=k)[0] <= 1 + 1e-12


@given(rankings, st.data())
def test_a_hit_nearer_to_the_front_never_hurts(ranking, data):
  hits, count, k = ranking
  place = data.draw(st.integers(0, hits.shape[1] - 1))
  better = hits.copy()
  better[0, [0, place]] = (
    hits[0, place] | hits[0, 0],
    hits[0, place] & hits[0, 0],
  )
  for function in metrics.RANKING.values():
    before, after = (function(x, count, k=k)[0] for x in (hits, better))
    assert after >= before - 1e-12


def test_at_cutoffs_names_every_metric_and_k():
  values = metrics.at_cutoffs(
    HITS, THREE, names=("recall", "mrr"), cutoffs=(2, 5)
  )
  assert list(values) == ["recall@2", "recall@5", "mrr@2", "mrr@5"]
  np.testing.assert_allclose(values["recall@5"], [2 / 3])


def test_exposure_metrics_are_their_arithmetic():
  exposure = np.array([0, 1, 3, 0])
  assert metrics.coverage(exposure) == 2 / 4
  # Mean absolute difference over all ordered pairs / (2 x mean).
  differences = np.abs(exposure[:, None] - exposure).mean()
  np.testing.assert_allclose(metrics.gini(exposure), differences / (2 * 1))
  popularity = np.array([9, 5, 2, 9])
  assert metrics.mean_popularity(exposure, popularity) == (5 + 3 * 2) / 4


def test_exposure_metrics_at_their_extremes():
  assert metrics.gini(np.array([2, 2, 2])) == 0
  np.testing.assert_allclose(metrics.gini(np.array([0, 0, 0, 7])), 3 / 4)
  assert np.isnan(metrics.gini(np.zeros(3)))
  assert np.isnan(metrics.mean_popularity(np.zeros(3), np.ones(3)))
