"""The teacher cache: figures, keys, kills, full disks, processes, workers."""

import errno
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as HFImage
from helpers.processes import child, in_group
from helpers.tiny import CLASSES, ROWS, Net, difference, rows, state, to_tensor, trainer, view
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from kd_plugins import CE, KD, PCL, Loss
from kd_plugins.data import ImageView, TeacherCache, cache_files, cache_teachers, teacher_cache
from kd_plugins.models import PeerModule
from kd_plugins.models.input_config import normalization_of

STUDENT, TEACHER = ((0.5, 0.5, 0.5), (0.25, 0.3, 0.25)), ((0.1, 0.2, 0.3), (0.5, 0.5, 0.4))


def with_cfg(net, mean, std):
    net.pretrained_cfg = {"mean": mean, "std": std}
    return net


def counted(net):
    """The network, and a list with the batch size of each of its forwards."""
    calls = []
    net.register_forward_hook(lambda *args: calls.append(args[1][0].shape[0]))
    return net, calls


def pixels_of(data, indices):
    return torch.stack([data[i]["pixel_values"] for i in indices])


def read(folder):
    return (Path(folder) / "logits.npy").read_bytes()


def test_a_teacher_whose_classes_are_in_another_order_is_refused(tmp_path):
    features = Features({"image": HFImage(), "label": ClassLabel(names=["a", "b", "c"])})
    pictures = [{"image": row["image"], "label": row["label"]} for row in rows(6)]
    data = ImageView(Dataset.from_list(pictures, features=features), to_tensor)
    teacher = Net(1)
    teacher.pretrained_cfg = {"label_names": ["b", "a", "c"]}
    with pytest.raises(ValueError, match=r"teacher 0 in another order: class 0 is 'a'.*'b'"):
        cache_teachers(data, teacher, tmp_path)
    assert not any(tmp_path.iterdir())


