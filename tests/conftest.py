"""Settings for all tests."""

import gc
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


def pytest_collection_finish():
    """Take what was imported out of the search for garbage: every Trainer starts one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_report_teststatus(report, config):
    """Say at once which test failed: a run that is cut off has no summary."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if report.failed and terminal:
        terminal.ensure_newline()
        terminal.write_line(f"FAILED {report.nodeid}: {report.longreprtext[-500:]}")
