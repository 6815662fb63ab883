"""Pictures of runs: every state of a run can be drawn, and the lines are the logged numbers."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kd_plugins.audit import plots as report


def make_log(epochs=3, peers="ab", noisy=True):
    log = []
    for step in range(1, epochs * 40 + 1):
        entry = {"step": step, "epoch": step / 40, "loss": 1.0, "chi": 2.2 - step / 100}
        for peer in peers:
            entry |= {
                f"own_{peer}": 1.0,
                f"taught_{peer}": 0.5,
                f"selected_{peer}": 0.5,
                f"r_{peer}": 0.1,
            }
            entry[f"right_{peer}"] = math.nan if step < 3 else 0.9
        log.append(entry)
        if step % 40 == 0:
            scores = {"accuracy": step / 200, "accuracy_ensemble": step / 190, "loss": 1.0}
            scores |= {f"accuracy_{peer}": step / 210 for peer in peers}
            if noisy:
                scores |= {
                    "train_memorised": 0.1,
                    "train_corrected": 0.4,
                    "train_accuracy_clean_part": 0.8,
                }
            log.append(
                {"step": step, "epoch": step / 40}
                | {f"eval_{key}": value for key, value in scores.items()}
            )
    return log


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved, original = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args: (saved.append(self), original(self, *args))[1]
    )
    return saved


def test_comparison_of_runs(tmp_path, figures):
    runs = {"CE": make_log(epochs=2), "SMKD-P + MyLC": make_log()}
    paths = report.draw(runs, tmp_path / "new")
    assert [p.name for p in paths] == [
        "curves.png",
        "selection-ce.png",
        "selection-smkd-p-mylc.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    accuracy, labels = figures[0].axes
    mean = next(
        line
        for line in accuracy.lines
        if line.get_linewidth() == 2.8 and len(line.get_xdata()) == 3
    )
    assert list(mean.get_xdata()) == [1, 2, 3] and list(mean.get_ydata()) == [0.2, 0.4, 0.6]
    assert [text.get_text() for text in figures[0].legends[0].texts] == [
        "CE: 40.0%",
        "SMKD-P + MyLC: 60.0%",
    ]
    assert len([line for line in labels.lines if len(line.get_xdata())]) == 6


def test_selection_shows_directions_threshold_and_its_ceiling(tmp_path, figures):
    report.selection(make_log(), tmp_path / "s.png", num_classes=10)
    top, *below = figures[0].axes
    names = [text.get_text() for text in top.get_legend().texts]
    assert names == [
        "a → b, share of batch",
        "b → a, share of batch",
        "a → b, right of these",
        "b → a, right of these",
    ]
    assert [ax.get_title(loc="left") for ax in below] == [
        "Threshold",
        "Certainty and trust",
        "Loss",
    ]
    assert below[0].lines[-1].get_ydata()[0] == pytest.approx(math.log(10))
    assert len(top.lines[0].get_xdata()) == 60  # 120 entries, means over two
    assert top.lines[0].get_color() == top.lines[2].get_color() != top.lines[1].get_color()


def test_keys_of_earlier_versions_are_read(tmp_path, figures):
    """A log with chi and r_a gives the same picture as one with the new names."""
    now = {"chi": "threshold", "r_a": "mean_certainty_a", "r_b": "mean_certainty_b"}
    log = [{now.get(key, key): value for key, value in entry.items()} for entry in make_log()]
    for entries in (make_log(), log):
        report.selection(entries, tmp_path / "s.png")
    for old, new in zip(*(figure.axes for figure in figures), strict=True):
        assert old.get_title(loc="left") == new.get_title(loc="left")
        for a, b in zip(old.lines, new.lines, strict=True):
            assert list(a.get_ydata()) == pytest.approx(list(b.get_ydata()), nan_ok=True)
            assert a.get_label() == b.get_label() and len(a.get_ydata()) > 0


@pytest.mark.parametrize(
    ("log", "names"),
    [
        ([], []),
        ([{"step": 1, "loss": math.nan}], []),
        (
            [{"step": 1, "epoch": 0.1, "selected_a": 0.5}],
            ["selection.png"],
        ),  # the first entry, before any evaluation
        ([{"epoch": 1, "selected_a": math.nan, "eval_accuracy": 0.5}], ["curves.png"]),
        ([{"step": 7, "eval_test_accuracy": 0.5, "eval_train_accuracy": 0.1}], ["curves.png"]),
        (make_log(peers="abc", noisy=False), ["curves.png", "selection.png"]),
    ],
)
def test_unfinished_and_partial_logs_draw_what_they_have(tmp_path, log, names):
    assert [p.name for p in report.draw(log, tmp_path)] == names


def test_named_evaluation_sets_prefer_the_one_not_trained_on(tmp_path, figures):
    report.curves(
        [{"epoch": 1, "eval_train_accuracy": 0.1, "eval_test_accuracy": 0.5}], tmp_path / "c.png"
    )
    assert figures[0].legends[0].texts[0].get_text() == "run: 50.0%"


def test_the_furthest_readable_state_of_a_folder_is_read(tmp_path):
    for folder, step in ((".", 10), ("checkpoint-9", 9), ("checkpoint-20", 20)):
        state = {"global_step": step, "log_history": [{"step": step, "loss": math.nan}]}
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text(
        '{"global_step": 30, "log'
    )  # killed while writing
    assert report.read(tmp_path)[0]["step"] == 20
    assert report.read(tmp_path / "trainer_state.json")[0]["step"] == 10
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: expected a readable trainer_state\.json"
    ):
        report.read(tmp_path / "nowhere")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install kd-plugins\[recipes\]"):
        report.curves(make_log(), tmp_path / "c.png")


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """One run, several runs, and runs whose folders have the same name."""
    for name in ("x/ce", "y/ce", "y/smkd"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").write_text(
            json.dumps({"global_step": 1, "log_history": make_log()})
        )
    monkeypatch.chdir(tmp_path)
    for runs, drawn in {
        ("x/ce",): ["curves.png", "selection.png"],
        ("x/ce", "y/smkd"): ["curves.png", "selection-ce.png", "selection-smkd.png"],
        ("y/ce", "x/ce"): ["curves.png", "selection-y-ce.png", "selection-x-ce.png"],
    }.items():
        report.main(runs)
        assert capsys.readouterr().out.split() == [
            str(Path(runs[0], "pictures", name)) for name in drawn
        ]
        assert all((tmp_path / runs[0] / "pictures" / name).exists() for name in drawn)


STATE = {"global_step": 1, "log_history": []}


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 2, "expected a readable trainer_state.json"),
        ("no JSON", 2, "expected a readable trainer_state.json"),
        (b"\xff\x00", 2, "expected a readable trainer_state.json"),
        ([1, 2], 2, "expected the state of a Trainer, with log_history"),
        ({"model_type": "vit"}, 2, "expected the state of a Trainer, with log_history"),
        (STATE | {"log_history": 3}, 2, "expected the state of a Trainer, with log_history"),
        (STATE | {"log_history": [3]}, 2, "expected the state of a Trainer, with log_history"),
        (STATE, 0, "nothing to draw"),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_what_is_no_run_is_said_in_words(tmp_path, capsys, content, code, words, folder):
    """Foreign files and missing folders give a message and exit code 2, not a traceback."""
    file = tmp_path / "trainer_state.json"
    if content is not None:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    elif folder:
        tmp_path = tmp_path / "nowhere"
    exit_code = 0
    try:
        report.main([str(tmp_path if folder else file)])
    except SystemExit as stopped:
        exit_code = stopped.code
    out, err = capsys.readouterr()
    assert exit_code == code and words in (err if code else out)
    assert "Traceback" not in err and not list(tmp_path.rglob("*.png"))


def test_help_and_no_runs(capsys):
    for argv, code in ((["--help"], 0), ([], 2), (["--whatever"], 2)):
        with pytest.raises(SystemExit) as stopped:
            report.main(argv)
        out, err = capsys.readouterr()
        assert stopped.value.code == code
        assert "usage: python -m kd_plugins.audit.plots" in (err if code else out)


def test_a_file_of_something_else_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# mine")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path / "README.md")])
    assert stopped.value.code == 2 and "README.md" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# mine"


@pytest.mark.parametrize("module", ["kd_plugins.audit.plots", "kd_plugins.report"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*is now kd_plugins:DeprecationWarning")
def test_as_a_program(tmp_path, module, monkeypatch, capsys):
    """``python -m`` runs the module under its new name and its old one."""
    monkeypatch.setattr(sys, "argv", [module, str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "expected a readable trainer_state.json" in err
    assert "Traceback" not in err and not out
