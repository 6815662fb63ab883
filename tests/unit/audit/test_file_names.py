"""Tables name the files of the pictures, so that one can find, move or delete them."""

import datasets
import numpy as np
import pytest
from helpers.tiny import to_tensor

from kd_plugins import find_suspects, html_page
from kd_plugins.audit import with_files
from kd_plugins.data import ImageView

FILES = ["cat/a.png", "cat/b, c.png", "犬/d.png", "e.png"]


def data(paths, decoded=True):
    kind = datasets.Image() if decoded else datasets.Value("string")
    features = datasets.Features({"image": kind, "label": datasets.ClassLabel(names=["x", "y"])})
    table = {"image": paths, "label": [0, 1, 0, 1][: len(paths)]}
    return datasets.Dataset.from_dict(table, features=features)


def table(index, other):
    columns = {"index": index, "similarity": [0.9] * len(index), "other": other}
    return datasets.Dataset.from_dict(columns).select(range(len(index)))


@pytest.mark.parametrize("kind", ["pictures", "texts", "mapped", "view", "rows"])
def test_files_by_row(tmp_path, kind):
    """No file has to exist, and none is opened. Paths below the folder are relative to it."""
    paths = [str(tmp_path / name) for name in FILES[:3]] + ["/elsewhere/e.png"]
    source = data(paths, decoded=kind != "texts")
    if kind == "mapped":
        source = datasets.concatenate_datasets([source, source]).select([4, 1, 6, 3])
    if kind == "view":
        source = ImageView(source, to_tensor)
    if kind == "rows":
        source = [{"image": path, "label": 0} for path in paths]
    found = with_files(table([2, 0, 3], [1, 3, 2]), source, folder=tmp_path)
    assert found.column_names == ["index", "file", "similarity", "other", "other_file"]
    assert found["file"][:] == ["犬/d.png", "cat/a.png", "/elsewhere/e.png"]
    assert found["other_file"][:] == ["cat/b, c.png", "/elsewhere/e.png", "犬/d.png"]
    assert with_files(found, source) is found  # it has them already
    whole = with_files(table([2], [0]), source)
    assert whole["file"][:] == [paths[2]]


def test_a_folder_may_be_named_from_here_or_by_a_file_in_it(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "table.csv").touch()
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "in/", "in/table.csv"):
        for path in ("in/cat/a.png", str(tmp_path / "in/cat/a.png")):
            found = with_files(table([0], [0]), data([path]), folder=folder)
            assert found["file"][:] == ["cat/a.png"]


def test_pictures_without_a_file_have_no_column(tmp_path):
    inside = data([{"bytes": b"", "path": None}] * 2)
    arrays = [{"image": np.zeros((4, 4)), "label": 0}] * 2
    for source in (inside, arrays):
        assert (
            with_files(table([1, 0], [0, 1]), source).column_names == table([0], [0]).column_names
        )
    some = data([{"bytes": b"", "path": None}, {"bytes": b"", "path": "a.png"}])
    assert with_files(table([0, 1], [1, 0]), some)["file"][:] == [None, "a.png"]


def test_the_page_names_the_file_of_each_card(tmp_path):
    rows = data(FILES)
    probs = np.eye(2, dtype=np.float32)[[1, 1, 1, 0]]  # the second label is not doubted
    suspects = with_files(find_suspects(rows["label"], probs), rows)
    text = html_page(suspects, rows, tmp_path / "page.html").read_text(encoding="utf-8")
    assert '"files":["cat/a.png","\\u72ac/d.png","e.png"]' in text
