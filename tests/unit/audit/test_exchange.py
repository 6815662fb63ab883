"""Suspects to Label Studio, Argilla and cleanlab's Datalab, and back."""

import base64
import json
from io import BytesIO
from xml.etree import ElementTree

import datasets
import numpy as np
import pytest
from helpers.suspects import BROKEN, HOSTILE, odd_suspects
from PIL import Image

from kd_plugins import apply_decisions, find_suspects, html_page
from kd_plugins.audit import exchange

NAMES = ["cat", "dog", "owl", "fox", "eel", "ant"]
NONE = "none of the classes"
# For the suspects in order: the answer, and what the label then is. Suspect 0 has label 0 (cat).
ANSWERS = ["dog", "dog", "cat", None, NONE]


@pytest.fixture(scope="module")
def odd():
    return odd_suspects()


def expected(suspects, data):
    """The labels after ANSWERS, by row; the picture that belongs to no class is gone."""
    labels = dict(enumerate(data["label"]))
    for row, answer in zip(suspects, ANSWERS, strict=False):
        if answer == NONE:
            del labels[row["index"]]
        elif answer:
            labels[row["index"]] = NAMES.index(answer)
    return labels


def check(decisions, odd):
    data, suspects = odd
    assert decisions["index"][:] == suspects["index"][:5]
    assert decisions["decision"][:] == ["wrong", "fine", "other", "skip", "other"]
    better = apply_decisions(data, decisions)
    assert dict(zip(better["original_row"], better["label"], strict=True)) == expected(
        suspects, data
    )


def is_picture(address):
    kind, _, content = address.partition(";base64,")
    return kind == "data:image/webp" and Image.open(BytesIO(base64.b64decode(content))).width > 0


def test_label_studio(odd):
    """Tasks with predictions as its documentation shows them; an export with annotations."""
    data, suspects = odd
    tasks = json.loads(json.dumps(exchange.to_label_studio(suspects, data, class_names=NAMES)))
    ranked = [row for row in suspects.select(range(8)) if row["index"] != BROKEN]
    assert [task["data"]["row"] for task in tasks] == [row["index"] for row in ranked]
    for task, row in zip(tasks, ranked, strict=True):
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert (result["from_name"], result["to_name"]) == ("label", "image")
        assert result["type"] == "choices"
        assert result["value"] == {"choices": [NAMES[row["proposed"]]]}
        assert prediction["score"] == pytest.approx(row["score"])
        assert task["data"]["given"] == NAMES[row["label"]] and is_picture(task["data"]["image"])
    for k, answer in enumerate(ANSWERS):
        value = {"choices": [answer]}
        result = [{"from_name": "label", "to_name": "image", "type": "choices", "value": value}]
        earlier = {"result": [result[0] | {"value": {"choices": ["eel"]}}], "was_cancelled": False}
        last = {"result": result if answer else [], "was_cancelled": answer is None}
        tasks[k]["annotations"] = [earlier, last]
    check(exchange.from_label_studio(tasks, suspects, NAMES), odd)

    # With all rows, a confirmed label is fine, also where the same class is proposed.
    agreed = suspects.filter(lambda row: row["label"] == row["proposed"])
    value = {"choices": [NAMES[agreed[0]["label"]]]}
    result = [{"from_name": "label", "to_name": "image", "type": "choices", "value": value}]
    task = {"data": {"row": agreed[0]["index"]}, "annotations": [{"result": result}]}
    assert exchange.from_label_studio([task], suspects, NAMES)["decision"][:] == ["fine"]

    config = ElementTree.fromstring(exchange.label_studio_config(HOSTILE))
    assert [e.get("value") for e in config.iter("Choice")][-1] == NONE
    assert len(list(config.iter("Choice"))) == 7
    assert config.find("Choices").get("toName") == config.find("Image").get("name") == "image"
    hosted = exchange.to_label_studio(
        suspects, data, class_names=NAMES, url=lambda row: f"https://example.com/{row}.png"
    )
    assert hosted[0]["data"]["image"] == f"https://example.com/{suspects[0]['index']}.png"
    assert len(hosted) == 8  # the broken one has an address too


