"""What every family keeps: labels of any integer type, state that only training moves, class
weights."""

import pytest
import torch
from helpers.contract import C, batch_for, make

from kd_plugins import list_losses
from kd_plugins.losses import loss_class

MODULES = {
    *("robust", "dmi", "transition", "sample_memory", "curriculum", "online", "online_features"),
    *("distill", "teacher_free", "distill_features", "distill_contrast", "distill_camkd"),
    *("averaged_labels", "bi_tempered", "jocor", "mixing"),
    *("distill_logits", "distill_relations"),
}
NAMES = [n for n in list_losses() if loss_class(n).__module__.rpartition(".")[2] in MODULES]
every = pytest.mark.parametrize("name", NAMES)


def test_these_are_most_losses():
    assert len(NAMES) == 48


@every
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(name, dtype):
    a, b = make(name), make(name)
    x = batch_for(a)
    assert torch.equal(x.replace(target=x.target.to(dtype))(a), x(b))
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@every
def test_boolean_labels_are_refused(name):
    loss = make(name)
    x = batch_for(loss)
    with pytest.raises(TypeError, match=r"class indices must be integers, got torch.bool"):
        x.replace(target=x.target > 0)(loss)


@every
def test_without_gradients_state_stays(name):
    """In training mode too: a validation pass under no_grad leaves tables and means alone."""
    loss = make(name)
    x = batch_for(loss)
    for trained in (False, True):
        if trained:
            x(loss)
        before = {k: v.clone() for k, v in loss.state_dict().items()}
        with torch.no_grad():
            x.map(lambda t: 2 * t)(loss)
        torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)
        assert all(not value.requires_grad and value.dim() == 0 for value in loss.stats.values())


@every
def test_class_weights(name):
    """Samples weigh as the class of their label does; the mean is divided by their weights."""
    weights = torch.tensor([2.0, 0.5, 0.0, 1.0])
    plain, weighed = make(name, reduction="none"), make(name, weight=weights)
    x = batch_for(plain)
    each = x(plain)
    if each.dim() == 0:  # a loss on the whole batch
        with pytest.raises(TypeError, match=r"DMI .*class weights have no samples"):
            x(weighed)
        return
    w = weights[x.target]
    torch.testing.assert_close(x(weighed), (w * each).sum() / w.sum())
    torch.testing.assert_close(x(make(name, weight=weights, reduction="sum")), (w * each).sum())
    soft = 0.75 * torch.nn.functional.one_hot(x.target, C) + 0.25 / C
    x, plain = x.replace(target=soft), make(name, reduction="none")
    w, each = soft @ weights, x(plain)
    torch.testing.assert_close(x(make(name, weight=weights)), (w * each).sum() / w.sum())


@every
def test_a_wrong_keyword_names_the_class_and_the_nearest_name(name):
    cls = loss_class(name)
    with pytest.raises(
        TypeError, match=rf"^{cls.__name__} has no argument 'reductoin'.*reduction\?"
    ):
        make(name, reductoin="sum")