def test_items_hold_what_each_teacher_says(tmp_path):
    data, teachers = view(20), [Net(1), Net(2, bn=True, dropout=0.5)]
    teachers[1].train().drop.eval()
    before, modes = state(teachers[1]), [m.training for t in teachers for m in t.modules()]
    generator = torch.get_rng_state()
    cached = cache_teachers(data, teachers, tmp_path / "new" / "cache", batch_size=6)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for t in teachers for m in t.modules()] == modes and difference(
        before, state(teachers[1])
    ) == 0
    assert all(p.requires_grad and p.grad is None for t in teachers for p in t.parameters())
    assert (
        isinstance(cached, TeacherCache)
        and cached.teacher_logits.shape == (20, 2, CLASSES)
        and len(cached) == 20
    )
    for i in (0, 5, 6, 19):
        item, plain = cached[i], data[i]
        said = item.pop("teacher")
        assert said.dtype == torch.float32 and not said.requires_grad
        expected = torch.cat([t.eval()(plain["pixel_values"][None]) for t in teachers])
        torch.testing.assert_close(said, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(item, plain, atol=0, rtol=0)
        assert said[0].sub(said[1]).abs().max() > 0.01
    with pytest.raises(IndexError, match="row 20 of 20"):
        cached[20]
    assert np.load(tmp_path / "new" / "cache" / "done.npy").tolist() == [1] * 20
    key = json.loads((tmp_path / "new" / "cache" / "key.json").read_text())
    assert (
        key["data"].startswith("20 rows")
        and key["teachers"][0].startswith("Net ")
        and "to_tensor" in key["hint"]
    )


def test_all_else_is_the_views(tmp_path):
    data = view(9)
    cached = cache_teachers(data, [Net(1)], tmp_path)
    assert (
        cached.num_classes == CLASSES
        and cached.class_names == ["0", "1", "2"]
        and cached.name is None
    )
    assert cached.labels is data.labels and cached.clean_labels is data.clean_labels
    cached.set_epoch(3)
    assert data._epoch.item() == 3 and cached.broken() == []
    assert getattr(cached, "nothing", 7) == 7
    with pytest.raises(AttributeError, match="TeacherCache has no attribute '__getitems__'"):
        cached.__getitems__  # noqa: B018


def test_teachers_see_the_pixels_as_in_the_trainer(tmp_path):
    student, teacher = with_cfg(Net(1), *STUDENT), with_cfg(Net(2), *TEACHER)
    data = view(8)
    hosted = PeerModule([student], KD(), [teacher], normalization_of([data], []))
    expected, _ = hosted._run(teacher, 1, {"pixel_values": pixels_of(data, range(8))})
    cached = cache_teachers(data, [teacher], tmp_path / "a", student=student)
    torch.testing.assert_close(
        torch.from_numpy(cached.teacher_logits[:, 0].copy()), expected, atol=1e-6, rtol=1e-6
    )
    bare = cache_teachers(data, [teacher], tmp_path / "b")
    plain = teacher(pixels_of(data, range(8)))
    torch.testing.assert_close(
        torch.from_numpy(bare.teacher_logits[:, 0].copy()), plain, atol=1e-6, rtol=1e-6
    )
    assert (plain - expected).abs().max() > 0.1


def test_autocast_is_as_asked_whatever_is_on_around(tmp_path):
    data, teacher = view(8), Net(1)
    x = pixels_of(data, range(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = teacher(x).float()
        full = cache_teachers(data, [teacher], tmp_path / "full").teacher_logits[:, 0]
    torch.testing.assert_close(torch.from_numpy(full.copy()), teacher(x), atol=1e-6, rtol=1e-6)
    cached = cache_teachers(data, [teacher], tmp_path / "half", dtype=torch.bfloat16)
    assert cached.teacher_logits.dtype == np.float32
    torch.testing.assert_close(
        torch.from_numpy(cached.teacher_logits[:, 0].copy()), half, atol=1e-6, rtol=0
    )
    assert np.abs(full - cached.teacher_logits[:, 0]).max() > 1e-4


@pytest.mark.parametrize("bf16", [False, True])
def test_figures_equal_those_without_and_no_teacher_runs(tmp_path, bf16):
    (first, calls), second = counted(with_cfg(Net(5), *TEACHER)), Net(6)
    loss = 0.5 * CE() + 0.5 * KD(temperature=2)
    settings = {"bf16": bf16, "max_grad_norm": 0.5}

    def run(train, teachers):
        done = trainer(
            tmp_path / "run",
            [with_cfg(Net(1), *STUDENT)],
            loss,
            train,
            hf={"teachers": teachers},
            **settings,
        )
        done.train()
        logs = [log for log in done.state.log_history if "kd_1_weight_0" in log]
        return state(done.peers[0]), [[log["loss"], log["kd_1"]] for log in logs]

    expected, logs = run(view(), [first, second])
    assert len(calls) == len(logs) == 12
    calls.clear()
    dtype = torch.bfloat16 if bf16 else None
    cached = cache_teachers(
        view(), [first, second], tmp_path / "cache", student=with_cfg(Net(1), *STUDENT), dtype=dtype
    )
    assert sum(calls) == ROWS
    calls.clear()
    again = cache_teachers(
        view(), [first, second], tmp_path / "cache", student=with_cfg(Net(2), *STUDENT), dtype=dtype
    )
    for data in (cached, again):
        weights, told = run(data, [])
        assert difference(weights, expected) <= 1e-6
        # a log has six digits: values that differ by 1e-7 may round to neighbours
        assert told == [pytest.approx(log, abs=1.5e-5) for log in logs]
    assert not calls  # neither for a complete cache nor in training


def test_a_cached_teacher_is_handed_over_by_teacher():
    """Batches hold [B, T, C], a loss reads [T, B, C]; here B = T, so that no shape check helps."""
    seen = []

    class Seen(Loss):
        def per_sample(self, logits, target, teacher):
            seen.append(teacher)
            return logits.sum(-1)

    teacher = torch.arange(12.0).view(2, 2, 3)
    hosted = PeerModule([Net(1)], Seen())
    hosted(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), teacher=teacher)
    assert torch.equal(seen[0], teacher.transpose(0, 1))
    assert set(hosted.eval()(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), teacher=teacher)) == {
        "loss",
        "logits",
    }


class Features_(Loss):
    def per_sample(self, logits, target, teacher, teacher_features):
        return logits.sum(-1)


def test_the_trainer_refuses(tmp_path):
    cached = cache_teachers(view(), [Net(1), Net(2)], tmp_path / "cache")

    def make(loss, teachers=(), models=None, train=cached):
        return trainer(
            tmp_path / "run", models or [Net(1)], loss, train, hf={"teachers": list(teachers)}
        )

    with pytest.raises(
        ValueError, match=r"bring logits of 2 teachers, and 1 teachers are given.*not both"
    ):
        make(KD(), [Net(3)])
    with pytest.raises(
        ValueError,
        match=r"Features_ reads teacher_features, and the training data bring logits only",
    ):
        make(Features_())
    with pytest.raises(
        ValueError, match=r"averages over time, not from the teachers' logits in the training data"
    ):
        make(PCL([5, 5], CLASSES), models=[Net(1), Net(2)])
    with pytest.raises(ValueError, match=r"different numbers of classes.*'cached teachers': 3"):
        make(KD(), models=[Net(1, classes=4)])
    with pytest.raises(ValueError, match="KD reads teacher, and there are no teachers"):
        make(KD(), train=view())
    make(KD()), make(CE())  # a baseline on the same data


def embedded(n=12):
    """An HF Dataset with the encoded pictures in it."""

    def png(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = Features(image=HFImage(), label=ClassLabel(names=["a", "b", "c"]))
    return Dataset.from_dict(
        {"image": [png(r["image"]) for r in rows(n)], "label": [r["label"] for r in rows(n)]},
        features=features,
    )


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, picture):
        return to_tensor(picture) * self.by

    def __repr__(self):
        return f"Scaled({self.by})"


def rebuilt():
    """The same weights in other modules."""
    net = Net(1)
    net.drop = nn.Tanh()
    return net


def nudged():
    net = Net(1)
    net.fc.bias.data[2] += 1e-7
    return net


def of(data, transform=to_tensor, **kwargs):
    return ImageView(data, transform, **kwargs)


OTHER = {  # what differs from of(rows(12)), [Net(1)], and the parts that the error names
    "another picture": ({"view": lambda: of([*rows(11), rows(12, seed=1)[11]])}, "data"),
    "another order": ({"view": lambda: of(rows(12)[::-1])}, "data"),
    "fewer": ({"view": lambda: of(rows(11))}, "data"),
    "data and transform": ({"view": lambda: of(rows(11), Scaled(2.0))}, "data"),
    "transform": ({"view": lambda: of(rows(12), Scaled(1.0000001))}, "transform"),
    "weight": ({"teachers": lambda: [nudged()]}, "teachers"),
    "module": ({"teachers": lambda: [rebuilt()]}, "teachers"),
    "normalisation": ({"teachers": lambda: [with_cfg(Net(1), *TEACHER)]}, "teachers"),
    "one more": ({"teachers": lambda: [Net(1), Net(2)]}, "teachers"),
    "student": ({"student": lambda: with_cfg(Net(1), *STUDENT)}, "teachers"),
    "dtype": ({"dtype": lambda: torch.bfloat16}, "dtype"),
    "classes": ({"teachers": lambda: [Net(1, classes=4)]}, "teachers, classes"),
    "two parts": (
        {"teachers": lambda: [nudged()], "dtype": lambda: torch.bfloat16},
        "teachers, dtype",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_anything_else_is_refused_by_name(tmp_path, case):
    made = {"view": of(rows(12)), "teachers": [Net(1)]}
    cache_teachers(**made, folder=tmp_path)
    before = read(tmp_path)
    changed, parts = OTHER[case]
    with pytest.raises(
        ValueError,
        match=rf"differs in {parts}: .*was made for .*asked for is .*another folder, or delete it",
    ):
        cache_teachers(**made | {name: make() for name, make in changed.items()}, folder=tmp_path)
    assert read(tmp_path) == before
    cache_teachers(**made, folder=tmp_path)


def test_an_error_says_what_the_transforms_were(tmp_path):
    cache_teachers(of(rows(4), Scaled(1.0)), [Net(1)], tmp_path)
    with pytest.raises(
        ValueError, match=r"was made for .*Scaled\(1.0\).*asked for is .*Scaled\(1.5\)"
    ):
        cache_teachers(of(rows(4), Scaled(1.5)), [Net(1)], tmp_path)


def test_what_makes_no_difference_is_a_hit(tmp_path):
    net, calls = counted(Net(1))
    made = of(embedded())
    made.set_epoch(5)
    cache_teachers(made, [net], tmp_path)
    assert sum(calls) == 12 and made._epoch.item() == 5
    calls.clear()
    data = embedded()
    relabelled = data.remove_columns("label").add_column("label", np.arange(12) % 3)
    same = (
        data.select([*range(12)]),
        relabelled,
        data.shuffle(seed=0).select(np.argsort(order_of(data))),
    )
    for other in same:
        cache_teachers(of(other, seed=9), [net.train()], tmp_path, batch_size=5)
    assert not calls
    with pytest.raises(ValueError, match="differs in data"):
        cache_teachers(of(data.shuffle(seed=0)), [net], tmp_path)


def order_of(data):
    return data.add_column("row", np.arange(len(data))).shuffle(seed=0)["row"][:]


def test_a_buffer_outside_the_state_dict_counts(tmp_path):
    def normalising(mean):
        net = Net(1)
        net.register_buffer("shift", torch.full((), mean), persistent=False)
        return net

    cache_teachers(view(8), [normalising(0.5)], tmp_path)
    cache_teachers(view(8), [normalising(0.5)], tmp_path)
    with pytest.raises(ValueError, match="differs in teachers"):
        cache_teachers(view(8), [normalising(0.25)], tmp_path)


def test_files_count_by_path_size_and_time(tmp_path):
    for i, row in enumerate(rows(4)):
        Image.fromarray(row["image"]).save(tmp_path / f"{i}.png")
    data = [{"image": str(tmp_path / f"{i}.png"), "label": i % 3} for i in range(4)]
    for kind in (data, Dataset.from_list(data)):
        folder = tmp_path / type(kind).__name__
        cache_teachers(of(kind), [Net(1)], folder)
        cache_teachers(of(kind), [Net(1)], folder)
        stat = os.stat(tmp_path / "3.png")
        os.utime(tmp_path / "3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        with pytest.raises(ValueError, match="differs in data"):
            cache_teachers(of(kind), [Net(1)], folder)


@pytest.mark.parametrize("kind", [np.asarray, Image.fromarray, lambda pixels: pixels.tolist()])
def test_pictures_in_memory_count_by_their_pixels(tmp_path, kind):
    def made(by):
        data = [{"image": r["image"], "label": r["label"]} for r in rows(20)]
        data[7]["image"][3, 3, 0] += (
            by  # row 7 is not among those that the hash of the transform reads
        )
        return of([r | {"image": kind(r["image"])} for r in data])

    cache_teachers(made(0), [Net(1)], tmp_path)
    cache_teachers(made(0), [Net(1)], tmp_path)
    with pytest.raises(ValueError, match="differs in data"):
        cache_teachers(made(1), [Net(1)], tmp_path)


GENERATOR = torch.Generator()


def flip(picture):
    return to_tensor(picture).flip(-1) if torch.rand(()) < 0.5 else to_tensor(picture)


def seldom(picture):
    return to_tensor(picture) * (0.0 if random.random() < 1e-6 else 1.0)


def numpys(picture):
    return to_tensor(picture) + np.random.rand()


def private(picture):
    return to_tensor(picture) + torch.rand((), generator=GENERATOR)


@pytest.mark.parametrize("transform", [flip, seldom, numpys, private])
@pytest.mark.parametrize("n", [1, 40])
def test_a_random_transform_is_refused(tmp_path, transform, n):
    net, calls = counted(Net(1))
    with pytest.raises(
        ValueError,
        match=rf"transform draws at random.*{transform.__name__}.*belong to another crop",
    ):
        cache_teachers(view(n, transform=transform), [net], tmp_path / "cache")
    assert not calls and not (tmp_path / "cache").exists()


def test_broken_pictures_keep_their_place(tmp_path):
    data = rows(12)
    for row in (3, 4, 11):
        data[row]["image"] = b"no picture"
    cached = cache_teachers(
        ImageView(data, to_tensor, max_broken=0.5), [Net(1)], tmp_path, batch_size=5
    )
    assert [cached[i]["index"] for i in (3, 4, 5, 11)] == [5, 5, 5, 0]
    for i, j in ((3, 5), (4, 5), (11, 0)):
        torch.testing.assert_close(cached[i]["teacher"], cached[j]["teacher"], atol=1e-6, rtol=1e-6)
    assert (cached[4]["teacher"] - cached[6]["teacher"]).abs().max() > 0.01
    assert len(cached.broken()) == 3
    data[4]["image"] = rows(12)[4]["image"]
    with pytest.raises(ValueError, match="differs in data"):
        cache_teachers(ImageView(data, to_tensor, max_broken=0.5), [Net(1)], tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f: cache_teachers(rows(4), [Net(1)], f),
            TypeError,
            "must be an ImageView, got list",
        ),
        (lambda f: cache_teachers(view(8), [], f), ValueError, "no teachers"),
        (
            lambda f: cache_teachers(view(8), [Net(1)], f, dtype=torch.float32),
            ValueError,
            "dtype=torch.float32: expected",
        ),
        (
            lambda f: cache_teachers(view(8), [Net(1), Net(1, classes=5)], f),
            ValueError,
            r"numbers of classes: \[3, 5\]",
        ),
        (
            lambda f: cache_teachers(view(8), [Net(1), lying()], f),
            ValueError,
            r"teacher 1 gave logits \[8, 5\], expected \[8, 3\]",
        ),
        (
            lambda f: cache_teachers(view(8), [Net(1), spoiled()], f),
            ValueError,
            "teacher 1 gave NaN for rows 0 to 7",
        ),
    ],
)
def test_refuses(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path / "cache")
    done = tmp_path / "cache" / "done.npy"
    assert not done.exists() or not np.load(done).any()


def lying():
    net = Net(1, classes=5)
    net.num_classes = 3
    return net


def spoiled():
    net = Net(1)
    net.fc.bias.data[0] = torch.nan
    return net


def test_a_network_that_does_not_say_its_classes_is_asked(tmp_path):
    net, calls = counted(Net(1))
    del net.num_classes
    assert cache_teachers(view(8), [net], tmp_path).teacher_logits.shape == (
        8,
        1,
        CLASSES,
    ) and calls == [1, 8]


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(
        OSError, match=rf"cache in {tmp_path}/c takes 144 bytes .*only 100 are free"
    ) as caught:
        cache_teachers(view(12), [Net(1)], tmp_path / "c")
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "c" / "key.json").exists()


def test_a_disk_that_fills_up_is_an_error_that_resumes(tmp_path, monkeypatch):
    sync, left = os.fsync, [2]

    def fill_up(fd):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    whole = read_of(cache_teachers(view(12), [Net(1)], tmp_path / "whole", batch_size=4))
    monkeypatch.setattr(os, "fsync", fill_up)
    with pytest.raises(
        OSError, match=rf"cache in {tmp_path}/c takes 144 bytes .*No space left on device"
    ) as caught:
        cache_teachers(view(12), [Net(1)], tmp_path / "c", batch_size=4)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    net, calls = counted(Net(1))
    assert (
        read_of(cache_teachers(view(12), [net], tmp_path / "c", batch_size=4)) == whole
        and sum(calls) == 8
    )
    other = cache_teachers(
        view(12), [net], tmp_path / "d", batch_size=6
    )  # a block that is done in part is computed again
    assert sum(calls) == 20 and other.teacher_logits.any(-1).all()


def read_of(cached):
    return cached.path.read_bytes()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError,
        match=rf"cache in {tmp_path}/file/c takes 144 bytes and cannot be written: Not a dir",
    ):
        cache_teachers(view(12), [Net(1)], tmp_path / "file" / "c")