def test_argilla(odd):
    """Records as Argilla 2's `Record.to_dict` has them."""
    data, suspects = odd
    records = json.loads(json.dumps(exchange.to_argilla(suspects, data, class_names=NAMES)))
    assert len(records) == 7 and is_picture(records[0]["fields"]["image"])
    first = suspects[0]
    assert records[0]["id"] == str(first["index"])
    assert records[0]["fields"]["given"] == NAMES[first["label"]]
    assert records[0]["suggestions"] == {
        "label": {"value": "dog", "score": pytest.approx(first["score"]), "agent": "kd_plugins"}
    }
    user = "00000000-0000-0000-0000-000000000000"
    for record, answer in zip(records, ANSWERS, strict=False):
        record["responses"] = {"label": [{"value": answer, "user_id": user}]}
    check(exchange.from_argilla(records, suspects, NAMES), odd)
    with pytest.raises(ValueError, match="row 99 is not among the suspects"):
        exchange.from_argilla([records[0] | {"id": "99"}], suspects, NAMES)
    records[0]["responses"]["label"][0]["value"] = "gnu"
    with pytest.raises(ValueError, match="'gnu' is none of the classes"):
        exchange.from_argilla(records, suspects, NAMES)


# cleanlab and what it loads
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_datalab(tmp_path):
    """cleanlab's own Datalab finds issues, which become suspects; ours become issues of it."""
    cleanlab = pytest.importorskip("cleanlab")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 200)
    given = np.where(np.arange(200) < 20, (labels + 1) % 6, labels)  # the first twenty are wrong
    probs = np.full((200, 6), 0.02)
    probs[np.arange(200), labels] = 0.9
    images = [Image.new("RGB", (4, 4))] * 200
    kind = datasets.ClassLabel(names=NAMES)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    data = datasets.Dataset.from_dict({"image": images, "label": given}, features=features)

    lab = cleanlab.Datalab({"y": [NAMES[k] for k in given]}, label_name="y", verbosity=0)
    lab.find_issues(pred_probs=probs[:, np.argsort(NAMES)], issue_types={"label": {}})
    suspects = exchange.from_datalab(lab, NAMES)
    assert sorted(suspects["index"][:]) == list(range(20))
    assert suspects["label"][:] == given[suspects["index"][:]].tolist()
    assert suspects["proposed"][:] == labels[suspects["index"][:]].tolist()
    assert suspects["proposed_name"][:] == [NAMES[k] for k in suspects["proposed"]]
    assert suspects["score"][:] == pytest.approx([0.98] * 20)
    assert html_page(suspects, data, tmp_path / "page.html").stat().st_size > 0
    assert "NaN" not in (tmp_path / "page.html").read_text().partition('id="data">')[2][:9000]
    assert apply_decisions(data, suspects)["label"][:] == labels.tolist()

    ours = find_suspects(given, probs)
    exchange.to_datalab(ours, lab)
    exchange.to_datalab(ours, lab.__class__({"y": given}, label_name="y", verbosity=0))  # again
    issues = lab.get_issues("suspect")
    assert np.flatnonzero(issues["is_suspect_issue"]).tolist() == sorted(ours["index"][:])
    assert issues["suspect_score"][:20].tolist() == pytest.approx([0.02] * 20)
    assert (issues["suspect_score"][20:] == 1).all()
    summary = lab.get_issue_summary("suspect")
    assert summary["num_issues"].tolist() == [20]
    assert lab.get_issues("label")["is_label_issue"].sum() == 20  # Datalab's own stay
    small = cleanlab.Datalab({"y": [0, 1]}, label_name="y", verbosity=0)
    with pytest.raises(ValueError, match="the lab 2 rows"):
        exchange.to_datalab(ours, small)
