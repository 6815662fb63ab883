"""Suspects: the ranking, and the data corrected by it."""

import datasets
import numpy as np
import pytest
import torch
from helpers.suspects import FEATURES
from helpers.tiny import CLASSES, rows, to_tensor, trainer
from PIL import Image
from torch import nn

from kd_plugins import correct_labels, drop_suspects, find_suspects, predict_probs
from kd_plugins.data import ImageView

LABELS = np.array([0, 1, 2, 0])
PROBS = np.array([[0.6, 0.3, 0.1], [0.7, 0.1, 0.2], [0.3, 0.5, 0.2], [0.0, 0.0, 1.0]], np.float32)


def test_scores_by_hand():
    """The score is 1 - p of the given label. The label of sample 0 is the most probable class."""
    suspects = find_suspects(LABELS, PROBS, class_names=["cat", "dog", "owl"])
    assert suspects["index"][:] == [3, 1, 2]
    assert suspects["label"][:] == [0, 1, 2] and suspects["proposed"][:] == [2, 0, 1]
    assert suspects["score"][:] == pytest.approx([1.0, 0.9, 0.8])
    assert suspects["p_label"][:] == pytest.approx([0.0, 0.1, 0.2])
    assert suspects["p_proposed"][:] == pytest.approx([1.0, 0.7, 0.5])
    assert suspects["label_name"][:] == ["cat", "dog", "owl"] and suspects["proposed_name"][:] == [
        "owl",
        "cat",
        "dog",
    ]
    ranked = find_suspects(LABELS, PROBS, all_rows=True)
    assert ranked["index"][:] == [3, 1, 2, 0] and ranked.column_names == [
        "index",
        "label",
        "proposed",
        "score",
        "p_label",
        "p_proposed",
    ]
    assert ranked[3] == {
        "index": 0,
        "label": 0,
        "proposed": 0,
        "score": pytest.approx(0.4),
        "p_label": pytest.approx(0.6),
        "p_proposed": pytest.approx(0.6),
    }


def test_scores_by_loops(monkeypatch):
    """Compare with a loop, over several chunks of which the last is short."""
    monkeypatch.setattr("kd_plugins.audit.suspects.CHUNK", 16)
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.full(5, 0.5), 100).astype(np.float32), rng.integers(0, 5, 100)
    wanted = []
    for i, y in enumerate(labels.tolist()):
        p = [float(x) for x in probs[i]]
        rival = max((c for c in range(5) if c != y), key=lambda c: p[c])
        if p[rival] > p[y]:
            wanted.append((i, rival, 1 - p[y]))
    wanted.sort(key=lambda row: -row[2])
    suspects = find_suspects(labels, probs)
    assert [(row["index"], row["proposed"]) for row in suspects] == [(i, c) for i, c, _ in wanted]
    assert suspects["score"][:] == pytest.approx([s for *_, s in wanted], abs=1e-6)
    assert 50 < len(suspects) < 100


def test_ties():
    """The given label wins a tie; of other classes the first wins, and of rows the first."""
    probs = np.array([[0.45, 0.45, 0.1], [0.2, 0.4, 0.4], [0.2, 0.4, 0.4]])
    suspects = find_suspects([1, 0, 0], probs)
    assert suspects["index"][:] == [1, 2] and suspects["proposed"][:] == [1, 1]
    assert find_suspects([1, 0, 0], probs, all_rows=True)[2]["proposed"] == 1


def test_unknown_rows_are_left_out_and_other_numbers_refused():
    probs = PROBS.copy()
    probs[1] = np.nan
    with pytest.warns(UserWarning, match="1 of 4 rows of probs are NaN"):
        assert find_suspects(LABELS, probs, all_rows=True)["index"][:] == [3, 2, 0]
    with pytest.raises(
        ValueError,
        match=r"row 0 of probs sums to 10, its lowest is 1: expected probabilities, not logits",
    ):
        find_suspects(LABELS, PROBS * 10)
    with pytest.raises(ValueError, match=r"row 2 .* lowest is -0.5"):
        find_suspects(LABELS, np.where(np.arange(4)[:, None] == 2, [[-0.5, 1, 0.5]], PROBS))
    with pytest.raises(ValueError, match=r"probs \[4, 3\] are of 3 .* Label 3 at position 1"):
        find_suspects([0, 3, 0, 0], PROBS)
    with pytest.raises(
        ValueError, match=r"expected floats \[N, C\] for labels \[3\], got float32 \[4, 3\]"
    ):
        find_suspects(LABELS[:3], PROBS)
    with pytest.raises(
        ValueError, match="class_names: got 2, and the probabilities have 3 columns"
    ):
        find_suspects(LABELS, PROBS, class_names=["cat", "dog"])
    for given in (
        {},
        {"labels": LABELS},
        {"probs": PROBS},
        {"labels": LABELS, "probs": PROBS, "dynamics": {}},
    ):
        with pytest.raises(ValueError, match="expected labels and probs, or dynamics alone"):
            find_suspects(**given)


