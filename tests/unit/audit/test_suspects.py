"""Suspects: the ranking by hand and by cleanlab, the probabilities, the views, the pictures, and the page in a real browser."""

import base64
import csv
import json
import re
import runpy
import shutil
import sys
import time
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers.tiny import CLASSES, Net, rows, to_tensor, trainer, vit
from PIL import Image
from torch import nn

from kd_plugins import (
    contact_sheet,
    correct_labels,
    drop_suspects,
    find_suspects,
    html_page,
    predict_probs,
)
from kd_plugins.data import ImageView
from kd_plugins.models import export

LABELS = np.array([0, 1, 2, 0])
PROBS = np.array([[0.6, 0.3, 0.1], [0.7, 0.1, 0.2], [0.3, 0.5, 0.2], [0.0, 0.0, 1.0]], np.float32)


def encoded(picture, kind="PNG", **settings):
    picture.save(buffer := BytesIO(), kind, **settings)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------- the ranking


def test_scores_by_hand():
    """1 - p of the given label; sample 0 is believed."""
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
    """A second derivation, over several chunks, the last of them short."""
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
    """The given label stands beside one as probable; of two rivals the first; of two equal samples the first row."""
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
    with pytest.raises(ValueError, match=r"Label 3 at position 1: labels go from 0 to 2"):
        find_suspects([0, 3, 0, 0], PROBS)
    with pytest.raises(
        ValueError, match=r"expected floats \[N, C\] for labels \[3\], got float32 \[4, 3\]"
    ):
        find_suspects(LABELS[:3], PROBS)
    with pytest.raises(ValueError, match="Label 2 at position 2: labels go from 0 to 1"):
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
    """1 - mean p of the given label; the class with most votes is proposed; sample 3 was never seen."""
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
    """The folder of the callback; what the networks learn of clean pictures gives the wrong labels away."""
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


# ------------------------------------------------------------------------------------------------------ the probabilities


class Oracle(nn.Module):
    """Knows that the brightest channel is the class, and says so with some noise."""

    num_classes = CLASSES

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, pixels):
        mean = pixels.mean((2, 3))
        return 4 * mean + self.noise * torch.sin(1e4 * mean)


def normalised(net, mean, std):
    net.pretrained_cfg = {"mean": mean, "std": std}
    return net


