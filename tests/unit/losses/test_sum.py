"""Sums of losses: values, what each term gets, what does not add up."""

import pytest
import torch
from helpers.contract import C, batch_for

from kd_plugins import CE, MKD, SMKD, BootSoft, LabelSmoothing, Loss, MyLC, Sum, create_loss


def inputs():
    return torch.randn(6, C), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("weights", [(0.1, 0.9), (2, 3), (-1, 0.5)])
def test_a_sum_is_its_terms(weights):
    z, y = inputs()
    u, v = weights
    a, b = LabelSmoothing(eps=0.2), BootSoft(eps=0.3)
    total = u * a + v * b
    torch.testing.assert_close(total(z, y), u * a(z, y) + v * b(z, y))
    torch.testing.assert_close((a + b)(z, y), a(z, y) + b(z, y))
    assert total.stats["labelsmoothing_0"].item() == pytest.approx(a(z, y).item())
    assert total.stats["bootsoft_1"].item() == pytest.approx(b(z, y).item())


def test_sums_flatten():
    nested = 2 * (0.5 * CE() + LabelSmoothing()) + BootSoft() + 3.0 * (4 * CE())
    assert isinstance(nested, Sum) and nested.weights == [1.0, 2.0, 1.0, 12.0]
    assert [type(t) for t in nested.terms] == [CE, LabelSmoothing, BootSoft, CE]


def test_a_sum_of_mutual_losses():
    x = batch_for(MKD())
    a, b = MKD(eps=0.2), SMKD(CE(), b2=0)
    total = 0.5 * a + 2 * b
    assert total.num_peers == 2
    torch.testing.assert_close(x(total), 0.5 * x(a) + 2 * x(b))


def test_a_sum_hands_each_term_what_it_reads_and_state_and_progress():
    class Matches(Loss):
        def per_sample(self, logits, target, teacher):
            return (logits - teacher[0]).square().sum(-1)

    z, y = inputs()
    t = torch.randn(6, C)
    total = 0.5 * CE() + 0.25 * Matches() + create_loss("proselflc") + MyLC()
    assert total.required_inputs == {"teacher"}
    total.set_progress(0.5)
    alone = create_loss("proselflc")
    alone.set_progress(0.5)
    expected = 0.5 * CE()(z, y) + 0.25 * Matches()(z, y, teacher=t) + alone(z, y) + MyLC()(z, y)
    torch.testing.assert_close(total(z, y, teacher=t), expected)
    assert total.state_dict()["terms.3.running.count"] == 6
    with pytest.raises(TypeError, match=r"missing.*teacher"):
        total(z, y)


def test_a_sum_keeps_what_its_terms_were_made_with():
    """A reduction or a number of classes given to a term must not be dropped in silence."""
    z, y = inputs()
    a, b = CE(reduction="sum"), LabelSmoothing(reduction="sum")
    torch.testing.assert_close((0.5 * a + b)(z, y), 0.5 * a(z, y) + b(z, y))
    with pytest.raises(ValueError, match="must agree on reduction, here 'mean' and 'sum'"):
        CE(reduction="sum") + CE()
    with pytest.raises(ValueError, match="num_classes=7"):
        (CE() + CE(num_classes=7))(z, y)


def test_terms_that_want_different_averages_of_the_peers_do_not_add():
    with pytest.raises(ValueError, match=r"different decays, \[0.9, 0.999\]"):
        create_loss("pcl", ema=0.9) + create_loss("pcl", ema=0.999)
    assert (create_loss("pcl", ema=0.9) + 2 * create_loss("pcl", ema=0.9)).ema_decay == 0.9


@pytest.mark.parametrize(
    "build", [lambda: CE() + MKD(), lambda: 0.1 * SMKD() + 0.9 * (CE() + CE())]
)
def test_one_network_and_several_do_not_add(build):
    with pytest.raises(TypeError, match="cannot be added"):
        build()


@pytest.mark.parametrize(
    "build", [lambda: True * CE(), lambda: "2" * CE(), lambda: CE() + 1, lambda: [1] * CE()]
)
def test_weights_are_numbers(build):
    with pytest.raises(TypeError):
        build()


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(weight):
    with pytest.raises(ValueError, match="weight of a term"):
        CE() + weight * MyLC()
