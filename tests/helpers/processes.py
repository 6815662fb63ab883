"""Tests that need more than one process. No clock decides a result, however busy the machine is.

The processes are forks of the test process. What is imported stays imported, so they start at once.
"""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

TESTS = Path(__file__).parents[1]
# for a process that imports the package and the helpers anew
PYTHONPATH = os.pathsep.join([str(TESTS.parent), str(TESTS)])


def kinds_of(kind):
    """A class and all that inherit from it."""
    return [kind, *(k for below in kind.__subclasses__() for k in kinds_of(below))]


def child(work, *args, log=os.devnull, env=()):
    """A process that calls ``work(*args)``. What it prints goes into the file ``log``."""

    def run():
        os.environ.update(env)
        for kind in kinds_of(tqdm):  # forks share their locks, and a killed one keeps what it holds
            kind.set_lock(threading.RLock())
        AcceleratorState._reset_state(reset_partial_state=True)  # it says how many processes run
        with open(log, "w", buffering=1, encoding="utf-8") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.stdout = sys.stderr = out
            work(*args)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def side_by_side(processes, logs):
    """What the processes print. If one fails, the others are ended, and its log says why."""
    try:
        while None in (codes := [p.exitcode for p in processes]) and not any(codes):
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.join()
    texts = [log.read_text(encoding="utf-8") for log in logs]
    for code, text in zip(codes, texts, strict=True):
        assert code in (0, None), text[-4000:]
    return texts


def in_group(work, folder, ranks=((0, 2), (1, 2))):
    """What ``work(rank, world)`` returns as JSON, in processes that are one gloo group or alone."""

    def run(rank, world):
        if world > 1:
            at = {"init_method": f"file://{folder / 'store'}", "rank": rank, "world_size": world}
            torch.distributed.init_process_group("gloo", **at)
        print(json.dumps(work(rank, world)))
        if world > 1:
            torch.distributed.destroy_process_group()

    logs = [folder / f"{rank}-of-{world}.log" for rank, world in ranks]
    running = [child(run, *which, log=log) for which, log in zip(ranks, logs, strict=True)]
    return [json.loads(text.splitlines()[-1]) for text in side_by_side(running, logs)]


def on_ranks(code, steps, folder):
    """What code leaves in ``seen`` on each of two processes, and on one alone.

    It finds ``steps``, ``rank``, ``world`` and ``mine``, the part of this process.
    """

    def work(rank, world):
        names = {"torch": torch, "steps": steps, "seen": [], "rank": rank, "world": world}
        names["mine"] = lambda parts: torch.cat(parts) if world == 1 else parts[rank]
        exec(code, names)
        return names["seen"]

    return in_group(work, folder, [(0, 2), (1, 2), (0, 1)])


def launch(script, folder, world=2):
    """``script folder`` on that many processes, with the variables that torchrun sets.

    Returns what each process printed. All of them have to end well.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run():
        sys.argv = [script, str(folder)]
        runpy.run_path(script, run_name="__main__")

    logs, running = [folder / f"rank{rank}.log" for rank in range(world)], []
    for rank, log in enumerate(logs):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        env |= {"LOCAL_WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        env["OMP_NUM_THREADS"] = "1"  # accelerate warns without it
        running.append(child(run, log=log, env=env))
    return side_by_side(running, logs)


def leave():
    """The end of a process that ``launch`` or torchrun started.

    A thread of gloo that still holds its last work when Python shuts down aborts the process
    (pytorch/pytorch#190489), the more often the busier the machine. So Python does not shut down.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
