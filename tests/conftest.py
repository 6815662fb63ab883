"""Settings for all tests."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # small tensors; and test machines are shared
hypothesis.settings.register_profile(
    "kd_plugins", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("kd_plugins")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
