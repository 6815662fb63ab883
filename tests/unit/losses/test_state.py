"""State over the data set: the running mean by hand, MyLC.prime, and two processes that hold the
same r."""

import json
import subprocess
import sys
import types

import pytest
import torch
from helpers import reference as naive
from helpers.processes import on_ranks

from kd_plugins import SMKD, MyLC
from kd_plugins.losses.state import RunningMean, SampleTable


def feed(window, batches):
    mean = RunningMean(window)
    out = []
    for batch in batches:
        mean.update(torch.tensor(batch))
        out.append((mean.mean.item(), mean.count.item()))
    return out


def test_cumulative_then_exponential_by_hand():
    """Window 4: (1+0)/2; then (1+0+1+1)/4; then m + 2/4 (0 - m); then a short batch, m + 1/4 (1
    - m)."""
    got = feed(4, [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0]])
    assert got == [(0.5, 2), (0.75, 4), (0.375, 4), (0.375 + 0.25 * 0.625, 4)]


def test_within_the_window_it_is_the_mean_over_samples_and_not_over_batches():
    batches = [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0]]
    assert feed(9, batches)[-1] == (pytest.approx(5 / 9), 9)  # the mean of batch means is 2/3


@pytest.mark.parametrize(
    ("window", "batches", "expected"),
    [
        (
            2,
            [[1.0, 1.0, 0.0, 0.0]],
            [(0.5, 2)],
        ),  # a batch above the window counts as the window, not more
        (2, [[1.0], [0.0, 0.0, 0.0]], [(1.0, 1), (0.0, 2)]),
        (
            3,
            [[1.0, 1.0], [0.0, 0.0]],
            [(1.0, 2), (1 / 3, 3)],
        ),  # the window ends inside a batch: 1 + 2/3 (0 - 1)
        (1, [[1.0], [0.25]], [(1.0, 1), (0.25, 1)]),
    ],
)
def test_edges_of_the_window(window, batches, expected):
    assert feed(window, batches) == [(pytest.approx(m), n) for m, n in expected]


def test_what_is_not_a_number_is_not_counted():
    nan, inf = float("nan"), float("inf")
    assert feed(10, [[nan, inf], [1.0, nan], [0.0], [nan]]) == [
        (0.0, 0),
        (1.0, 1),
        (0.5, 2),
        (0.5, 2),
    ]


def test_a_window_holds_at_least_one_sample():
    for window in (0, -5):
        with pytest.raises(ValueError, match=f"window={window}"):
            RunningMean(window)


def test_precision_of_a_long_run_survives_a_cast():
    """In bfloat16 the count would stop at 256, and the mean with it."""
    mean = RunningMean(10_000).bfloat16()
    for i in range(1000):
        mean.update(torch.full((2,), float(i % 2), dtype=torch.bfloat16))
    assert mean.count.item() == 2000 and mean.mean.item() == pytest.approx(0.5, abs=1e-5)
    assert mean.mean.dtype == mean.count.dtype == torch.float32


def test_values_that_want_a_gradient_leave_none_in_the_state():
    mean = RunningMean(8)
    mean.update(torch.rand(4, requires_grad=True))
    assert not mean.mean.requires_grad and mean.mean.grad_fn is None


def test_resume_goes_on_as_if_nothing_had_happened():
    batches = [torch.randn(4, 3) * 3 for _ in range(6)]
    y = torch.zeros(4, dtype=torch.long)
    through, first, second = (MyLC(window=10) for _ in range(3))
    for z in batches:
        through(z, y)
    for z in batches[:3]:
        first(z, y)
    second.load_state_dict(first.state_dict())
    for z in batches[3:]:
        second(z, y)
    assert torch.equal(second.r, through.r)
    assert torch.equal(second.running.count, through.running.count)


# ------------------------------------------------------------------------------------------ priming


class Tiny(torch.nn.Module):
    """Logits = W x; dropout and batch norm would change them in training mode."""

    def __init__(self, as_output=False):
        super().__init__()
        self.norm, self.drop, self.head = (
            torch.nn.BatchNorm1d(5),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(5, 3),
        )
        self.as_output = as_output

    def forward(self, x):
        logits = self.head(self.drop(self.norm(x))) * 4
        return types.SimpleNamespace(logits=logits) if self.as_output else logits


@pytest.fixture
def data():
    return [torch.randn(n, 5) for n in (4, 4, 1)]  # a short last batch


def by_hand(model, data):
    """Mean certainty in eval mode over all samples."""
    model = model.eval()
    with torch.no_grad():
        logits = torch.cat([model.head(model.norm(x)) * 4 for x in data]).tolist()
    return sum(naive.sure(naive.softmax(row)) for row in logits) / len(logits)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batches", ["tuples", "dictionaries"])
@pytest.mark.parametrize("as_output", [True, False])
def test_prime_sets_r_from_one_pass(data, as_output, batches, training):
    model = Tiny(as_output).train(training)
    model.norm.eval()  # frozen, whatever the rest does
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loader = [
        (x, torch.zeros(len(x))) if batches == "tuples" else {"pixel_values": x, "labels": None}
        for x in data
    ]
    loss = MyLC(window=100)
    loss(torch.randn(7, 3), torch.zeros(7, dtype=torch.long))  # what was there is replaced
    r = loss.prime(model, loader)
    assert [m.training for m in (model, model.norm, model.drop)] == [training, False, training]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert r.item() == loss.r.item() == pytest.approx(by_hand(model, data), abs=1e-6)
    assert loss.running.count.item() == 9 and loss.training
    z = torch.randn(3, 3)
    loss.eval()(z, torch.zeros(3, dtype=torch.long))
    assert loss.stats["mean_certainty"].item() == r.item()