def test_probabilities_in_order_of_the_view():
    """Two networks of different normalisation, one with BatchNorm and dropout, over shuffled rows; modes are put back."""
    data = datasets.Dataset.from_list(rows(21), features=FEATURES).shuffle(seed=1)
    view = ImageView(data, to_tensor)
    a = normalised(Net(1, bn=True, dropout=0.5), (0.5,) * 3, (0.5,) * 3)
    b = normalised(Net(2), (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)).eval()
    b.fc.train()
    modes = [m.training for m in (*a.modules(), *b.modules())]
    random = torch.random.get_rng_state()
    got = predict_probs([a, b], view, batch_size=4)
    assert [m.training for m in (*a.modules(), *b.modules())] == modes and torch.equal(
        random, torch.random.get_rng_state()
    )
    assert got.dtype == np.float32 and got.shape == (21, CLASSES)
    a.eval(), b.eval()
    for i, row in enumerate(data):
        pixels = to_tensor(row["image"])[None]
        theirs = (
            (pixels * 0.5 + 0.5) - torch.tensor([0.1, 0.2, 0.3])[:, None, None]
        ) / torch.tensor([0.9, 0.8, 0.7])[:, None, None]
        with torch.no_grad():
            wanted = (a(pixels).softmax(-1) + b(theirs).softmax(-1)) / 2
        np.testing.assert_allclose(got[i], wanted[0], atol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(predict_probs(a, view), predict_probs([a], view))


def test_broken_pictures_have_no_probabilities():
    """The row that stands in for one keeps its own probabilities, and lends none."""
    table = rows(9)
    table[2]["image"] = table[8]["image"] = b"nothing"
    view = ImageView(table, to_tensor, max_broken=0.5)
    with pytest.warns(UserWarning, match="2 of 9 pictures cannot be read"):
        got = predict_probs(Net(1), view, batch_size=2)
    assert np.isnan(got[[2, 8]]).all() and np.isfinite(got[[0, 1, 3, 4, 5, 6, 7]]).all()
    np.testing.assert_allclose(
        got[3], predict_probs(Net(1), ImageView(table[3:6], to_tensor))[0], atol=1e-6
    )


def test_networks_from_folders(tmp_path):
    network = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    export(network, tmp_path / "peer_a")
    view = ImageView(
        [{"image": np.full((64, 64, 3), 50 * k, np.uint8), "label": k} for k in range(3)], to_tensor
    )
    np.testing.assert_allclose(
        predict_probs([tmp_path / "peer_a"], view), predict_probs(network, view), atol=1e-6
    )


SHUFFLED = [2, 0, 1]  # the network's class k is class SHUFFLED[k] of the data


@pytest.mark.parametrize("library", ["timm", "transformers", "folder"])
def test_classes_are_matched_by_name(library, tmp_path):
    """A network that was trained with its classes in another order says the same of each name."""
    data = datasets.Dataset.from_list(rows(6), features=FEATURES)
    view, names = ImageView(data, to_tensor), [NAMES[k] for k in SHUFFLED]
    network = {
        "timm": Net(1),
        "transformers": vit(),
        "folder": timm.create_model("test_resnet", num_classes=CLASSES),
    }[library]
    wanted = predict_probs(network, view)[:, np.argsort(SHUFFLED)]
    assert np.ptp(wanted, 1).min() > 1e-4
    if library == "timm":
        network.pretrained_cfg = {"label_names": names}
    elif library == "transformers":
        network.config.id2label = dict(enumerate(names))
    else:
        network = export(network, tmp_path / "peer_a", names)
    np.testing.assert_allclose(predict_probs(network, view), wanted, atol=1e-6)
    plain = Net(2)  # without names: as the data have them
    both = predict_probs([network, plain], view)
    np.testing.assert_allclose(both, (wanted + predict_probs(plain, view)) / 2, atol=1e-6)


def test_other_classes_are_refused_and_numbers_are_no_names():
    view = ImageView(datasets.Dataset.from_list(rows(6), features=FEATURES), to_tensor)
    network = normalised(Net(1), (0.0,) * 3, (1.0,) * 3)
    wanted = predict_probs(network, view)
    network.pretrained_cfg["label_names"] = ["cat", "cow", "owl"]
    with pytest.raises(ValueError, match=r"Net has no class 'dog', .* class 1 is 'cow'"):
        predict_probs(network, view)
    np.testing.assert_array_equal(predict_probs(network, ImageView(rows(6), to_tensor)), wanted)
    for names in (
        ["0", "1", "2"],
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["of", "an", "older", "head"],
    ):
        network.pretrained_cfg["label_names"] = names
        np.testing.assert_array_equal(predict_probs(network, view), wanted)


def test_what_cannot_predict_is_refused():
    view = ImageView(rows(6), to_tensor)
    with pytest.raises(TypeError, match="view: expected an ImageView, got Subset"):
        predict_probs(Net(1), torch.utils.data.Subset(view, [3, 4]))
    with pytest.raises(ValueError, match="at least one network"):
        predict_probs([], view)
    with pytest.raises(ValueError, match="the data have 3 classes, Net has 7"):
        predict_probs([Net(1), Net(2, classes=7)], view)
    broken = Net(1)
    nn.init.constant_(broken.fc.bias, torch.nan)
    with pytest.raises(ValueError, match="the networks predict NaN for row 0"):
        predict_probs(broken, view)


# -------------------------------------------------------------------------------------------------------------- the views

NAMES = ["cat", "dog", "owl"]
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "clean": datasets.Value("int64"),
    }
)


@pytest.fixture
def stored(tmp_path):
    """A data set on disk, in an order of its own, whose pictures are large beside its labels."""
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
    """The suspects with decisions, as if the page had written them and a reader had read them."""
    return suspects.add_column("decision", list(decisions))


def test_decisions_are_followed(stored, tmp_path):
    """ "wrong" is corrected or dropped, "fine" stays, whether added in memory or read from the CSV."""
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
    believed = find_suspects(LABELS, PROBS, all_rows=True).select([3])  # row 0
    assert correct_labels(stored, believed)["corrected_label"][:] == LABELS.tolist()
    with pytest.raises(
        ValueError, match="row 0 is marked wrong, but the proposed label is its own, 0"
    ):
        correct_labels(stored, decided(believed, "wrong"))
    assert drop_suspects(stored, decided(believed, "wrong"))["label"][:] == [1, 2, 0]


