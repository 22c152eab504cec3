"""Pooled features as parquet: a row for each frame, with its episode, frame and timestamp.

Rows are neither compressed nor coded by a dictionary, in small row groups, so that a reader that
wants one row reads little more.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

COLUMN = "features"  # fixed_size_list<float32>[D]
GROUP_BYTES = 2**17  # of a row group, about: a row at random takes 0.35 ms (2048 values, one core), of 2**20 1.2 ms


def rows_of_a_group(width: int) -> int:
    """How many rows of so many float32 values."""
    return max(1, GROUP_BYTES // (4 * width))


def write_parquet(file: BinaryIO, keys: pa.Table, groups: Iterable[Tensor], width: int) -> None:
    """Writes a file.

    Args:
        file: Open for writing.
        keys: The other columns.
        groups: float32 (rows, width), `rows_of_a_group` of them but in the last.
        width: See above.
    """
    kind = pa.list_(pa.field("element", pa.float32(), nullable=False), width)
    schema = keys.schema.append(pa.field(COLUMN, kind, nullable=False))
    options = {"compression": "none", "use_dictionary": False, "write_statistics": keys.column_names}
    start = 0
    with pq.ParquetWriter(file, schema, **options) as writer:
        for rows in groups:
            values = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1).numpy()), type=kind)
            some = keys.slice(start, len(rows))
            writer.write_table(pa.Table.from_arrays([*some.columns, values], schema=schema))
            start += len(rows)


class ParquetReader:
    """A shard of `write_parquet`."""

    def __init__(self, path: Path) -> None:
        """Raises `ValueError`, naming the file, where it is missing or damaged."""
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
            self.rows = self.file.metadata.row_group(0).num_rows if self.file.num_row_groups else 1
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a shard that can be read: {error}") from error
        self.group: tuple[int, Tensor] | None = None  # that was read last

    def row(self, place: int) -> list[Tensor]:
        """A copy of a row, float32 (D,), in a list as of other shards."""
        index, row = divmod(place, self.rows)
        if self.group is None or self.group[0] != index:
            column = self.file.read_row_group(index, columns=[COLUMN], use_threads=False).column(0).combine_chunks()
            values = torch.tensor(column.flatten().to_numpy())
            self.group = index, values.view(-1, column.type.list_size)
        return [self.group[1][row].clone()]

    def __enter__(self) -> ParquetReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def is_whole(path: Path) -> bool:
    """Whether a file is there with all of its end, where parquet has its beginnings."""
    try:
        pq.read_metadata(path)
    except (OSError, ValueError):
        return False
    return True