def test_from_dynamics_by_hand():
    """The score is 1 - mean p of the label; most votes win. Sample 3 was never visited."""
    summary = {
        "index": np.arange(4),
        "label": [0, 1, 2, -1],
        "proposed": [0, 2, 0, -1],
        "p_label": [0.9, 0.1, 0.3, np.nan],
        "confidence": [0.8, 0.6, 0.2, np.nan],
    }
    ranked = find_suspects(dynamics=summary, all_rows=True)
    assert ranked["index"][:] == [1, 2, 0] and ranked["proposed"][:] == [2, 0, 0]
    assert ranked["score"][:] == pytest.approx([0.9, 0.7, 0.1])
    assert ranked["p_proposed"][:] == pytest.approx([0.6, 0.2, 0.9])
    assert find_suspects(dynamics=summary)["index"][:] == [1, 2]


def test_from_the_dynamics_of_a_run(tmp_path):
    """The networks learn the clean labels first, so the dynamics reveal the wrong ones."""
    from kd_plugins import DynamicsCallback
    from kd_plugins.audit import summarise

    view = ImageView(rows(wrong=0.15), to_tensor, clean="clean")
    run = trainer(
        tmp_path,
        train=view,
        num_train_epochs=8,
        hf={"callbacks": [DynamicsCallback(tmp_path / "dynamics")]},
    )
    run.train()
    suspects = find_suspects(dynamics=tmp_path / "dynamics", class_names=view.class_names)
    assert (
        suspects[:]
        == find_suspects(dynamics=summarise(tmp_path / "dynamics"), class_names=view.class_names)[:]
    )
    wrong = view.labels != view.clean_labels
    assert wrong.sum() >= 5 and wrong[suspects["index"][: wrong.sum()]].mean() > 0.6
    assert (view.labels[suspects["index"][:]] == suspects["label"][:]).all()


def test_cleanlab_takes_the_probabilities_as_they_are():
    pytest.importorskip("cleanlab")
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.metrics import roc_auc_score

    view = ImageView(rows(96, wrong=0.2), to_tensor, clean="clean")
    probs = predict_probs([Oracle(0.4), Oracle(0.8)], view)
    wrong = view.labels != view.clean_labels
    issues = find_label_issues(
        view.labels, probs, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    assert wrong[issues].mean() > 0.8 and len(issues) >= wrong.sum() / 2
    ranked = find_suspects(view.labels, probs, all_rows=True)
    quality = get_label_quality_scores(view.labels, probs)
    np.testing.assert_allclose(
        1 - np.array(ranked["score"]), quality[ranked["index"][:]], atol=1e-6
    )
    assert roc_auc_score(wrong[ranked["index"][:]], ranked["score"][:]) > 0.9


class Oracle(nn.Module):
    """Predicts the brightest channel, which is the class, with some noise."""

    num_classes = CLASSES

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, pixels):
        mean = pixels.mean((2, 3))
        return 4 * mean + self.noise * torch.sin(1e4 * mean)


# ------------------------------------------------------------------------ correcting and dropping


