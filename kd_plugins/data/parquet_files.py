"""Write data sets as Parquet files with their pictures inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import embed_table_storage
from tqdm.auto import tqdm

ROWS = 200  # in a row group
ROWS_OF_A_FILE = 100_000


def write_parquet(splits: Mapping[str, Dataset], folder: str | Path) -> list[Path]:
    """Write splits as ``folder/data/SPLIT-00000-of-00001.parquet``, as the hub names them.

    ``datasets.load_dataset(folder)`` reads them. Pictures are inside the files, also those that the
    data set knows by their path only. The memory is that of a row group.
    """
    (out := Path(folder) / "data").mkdir(parents=True, exist_ok=True)
    paths = []
    for split, rows in splits.items():
        count = max(1, -(-len(rows) // ROWS_OF_A_FILE))
        for k in range(count):
            path = out / f"{split}-{k:05d}-of-{count:05d}.parquet"
            _write(rows.shard(count, k, contiguous=True), path, split)
            paths.append(path)
    return paths


def _write(rows: Dataset, path: Path, split: str) -> None:
    schema = rows.features.arrow_schema
    stored = rows.with_format("arrow")
    starts = range(0, len(rows), ROWS)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in tqdm(starts, f"write {split}", unit_scale=ROWS, leave=False, disable=None):
            table = stored[start : start + ROWS].cast(schema)
            writer.write_table(embed_table_storage(table))
