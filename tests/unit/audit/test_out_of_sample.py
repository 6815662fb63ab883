"""Heads that never saw the label of the sample that they predict."""

import sys
import tracemalloc

import numpy as np
import pytest
import torch

from kd_plugins import CE, SMKD, ForwardCorrection, TruncatedGCE
from kd_plugins.audit import out_of_sample
from kd_plugins.data import pair_flip

MODULE = sys.modules["kd_plugins.audit.out_of_sample"]
QUICK = {"epochs": 4, "batch_size": 32, "learning_rate": 0.02}


def blobs(size=300, classes=3, dim=12, seed=0):
    """Features around one centre for each class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % classes
    features = rng.normal(size=(classes, dim))[labels] * 1.5 + rng.normal(size=(size, dim))
    return features.astype(np.float32), labels


def test_own_label_is_never_seen(monkeypatch):
    """Another label of sample 0 changes what the other folds are predicted, and not its own."""
    features, labels = blobs(60)
    fold = MODULE._fold_of(labels, 5, 0)
    monkeypatch.setattr(MODULE, "_fold_of", lambda *_: fold)
    other = np.where(np.arange(60) == 0, 1, labels)
    one, two = (out_of_sample(features, y, seeds=[0], **QUICK) for y in (labels, other))
    same = fold == fold[0]
    np.testing.assert_array_equal(one[same], two[same])
    assert (one[~same] != two[~same]).any()


def test_rows_that_are_left_out_teach_nothing():
    """A copy of a wrongly labelled row, as a broken picture leaves one, does not vouch for it."""
    features, labels = blobs(60)
    labels[51] = (labels[51] + 1) % 3
    features[50], labels[50] = features[51], labels[51]
    left_out = np.arange(60) == 50
    probs = out_of_sample(features, labels, left_out=left_out, **QUICK)
    assert np.isnan(probs).any(1).tolist() == left_out.tolist()
    alone = out_of_sample(np.delete(features, 50, 0), np.delete(labels, 50), **QUICK)
    np.testing.assert_allclose(np.delete(probs, 50, 0), alone, atol=0.05)  # other moments
    with_copy = out_of_sample(features, labels, **QUICK)
    assert with_copy[51, labels[51]] > probs[51, labels[51]] + 0.02


def test_folders_tell_losses_apart_that_print_alike(tmp_path):
    features, labels = blobs(60)
    losses = [ForwardCorrection(pair_flip(3, rate)) for rate in (0.0, 0.4)]
    assert repr(losses[0]) == repr(losses[1])
    out_of_sample(features, labels, loss=losses[0], folder=tmp_path, **QUICK)
    out_of_sample(features, labels, loss=ForwardCorrection(np.eye(3)), folder=tmp_path, **QUICK)
    with pytest.raises(ValueError, match="differ in loss"):
        out_of_sample(features, labels, loss=losses[1], folder=tmp_path, **QUICK)


def test_features_in_other_precisions():
    features, labels = blobs(60)
    expected = out_of_sample(features, labels, **QUICK)
    np.testing.assert_allclose(out_of_sample(features.astype(float), labels, **QUICK), expected)


def test_folds_have_equal_shares_of_each_class():
    labels = np.repeat([0, 1, 2], [50, 30, 10])
    fold = MODULE._fold_of(labels, 5, seed=1)
    counts = [np.bincount(labels[fold == k], minlength=3).tolist() for k in range(5)]
    assert counts == [[10, 6, 2]] * 5
    assert (fold != MODULE._fold_of(labels, 5, seed=2)).any()


def test_wrong_labels_are_contradicted():
    """The heads predict the true class, also of wrongly labelled samples; CE is less sure."""
    features, true = blobs()
    labels = np.where(np.arange(300) % 5 == 0, (true + 1) % 3, true)
    probs = out_of_sample(features, labels, **QUICK)
    assert probs.dtype == np.float32 and np.allclose(probs.sum(1), 1, atol=1e-5)
    assert (probs.argmax(1) == true).mean() > 0.9
    with_ce = out_of_sample(features, labels, loss=CE(), **QUICK)
    n = np.arange(300)
    assert with_ce[n, true].mean() < probs[n, true].mean()


def test_seeds_are_averaged_and_leave_the_generators_alone():
    features, labels = blobs(90)
    state = torch.random.get_rng_state()
    both = out_of_sample(features, labels, num_classes=4, seeds=[3, 8], **QUICK)
    single = [out_of_sample(features, labels, num_classes=4, seeds=[s], **QUICK) for s in (3, 8)]
    np.testing.assert_allclose(both, np.mean(single, axis=0), atol=1e-6)
    assert both.shape == (90, 4) and torch.equal(state, torch.random.get_rng_state())


def test_killed_run_goes_on_after_its_last_fold(tmp_path, monkeypatch):
    """What was complete is not computed again, and the result is that of a run in one go."""
    features, labels = blobs(90)
    whole = out_of_sample(features, labels, seeds=[0, 1], **QUICK)
    predict, calls = MODULE._Task.predict, []

    def counted(self, *args):
        if len(calls) == 3:
            calls.append(None)
            raise KeyboardInterrupt
        calls.append(args)
        return predict(self, *args)

    monkeypatch.setattr(MODULE._Task, "predict", counted)
    with pytest.raises(KeyboardInterrupt):
        out_of_sample(features, labels, seeds=[0, 1], folder=tmp_path, **QUICK)
    again = out_of_sample(features, labels, seeds=[0, 1], folder=tmp_path, **QUICK)
    assert len(calls) == 1 + 10  # the interrupted one, and each fold of each seed once
    np.testing.assert_array_equal(again, whole)
    out_of_sample(features, labels, seeds=[0, 1], folder=tmp_path, **QUICK)
    assert len(calls) == 11


def test_folder_of_something_else_is_refused(tmp_path):
    features, labels = blobs(60)
    given = {"seeds": [0], "folder": tmp_path, **QUICK}
    out_of_sample(features, labels, **given)
    for changed, word in (
        ((features + 1, labels), "features"),
        ((features, labels[::-1].copy()), "labels"),
    ):
        with pytest.raises(ValueError, match=f"differ in {word}"):
            out_of_sample(*changed, **given)
    with pytest.raises(ValueError, match="differ in loss"):
        out_of_sample(features, labels, loss=CE(), **given)


def test_memory_map_gives_the_same(tmp_path):
    features, labels = blobs(60)
    np.save(tmp_path / "features.npy", features)
    stored = np.load(tmp_path / "features.npy", mmap_mode="r")
    one, two = (out_of_sample(x, labels, seeds=[0], **QUICK) for x in (features, stored))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": np.zeros((59, 4), np.float32)}, r"expected floats \[N, D\] for labels"),
        ({"features": np.zeros((60, 4), int)}, "got int64"),
        ({"num_classes": 2}, "labels go from 0 to 1"),
        ({"folds": 1}, "folds"),
        ({"folds": 61}, "a fold is empty"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"seeds": []}, "at least one"),
        ({"loss": SMKD()}, "a loss of one network"),
        ({"loss": TruncatedGCE()}, "logits and target only"),
    ],
)
def test_refusals(change, words):
    features, labels = blobs(60)
    given = {"features": features, "labels": labels} | change
    with pytest.raises(ValueError, match=words):
        out_of_sample(**given)


def test_probabilities_of_many_classes_are_never_in_memory_at_once(tmp_path):
    """What numpy holds at its peak is a small part of the 32 MB of the result."""
    labels = np.arange(20_000) % 400
    features = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    tracemalloc.start()
    options = {"seeds": [0], "folds": 2, "epochs": 1, "batch_size": 128}
    probs = out_of_sample(features, labels, folder=tmp_path, **options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert probs.shape == (20_000, 400) and peak < probs.nbytes / 2
    assert np.allclose(probs.sum(1), 1, atol=1e-4)
