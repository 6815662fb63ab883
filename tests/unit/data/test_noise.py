"""Label noise: matrices by hand, exact counts against a naive loop, streams, size."""

import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from kd_plugins.data import (
    asymmetric,
    circular,
    corrupt,
    corrupt_by_key,
    noise_report,
    noisy_stream,
    noisy_view,
    pair_flip,
    symmetric,
)

SKEWED = np.repeat([0, 1, 2], [37, 11, 3])


def dataset(labels, num_classes, **columns):
    features = Features(label=ClassLabel(num_classes=num_classes), key=Value("string"))
    rows = {"label": np.asarray(labels).tolist(), "key": [f"k{i}" for i in range(len(labels))]}
    made = Dataset.from_dict(rows, features=features)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


def test_matrices_by_hand():
    np.testing.assert_allclose(
        symmetric(3, 0.4), [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]
    )
    np.testing.assert_allclose(
        symmetric(4, 0.4, include_self=True), np.full((4, 4), 0.1) + 0.6 * np.eye(4)
    )
    np.testing.assert_allclose(pair_flip(3, 0.3), [[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]])
    np.testing.assert_allclose(asymmetric(3, 0.3, {2: 0}), [[1, 0, 0], [0, 1, 0], [0.3, 0, 0.7]])
    # superclasses {0, 2}, {1, 3, 4} and {5} alone
    expected = np.zeros((6, 6))
    for i, j in {0: 2, 2: 0, 1: 3, 3: 4, 4: 1, 5: 5}.items():
        expected[i, i] += 0.75
        expected[i, j] += 0.25
    np.testing.assert_allclose(circular([7, 9, 7, 9, 9, 1], 0.25), expected)


@pytest.mark.parametrize("make", [symmetric, pair_flip, lambda c, r: circular([0] * c, r)])
def test_limits_of_the_rate(make):
    labels = np.arange(50) % 5
    for exact in (True, False):
        np.testing.assert_array_equal(corrupt(labels, make(5, 0.0), exact=exact), labels)
        assert (corrupt(labels, make(5, 1.0), exact=exact) != labels).all()
    np.testing.assert_array_equal(corrupt(labels, pair_flip(5, 1.0)), (labels + 1) % 5)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.45, 0.7])
@pytest.mark.parametrize(
    "make", [symmetric, pair_flip, lambda c, r: asymmetric(c, r, {0: 1, 2: 1})]
)
def test_exact_count_against_a_naive_derivation(make, rate):
    matrix = make(3, rate)
    expected = [(c == SKEWED).sum() * (1 - matrix[c][c]) for c in range(3)]
    total = int(sum(expected) + 0.5 + 1e-9)
    quota = [int(e + 1e-9) for e in expected]
    while sum(quota) < total:  # hand out what is missing, one at a time, to the largest remainder
        rest = [round(e - q, 9) for e, q in zip(expected, quota, strict=True)]
        quota[rest.index(max(rest))] += 1
    for seed in range(3):
        noisy = corrupt(SKEWED, matrix, seed)
        assert [int(((c == SKEWED) & (noisy != c)).sum()) for c in range(3)] == quota
        assert (matrix[SKEWED, noisy] > 0).all()  # only flips that the matrix allows


def test_exact_rate_of_a_balanced_set_is_exact():
    labels = np.arange(1000) % 10
    for rate in (0.1, 0.3, 0.4, 0.7, 0.9):
        noisy = corrupt(labels, symmetric(10, rate))
        assert ((noisy != labels).reshape(100, 10).sum(0) == round(100 * rate)).all()


def test_flips_are_uniform_over_samples_and_follow_the_row():
    matrix = np.array([[0.5, 0.1, 0.4], [0, 1, 0], [0.25, 0.75, 0]])
    labels = np.repeat([0, 2], [20, 20])
    for exact in (True, False):
        given = np.array([corrupt(labels, matrix, seed, exact) for seed in range(2000)])
        share = np.stack(
            [(given == c).mean(0) for c in range(3)], axis=1
        )  # [N, C], each sample's own frequencies
        assert np.abs(share - matrix[labels]).max() < 0.06  # 5 sigma: 5 sqrt(0.25 / 2000) = 0.056
        np.testing.assert_allclose(share.reshape(2, 20, 3).mean(1), matrix[[0, 2]], atol=0.0126)
        counts = (given[:, :20] != 0).sum(
            1
        )  # flips of class 0: always 10, or with variance 20 * 0.5 * 0.5
        assert counts.var() == (0 if exact else pytest.approx(5, rel=0.2))


def test_include_self_leaves_a_share_right():
    labels = np.arange(2000) % 4
    assert (
        corrupt(labels, symmetric(4, 0.4, include_self=True)) != labels
    ).sum() == 600  # 0.4 * 3 / 4


