"""What finding wrong labels costs after the features, for as many rows as WebVision has.

    python recipes/experiments/millions_of_rows.py --rows 2400000

The features are random numbers around a centre for each class, in a file; 20% of the labels are
wrong. Time and memory of each step are printed: memory of the process itself, and with the pages of
files that it has read. docs/wrong-labels.md has figures. Linux only.
"""

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import kd_plugins as kd

ROWS = 1 << 16  # that are made at once


def write_features(path: Path, true: np.ndarray, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = 0.35 * rng.normal(size=(true.max() + 1, width)).astype(np.float32)
    features = np.lib.format.open_memmap(path, "w+", np.float32, (len(true), width))
    for start in range(0, len(true), ROWS):
        part = centres[true[start : start + ROWS]]
        features[start : start + ROWS] = part + rng.normal(size=part.shape).astype(np.float32)
    return features


class Peak(threading.Thread):
    """The largest memory [MB] of the process itself, without the files that it maps."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0.0

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text().splitlines()
            [own] = [line.split()[1] for line in status if line.startswith("RssAnon")]
            self.largest = max(self.largest, int(own) / 1e3)
            time.sleep(0.2)


def measured(name: str, peak: Peak, step):
    wall, cpu, peak.largest = time.time(), time.process_time(), 0.0
    result = step()
    time.sleep(0.5)  # one more look at the memory
    mapped = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{name}: {time.time() - wall:.0f} s, of one core {time.process_time() - cpu:.0f} s; "
        f"{peak.largest:.0f} MB, with files {mapped:.0f} MB so far",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_400_000)
    parser.add_argument("--width", type=int, default=128, help="of the features")
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=1, help="of each head; one round of folds")
    s = parser.parse_args()
    true = np.random.default_rng(1).integers(0, s.classes, s.rows)
    labels = kd.data.corrupt(true, kd.data.symmetric(s.classes, rate=0.2), seed=0)
    peak = Peak()
    peak.start()
    with tempfile.TemporaryDirectory() as folder:
        features = write_features(Path(folder, "features.npy"), true, s.width)
        heads = {"folder": Path(folder, "folds"), "seeds": [0], "epochs": s.epochs}
        probs = measured("folds", peak, lambda: kd.out_of_sample(features, labels, **heads))
        noise = measured("noise", peak, lambda: kd.estimate_label_noise(labels, probs, features))
        suspects = measured("suspects", peak, lambda: kd.find_suspects(noise=noise))
    wrong = labels != true
    print(f"{len(suspects)} suspects, {wrong[suspects['index']].sum()} of them wrong; ", end="")
    print(f"{wrong.sum()} labels are wrong, estimated {noise.count()[0]:.0f}")


if __name__ == "__main__":
    main()
