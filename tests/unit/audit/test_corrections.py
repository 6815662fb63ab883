"""Decisions on suspects, applied: labels corrected, rows dropped or down-weighted, told in
files."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from helpers.suspects import FEATURES, NAMES, encoded
from PIL import Image

from kd_plugins import apply_decisions, correct_labels, drop_suspects, read_decisions
from kd_plugins.audit import write_corrected
from kd_plugins.audit.decisions import data_signature
from kd_plugins.data import find_column

LABELS = [0, 1, 2, 0, 1, 2, 0, 1]
HEAD = "index,label,proposed,decision,new_label,data"
DECIDED = ["0,0,1,wrong,1,", "1,1,2,fine,1,", "2,2,0,other,1,", "3,0,2,skip,,", "4,1,0,other,,"]
BETTER = [1, 1, 1, 0, None, 2, 0, 1]  # None: belongs to no class
SIGNATURE = data_signature(8, np.array(LABELS))


@pytest.fixture
def data(tmp_path):
    """Eight pictures in files of their own, which the data set knows by path."""
    paths = []
    for k in range(8):
        paths.append(str(tmp_path / f"{k}.png"))
        Image.new("RGB", (8, 8), (30 * k, 0, 0)).save(paths[-1])
    table = {"image": paths, "label": LABELS, "clean": [0] * 8}
    return datasets.Dataset.from_dict(table, features=FEATURES)


@pytest.fixture
def decisions(tmp_path):
    return write(tmp_path / "decisions.csv", [line + SIGNATURE for line in DECIDED])


def write(path, lines, head=HEAD):
    path.write_text("\n".join([head, *lines, ""]))
    return path


def test_each_decision_by_hand(data, decisions):
    table = read_decisions(decisions)
    better = apply_decisions(data, table)
    assert better["label"][:] == [k for k in BETTER if k is not None]
    assert better["original_row"][:] == [0, 1, 2, 3, 5, 6, 7]
    assert better["given_label"][:] == [LABELS[k] for k in better["original_row"]]
    assert better["decision"][:] == ["wrong", "fine", "other", "skip", "", "", ""]
    assert better.features["label"] == data.features["label"]
    assert find_column(better, "label") == "label"  # a run finds it without being told

    dropped = apply_decisions(data, table, how="drop")
    assert dropped["original_row"][:] == [1, 3, 5, 6, 7] and dropped["label"][:] == [1, 0, 2, 0, 1]
    assert drop_suspects(data, table)["label"][:] == [1, 0, 2, 0, 1]

    weighted = apply_decisions(data, table, how="weight", weight=0.25)
    assert weighted["weight"][:] == [0.25, 1, 0.25, 1, 0.25, 1, 1, 1]
    assert weighted["label"][:] == LABELS
    with pytest.raises(ValueError, match="row 4 belongs to no class by its decision"):
        correct_labels(data, table)
    assert correct_labels(data, table.select(range(4)))["corrected_label"][:5] == [1, 1, 1, 0, 1]


@pytest.mark.parametrize("columns", [6, 5, 4], ids=["all", "no data", "no new_label"])
def test_the_decisions_of_the_page_on_wrong_labels(tmp_path, columns):
    """They are as a user would write them; the last two columns may be missing."""
    page = Path(__file__).parents[3] / "docs" / "wrong-labels.md"
    block = page.read_text(encoding="utf-8").split("```text\nindex,")[1].split("\n```")[0]
    head, *lines = block.splitlines()
    lines = [",".join(x.split(",")[:columns]) for x in lines if columns > 4 or "other" not in x]
    path = write(tmp_path / "own.csv", lines, "index," + ",".join(head.split(",")[: columns - 1]))
    labels = np.zeros(300, np.int64)
    labels[[248, 98, 17, 203]] = 5, 1, 3, 3
    features = datasets.Features({"label": datasets.ClassLabel(num_classes=6)})
    data = datasets.Dataset.from_dict({"label": labels}, features=features)
    applied = apply_decisions(data, read_decisions(path))
    if columns == 4:
        assert len(applied) == 300
        labels[248] = 2
    else:
        assert 203 not in applied["original_row"][:] and len(applied) == 299
        labels[[248, 17]] = 2, 4
    assert applied["label"][:] == labels[applied["original_row"][:]].tolist()


# datasets 5.0 does not close the file of from_csv
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_csv_reader_of_datasets_gives_the_same(data, decisions, tmp_path):
    table = datasets.Dataset.from_csv(str(decisions), cache_dir=str(tmp_path / "cache"))
    ours, theirs = apply_decisions(data, read_decisions(decisions)), apply_decisions(data, table)
    assert ours.remove_columns("image")[:] == theirs.remove_columns("image")[:]


def test_a_table_saved_by_a_spreadsheet_or_by_pandas(data, decisions, tmp_path):
    expected = read_decisions(decisions)[:]
    table = pd.read_csv(decisions)
    assert table["new_label"].dtype == float  # for it has empty cells
    for separator in ",;\t":
        table.to_csv(path := tmp_path / "saved.csv", index=False, sep=separator)
        assert read_decisions(path)[:] == expected


def test_files_that_were_renamed_within_their_class(data, tmp_path):
    """Rows and labels are the same, and yet row 3 is another picture."""
    lines = ["3,0,2,wrong,2,,moved/elsewhere/3.png", "4,1,0,fine,1,,"]
    decisions = read_decisions(write(tmp_path / "d.csv", lines, HEAD + ",file"))
    assert apply_decisions(data, decisions)["label"][3] == 2
    renamed = data.select([6, 1, 2, 0, 4, 5, 3, 7])
    assert renamed["label"][:] == LABELS
    with pytest.raises(ValueError, match=r"row 3 is the file .*/0.png, and .*/3.png among"):
        apply_decisions(renamed, decisions)
    with pytest.raises(ValueError, match="files were added, removed or renamed"):
        correct_labels(renamed, decisions)


def test_a_second_round_keeps_the_first_labels(data, decisions, tmp_path):
    once = apply_decisions(data, read_decisions(decisions))
    lines = ["0,1,2,wrong,2,", "5,0,1,fine,0,"]
    again = apply_decisions(once, read_decisions(write(tmp_path / "again.csv", lines)))
    assert again["label"][:] == [2, 1, 1, 0, 2, 0, 1]
    assert again["given_label"][:] == once["given_label"][:]
    assert again["original_row"][:] == once["original_row"][:]
    assert again["decision"][:] == ["wrong", "fine", "other", "skip", "", "fine", ""]
    with pytest.raises(ValueError, match="8 rows, these have 7"):
        apply_decisions(once, read_decisions(decisions))


def test_columns_that_would_be_lost_are_refused(data, decisions):
    """They have the names of those that tell what was changed."""
    table = read_decisions(decisions).remove_columns("data")
    own = data.add_column("given_label", LABELS)
    for label in ("label", "given_label"):
        with pytest.raises(ValueError, match=r"the data have a column 'given_label'.*Rename it"):
            apply_decisions(own, table, label=label)
    assert apply_decisions(own.rename_column("given_label", "mine"), table)["mine"][0] == 0


def test_other_splits_may_have_rows_without_a_label(data, decisions, tmp_path):
    hidden = data.map(lambda row: {"label": -1})
    splits = datasets.DatasetDict({"train": data, "test": hidden})
    write_corrected(splits, decisions, tmp_path / "out")
    stored = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert stored["test"]["label"][:] == [-1] * 8 and stored["test"]["decision"][:] == [""] * 8
    assert stored["train"]["label"][:] == [k for k in BETTER if k is not None]


def test_a_second_round_keeps_the_first_weights(data, tmp_path):
    lines = ["0,0,1,wrong,1,"], ["3,0,1,wrong,1,"]
    for k, line in enumerate(lines):
        decisions = read_decisions(write(tmp_path / f"{k}.csv", line))
        data = apply_decisions(data, decisions, how="weight", weight=0.25)
    assert data["weight"][:] == [0.25, 1, 1, 0.25, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "lines, words",
    [
        (["0,0,1,wrong,1,9-ab"], "made for data of 9 rows, these have 8: they would change the"),
        (["0,0,1,wrong,1,8-ab"], "made for data of 8 rows with other labels than these"),
        (["0,2,1,wrong,1,"], "row 0 has label 0 in column 'label', and 2 among the suspects"),
        (["8,0,1,wrong,1,"], "row 8, the data set 8 rows"),
        (["0,0,1,maybe,1,"], "row 0 has the decision 'maybe'"),
        (["0,0,1,wrong,1,", "0,0,1,fine,0,"], "row 0 has two decisions"),
        (["0,0,1,other,0,"], "row 0 is marked wrong, but the proposed label is its own, 0"),
        (["0,0,1,other,7,"], "Label 7 at position 0: labels go from 0 to 2"),
        (["0,cat,1,other,7,"], "'cat' in column 'label'; expected an integer"),
    ],
)
def test_refused(data, tmp_path, lines, words):
    path = write(tmp_path / "decisions.csv", lines)
    with pytest.raises(ValueError, match=words):
        write_corrected({"train": data}, path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_other_refusals(data, decisions, tmp_path):
    with pytest.raises(ValueError, match=r"has no column 'index', only \['row'\]"):
        read_decisions(write(tmp_path / "other.csv", ["0"], "row"))
    with pytest.raises(ValueError, match="how='remove': expected one of correct, drop, weight"):
        apply_decisions(data, read_decisions(decisions), how="remove")
    with pytest.raises(ValueError, match="there is no column 'new_label'"):
        apply_decisions(data, read_decisions(decisions).remove_columns("new_label"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full exists already: name a new folder"):
        write_corrected({"train": data}, decisions, tmp_path / "full")


def test_written_data_are_whole_and_tell_what_was_changed(data, decisions, tmp_path):
    """Pictures come along, other splits too; the folder loads by its name alone."""
    out = tmp_path / "new" / "better"
    splits = datasets.DatasetDict({"train": data, "test": data.select([7, 1])})
    figures = write_corrected(splits, decisions, out, source=str(tmp_path))
    assert figures == {"before": 8, "after": 7, "changed": 3}
    for k in range(8):
        (tmp_path / f"{k}.png").unlink()  # the written data hold them
    stored = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert stored["test"]["label"][:] == [1, 1] and stored["test"]["decision"][:] == ["", ""]
    train = stored["train"]
    assert train["label"][:] == [k for k in BETTER if k is not None]
    assert [p.getpixel((0, 0))[0] // 30 for p in train["image"]] == train["original_row"][:]
    assert train.features["label"].names == NAMES

    told = json.loads((out / "provenance.json").read_text())
    assert told["data"] == str(tmp_path) and told["how"] == "correct" and told["split"] == "train"
    assert told["decisions"] == "decisions.csv" and told["data_before"] == SIGNATURE
    assert told["data_after"] == data_signature(7, np.array(train["label"]))
    assert (out / "decisions.csv").read_bytes() == decisions.read_bytes()
    with open(out / "changes.csv", newline="") as file:
        assert [list(row.values()) for row in csv.DictReader(file)] == [
            ["0", "0.png", "0", "cat", "1", "dog", "wrong", "corrected"],
            ["2", "2.png", "2", "owl", "1", "dog", "other", "corrected"],
            ["4", "4.png", "1", "dog", "", "", "other", "dropped"],
        ]
    assert encoded(train[0]["image"]) != encoded(train[1]["image"])
