"""The picture of results: a dot is a seed, and the line is the reference."""

from matplotlib.figure import Figure

from kd_plugins.audit.dots import draw_dots


def test_dots_and_the_line_of_the_reference(tmp_path, monkeypatch):
    results = {"gce": {"0.2": [0.7, 0.9], "0.4": [0.6]}, "ce": {"0.2": [0.5, 0.6], "0.4": []}}
    saved, original = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, p: (saved.append(f), original(f, p)))
    path = draw_dots(results, tmp_path / "results.png", reference="ce")
    assert path.stat().st_size > 5000
    left, right = saved[0].axes
    assert [[round(x) for x in line.get_xdata()] for line in left.lines] == [
        [50, 60],
        [70, 90],
        [55, 55],
    ]
    assert [list(line.get_ydata()) for line in left.lines][:2] == [[0, 0], [1, 1]]
    assert [t.get_text() for t in left.get_yticklabels()] == ["ce", "gce"]
    assert [len(line.get_xdata()) for line in right.lines] == [0, 1]  # no line without a figure
