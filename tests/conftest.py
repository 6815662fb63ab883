"""Settings for all tests."""

import os
import signal

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # its workers ignore Ctrl-C, and so would what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # small tensors; and test machines are shared
hypothesis.settings.register_profile(
    "kd_plugins", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("kd_plugins")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
