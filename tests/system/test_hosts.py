"""Two hosts, each a network namespace of its own, in one run; and one that is cut off.

Each host has the agent that torchrun starts, with torchrun's default rendezvous, by the first
host's address. With ``c10d`` the survivor ends as soon, but the agent of the host that is cut off
waits for the store on the other one for minutes after its own process has ended.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers.processes import child
from helpers.tiny import difference, trainer
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import TrainerCallback

TIMEOUT = 15  # seconds a process waits for another (ddp_timeout)
NEW_NETWORK = 0x40000000  # CLONE_NEWNET


class Slow(TrainerCallback):
    """Time to pull a cable."""

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.1)


def work(folder, per_device):
    settings = {
        "per_device_train_batch_size": per_device,
        "max_steps": 24,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    run = trainer(folder, hf={"callbacks": [Slow()]}, ddp_timeout=TIMEOUT, **settings)
    run.train(resume_from_checkpoint=True)
    run.save_model(str(Path(folder, "end")))


def work_on_a_host(folder):
    work(folder, 4)
    torch.distributed.barrier()  # nobody leaves while the other still talks to it


def agent(name, rank, folder):
    """What ``ip netns exec NAME torchrun --nnodes 2 --node_rank RANK ...`` does."""
    with open(f"/var/run/netns/{name}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), NEW_NETWORK) == 0
    config = LaunchConfig(
        run_id="pair",
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        rdzv_backend="static",
        rdzv_endpoint="10.77.0.1:29411",
        rdzv_configs={"rank": rank},
        max_restarts=0,
        start_method="fork",  # nothing has to be imported again
    )
    elastic_launch(config, work_on_a_host)(folder)


def ip(*args):
    return subprocess.run(["ip", *args], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """The names of two namespaces with a cable between them."""
    names = [f"kd{os.getpid()}{side}" for side in "ab"]
    cable = f"link add kd0 netns {names[0]} type veth peer name kd1 netns {names[1]}"
    steps = [("netns", "add", name) for name in names] + [cable.split()]
    for k, name in enumerate(names):
        steps += [("-n", name, "addr", "add", f"10.77.0.{k + 1}/24", "dev", f"kd{k}")]
        steps += [("-n", name, "link", "set", device, "up") for device in ("lo", f"kd{k}")]
    try:
        if not shutil.which("ip") or any(ip(*step).returncode for step in steps):
            pytest.skip("network namespaces need root and iproute2")
        yield names
    finally:
        if shutil.which("ip"):
            for name in names:
                for process in running(name):
                    os.kill(process, signal.SIGKILL)
                ip("netns", "del", name)


def running(host):
    """Agents and workers: killing an agent would leave its workers."""
    return [int(process) for process in ip("netns", "pids", host).stdout.split()]


def start(hosts, folder):
    """An agent on both hosts, whose output goes into files."""
    return [
        child(
            agent,
            *(name, k, folder),
            log=f"{folder}-{k}.log",
            env={"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"kd{k}"},
        )
        for k, name in enumerate(hosts)
    ]


def test_two_hosts_are_one_run_and_a_cut_cable_ends_it(hosts, tmp_path):
    """As one process on the same batches. When one is cut off, both end with an error after
    ddp_timeout and leave nothing running; started again in the same way, the run resumes."""
    one, two = tmp_path / "one", tmp_path / "two"
    work(one, 8)
    logs = [Path(f"{two}-{k}.log") for k in range(2)]

    def until(done, ends=None):
        """Nobody may end before, unless with the exit code ``ends``."""
        while not done():
            fine = all(p.exitcode in (None, ends) for p in processes)
            assert fine, [log.read_text()[-3000:] for log in logs]
            time.sleep(0.02)

    processes = start(hosts, two)
    until((two / "checkpoint-8" / "trainer_state.json").exists)
    ip("-n", hosts[1], "link", "set", "kd1", "down")
    cut = time.monotonic()
    for host, process, log in zip(hosts, processes, logs, strict=True):
        # far above what a busy machine takes: a process that waits for ever fails here
        process.join(timeout=TIMEOUT + 300)
        assert process.exitcode not in (None, 0)
        print(f"ended {time.monotonic() - cut:.1f} s after the cut")
        said = log.read_text()
        # torch 2.8 prints it where stderr was when torch was imported
        elsewhere = torch.__version__ < (2, 9)
        assert f"Timed out waiting {TIMEOUT}000ms" in said or "onnection" in said or elsewhere
        assert not running(host)
    assert not (two / "end").exists()

    ip("-n", hosts[1], "link", "set", "kd1", "up")
    processes = start(hosts, two)
    # an agent waits five minutes for one that failed
    until(lambda: all(p.exitcode == 0 for p in processes), ends=0)
    assert 0 < logs[0].read_text().count("'loss'") <= 24 - 8
    ends = [load_file(folder / "end" / "model.safetensors") for folder in (one, two)]
    assert difference(*ends) < 1e-5
