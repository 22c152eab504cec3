"""Arrow tables with a column of images, in parquet files or as `datasets` saves them to disk -> their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_batched.extraction.sources.pixels import read_image
from qwen_batched.extraction.sources.source import Frame

ROWS = 32  # of a file in memory at once


def schema_of(path: Path) -> pa.Schema:
    """The columns of a file. Raises `ValueError`, naming it, where it is damaged."""
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_stream(file).schema
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def image_columns(schema: pa.Schema) -> list[str]:
    """Columns whose values are images: structs of `bytes` and `path`, as `datasets` writes them, or binary."""
    return [field.name for field in schema if _is_image(field.type)]


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def count_rows(path: Path) -> int:
    """Rows of a file. Raises `ValueError`, naming it, where it is damaged."""
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_metadata(path).num_rows
        return sum(batch.num_rows for batch in _batches(path, None, 0))
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def column_values(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Whole columns of a file, but for images."""
    found: dict[str, list[Any]] = {name: [] for name in columns}
    for batch in _batches(path, columns, 0):
        for name in columns:
            found[name] += batch.column(name).to_pylist()
    return found


def read_rows(path: Path, column: str, start: int, stop: int) -> Iterator[Frame]:
    """The images of rows, `ROWS` of them in memory at once; all are `Damage` behind the place where a file is."""
    row = start
    try:
        for batch in _batches(path, [column], start):
            for value in batch.column(0):
                if row == stop:
                    return
                yield _image(value.as_py(), path, row)
                row += 1
        reason = f"has {row} rows, and not {stop}"
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
    for place in range(row, stop):
        yield read_image(None, f"{path}, row {place} ({reason})")


def _image(value: Any, path: Path, row: int) -> Frame:
    image, name = value, f"{path}, row {row}"
    if isinstance(value, dict):
        image = value["bytes"]
        if image is None and value["path"]:
            file = Path(value["path"])
            image = file if file.is_absolute() else path.parent / file
    return read_image(image, name)


def _batches(path: Path, columns: Sequence[str] | None, start: int) -> Iterator[pa.RecordBatch]:
    """The rows from `start` on, in pieces."""
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as file:
            groups: list[int] = []
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if not groups and rows <= start:
                    start -= rows
                else:
                    groups.append(group)
            pieces = file.iter_batches(batch_size=ROWS, row_groups=groups, columns=columns)
            yield from _from(pieces, start)
        return
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        yield from _from((batch.select(columns) if columns else batch for batch in stream), start)


def _from(pieces: Iterator[pa.RecordBatch], start: int) -> Iterator[pa.RecordBatch]:
    for piece in pieces:
        if start >= piece.num_rows:
            start -= piece.num_rows
            continue
        yield piece.slice(start)
        start = 0
