"""A device that computes shapes only: whoever waits for a value on the host is caught without a
GPU."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class NoTransfer(TorchDispatchMode):
    """Refuses a copy between devices; FakeTensorMode itself refuses what waits for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            constant = source.device.type == "cpu" and source.dim() == 0
            assert source.device == result.device or constant, f"{source.device} -> {result.device}"
        waits = name == "_linalg_check_errors" or (kwargs or {}).get("check_errors")
        assert not waits, f"{name} waits for the device"
        return result


@contextlib.contextmanager
def on_a_fake_accelerator(loss):
    """Move a loss to a 'cuda' device that cannot answer with a number; yields how to move a
    tensor."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < (2, 14) and not torch.cuda.is_available():
        pytest.skip("torch 2.8 aborts the process at a fake cuda tensor where there is no GPU")

    def fake(t):
        return torch.empty(t.shape, dtype=t.dtype, device="cuda:0")

    with FakeTensorMode(), NoTransfer():
        for module in loss.modules():
            for key, t in module._buffers.items():
                module._buffers[key] = None if t is None else fake(t)
            for key, t in module._parameters.items():
                module._parameters[key] = None if t is None else torch.nn.Parameter(fake(t))
        yield lambda t: fake(t).requires_grad_(t.requires_grad)
