"""``kd-plugins suspects PICTURES``: wrong labels from a folder of pictures, without training."""

import csv
import re
import shutil

import datasets
import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from kd_plugins import cli
from kd_plugins.audit.out_of_sample import _Task
from kd_plugins.data.cache_files import CacheFiles

NAMES = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder per class. The brightest channel tells the class; file names that begin with x are
    in the wrong folder."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for k, name in enumerate(NAMES):
        (folder / name).mkdir()
        for i in range(40):
            wrong = i % 8 == 0
            pixels = rng.integers(0, 90, (16, 16, 3))
            pixels[..., (k + wrong) % 3] += 120
            file = f"{'x' if wrong else 'a'}{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / file)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return f"test_resnet={path}"


def test_weights_with_another_head_are_refused(pictures, tmp_path, capsys):
    """The head is not used, but a file that fits only in part could be the wrong network's."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=37).state_dict(), weights)
    argv = ["suspects", str(pictures), "--backbone", f"test_resnet={weights}"]
    with pytest.raises(SystemExit):
        cli.main([*argv, "--output", str(tmp_path)])
    assert "do not fit the network" in capsys.readouterr().err


def suspects_of(table):
    return datasets.Dataset.from_parquet(str(table), keep_in_memory=True)


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_wrong_folders_are_found(pictures, backbone, tmp_path, capsys):
    argv = ["suspects", str(pictures), "--backbone", backbone, "--side", "32"]
    cli.main([*argv, "--output", str(tmp_path)])
    out = capsys.readouterr().out
    kinds = ("suspects.html", "suspects.parquet", "suspects.csv", "suspects.png", "noise.png")
    for name in (*kinds, "classes.csv", "duplicates.csv", "outliers.csv"):
        assert f"{tmp_path / name}\n" in out and (tmp_path / name).stat().st_size > 50
    found = suspects_of(tmp_path / "suspects.parquet")
    rows = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")
    names = [rows.with_format("arrow")["image"][i]["path"].as_py() for i in found["index"]]
    assert sum("/x" in name for name in names[:15]) >= 13
    for row in found:
        assert all(rows[k]["label"] == row["proposed"] for k in row["neighbours"])
    assert "neighbours" in (tmp_path / "suspects.csv").read_text().splitlines()[0]
    files = [str(path.relative_to(pictures)) for path in sorted(pictures.glob("*/*"))]
    for name in ("suspects.csv", "outliers.csv", "duplicates.csv"):
        table = rows_of(tmp_path / name)
        assert all(row["file"] == files[int(row["index"])] for row in table)
        assert name == "duplicates.csv" or len(table) > 10
    assert re.search(r'"files":\["(cat|dog|owl)/', (tmp_path / "suspects.html").read_text())
    assert re.search(r"\d+ pairs of nearly the same picture have different labels", out)
    count = int(re.search(r"About (\d+) of 120 labels are wrong", out)[1])
    assert 10 <= count <= 22
    assert re.search(r"\d+\.\d% of dog are labelled cat", out)
    table = rows_of(tmp_path / "classes.csv")
    assert [row["class"] for row in table] == NAMES
    assert sum(float(row["wrong"]) for row in table) == pytest.approx(count, abs=0.7)
    assert [row["mostly"] for row in table] == ["dog", "owl", "cat"]


def test_killed_in_features_and_in_folds(pictures, backbone, tmp_path, monkeypatch):
    """Each batch of features is written once, each fold predicted once; the result is the same."""
    argv = ["suspects", str(pictures), "--backbone", backbone, "--side", "32", "--batch_size", "16"]
    cli.main([*argv, "--output", str(tmp_path / "whole")])
    done = {"features": [], "folds": []}

    def dies(kind, method, at):
        def once(self, *args):
            if len(done[kind]) == at and "killed" not in done[kind]:
                done[kind].append("killed")
                raise KeyboardInterrupt
            result = method(self, *args)
            done[kind].append(args[0] if kind == "features" else args[-1])
            return result

        return once

    monkeypatch.setattr(CacheFiles, "write", dies("features", CacheFiles.write, 3))
    monkeypatch.setattr(_Task, "predict", dies("folds", _Task.predict, 4))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cli.main([*argv, "--output", str(tmp_path / "killed")])
    cli.main([*argv, "--output", str(tmp_path / "killed")])
    cli.main([*argv, "--output", str(tmp_path / "killed")])  # there is nothing left to compute
    starts, folds = ([x for x in done[kind] if x != "killed"] for kind in ("features", "folds"))
    assert sorted(starts) == list(range(0, 120, 16)) and sorted(folds) == list(range(15))
    one, two = (suspects_of(tmp_path / k / "suspects.parquet") for k in ("whole", "killed"))
    assert one["index"][:] == two["index"][:] and one["score"][:] == two["score"][:]


def test_csv_and_probabilities_of_ones_own(pictures, tmp_path, capsys):
    """A CSV file with paths beside the pictures, and probabilities [N, C] in a file."""
    files = sorted(pictures.glob("*/*.png"))
    with open(pictures / "table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "label"])
        table.writerows([path.relative_to(pictures), path.parent.name] for path in files)
    labels = np.array([NAMES.index(path.parent.name) for path in files])
    wrong = np.array([path.name.startswith("x") for path in files])
    probs = np.full((120, 3), 0.02, np.float32)
    probs[np.arange(120), (labels + wrong) % 3] = 0.96
    np.save(tmp_path / "probs.npy", probs)
    argv = ["suspects", str(pictures / "table.csv"), "--probs", str(tmp_path / "probs.npy")]
    cli.main([*argv, "--output", str(tmp_path / "out")])
    found = suspects_of(tmp_path / "out" / "suspects.parquet")
    assert sorted(found["index"]) == np.flatnonzero(wrong).tolist()
    assert found["label_name"][0] in NAMES
    few = "15 of 120 labels are suspected, another class is more probable:"
    out = capsys.readouterr().out
    assert few in out and "counts small doubts about all labels too" in out
    cli.main([*argv, "--output", str(tmp_path / "all"), "--all_rows"])
    ranked = suspects_of(tmp_path / "all" / "suspects.parquet")
    assert len(ranked) == 120 and ranked["index"][:15] == found["index"][:]
    assert few in capsys.readouterr().out  # the page shows these 15
    (pictures / "table.csv").unlink()


def test_pictures_that_cannot_be_read(pictures, backbone, tmp_path, capsys):
    """A few are named and left out of all totals. Many are refused in one line, also by workers."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    for name in ("cat/a1.png", "owl/a3.png"):
        (folder / name).write_bytes(b"not a picture")
    argv = ["suspects", str(folder), "--backbone", backbone, "--side", "32"]
    argv += ["--output", str(tmp_path / "out")]
    cli.main(argv)
    out = capsys.readouterr().out
    assert "2 of 120 pictures are left out, they cannot be read:\n" in out
    assert f"  {folder / 'cat/a1.png'}\n  {folder / 'owl/a3.png'}\n" in out
    assert re.search(r"About \d+ of 118 labels are wrong", out)
    assert re.search(r"\d+ of 118 labels are suspected", out)
    argv[-1] = str(tmp_path / "refused")
    for more in (["--num_workers", "2"], ["--num_workers", "0"]):
        with pytest.raises(SystemExit) as error:
            cli.main([*argv, "--max_broken", "0.01", *more])
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.value.code == 2
        assert line.startswith("2 of 120 pictures cannot be read, more than max_broken=1.00%: ")
        assert line.endswith("or allow a larger share with max_broken, such as 0.1")


def test_refusals(pictures, tmp_path, capsys):
    """Each in one line, before anything is computed."""
    np.save(tmp_path / "wide.npy", np.full((120, 4), 0.25, np.float32))
    (tmp_path / "one").mkdir()
    shutil.copytree(pictures / "cat", tmp_path / "one" / "cat")
    flat, wide = tmp_path / "one" / "cat", tmp_path / "wide.npy"
    nope = f"test_resnet={tmp_path / 'nope.safetensors'}"
    cases = {
        r"^probs: expected \[120, 3\], .* got float32 \[120, 4\]": [pictures, "--probs", wide],
        r"^backbone '.*': there is no file .*nope.safetensors$": [pictures, "--backbone", nope],
        "no classes, only pictures: expected a folder per class, at least two": [flat],
        "a folder per class, at least two": [tmp_path / "one"],
    }
    for words, argv in cases.items():
        with pytest.raises(SystemExit) as error:
            cli.main(["suspects", *map(str, argv), "--output", str(tmp_path / "out")])
        assert error.value.code == 2
        assert re.search(words, capsys.readouterr().err.strip().splitlines()[-1]), words