# ------------------------------------------------------------------------------------------------------------ the pictures

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "\"quoted\" & 'single' <b>bold</b>",
    "line\u2028separators\u2029and @DATA@ @POLICY@ \\u003c",
    "<!-- <script> $&",
    "犬 Ωμέγα",
    "https://example.com/" + "long" * 30,
]
BROKEN = 5


@pytest.fixture(scope="module")
def odd():
    """Pictures of all kinds, of which one is broken, their labels, and the suspects among them."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    picture = Image.fromarray(noise)
    smooth = Image.linear_gradient("L").resize((32, 32))  # a PNG is smaller
    kinds = [
        encoded(picture),
        encoded(smooth.convert("RGB"), transparency=(9, 9, 9), icc_profile=bytes(40_000)),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture.convert("RGBA")),
        encoded(picture.convert("P")),
        b"\xff\xd8 broken",
        encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)),
        encoded(picture.resize((2000, 3))),
        encoded(picture.convert("LA")),
        encoded(picture.convert("1")),
    ]
    table = [
        {"image": {"bytes": kind, "path": None}, "label": k % 6} for k, kind in enumerate(kinds)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(k) for k in range(6)])}
    )
    data = datasets.Dataset.from_list(table, features=features)
    labels = np.array(data["label"])
    probs = np.full((10, 6), 0.02, np.float32)
    probs[np.arange(10), (labels + 1) % 6] = np.linspace(0.8, 0.4, 10)
    probs[np.arange(10), labels] = 1 - probs.sum(1) + 0.02
    suspects = find_suspects(labels, probs, class_names=HOSTILE, all_rows=True)
    assert (
        np.array(suspects["proposed"]) != np.array(suspects["label"])
    ).sum() == 8  # of the last two the label stands
    return data, suspects


@pytest.mark.parametrize("source", ["dataset", "view", "rows"])
def test_contact_sheet(odd, source, tmp_path):
    data, suspects = odd
    table = [
        {"image": row["image"]["bytes"], "label": row["label"]}
        for row in data.cast_column("image", datasets.Image(decode=False))
    ]
    source = {"dataset": data, "view": ImageView(data, to_tensor, max_broken=1), "rows": table}[
        source
    ]
    path = contact_sheet(suspects, source, tmp_path / "new" / "sheet.png", count=9, columns=3)
    sheet = np.array(Image.open(path).convert("RGB"))
    assert sheet.shape == (58 + 3 * 250, 3 * 190 + 14, 3)
    ranked = [row["index"] for row in suspects][:8]  # the other two are no suspects
    for k in range(9):
        x, y = 14 + k % 3 * 190, 58 + k // 3 * 250
        tile, text = sheet[y : y + 176, x : x + 176], sheet[y + 180 : y + 230, x : x + 176]
        if k == 8:
            assert (sheet[y : y + 250, x : x + 176] == 255).all()
        elif ranked[k] == BROKEN:
            assert (tile == (0xE7, 0xE9, 0xED)).all(-1).mean() > 0.95
        else:
            assert tile.std() > 5
        assert k == 8 or text.std() > 5
    assert len(set(sheet[58 : 58 + 176].mean((0, 2)).round(3))) > 100  # not one picture three times


class Addresses(HTMLParser):
    """What the elements of a page point to, or run."""

    @classmethod
    def of(cls, text):
        parser = cls()
        parser.found = []
        parser.feed(text)
        return parser.found

    def handle_starttag(self, tag, attrs):
        self.found += [
            v
            for k, v in attrs
            if k in ("src", "href", "srcset", "action", "data") or k.startswith("on")
        ]


def page_of(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )


def test_page_holds_all_and_loads_nothing(odd, tmp_path):
    data, suspects = odd
    path = html_page(suspects, data, tmp_path / "new" / "page.html", title=HOSTILE[0] + "@DATA@")
    text, page = page_of(path)
    assert text.isascii() and Addresses.of(text) == [
        "data:,"
    ]  # of the icon that browsers would ask for
    ways = [
        "url(",
        "@import",
        "fetch",
        "XMLHttp",
        "WebSocket",
        "innerHTML",
        "insertAdjacent",
        "document.write",
        "eval",
        "import(",
    ]
    assert [way for way in ways if way in text] == []
    assert [row[:3] for row in page["rows"]] == [
        [r["index"], r["label"], r["proposed"]] for r in suspects
    ][:8]
    assert [row[3] for row in page["rows"]] == pytest.approx(suspects["score"][:8], abs=1e-4)
    assert page["names"] == {str(k): " ".join(name.split()) for k, name in enumerate(HOSTILE)}
    for index, *_, uri in page["rows"]:
        if index == BROKEN:
            assert uri is None
            continue
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", uri).groups()
        picture = Image.open(BytesIO(base64.b64decode(content)))
        assert (
            picture.format.lower() == kind
            and max(picture.size) <= 96
            and picture.mode == "RGB"
            and len(content) < 30_000
        )
        assert not {"icc_profile", "transparency"} & picture.info.keys()
    assert (
        max(Image.open(BytesIO(base64.b64decode(page["rows"][1][-1].split(",")[1]))).size) == 32
    )  # no larger than it was
    assert {row[-1][:16] for row in page["rows"] if row[-1]} == {
        "data:image/jpeg;",
        "data:image/png;b",
    }

    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text
    title = re.findall(r"<(?:title|h1)>(.*?)</", text)
    assert [unescape(t) for t in title] == [HOSTILE[0] + "@DATA@"] * 2
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert (
        "default-src 'none'; img-src data:; " in policy
        and "unsafe" not in policy
        and policy.count("'sha256-") == 2
    )


def test_pages_and_sheets_that_cannot_be_drawn(odd, tmp_path):
    data, suspects = odd
    for draw in (html_page, contact_sheet):
        with pytest.raises(ValueError, match="the suspects have row 9, the data set 9 rows"):
            draw(suspects, data.select(range(9)), tmp_path / "x")
        with pytest.raises(ValueError, match=r"no column 'img'; there are \['image', 'label'\]"):
            draw(suspects, data, tmp_path / "x", image="img")
        with pytest.raises(TypeError, match="column 'label' holds int"):
            draw(suspects, data, tmp_path / "x", image="label")
        twice = datasets.concatenate_datasets(
            [suspects, suspects.map(lambda row: {"proposed": (row["proposed"] + 1) % 6})]
        )
        with pytest.raises(ValueError, match="two proposals"):
            draw(twice, data, tmp_path / "x")
        with pytest.raises(ValueError, match="count=0"):
            draw(suspects, data, tmp_path / "x", count=0)
        assert draw(suspects.select([]), data, tmp_path / "none").stat().st_size > 100
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("draw", [html_page, contact_sheet])
def test_pages_and_sheets_of_other_rows_are_refused(odd, tmp_path, draw):
    """Shuffled rows, a view of them, a list of them, and another column of labels."""
    data, suspects = odd
    order = data.select([1, 0, *range(2, 10)])
    plain = [{"image": None, "label": y} for y in order["label"]]
    message = (
        "row [01] has label [01] in .*, and [01] among the suspects: they belong to other data"
    )
    for other in (order, ImageView(order, to_tensor, max_broken=1), plain):
        with pytest.raises(ValueError, match=message):
            draw(suspects, other, tmp_path / "x")
    renamed = data.add_column("noisy", np.roll(data["label"], 1)).rename_column("label", "given")
    with pytest.raises(ValueError, match="No column 'label'"):
        draw(suspects, renamed, tmp_path / "x")
    with pytest.raises(ValueError, match="in column 'noisy'"):
        draw(suspects, renamed, tmp_path / "x", label="noisy")
    bare = [{"image": None}] * 10
    with pytest.raises(ValueError, match=r"no column 'label': .* label=None"):
        draw(suspects, bare, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for rows_, label in ((renamed, "given"), (bare, None)):
        assert draw(suspects, rows_, tmp_path / "page", label=label).stat().st_size > 100


# ------------------------------------------------------------------------------------------------------------- the browser

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,900",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip(
            "no chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(
        options, webdriver.ChromeService(programs[1])
    )  # named: selenium would look for one to download
    driver.downloads = downloads
    driver.get("about:blank")  # not the new tab, which asks for parts of itself
    yield driver
    driver.quit()


def requests(driver):
    """The addresses that the page asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