def test_seed_and_input():
    labels = np.arange(300) % 3
    before = labels.copy()
    first = corrupt(labels, symmetric(3, 0.5), seed=1)
    np.testing.assert_array_equal(first, corrupt(labels.tolist(), symmetric(3, 0.5), seed=1))
    assert (first != corrupt(labels, symmetric(3, 0.5), seed=2)).any()
    np.testing.assert_array_equal(labels, before)
    assert first.dtype == np.int64 and len(corrupt(labels[:0], symmetric(3, 0.5))) == 0


def test_view_adds_a_column_and_keeps_the_rest():
    clean = dataset(np.arange(100) % 5, 5)
    view = noisy_view(clean, symmetric(5, 0.4), seed=3)
    assert view.features["noisy_label"] == view.features["label"] == clean.features["label"]
    assert view["label"][:] == clean["label"][:] and clean.column_names == ["label", "key"]
    np.testing.assert_array_equal(
        view["noisy_label"][:], corrupt(np.arange(100) % 5, symmetric(5, 0.4), seed=3)
    )
    fingerprints = [noisy_view(clean, symmetric(5, 0.4), seed=s)._fingerprint for s in (3, 3, 4)]
    assert fingerprints[0] == fingerprints[1] == view._fingerprint != fingerprints[2]
    assert noisy_view(clean, symmetric(5, 0.4), seed=3, noisy="b")._fingerprint != view._fingerprint


def test_view_with_given_labels():
    human = np.arange(20) % 3
    clean = dataset(np.zeros(20, int), 3, human=human)
    for noise in (human, human.tolist(), "human"):
        assert noisy_view(clean, noise)["noisy_label"][:] == human.tolist()
    own = human.copy()
    view = noisy_view(clean, own)
    own[:] = 0  # the view has its own memory
    assert view["noisy_label"][:] == human.tolist()


def test_view_after_shuffle_copies_no_picture():
    pictures = [bytes([i]) * 100_000 for i in range(20)]
    features = Features(image=Image(decode=False), label=ClassLabel(num_classes=4))
    rows = {
        "image": [{"bytes": b, "path": None} for b in pictures],
        "label": [i % 4 for i in range(20)],
    }
    clean = Dataset.from_dict(rows, features=features)
    for mapped in (
        clean.shuffle(seed=0).select([3, 1, 4, 15, 9, 2]),
        clean.shuffle(seed=0).with_format("numpy"),
    ):
        before = pa.total_allocated_bytes()
        view = noisy_view(mapped, symmetric(4, 0.5), seed=1)
        assert (
            pa.total_allocated_bytes() - before < 100_000
        )  # one picture; flattening would copy 600 kB or 2 MB
        assert (
            view.format["type"] == mapped.format["type"] and "noisy_label" in view.format["columns"]
        )
        assert np.array_equal(view["label"][:], mapped["label"][:])
        np.testing.assert_array_equal(
            view["noisy_label"][:], corrupt(mapped["label"][:], symmetric(4, 0.5), seed=1)
        )
        assert [row["image"] for row in view] == [row["image"] for row in mapped]
        assert view._fingerprint == noisy_view(mapped, symmetric(4, 0.5), seed=1)._fingerprint
        assert len(
            view.shuffle(seed=3).filter(lambda label: label == 1, input_columns="noisy_label")
        ) < len(view)
    with pytest.raises(ValueError, match="selected twice"):
        noisy_view(clean.select([0, 1, 0]), [1, 2, 3])


