"""Tests that need more than one process. No clock decides over a result, however busy the
machine."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
# for a process that is started: package and helpers
PYTHONPATH = os.pathsep.join([str(TESTS.parent), str(TESTS)])

RANK = """
import json, sys, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, world, store, inputs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    at = {"init_method": "file://" + store, "rank": rank, "world_size": world}
    dist.init_process_group("gloo", **at)
steps, seen = torch.load(inputs), []
def mine(parts):
    return torch.cat(parts) if world == 1 else parts[rank]
"""


def outputs(commands, folder, env=None):
    """What commands print that run side by side. If one fails, the others are ended, and it says
    why."""
    running, files = [], []
    try:
        for k, command in enumerate(commands):
            files.append([folder / f"{k}.out", folder / f"{k}.err"])
            with files[-1][0].open("w") as out, files[-1][1].open("w") as err:
                running.append(subprocess.Popen(command, stdout=out, stderr=err, env=env))
        while None in (codes := [process.poll() for process in running]) and not any(codes):
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()
            process.wait()
    for code, (_, err) in zip(codes, files, strict=True):
        assert code in (0, None), err.read_text(encoding="utf-8")[-4000:]
    return [out.read_text(encoding="utf-8") for out, _ in files]


def on_ranks(work, steps, folder):
    """What ``work`` leaves in ``seen`` on each of two processes, and on one alone; it finds
    ``steps``, ``rank``, ``mine``."""
    torch.save(steps, folder / "steps")
    end = "\nprint(json.dumps(seen))\nif world > 1:\n    dist.destroy_process_group()\n"
    python = [sys.executable, "-c", f"{RANK}{work}{end}"]
    given = [str(folder / "store"), str(folder / "steps")]
    ranks = [[*python, rank, world, *given] for rank, world in (("0", "2"), ("1", "2"), ("0", "1"))]
    return [json.loads(text.splitlines()[-1]) for text in outputs(ranks, folder)]


def launch(script, folder, world=2):
    """``python script folder`` on that many processes under torchrun; they have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    command += ["--master_port", port, script, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def leave():
    """The end of a process that ``launch`` started.

    A thread of gloo that still holds its last work when Python shuts down aborts the process
    (pytorch/pytorch#190489), the more often the busier the machine. So Python does not shut down.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