def test_files_that_are_lost_or_cut_short(tmp_path):
    """Marks without logits do not count; a logits.npy of unknown origin is left alone."""
    whole = read_of(cache_teachers(view(12), [Net(1)], tmp_path, batch_size=4))
    for spoil in (
        lambda: (tmp_path / "logits.npy").unlink(),
        lambda: (tmp_path / "logits.npy").write_bytes(whole[:-8]),
        lambda: (tmp_path / "done.npy").unlink(),
        lambda: (tmp_path / "logits.npy").write_bytes(b""),
    ):
        spoil()
        assert read_of(cache_teachers(view(12), [Net(1)], tmp_path, batch_size=4)) == whole
    (tmp_path / "key.json").unlink()
    with pytest.raises(ValueError, match=r"logits.npy and no key.json"):
        cache_teachers(view(12), [Net(1)], tmp_path)
    assert read(tmp_path) == whole


def traced(folder, kill=None):
    """How many lines of the cache run until ``folder`` is filled. The process ends at ``kill``."""
    files = {cache_files.__file__, teacher_cache.__file__}
    names, seen = {"claim", "_create", "_write", "logits"}, 0

    def trace(frame, event, arg):
        nonlocal seen
        if frame.f_code.co_filename not in files or frame.f_code.co_name not in names:
            return None
        seen += event == "line"
        if seen == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    usual = sys.gettrace()
    sys.settrace(trace)
    cache_teachers(view(18), [Net(1), Net(2)], folder, batch_size=4)
    sys.settrace(usual)
    return seen


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path):
    """SIGKILL at 40 lines, from the key to the last mark: marked rows are right and are kept."""
    lines = traced(tmp_path / "whole")
    whole, marked = np.load(tmp_path / "whole" / "logits.npy"), []
    for n in range(40):
        folder, kept = tmp_path / str(n), np.zeros(18, np.uint8)
        killed = child(traced, folder, 1 + n * (lines - 1) // 39)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        if (folder / "done.npy").exists():
            kept = np.load(folder / "done.npy")
            assert (np.load(folder / "logits.npy")[kept == 1] == whole[kept == 1]).all()
        net, calls = counted(Net(1))
        cache_teachers(view(18), [net, Net(2)], folder, batch_size=4)
        assert sum(calls) == 18 - kept.sum()
        assert read(folder) == read(tmp_path / "whole") and np.load(folder / "done.npy").all()
        marked.append(int(kept.sum()))
    assert marked == sorted(marked) and set(marked) == {0, 4, 8, 12, 16, 18}


def test_two_processes_share_the_work(tmp_path):
    """They write the bytes of one process, and raise the same errors."""
    (tmp_path / "file").write_text("")

    def work(rank, world):
        errors, calls = [], []

        def attempt(name, teacher):
            teacher.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
            try:
                return cache_teachers(view(18), [teacher], tmp_path / name, batch_size=4)
            except (ValueError, OSError) as error:
                errors.append(str(error))

        cached = attempt("shared", Net(1))
        filled = bool(cached.teacher_logits[:].any(-1).all())
        first = list(calls)
        attempt("shared", Net(1))
        attempt("shared", Net(2))
        attempt("mixed", Net(rank))
        attempt("file/c", Net(1))
        return [first, calls, filled, errors]

    results = in_group(work, tmp_path)
    assert [r[0] for r in results] == [[4, 4, 2], [4, 4]] and [r[1] for r in results] == [
        r[0] for r in results
    ]
    for *_, filled, errors in results:
        assert filled and len(errors) == 3
        assert "differs in teachers" in errors[0] and "processes differ in teachers" in errors[1]
        assert "takes 216 bytes and cannot be written: Not a directory" in errors[2]
    single = cache_teachers(view(18), [Net(1)], tmp_path / "single", batch_size=4)
    assert read_of(single) == read(tmp_path / "shared")


def test_processes_without_a_group_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2, but there is no process group yet"):
        cache_teachers(view(8), [Net(1)], tmp_path)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_open_the_file_by_themselves(tmp_path, monkeypatch, context, workers):
    monkeypatch.chdir(tmp_path)
    cached = cache_teachers(view(18), [Net(1), Net(2)], "cache", num_workers=1)
    loader = DataLoader(cached, 5, num_workers=workers, multiprocessing_context=context)
    monkeypatch.chdir("/")  # a relative folder stays where it was
    said = torch.cat([batch["teacher"] for batch in loader])
    assert torch.equal(said, torch.from_numpy(cached.teacher_logits.copy()))
    again = pickle.loads(pickle.dumps(cached))
    assert torch.equal(again[3]["teacher"], said[3]) and isinstance(again.teacher_logits, np.memmap)


def test_a_pickle_holds_no_logits(tmp_path):
    data, teacher = view(48), Net(1, classes=3)
    teacher.fc = nn.Linear(24, 3000)
    teacher.num_classes = 3000
    cached = cache_teachers(data, [teacher], tmp_path)
    assert (
        cached.teacher_logits.nbytes > 500_000
        and len(pickle.dumps(cached)) < len(pickle.dumps(data)) + 1000
    )


def test_the_old_name():
    with pytest.warns(
        DeprecationWarning, match=r"CachedTeachers is now kd_plugins.data.TeacherCache"
    ):
        from kd_plugins.data import CachedTeachers
    assert CachedTeachers is TeacherCache