def test_training_goes_on_from_where_prime_left(data):
    loss = MyLC(window=12)
    r = loss.prime(Tiny(), [(x,) for x in data]).item()
    loss(torch.zeros(3, 3), torch.zeros(3, dtype=torch.long))  # three samples that know nothing
    assert loss.r.item() == pytest.approx(r * 9 / 12, abs=1e-6)


def test_prime_restores_the_mode_after_an_error():
    model = Tiny().train()
    with pytest.raises(KeyError):
        MyLC().prime(model, [{"images": torch.zeros(1, 5)}])
    assert all(m.training for m in model.modules())


def test_prime_wants_data():
    loss = MyLC()
    loss(torch.randn(7, 3), torch.zeros(7, dtype=torch.long))
    r = loss.r.item()
    with pytest.raises(ValueError, match="no batch"):
        loss.prime(Tiny(), [])
    assert loss.r.item() == r


def test_prime_of_peers(data):
    models, loss = [Tiny(), Tiny()], SMKD(MyLC(window=100))
    rs = loss.prime(models, [(x,) for x in data])
    expected = [by_hand(model, data) for model in models]
    assert [r.item() for r in rs] == pytest.approx(expected, abs=1e-6)
    assert [refine.r.item() for refine in loss.refine] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError):
        loss.prime(models[:1], [(x,) for x in data])


# ------------------------------------------------------------------------------------ two processes

SIZES = [(3, 1), (2, 4), (4, 4), (1, 2)]  # samples of rank 0 and of rank 1 in each step
WORKER = """
from kd_plugins import SMKD, MyLC
loss = SMKD(MyLC(window=12), eta=1.5, b2=0)
for step in steps:
    a, b = (mine(parts) for parts in step)
    a, b = a.requires_grad_(), b.requires_grad_()
    loss.train()
    loss((a, b), torch.zeros(len(a), dtype=torch.long)).backward()
    seen.append([v.item() for refine in loss.refine for v in (refine.r, refine.running.count)])
    if rank == 0:  # evaluation on one process only: it must not wait for the others
        loss.eval()((a, b), torch.zeros(len(a), dtype=torch.long))
"""


def test_two_processes_hold_one_state(tmp_path):
    """Equal to the last bit on both, and what one process has on the joined batch, with batches
    of unequal size."""
    results = on_ranks(
        WORKER,
        [[[torch.randn(n, 3) * s for n in sizes] for s in (1, 3)] for sizes in SIZES],
        tmp_path,
    )
    first, second, single = results
    assert first == second
    for step, (ours, theirs) in enumerate(zip(first, single, strict=True)):
        assert ours == pytest.approx(theirs, abs=1e-6)
        assert ours[1] == min(12, sum(map(sum, SIZES[: step + 1])))
    assert len({r for r, *_ in first}) == len(SIZES)  # r did move


# --------------------------------------------------------------------------------- a row per sample


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_a_table_keeps_what_was_written(shape):
    """Of two writes to one row in a batch the last counts; a row with a NaN keeps what it had."""
    table = SampleTable(5, *shape, fill=7.0)
    index, values = torch.tensor([3, 0, 3, 1]), torch.randn(4, *shape)
    table.write(index, values)
    expected = torch.full((5, *shape), 7.0)
    expected[0], expected[1], expected[3] = values[1], values[3], values[2]
    assert torch.equal(table.rows, expected)
    spoiled = values.clone()
    spoiled.view(4, -1)[1, -1] = float("nan")
    table.write(torch.tensor([2, 4, 0, 1]), spoiled)
    expected[2], expected[0], expected[1] = values[0], values[2], values[3]  # row 4 stays
    assert torch.equal(table.rows, expected)
    assert torch.equal(table.read(torch.tensor([4, 2])), expected[[4, 2]])


@pytest.mark.parametrize("index", [[5], [0, -1]])
def test_a_position_outside_the_table_is_named(index):
    table = SampleTable(5)
    for call in (lambda i: table.read(i), lambda i: table.write(i, torch.ones(len(i)))):
        with pytest.raises(
            ValueError, match=rf"index {index[-1]} is outside the table of num_samples=5"
        ):
            call(torch.tensor(index))
    with pytest.raises(ValueError, match="num_samples=0"):
        SampleTable(0)


TABLES = """
import json, sys
import torch
import torch.distributed as dist
from kd_plugins.losses.state import SampleTable
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
table = SampleTable(6, 2)
# unequal batches, and both saw sample 2
index = [torch.tensor([0, 2]), torch.tensor([2, 5, 4])][rank]
table.write(index, index[:, None] + torch.tensor([0.0, 10.0 * (rank + 1)]))
print(json.dumps(table.rows.tolist()))
dist.destroy_process_group()
"""


def test_two_processes_write_one_table(tmp_path):
    args = [sys.executable, "-c", TABLES]
    running = [
        subprocess.Popen(
            [*args, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    first, second = (json.loads(p.communicate()[0].splitlines()[-1]) for p in running)
    assert first == second == [[0, 10], [0, 0], [2, 22], [0, 0], [4, 24], [5, 25]]
