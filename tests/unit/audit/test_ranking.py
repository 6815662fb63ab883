"""The model of the noise: by hand, on data drawn from it, and what it gives to the suspects."""

import csv
import re

import numpy as np
import pytest

from kd_plugins import estimate_label_noise, find_suspects
from kd_plugins.audit import noise_summary, write_noise
from kd_plugins.audit.ranking import PRIORS, _explained, _NoiseModel, _raised
from kd_plugins.data import asymmetric, corrupt, pair_flip, symmetric


def drawn(transition, size=3000, sharpness=3.0, seed=0):
    """Right probabilities q, true classes that are drawn from them, and noisy labels."""
    rng = np.random.default_rng(seed)
    classes = len(transition)
    logits = rng.normal(size=(size, classes)) * sharpness
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    true = (rng.random(size)[:, None] > q.cumsum(1)).sum(1).clip(0, classes - 1)
    labels = corrupt(true, transition, seed=seed)
    return q.astype(np.float32), true, labels


def test_one_step_by_hand():
    """q T of two samples; T without a prior is the normalised joint."""
    q = np.array([[0.8, 0.2], [0.4, 0.6]])
    start = np.array([[0.7, 0.3], [0.3, 0.7]])
    model = _NoiseModel(q, np.array([0, 1]), lambda _: np.ones((1, 1)), [0.0], start)
    model.fit(steps=1)
    first = np.array([0.8 * 0.7, 0.2 * 0.3]) / (0.8 * 0.7 + 0.2 * 0.3)
    second = np.array([0.4 * 0.3, 0.6 * 0.7]) / (0.4 * 0.3 + 0.6 * 0.7)
    joint = np.stack([first, second], axis=1)
    expected = joint / joint.sum(1, keepdims=True)
    np.testing.assert_allclose(model.transition[..., 0], expected)
    np.testing.assert_allclose(model.wrong[0], [first[1], second[0]])


@pytest.mark.parametrize(
    "transition",
    [symmetric(4, 0.3), pair_flip(4, 0.3), asymmetric(4, 0.4, {0: 3})],
    ids=["symmetric", "pair", "asymmetric"],
)
def test_noise_that_it_assumes_is_found(transition):
    """With right q: T, the number of wrong labels, and a calibrated probability."""
    q, true, labels = drawn(transition)
    noise, wrong = estimate_label_noise(labels, q), labels != true
    np.testing.assert_allclose(noise.transition, transition, atol=0.06)
    value, low, high = noise.count()
    assert low < value < high and value == pytest.approx(noise.p_wrong.sum())
    assert value == pytest.approx(wrong.sum(), rel=0.15) and high - low < 0.25 * value
    for k, (value, low, high) in enumerate(noise.count_by_class(0.999)):
        assert value == pytest.approx(wrong[labels == k].sum(), abs=50) and low < value < high
    for low in (0.0, 0.25, 0.5, 0.75):
        part = (noise.p_wrong >= low) & (noise.p_wrong < low + 0.25)
        assert noise.p_wrong[part].mean() == pytest.approx(wrong[part].mean(), abs=0.2)


@pytest.mark.parametrize(
    ("transition", "named"),
    [
        (symmetric(6, 0.2), set()),
        (np.eye(6), set()),
        (asymmetric(6, 0.4, {0: 3, 4: 1}), {(0, 3), (4, 1)}),
        (pair_flip(3, 0.3), {(0, 1), (1, 2), (2, 0)}),
    ],
    ids=["symmetric", "none", "asymmetric", "pair"],
)
def test_only_confusions_that_stand_out_are_named(transition, named, tmp_path):
    """Flat noise has no worst pair: neither the summary nor the table names one."""
    q, _, labels = drawn(transition, size=1500, sharpness=9.0)
    noise, names = estimate_label_noise(labels, q, draws=2), list("abcdef")[: len(transition)]
    words = noise_summary(noise, names)
    pairs = {(names[i], names[j]) for i, j in named}
    assert set(re.findall(r"of (\w) are labelled (\w)", words)) == pairs
    assert ("No two classes are confused more often than others." in words) == (not named)
    with open(write_noise(noise, names, tmp_path)[0], encoding="utf-8") as file:
        mostly = {(row["mostly"], row["class"]) for row in csv.DictReader(file) if row["mostly"]}
    assert mostly == pairs


def test_the_class_behind_most_wrong_labels_is_named_by_number(tmp_path):
    """20% of a rare class are fewer pictures than 5% of a common one."""
    true = np.repeat([0, 1, 2], [2000, 100, 500])
    labels = true.copy()
    labels[:100], labels[2000:2020] = 2, 2
    probs = np.full((len(true), 3), 0.02)
    probs[np.arange(len(true)), true] = 0.96
    noise = estimate_label_noise(labels, probs)
    assert noise.transition[1, 2] > 2 * noise.transition[0, 2]
    write_noise(noise, ["common", "rare", "target"], tmp_path)
    with open(tmp_path / "classes.csv", newline="") as file:
        assert [row["mostly"] for row in csv.DictReader(file)][2] == "common"


def test_pair_noise_is_ranked_better_than_by_confidence():
    q, true, labels = drawn(pair_flip(4, 0.4), sharpness=1.5)
    wrong, n = labels != true, np.arange(len(q))

    def precision(score):
        return wrong[np.argsort(-score)[: wrong.sum()]].mean()

    noise = estimate_label_noise(labels, q, draws=0)
    assert precision(noise.p_wrong) > precision(1 - q[n, labels]) + 0.03
    assert {(i, j) for i, j, _ in noise.worst_pairs(4)} == {(i, (i + 1) % 4) for i in range(4)}
    assert np.isnan(noise.count()[1])  # no resampling, no interval