@pytest.fixture
def stored(tmp_path):
    """A data set on disk, with rows in another order, whose pictures are large."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    table = [
        {"image": Image.fromarray(p), "label": int(y), "clean": 0}
        for p, y in zip(noise, [2, 0, 0, 1], strict=True)
    ]
    datasets.Dataset.from_list(table, features=FEATURES).save_to_disk(tmp_path / "stored")
    return datasets.load_from_disk(tmp_path / "stored").select([1, 3, 0, 2])  # labels 0, 1, 2, 0


def test_corrected_and_dropped_without_a_copy(stored, tmp_path):
    suspects = find_suspects(LABELS, PROBS, all_rows=True)  # of rows 3, 1, 2
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    better = correct_labels(stored, suspects)
    assert better["corrected_label"][:] == [0, 0, 1, 2] and better["label"][:] == [0, 1, 2, 0]
    assert better.features["corrected_label"] == stored.features["label"]
    assert correct_labels(stored, suspects.select([0]), corrected="new")["new"][:] == [0, 1, 2, 2]
    fewer = drop_suspects(stored, suspects)
    assert fewer["label"][:] == [0] and fewer._indices.column(0).to_pylist() == [
        1
    ]  # row 0 of the view is row 1 of the table
    assert (
        fewer[0]["image"].tobytes() == better[0]["image"].tobytes() == stored[0]["image"].tobytes()
    )
    assert drop_suspects(stored, suspects.select([2]))["label"][:] == [0, 1, 0]
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before
    assert better.cache_files == stored.cache_files


def test_suspects_of_other_data_are_refused(stored):
    suspects = find_suspects(LABELS, PROBS)
    for view in (correct_labels, drop_suspects):
        with pytest.raises(
            ValueError, match=r"row 3 has label 1 in column 'label', and 0 among the suspects"
        ):
            view(stored.select([0, 2, 1, 1]), suspects.select([0]))
        with pytest.raises(ValueError, match="the suspects have row 3, the data set 3 rows"):
            view(stored.select([0, 1, 2]), suspects)


def decided(suspects, *decisions):
    """The suspects with a column of decisions, as in the CSV file of the page."""
    return suspects.add_column("decision", list(decisions))


def test_decisions_are_followed(stored, tmp_path):
    """Rows marked wrong are corrected or dropped; fine ones stay; in memory and from a CSV file."""
    suspects = decided(find_suspects(LABELS, PROBS), "fine", "wrong", "fine")  # rows 3, 1, 2
    suspects.to_csv(tmp_path / "decisions.csv")
    read = datasets.Dataset.from_csv(str(tmp_path / "decisions.csv"), cache_dir=str(tmp_path))
    for table in (suspects, read):
        assert correct_labels(stored, table)["corrected_label"][:] == [0, 0, 2, 0]
        assert drop_suspects(stored, table)["label"][:] == [0, 2, 0]


@pytest.mark.parametrize("nothing", ["", None])
def test_undecided_rows_keep_their_label_and_are_counted(stored, nothing):
    suspects = decided(find_suspects(LABELS, PROBS), "wrong", nothing, "fine")
    with pytest.warns(UserWarning, match="1 of 3 suspects are undecided and keep their label"):
        assert correct_labels(stored, suspects)["corrected_label"][:] == [0, 1, 2, 2]
    with pytest.warns(UserWarning, match="1 of 3 suspects are undecided"):
        assert drop_suspects(stored, suspects)["label"][:] == [0, 1, 2]


def test_contradictions_are_refused(stored):
    suspects = find_suspects(LABELS, PROBS)  # rows 3, 1, 2
    other = suspects.select([1]).map(lambda row: {"proposed": 2})
    two = datasets.concatenate_datasets([suspects, other])
    same = datasets.concatenate_datasets([suspects, suspects])
    both = datasets.concatenate_datasets(
        [
            decided(suspects, "wrong", "wrong", "fine"),
            decided(suspects, "wrong", "fine", "fine"),
        ]
    )
    for view in (correct_labels, drop_suspects):
        with pytest.raises(ValueError, match="row 1 has two proposals among the suspects, 0 and 2"):
            view(stored, two)
        with pytest.raises(ValueError, match="row 1 has two decisions, 'wrong' and 'fine'"):
            view(stored, both)
        with pytest.raises(ValueError, match="row 2 has the decision 'Wrong': expected 'wrong'"):
            view(stored, decided(suspects, "wrong", "fine", "Wrong"))
        assert view(stored, same)[:] == view(stored, suspects)[:]  # one proposal, found twice
    undoubted = find_suspects(LABELS, PROBS, all_rows=True).select([3])  # row 0
    assert correct_labels(stored, undoubted)["corrected_label"][:] == LABELS.tolist()
    with pytest.raises(
        ValueError, match="row 0 is marked wrong, but the proposed label is its own, 0"
    ):
        correct_labels(stored, decided(undoubted, "wrong"))
    assert drop_suspects(stored, decided(undoubted, "wrong"))["label"][:] == [1, 2, 0]