SHOWN = """return [...document.querySelectorAll("#cards li")].filter((li) => li.offsetParent && !li.hidden).map((li) => [
    Number(li.querySelector(".row").textContent.slice(4)), li.querySelector(".given").textContent,
    li.querySelector(".proposed").textContent, li.querySelector(".mark").textContent])"""


# datasets 5.0 leaves the file of from_csv open
@pytest.mark.filterwarnings(
    r"ignore:(?s).*unclosed file.*decisions\.csv:pytest.PytestUnraisableExceptionWarning"
)
def test_page_in_a_browser(odd, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    data, suspects = odd
    path = html_page(suspects, data, tmp_path / "page.html", title=HOSTILE[0])
    requests(browser), browser.get_log("browser")
    browser.get(path.as_uri())
    names = [" ".join(name.split()) for name in HOSTILE]
    ranked = [(r["index"], names[r["label"]], names[r["proposed"]]) for r in suspects][:8]

    def find(css):
        return browser.find_element("css selector", css)

    def shown():
        return [tuple(card[:3]) for card in browser.execute_script(SHOWN)]

    def move(css, value, event="input"):
        browser.execute_script(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1]; "
            "e.dispatchEvent(new Event(arguments[2], {bubbles: true}))",
            css,
            value,
            event,
        )

    # hostile names are text, thumbnails load, the broken picture says so
    assert shown() == ranked and find("h1").text == browser.title == HOSTILE[0]
    assert find("#count").text == "8 of 8, 0 wrong, 0 fine"
    assert browser.execute_script(
        "return [document.querySelectorAll('#cards b, #cards script').length, "
        "document.scripts.length, document.images.length]"
    ) == [0, 2, 7]
    for image in browser.find_elements("css selector", "#cards img"):
        browser.execute_script("arguments[0].scrollIntoView()", image)
        until(
            lambda image=image: browser.execute_script(
                "return arguments[0].complete && arguments[0].naturalWidth > 0", image
            )
        )
    assert (
        sum(e.text == "no picture" for e in browser.find_elements("css selector", ".picture")) == 1
    )

    # filters, alone and together
    Select(find("#given")).select_by_value("0")
    assert shown() == [row for row in ranked if row[1] == names[0]] and len(shown()) == 2
    assert find("#count").text.startswith("2 of 8")
    assert {o.text for o in Select(find("#given")).options} == {
        "all classes",
        *(f"{n} ({c})" for n, c in zip(names, (2, 2, 1, 1, 1, 1), strict=True)),
    }
    assert find("#least").text == "0.569"
    move("#score", 0.85)
    assert shown() == ranked[:1] and find("#least").text == "0.850"
    Select(find("#given")).select_by_value("")
    move("#score", 0.78)
    assert shown() == ranked[:3]
    move("#score", 0)
    Select(find("#proposed")).select_by_value("5")
    assert [row[2] for row in shown()] == [names[5]]
    Select(find("#proposed")).select_by_value("")
    find("#text").send_keys("ΩΜΈΓΑ")
    assert shown() == [row for row in ranked if names[4] in row[1:]]
    find("#text").clear()
    find("#text").send_keys("nowhere")
    assert shown() == [] and find("#count").text.startswith("0 of 8")
    find("#text").clear()
    find("#text").send_keys(Keys.ENTER)  # sends no form

    # order, and decisions by mouse and by key
    Select(find("#order")).select_by_value("row")
    assert [row[0] for row in shown()] == sorted(
        row[0] for row in ranked
    ) and browser.current_url == path.as_uri()
    cards = browser.find_elements("css selector", ".card")
    cards[0].click()
    cards[1].click()
    cards[1].click()
    for _ in range(3):
        cards[2].click()
    assert [card[3] for card in browser.execute_script(SHOWN)] == ["wrong", "fine", *[""] * 6]
    cards[2].send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys("w")  # and on to the next
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("aria-label").endswith("wrong")
    browser.switch_to.active_element.send_keys("f")
    marks = {card[0]: card[3] for card in browser.execute_script(SHOWN) if card[3]}
    assert (
        list(marks.values()) == ["wrong", "fine", "wrong", "fine"]
        and find("#count").text == "8 of 8, 2 wrong, 2 fine"
    )

    def after_reload():
        browser.refresh()
        return {card[0]: card[3] for card in browser.execute_script(SHOWN) if card[3]}

    until(lambda: after_reload() == marks)  # a busy browser writes them down a moment later
    find("#export").click()
    file = until(lambda: next(browser.downloads.glob("*.csv"), None))
    assert file.name == "decisions.csv"
    table = until(lambda: list(csv.DictReader(file.read_text().splitlines())))
    given = {r["index"]: (r["label"], r["proposed"]) for r in suspects}
    assert {
        int(r["index"]): ((int(r["label"]), int(r["proposed"])), r["decision"]) for r in table
    } == {index: (given[index], mark) for index, mark in marks.items()}
    assert len(table) == 4

    # what was decided goes into the data
    better = correct_labels(data, datasets.Dataset.from_csv(str(file), cache_dir=str(tmp_path)))
    changed = np.flatnonzero(
        np.array(better["label"]) != np.array(better["corrected_label"])
    ).tolist()
    assert changed == sorted(index for index, mark in marks.items() if mark == "wrong")

    # nothing has left the page, nothing was forbidden, no script of the names has run
    asked = requests(browser)
    assert {url.split(":")[0] for url in asked} <= {
        "file",
        "data",
        "blob",
    } and path.as_uri() in asked, set(asked)
    assert browser.get_log("browser") == []
    with pytest.raises(Exception, match="no such alert"):
        _ = browser.switch_to.alert.text


