"""Co-divide: against scikit-learn, loops and by hand; in Mutual and Co-teaching; state, ranks,
resume."""

import math

import numpy as np
import pytest
import torch
from helpers.processes import on_ranks
from helpers.tiny import ROWS, StopAt, difference, state, trainer, view
from sklearn.mixture import GaussianMixture

from kd_plugins import (
    CE,
    GCE,
    CoTeaching,
    GMMSelector,
    Mutual,
    MyLC,
    SelectAll,
    clean_probability,
    estimate_noise_rate,
)

# ------------------------------------------------------------------------------------- the mixture


def drawn(seed, n=4000):
    """Losses of right and wrong labels, overlapping, in any proportion."""
    rng = np.random.default_rng(seed)
    wrong = int(n * rng.uniform(0.1, 0.8))
    easy = rng.gamma(rng.uniform(0.5, 3), rng.uniform(0.1, 1), n - wrong)
    return np.concatenate([easy, rng.gamma(rng.uniform(3, 9), rng.uniform(0.3, 1), wrong)])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_mixture_of_scikit_learn(seed):
    """With the settings of the authors' code. Its k-means is not always the best split."""
    losses = drawn(seed)
    scaled = ((losses - losses.min()) / np.ptp(losses))[:, None]
    fitted = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
    expected = fitted.fit(scaled).predict_proba(scaled)[:, fitted.means_.argmin()]
    ours = clean_probability(torch.from_numpy(losses)).numpy()
    assert abs(ours - expected).max() < 0.05
    assert abs(ours - expected).mean() < 0.01
    rate = estimate_noise_rate(torch.from_numpy(losses))
    assert rate == pytest.approx(1 - expected.mean(), abs=0.01)


def test_columns_are_fitted_apart():
    losses = torch.from_numpy(np.stack([drawn(0), drawn(1)], 1))
    both = clean_probability(losses)
    torch.testing.assert_close(both[:, 0], clean_probability(losses[:, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:, 1], clean_probability(losses[:, 1]), atol=1e-5, rtol=0)


def test_two_points_by_hand():
    """Three losses of 0 and one of 1: variances are the floor 5e-4, so each owns its own."""
    w = clean_probability(torch.tensor([2.0, 2.0, 5.0, 2.0]))
    assert w.tolist() == pytest.approx([1, 1, 0, 1], abs=1e-6)


def test_equal_losses_are_all_clean():
    assert clean_probability(torch.full((5,), 0.7)).tolist() == [1.0] * 5
    assert estimate_noise_rate(torch.full((5,), 0.7)) == 0


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_losses_that_cannot_be_scaled_are_refused(bad):
    with pytest.raises(ValueError, match="losses: expected finite numbers, 0 or more"):
        clean_probability(torch.tensor([0.1, bad]))


def test_noise_rate_of_a_matrix():
    matrix = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.0, 0.4, 0.6]])
    assert estimate_noise_rate(matrix) == pytest.approx(0.7 / 3, abs=1e-6)
    assert estimate_noise_rate(matrix, [0.5, 0.5, 0.0]) == pytest.approx(0.15)
    for wrong in (torch.ones(3, 2), torch.eye(3) * 2):
        with pytest.raises(ValueError, match=r"expected losses \[N\].*got \[3, "):
            estimate_noise_rate(wrong)


# ------------------------------------------------------------------------------- as a selector


def peers(rows, wrong, sure=4.0):
    """Logits of two networks that are sure of class 0, with labels that are 1 where wrong."""
    y = torch.zeros(rows, dtype=torch.long).index_fill(0, torch.tensor(wrong), 1)
    z = torch.stack([sure + 0.1 * torch.arange(rows), torch.zeros(rows)], 1)
    return [z.requires_grad_(), (z.detach() * 0.5).requires_grad_()], y


def test_in_mutual_by_hand():
    """Each network learns its own labels, and once more those that the other finds clean."""
    zs, y = peers(6, [1, 4])
    loss = Mutual(CE(), GMMSelector(8, start=0), reduction="none")
    value = loss(zs, y, index=torch.arange(6))
    each = sum(CE(reduction="none")(z, y) for z in zs)
    right = torch.tensor([1, 0, 1, 1, 0, 1])
    torch.testing.assert_close(value, each * (1 + right))
    assert loss.select.losses.rows[6:].tolist() == [[-1, -1]] * 2
    assert loss.stats["noise_rate"].item() == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.parametrize("refine", [CE(), MyLC(window=8), GCE()])
def test_a_batch_is_judged_by_the_whole_table(refine):
    """A batch of wrong labels alone, after one of right ones; before that it looks clean."""
    zs, y = peers(8, [4, 5, 6, 7])
    loss = Mutual(refine, GMMSelector(8, start=0))
    alone = Mutual(refine, GMMSelector(8, start=0))
    for k in (slice(0, 4), slice(4, 8)):
        loss([z[k] for z in zs], y[k], index=torch.arange(8)[k])
    assert not loss.selection[0][0].any() and not loss.selection[1][0].any()
    alone([z[:1] for z in zs], y[4:5], index=torch.tensor([4]))
    assert alone.selection[0][0].all()