def test_prior_is_strong_only_where_the_noise_is_symmetric():
    for transition, strong in ((symmetric(4, 0.3), True), (pair_flip(4, 0.3), False)):
        q, _, labels = drawn(transition)
        order = np.argsort(labels, kind="stable")
        prior = PRIORS[_explained(q[order].astype(float), labels[order]).argmax()]
        assert (prior > 50) == strong and prior in PRIORS


def test_neighbours_speak_for_a_sample_whose_own_head_knows_nothing():
    """Sample 0 is wrong, as a fifth of its cluster, and its own probabilities are even."""
    rng = np.random.default_rng(0)
    true = np.arange(200) % 2
    features = (np.eye(2)[true] + 0.05 * rng.normal(size=(200, 2))).astype(np.float32)
    q = np.where(true[:, None] == [0, 1], 0.99, 0.01)
    q[0] = 0.5
    labels = np.where(np.arange(200) % 10 == 0, 1, true)
    alone, asked = (estimate_label_noise(labels, q, x, draws=0) for x in (None, features))
    small = estimate_label_noise(labels, q, features, draws=0, bank=50)
    assert alone.p_wrong[0] < 0.5 < min(asked.p_wrong[0], small.p_wrong[0])
    assert alone.proposed[0] == 1 and asked.proposed[0] == small.proposed[0] == 0


def test_no_sample_is_its_own_neighbour():
    """A sample that is far from all others, with probabilities unlike theirs, does not ask
    itself."""
    features = np.concatenate([np.tile([[1.0, 0.0]], (30, 1)), [[0.0, 1.0]]]).astype(np.float32)
    q = np.array([[0.9, 0.1]] * 30 + [[0.02, 0.98]])
    labels = np.array([0] * 30 + [1])
    own = estimate_label_noise(labels, q, draws=0).p_wrong[30]
    assert estimate_label_noise(labels, q, features, neighbours=1, draws=0).p_wrong[30] > own


def test_rows_of_nan_are_left_out():
    q, _, labels = drawn(symmetric(3, 0.2), size=300)
    q[7] = np.nan
    noise = estimate_label_noise(labels, q, draws=2)
    assert np.isnan(noise.p_wrong[7]) and np.isfinite(np.delete(noise.p_wrong, 7)).all()
    without = estimate_label_noise(np.delete(labels, 7), np.delete(q, 7, axis=0), draws=0)
    np.testing.assert_allclose(np.delete(noise.p_wrong, 7), without.p_wrong, atol=1e-6)
    assert 7 not in find_suspects(noise=noise, all_rows=True)["index"][:]


def test_suspects_take_the_probability_as_score():
    q, _, labels = drawn(symmetric(3, 0.3), size=200)
    noise = estimate_label_noise(labels, q, draws=0)
    suspects = find_suspects(noise=noise, class_names=["a", "b", "c"])
    rows, scores = np.array(suspects["index"]), np.array(suspects["score"])
    np.testing.assert_allclose(scores, noise.p_wrong[rows], atol=1e-6)
    assert (np.diff(scores) <= 0).all() and (noise.proposed[rows] != labels[rows]).all()
    with pytest.raises(ValueError, match="a score has one source"):
        find_suspects(labels, q, noise=noise)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probs": np.ones((3, 2))}, "probs: expected floats"),
        ({"probs": np.full((4, 2), np.nan)}, "nothing to fit"),
        ({"probs": np.full((4, 2), -3.0)}, r"numbers in \[0, 1\]"),
        ({"labels": [0, 1, 2, 0]}, "labels go from 0 to 1"),
        ({"features": np.ones((3, 2))}, "one row for each label"),
    ],
)
def test_refusals(change, words):
    given = {"labels": [0, 1, 1, 0], "probs": np.full((4, 2), 0.5)} | change
    with pytest.raises(ValueError, match=words):
        estimate_label_noise(**given)


def test_powers_do_not_underflow():
    """Even probabilities of 50,000 classes to the power of 9 are 0 in float32."""
    q = np.full((2, 50_000), 1 / 50_000, np.float32)
    np.testing.assert_allclose(_raised(q, 9.0).sum(1), 1.0, rtol=1e-3)
    np.testing.assert_allclose(_raised(np.array([[0.2, 0.8]]), 2.0), [[1 / 17, 16 / 17]])


def test_cautious_probabilities_are_sharpened():
    """Heads of few steps know the class and hardly say so: their doubt would explain all labels."""
    q, true, labels = drawn(symmetric(4, 0.2), sharpness=6.0)
    wrong = labels != true
    cautious = q**0.1 / (q**0.1).sum(1, keepdims=True)
    assert (cautious.argmax(1) == labels).mean() > cautious.max(1).mean() + 0.15
    before = cautious.copy()
    for probs in (q, cautious):
        noise = estimate_label_noise(labels, probs, draws=0)
        assert noise.count()[0] == pytest.approx(wrong.sum(), rel=0.15)
        suspects = find_suspects(noise=noise)
        assert len(suspects) > 0.7 * wrong.sum() and wrong[suspects["index"]].mean() > 0.8
    assert (cautious == before).all()
    right = estimate_label_noise(true, cautious, draws=0)
    assert right.count()[0] < 0.03 * len(true)