def test_report():
    report = noise_report([0, 0, 0, 1, 1], [0, 1, 1, 1, 0], 3)
    assert report.rate == pytest.approx(0.6)
    np.testing.assert_array_equal(report.confusion, [[1, 2, 0], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(report.transition, [[1 / 3, 2 / 3, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert str(report) == (
        "3 of 5 labels are wrong (60.00%), 3 classes; per class: 50.00% to 66.67%; "
        "most frequent: 0 -> 1 (2), 1 -> 0 (1)"
    )
    assert str(noise_report([0, 1], [0, 1], 2)) == "0 of 2 labels are wrong (0.00%), 2 classes"


def test_by_key_is_stateless_and_follows_the_matrix():
    matrix = np.array([[0.5, 0.1, 0.4], [0, 1, 0], [0.25, 0.75, 0]])
    labels, keys = np.arange(30_000) % 3, [f"q{i}" for i in range(30_000)]
    noisy = corrupt_by_key(keys, labels, matrix, seed=5)
    np.testing.assert_allclose(
        noise_report(labels, noisy, 3).transition, matrix, atol=0.025
    )  # 5 sigma
    assert ((matrix[labels, noisy]) > 0).all()
    order = np.random.default_rng(0).permutation(30_000)[:500]
    np.testing.assert_array_equal(
        corrupt_by_key([keys[i] for i in order], labels[order], matrix, seed=5), noisy[order]
    )
    assert (corrupt_by_key(keys, labels, matrix, seed=6) != noisy).any()
    assert (corrupt_by_key([b"a"], [0], matrix) == corrupt_by_key(["a"], [0], matrix)).all()
    np.testing.assert_array_equal(corrupt_by_key(keys[:300], labels[:300], np.eye(3)), labels[:300])


def test_stream_agrees_with_the_table_for_any_order_and_shard():
    clean, matrix = dataset(np.arange(60) % 4, 4), symmetric(4, 0.5)
    table = noisy_view(clean, corrupt_by_key(clean["key"][:], clean["label"][:], matrix, seed=2))
    wanted = dict(zip(table["key"][:], table["noisy_label"][:], strict=True))
    stream = noisy_stream(clean.to_iterable_dataset(num_shards=3), matrix, seed=2, key="key")
    assert stream.features["noisy_label"] == clean.features["label"]
    for variant, length in (
        (stream, 60),
        (stream.shuffle(seed=1, buffer_size=7), 60),
        (stream.shard(3, 1), 20),
    ):
        rows = list(variant)
        assert all(row["noisy_label"] == wanted[row["key"]] for row in rows)
        assert len(rows) == length
    assert Counter(wanted.values()) != Counter(clean["label"][:])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: symmetric(10, 40), r"rate=40: expected a number in \[0, 1\]"),
        (lambda: pair_flip(10, -0.1), r"rate=-0.1: expected"),
        (lambda: circular([0, 0], float("nan")), r"rate=nan: expected"),
        (
            lambda: symmetric(1, 0.1),
            "num_classes=1: expected an integer of at least 2; there is no other label",
        ),
        (lambda: asymmetric(3, 0.1, {0: 3}), "0 -> 3, but classes go from 0 to 2"),
        (
            lambda: corrupt([0], [[0.5, 0.5], [0.2, 0.7]]),
            "Row 1 of the transition matrix sums to 0.9",
        ),
        (lambda: corrupt([0], [[1, 0], [np.nan, 1]]), "Row 1 of the transition matrix sums to nan"),
        (lambda: corrupt([0], [[1.5, -0.5], [0, 1]]), r"transition\[0, 1\] = -0.5 is negative"),
        (lambda: corrupt([0], np.ones((2, 3)) / 3), r"shape \(2, 3\), expected \[C, C\]"),
        (
            lambda: corrupt([0, 1, 5, -1], symmetric(3, 0.1)),
            "Label 5 at position 2: labels go from 0 to 2",
        ),
        (lambda: corrupt([0.0, 1.0], symmetric(3, 0.1)), "expected class indices, got float64"),
        (lambda: corrupt_by_key(["a"], [0, 1], symmetric(3, 0.1)), "1 keys for 2 labels"),
        (lambda: noise_report([0, 1], [0], 2), "2 clean labels and 1 noisy ones"),
        (lambda: noise_report([0, 1], [0, 2], 2), "Label 2 at position 1"),
        (
            lambda: noisy_view(dataset([0, 1], 2), symmetric(3, 0.1)),
            r"\(3, 3\), but column 'label' has 2 classes",
        ),
        (
            lambda: noisy_view(dataset([0, 1], 2), [0, 1, 1]),
            r"shape \(3,\), the data set has 2 rows",
        ),
        (lambda: noisy_view(dataset([0, 1], 2), [0, 2]), "Label 2 at position 1"),
        (lambda: noisy_view(dataset([0, 1], 2), "human"), "no column 'human'"),
        (lambda: noisy_view(dataset([0, 1], 2), [0, 1], label="fine"), "no column 'fine'"),
        (
            lambda: noisy_view(dataset([0, 1], 2), [0, 1], noisy="label"),
            "Column 'label' exists already",
        ),
        (
            lambda: noisy_stream(dataset([0], 2).to_iterable_dataset(), symmetric(2, 0.1)),
            "no column '__key__'",
        ),
    ],
)
def test_errors_name_the_value(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_two_million_rows_take_50_mb():
    labels = np.random.default_rng(0).integers(0, 1000, 2_400_000)
    features = Features(label=ClassLabel(num_classes=1000))
    clean = Dataset(
        pa.table(
            {"label": pa.chunked_array(np.array_split(labels, 3))}, schema=features.arrow_schema
        )
    )
    matrix = symmetric(1000, 0.4)
    noisy_view(clean, matrix)  # what is loaded once does not count
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        view = noisy_view(clean, matrix)
        peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    given = view.data.column("noisy_label").to_numpy()
    assert (given != labels).sum() == 960_000
