"""Tests that need more than one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(
    [str(TESTS.parent), str(TESTS)]
)  # for a process that is started: package and helpers

RANK = """
import json, sys, torch, torch.distributed as dist
from datetime import timedelta
torch.set_num_threads(1)
rank, world, store, inputs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    at = {"init_method": "file://" + store, "rank": rank, "world_size": world}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **at)
steps, seen = torch.load(inputs), []
def mine(parts):
    return torch.cat(parts) if world == 1 else parts[rank]
"""


def on_ranks(work, steps, folder):
    """What ``work`` leaves in ``seen`` on each of two processes, and on one alone; it finds ``steps``, ``rank``, ``mine``."""
    torch.save(steps, folder / "steps")
    code = (
        f"{RANK}{work}\nprint(json.dumps(seen))\nif world > 1:\n    dist.destroy_process_group()\n"
    )

    def start(rank, world):
        args = [
            sys.executable,
            "-c",
            code,
            str(rank),
            str(world),
            str(folder / "store"),
            str(folder / "steps"),
        ]
        return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    running, results = [start(0, 2), start(1, 2), start(0, 1)], []
    try:
        for process in running:
            out, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
    return results


def launch(script, folder, world=2):
    """``python script folder`` on that many processes under torchrun; they have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(world),
        "--master_port",
        str(port),
    ]
    done = subprocess.run(
        [*command, script, str(folder)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def leave():
    """The end of a process that ``launch`` started. A thread of gloo that still holds its last work when Python shuts down aborts
    the process (pytorch/pytorch#190489), the more often the busier the machine: so Python does not shut down."""
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