# -------------------------------------------------------------------------------------------------------------- the recipe


def start(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["find_wrong_labels.py", *map(str, argv)])
    recipe = Path(__file__).parents[3] / "recipes" / "find_wrong_labels.py"
    monkeypatch.syspath_prepend(str(recipe.parent))  # as python puts it there for a script
    return runpy.run_path(str(recipe), run_name="__main__")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:cleanlab")
def test_recipe(tmp_path, monkeypatch, capsys):
    """Networks and dynamics, only the rows of a mask, true labels known; and without them."""
    pytest.importorskip("cleanlab")
    table = [row | {"exact": i % 5 != 0} for i, row in enumerate(rows(60, wrong=0.2))]
    features = datasets.Features({**FEATURES, "exact": datasets.Value("bool")})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(table, features=features).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    peers = [
        export(timm.create_model("test_resnet", num_classes=3), tmp_path / k, NAMES) for k in "ab"
    ]
    kept = [row for row in table if row["exact"]]
    errors = sum(row["label"] != row["clean"] for row in kept)
    n = np.arange(48)
    label, clean = (np.array([row[k] for row in kept]) for k in ("label", "clean"))
    seen = {
        "index": n,
        "label": label,
        "proposed": clean,
        "p_label": np.where(label == clean, 0.9, 0.2),
        "confidence": n * 0 + 0.8,
    }
    monkeypatch.setattr(
        "kd_plugins.audit.suspects.summarise",
        lambda folder: {"given": seen, "other": seen | {"label": np.roll(label, 1)}}[folder],
    )

    argv = [
        "--data",
        tmp_path / "data",
        "--where",
        "exact",
        "--output_dir",
        tmp_path / "out",
        "--networks",
        *peers,
    ]
    start(monkeypatch, *argv, "--clean", "clean", "--dynamics", "given")
    out = capsys.readouterr().out
    assert f"| by | AUROC | precision at {errors} | named wrong |" in out
    assert f"| training dynamics | 1.000 | 100.0% | {errors} | 100.0% | 100.0% |" in out
    for kind in ("html", "png", "csv", "parquet"):
        assert (
            f"out/suspects.{kind}" in out
            and (tmp_path / "out" / f"suspects.{kind}").stat().st_size > 100
        )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"] == 48 and results["suspects"] == errors
    assert (
        0 <= results["networks"]["auroc"] <= 1
        and 0 <= results["networks, cleanlab"]["precision"] <= 1
    )
    saved = datasets.Dataset.from_parquet(
        str(tmp_path / "out" / "suspects.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert len(saved) == errors and saved["proposed"][:] == [clean[i] for i in saved["index"]]

    start(monkeypatch, *argv, "--output_dir", tmp_path / "unknown")
    assert (
        "AUROC" not in capsys.readouterr().out and (tmp_path / "unknown" / "suspects.csv").exists()
    )
    for wrong, words in (
        ([*argv[:6], "--dynamics", "other"], "among the suspects: they belong to other data"),
        (argv[:6], "give --networks"),
    ):
        with pytest.raises(SystemExit, match="2"):
            start(monkeypatch, *wrong)
        assert words in capsys.readouterr().err
