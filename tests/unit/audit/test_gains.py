"""The picture of results: what each method gains over the reference."""

import runpy

from helpers.recipes import RECIPES
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pytest import approx

from kd_plugins.audit.gains import draw_gains


def drawn(monkeypatch, *args, **kwargs):
    """The panel that `draw_gains` draws, and its texts by place."""
    saved, original = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **k: (saved.append(f), original(f, *a, **k))
    )
    path = draw_gains(*args, **kwargs)
    assert path.stat().st_size > 0
    panel = saved[0].axes[0]
    return panel, {text.get_position(): text.get_text() for text in panel.texts}


RESULTS = {
    "gce": {"symmetric 0.2": [0.7, 0.9], "symmetric 0.4": [0.6], "pair": [0.5]},
    "mae": {"symmetric 0.2": [0.1], "symmetric 0.4": []},
    "ce": {"symmetric 0.2": [0.5, 0.6], "symmetric 0.4": [0.62], "pair": []},
}


def test_a_cell_is_a_gain_in_points_and_the_reference_shows_its_accuracy(tmp_path, monkeypatch):
    panel, texts = drawn(monkeypatch, RESULTS, tmp_path / "results.png")
    assert texts == {
        (0, 0): "+25.0",
        (1, 0): "-2.0",
        (2, 0): "50.0",  # nothing to compare with
        (0, 1): "-45.0",
        (0, 2): "55.0",
        (1, 2): "62.0",
    }
    assert [text.get_text() for text in panel.get_yticklabels()] == ["gce", "mae", "ce"]
    assert panel.get_xticklabels()[0].get_text() == "symmetric\n0.2"


def test_colours_tell_gains_from_losses_and_are_full_at_ten_points(tmp_path, monkeypatch):
    panel, _ = drawn(monkeypatch, RESULTS, tmp_path / "results.png")
    picture = panel.images[0]
    gain, loss, small = (to_hex(picture.cmap(picture.norm(x))) for x in (25.0, -45.0, 0.0))
    assert len({gain, loss, small}) == 3
    assert gain == to_hex(picture.cmap(picture.norm(10.0)))
    assert picture.get_array()[0, 0] == approx(25.0)
    assert picture.get_array().mask.tolist()[0] == [False, False, True]


def test_without_the_reference_cells_are_accuracies(tmp_path, monkeypatch):
    results = {"gce": {"0.2": [0.7, 0.9]}, "mae": {"0.2": [0.1]}}
    _, texts = drawn(monkeypatch, results, tmp_path / "results.png")
    assert texts == {(0, 0): "80.0", (0, 1): "10.0"}


def test_the_tables_of_the_page_are_read_whole():
    read = runpy.run_path(str(RECIPES / "experiments" / "draw_gains.py"))
    found = read["read_tables"]((RECIPES.parent / "docs" / "frozen-features.md").read_text())
    assert len(found["Food-101"]) > 30 and len(found["CIFAR-100"]) >= 10
    for data, columns in read["COLUMNS"].items():  # no title is mistyped
        assert set(found[data]["ce"]) == set(found[data]["gce"]) == set(columns)
    page = """
### Ten classes of Food-101

| method | as it is | symmetric 40% | chosen |
|---|---|---|---|
| `ce` | 1.0 | 2.0 | 1e-3 |

| method | as it is | memorised |
|---|---|---|
| `ce` | 69.4 ± 0.5 | 100 |
| `elr` | | 37 |

### Others

| method | as it is |
|---|---|
| `ce` | 3.0 |
"""
    expected = {"Food-101": {"ce": {"as it is": [approx(0.694)]}}, "CIFAR-100": {}}
    assert read["read_tables"](page) == expected