def test_co_teaching_without_a_noise_rate():
    """The mean is over the selected samples, and the other network's choice counts."""
    zs, y = peers(6, [1, 4])
    zs[1] = torch.where(torch.arange(6)[:, None] == 1, zs[1].flip(1), zs[1])  # b believes label 1
    with pytest.raises(ValueError, match=r"ramp=0.3, exponent=1.0: .* forget=None would ignore"):
        CoTeaching(forget=None, ramp=0.3)
    loss = CoTeaching(forget=None)
    loss.bind(num_samples=6)
    loss.set_progress(0.5)
    value = loss(zs, y, index=torch.arange(6))
    a, b = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 2, 3, 5])
    expected = CE()(zs[0][b], y[b]) + CE()(zs[1][a], y[a])
    torch.testing.assert_close(value, expected)
    assert loss.required_inputs == {"index"}


def test_all_samples_count_before_start():
    zs, y = peers(6, [1, 4])
    loss = Mutual(CE(), GMMSelector(6, start=0.1))
    for progress, selected in ((0.0, 6), (0.09, 6), (0.1, 4)):
        loss.set_progress(progress)
        loss(zs, y, index=torch.arange(6))
        assert loss.selection[0][0].sum() == selected


def test_validation_leaves_the_table_alone():
    zs, y = peers(6, [1, 4])
    loss = Mutual(CE(), GMMSelector(6, start=0))
    loss(zs, y, index=torch.arange(6))
    before = loss.select.losses.rows.clone()
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            loss.train(not mode)(zs, 1 - y, index=torch.arange(6))
    assert torch.equal(loss.select.losses.rows, before)


def test_unknown_sizes_are_named():
    loss = CoTeaching(forget=None)
    loss.set_progress(0.5)
    zs, y = peers(6, [1])
    with pytest.raises(
        RuntimeError, match=r"does not know num_samples.*bind\(num_samples=\.\.\.\)"
    ):
        loss(zs, y, index=torch.arange(6))
    loss.bind(num_samples=6)
    with pytest.raises(ValueError, match=r"num_samples=6.*num_samples=7"):
        loss.bind(num_samples=7)
    with pytest.raises(ValueError, match="index 6 is outside"):
        loss(zs, y, index=torch.arange(1, 7))
    assert Mutual(CE(), SelectAll()).bind(num_samples=6).required_inputs == frozenset()


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"threshold": 1.5}, r"threshold=1\.5"), ({"start": 30}, "start=30")]
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GMMSelector(**kwargs)


WORKER = """
from kd_plugins import CoTeaching
loss = CoTeaching(forget=None)
loss.bind(num_samples=9)
for s, step in enumerate(steps):
    a, b, y, i = (mine(parts) for parts in step)
    loss.set_progress(s / len(steps))
    loss((a.requires_grad_(), b.requires_grad_()), y, index=i).backward()
    seen.append(loss.stats["noise_rate"].item())
seen.append(loss.select.losses.rows.tolist())
"""


def test_two_processes_divide_alike(tmp_path):
    steps = []
    for _ in range(4):
        for index in ([[0, 1, 2], [3, 4]], [[5, 6], [7, 8]], [[3], [3]]):
            index = [torch.tensor(part) for part in index]
            zs = [[3 * torch.randn(len(i), 3) for i in index] for _ in range(2)]
            steps.append([*zs, [i % 3 for i in index], index])
    first, second, single = on_ranks(WORKER, steps, tmp_path)
    assert first == second == single
    assert 0 < first[-2] < 1


def test_in_the_trainer_it_finds_right_labels_and_resumes_bit_equal(tmp_path):
    """A quarter of the labels is wrong; of the selected ones fewer are."""

    def run(folder, callbacks=()):
        saving = {"save_strategy": "steps", "save_steps": 10, "num_train_epochs": 8}
        hf = {"callbacks": list(callbacks)}
        return trainer(tmp_path / folder, loss=CoTeaching(forget=None), hf=hf, **saving)

    whole, stopped = run("whole"), run("stopped", [StopAt(20)])
    whole.train()
    stopped.train()
    resumed = run("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert difference(state(whole.model), state(resumed.model)) == 0
    last = [log for log in whole.state.log_history if "right_a" in log][-6:]
    data = view()
    wrong = (data.labels != data.clean_labels).mean()
    assert np.mean([log["right_a"] for log in last]) > 1 - wrong / 2
    assert wrong / 2 < last[-1]["noise_rate"] < 2 * wrong
    rate = estimate_noise_rate(whole.model.criterion.select.losses.rows[:, 0])
    assert whole.model.criterion.select.losses.rows.shape == (ROWS, 2)
    assert wrong / 2 < rate < 2 * wrong
