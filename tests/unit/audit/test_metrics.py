"""Metrics: values by hand, every way in which evaluate calls them, and what they refuse."""

import json
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch

from kd_plugins.audit.metrics import Memorisation, TopKAccuracy, peer_metrics

GIVEN = [0, 1, 1, 2, 0]
CLEAN = [0, 1, 2, 2, 1]  # samples 2 and 4 are wrongly labelled
RANKED = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1], [1, 0, 2]]
EXPECTED = {"noise_rate": 0.4, "accuracy_clean_part": 2 / 3, "memorised": 0.5, "corrected": 0.5}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_predictions_may_be_ids_or_rankings_of_any_array_kind(kind):
    assert TopKAccuracy(k=2).compute(predictions=kind(RANKED), references=kind(GIVEN)) == {
        "accuracy": 0.6,
        "top2": 1.0,
    }
    first = kind([row[0] for row in RANKED])
    assert TopKAccuracy(k=2).compute(predictions=first, references=kind(GIVEN)) == {"accuracy": 0.6}
    assert (
        Memorisation().compute(predictions=first, references=GIVEN, clean_references=CLEAN)
        == EXPECTED
    )


def test_combined_metrics_agree_batch_by_batch_and_sample_by_sample():
    whole = evaluate.combine([TopKAccuracy(k=3), Memorisation()]).compute(
        predictions=RANKED, references=GIVEN, clean_references=CLEAN
    )
    assert whole == {"accuracy": 0.6, "top3": 1.0, **EXPECTED}
    batches, samples = (evaluate.combine([TopKAccuracy(k=3), Memorisation()]) for _ in range(2))
    for cut in (slice(0, 2), slice(2, 5)):
        batches.add_batch(
            predictions=RANKED[cut], references=GIVEN[cut], clean_references=CLEAN[cut]
        )
    for ranked, given, clean in zip(RANKED, GIVEN, CLEAN, strict=True):
        samples.add(prediction=ranked, reference=given, clean_references=clean)
    assert batches.compute() == samples.compute() == whole


@pytest.mark.parametrize(
    ("given", "clean", "absent"),
    [([0, 1], [0, 1], {"memorised", "corrected"}), ([0, 1], [1, 0], {"accuracy_clean_part"})],
)
def test_shares_of_empty_groups_are_left_out(given, clean, absent):
    shares = Memorisation().compute(predictions=[0, 1], references=given, clean_references=clean)
    assert shares.keys() == EXPECTED.keys() - absent
    json.dumps(shares, allow_nan=False)


def test_nothing_is_written_even_without_a_home(tmp_path):
    code = (
        "from kd_plugins.audit.metrics import TopKAccuracy\n"
        "print(TopKAccuracy().compute(predictions=[1], references=[1]))"
    )
    env = {
        "PYTHONPATH": ":".join(path for path in sys.path if path),
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "{'accuracy': 1.0}\n", done.stderr
    assert not [p for p in tmp_path.rglob("*") if "evaluate" in p.parts]


def test_files_can_be_asked_for(tmp_path):
    metric = TopKAccuracy(keep_in_memory=False, cache_dir=str(tmp_path))
    assert metric.compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 0.5}


def test_peers_agree_with_a_naive_loop():
    rng = np.random.default_rng(0)
    top = np.stack(
        [np.stack([rng.permutation(7)[:5] for _ in range(3)]) for _ in range(60)]
    )  # [60, 2 peers + 1, 5]
    given, clean = rng.integers(0, 7, (2, 60))
    shares = peer_metrics(top, given, clean)
    for peer, name in enumerate(["a", "b", "ensemble"]):
        rows = list(zip(top[:, peer].tolist(), given.tolist(), clean.tolist(), strict=True))
        wrong = [row for row in rows if row[1] != row[2]]
        right = [row for row in rows if row[1] == row[2]]
        assert shares[f"accuracy_{name}"] == pytest.approx(sum(t[0] == c for t, _, c in rows) / 60)
        assert shares[f"top5_{name}"] == pytest.approx(sum(c in t for t, _, c in rows) / 60)
        assert shares[f"memorised_{name}"] == pytest.approx(
            sum(t[0] == g for t, g, _ in wrong) / len(wrong)
        )
        assert shares[f"corrected_{name}"] == pytest.approx(
            sum(t[0] == c for t, _, c in wrong) / len(wrong)
        )
        assert shares[f"accuracy_clean_part_{name}"] == pytest.approx(
            sum(t[0] == c for t, _, c in right) / len(right)
        )
    for key in (
        "accuracy",
        "top5",
        "memorised",
        "corrected",
        "accuracy_clean_part",
    ):  # the mean does not include the ensemble
        assert shares[key] == pytest.approx((shares[f"{key}_a"] + shares[f"{key}_b"]) / 2)
    assert shares["noise_rate"] == pytest.approx((given != clean).mean())
    assert "noise_rate_a" not in shares


def test_one_peer_has_no_suffixes_and_names_can_be_chosen():
    top = np.array(RANKED)[:, None]
    assert peer_metrics(top, GIVEN) == {"accuracy": 0.6}
    assert peer_metrics(top, GIVEN, CLEAN) == {"accuracy": 0.6, **EXPECTED}
    four = np.repeat(top, 4, axis=1)
    assert {"accuracy_c", "accuracy_ensemble"} < peer_metrics(four, GIVEN).keys()
    assert "accuracy_resnet" in peer_metrics(four[:, :3], GIVEN, names=("resnet", "vit"))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: TopKAccuracy(k=1), ValueError, "k=1: expected an integer of at least 2"),
        (
            lambda: TopKAccuracy().compute(predictions=[[0.2, 0.8]], references=[1]),
            TypeError,
            "logits would be cut",
        ),
        (
            lambda: TopKAccuracy().compute(predictions=[], references=[]),
            TypeError,
            "float64 of shape",
        ),
        (
            lambda: TopKAccuracy().add_batch(predictions=[1, 2], references=[1]),
            ValueError,
            "1 of references",
        ),
        (
            lambda: TopKAccuracy().add_batch(predictions=[1], references=[[1]]),
            ValueError,
            r"got shape \[1, 1\]",
        ),
        (
            lambda: Memorisation().compute(predictions=[1], references=[1]),
            ValueError,
            "clean_references",
        ),
        (
            lambda: peer_metrics(np.zeros((4, 2, 5), int), np.zeros(4, int)),
            ValueError,
            r"got \[4, 2, 5\]",
        ),
        (
            lambda: peer_metrics(np.zeros((4, 3, 5), int), np.zeros(3, int)),
            ValueError,
            "3 of labels",
        ),
        (
            lambda: peer_metrics(np.zeros((4, 3, 5), int), np.zeros(4, int), names="a"),
            ValueError,
            "2 different names",
        ),
        (
            lambda: peer_metrics(np.zeros((4, 3, 5)), np.zeros(4, int)),
            TypeError,
            "top_ids: expected class ids",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
