"""Losses in torch.compile, and on a device for which the host must not wait."""

import pytest
import torch
from helpers.contract import C, batch_for, every, leaves, make, pair
from helpers.devices import on_a_fake_accelerator
from torch._dynamo.testing import CompileCounterWithBackend

from kd_plugins import Loss


def step(loss, call, batch, progress):
    """Value and gradients of one training step."""
    loss.set_progress(progress)
    value = batch(call)
    grads = torch.autograd.grad(value, leaves(batch), allow_unused=True)
    return value, [grad for grad in grads if grad is not None]


def compiled_is_eager(name, backend, steps):
    """Values, gradients and state over a schedule, in one graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    eager, inner = make(name), make(name)
    compiled = torch.compile(inner, fullgraph=True, backend=counter)
    for k in range(steps):
        x = batch_for(eager)
        x.logits = [(z.detach() * (1 + k / 4)).requires_grad_() for z in x.logits]
        progress = k / (steps - 1)
        ours, theirs = step(inner, compiled, x, progress), step(eager, eager, x, progress)
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
    torch.testing.assert_close(inner.state_dict(), eager.state_dict())
    torch._dynamo.reset()


@every
def test_compiles_whole_and_once_for_all_of_training(name):
    """Where a loss has state, also as inductor traces it, but without its code generation."""
    stateful = any(True for _ in make(name).buffers())
    compiled_is_eager(name, "aot_eager" if stateful else "eager", steps=4)


@pytest.mark.parametrize("name", ["smkd", "camkd"])
def test_inductor(name):
    compiled_is_eager(name, "inductor", steps=2)


@every
def test_never_waits_for_the_device(name):
    """No ``.item()``, ``nonzero()``, boolean index, branch on a tensor, copy to the host; seen
    without a GPU."""
    for soft in (False, True):
        loss = make(name)
        x = batch_for(loss)
        if soft:
            x.target = torch.nn.functional.one_hot(x.target, C).float()
        with on_a_fake_accelerator(loss) as move:
            loss.set_progress(0.5)
            value = x.each(move)(loss)
            assert value.device.type == "cuda" and value.shape == () and value.requires_grad


@pytest.mark.parametrize(
    "waits",
    [
        lambda z: z if z.sum() > 0 else -z,
        lambda z: z * z.sum().item(),
        lambda z: z[z > 0],
        lambda z: (z > 0).nonzero(),
        lambda z: z.detach().cpu(),
        lambda z: z.sum().detach().to("cpu"),
        lambda z: z + torch.arange(3.0).to(z.device),
        lambda z: torch.linalg.inv(z[:2, :2]),
    ],
)
def test_the_fake_accelerator_sees_who_waits(waits):
    class Waits(Loss):
        def per_sample(self, logits, target):
            return (waits if waiting else torch.relu)(logits)

    loss = Waits(reduction="none")
    with on_a_fake_accelerator(loss) as move:
        z, y = move(torch.randn(4, 3)), move(torch.zeros(4, dtype=torch.long))
        waiting = False
        assert loss(z, y).device.type == "cuda"
        waiting = True
        with pytest.raises((RuntimeError, AssertionError)):
            loss(z, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@every
def test_never_waits_for_a_real_device(name):
    expected, x = pair(name)
    loss = make(name).double().cuda()

    def move(t):
        return t.detach().cuda().requires_grad_(t.requires_grad)

    on_gpu = x.each(move)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = on_gpu(loss)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if name != "crd":  # which draws its negatives on the device
        torch.testing.assert_close(value.cpu(), x(expected))
