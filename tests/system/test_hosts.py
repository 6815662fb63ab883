"""Two hosts, each a network namespace of its own, in one run through torchrun's rendezvous; and
one that is cut off.

The rendezvous is torchrun's default, by the first host's address. With ``--rdzv_backend c10d``
the survivor ends as soon, but the
agent of the host that is cut off waits for the store on the other one for minutes after its own
process has ended.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import PYTHONPATH, leave
from helpers.tiny import difference, trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

TIMEOUT = (
    30  # seconds a process waits for another (ddp_timeout); importing takes long on a busy machine
)


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


if __name__ == "__main__":
    work(sys.argv[1], 4)
    leave()


def ip(*args):
    return subprocess.run(["ip", *args], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """The names of two namespaces with a cable between them."""
    names = [f"kd{os.getpid()}{side}" for side in "ab"]
    steps = [("netns", "add", name) for name in names]
    steps += [
        (
            "link",
            "add",
            "kd0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "kd1",
            "netns",
            names[1],
        )
    ]
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
    """torchrun on both hosts; the processes, whose output goes into files."""
    processes = []
    for k, name in enumerate(hosts):
        command = [
            "ip",
            "netns",
            "exec",
            name,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
        ]
        command += ["--node_rank", str(k), "--master_addr", "10.77.0.1", "--master_port", "29411"]
        env = os.environ | {
            "PYTHONPATH": PYTHONPATH,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": f"kd{k}",
        }
        with open(f"{folder}-{k}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, __file__, str(folder)], stdout=log, stderr=subprocess.STDOUT, env=env
                )
            )
    return processes


def test_two_hosts_are_one_run_and_a_cut_cable_ends_it(hosts, tmp_path):
    """As one process on the same batches. When one is cut off, both end with an error after
    ddp_timeout and leave nothing running; started again by the same commands, the run resumes."""
    one, two = tmp_path / "one", tmp_path / "two"
    work(one, 8)
    logs = [Path(f"{two}-{k}.log") for k in range(2)]

    def until(done, ends=None):
        """Nobody may end before, unless with the exit code ``ends``."""
        while not done():
            fine = all(p.poll() in (None, ends) for p in processes)
            assert fine, [log.read_text()[-3000:] for log in logs]
            time.sleep(0.02)

    processes = start(hosts, two)
    until((two / "checkpoint-8" / "trainer_state.json").exists)
    ip("-n", hosts[1], "link", "set", "kd1", "down")
    cut = time.monotonic()
    for host, process, log in zip(hosts, processes, logs, strict=True):
        # far above what a busy machine takes: a process that waits for ever fails here
        assert process.wait(timeout=TIMEOUT + 300) != 0
        print(f"ended {time.monotonic() - cut:.1f} s after the cut")
        assert (
            f"Timed out waiting {TIMEOUT}000ms" in log.read_text() or "onnection" in log.read_text()
        )
        assert not running(host)
    assert not (two / "end").exists()

    ip("-n", hosts[1], "link", "set", "kd1", "up")
    processes = start(hosts, two)
    until(
        lambda: all(p.poll() == 0 for p in processes), ends=0
    )  # an agent waits five minutes for one that failed
    assert 0 < logs[0].read_text().count("'loss'") <= 24 - 8
    ends = [load_file(folder / "end" / "model.safetensors") for folder in (one, two)]
    assert difference(*ends) < 1e-5
