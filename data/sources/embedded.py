"""Items of rows that hold the media themselves: dataset rows, and parquet files written from them."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data.config import SourceConfig
from data.items import Fault, Item

from .columns import Columns
from .paths import DataRoot, Unusable, require_media, shown
from .rows import Row, parquet_rows, parquet_schema
from .spool import store

Locate = Callable[[str], Path]
"""Finds the file that a row only names. Raises Unusable."""


def row_items(
    rows: Iterable[Row], clip: str, label: str, source: SourceConfig, spool: Path, locate: Locate
) -> Iterator[Item | Fault]:
    """An item for each row, called `label/NUMBER-NAME`; `clip` is the column with the clip.

    A cell with a clip or a mask holds bytes, or a name, or both as `{"bytes": ..., "path": ...}`.
    """
    for number, row in rows:
        try:
            if isinstance(row, str):
                raise Unusable(row)
            nested = row.get("json")
            cells = {**nested, **row} if isinstance(nested, dict) else row
            columns = Columns.among(tuple(cells), source)
            known, path = _medium(cells.get(clip), spool, locate)
            captions = columns.captions_in(cells)
            mask = columns.mask_in(cells)
            try:
                mask_path = None if mask is None else _medium(mask, spool, locate)[1]
            except Unusable as fault:
                raise Unusable(f"its mask: {fault}") from None
        except Unusable as fault:
            yield Fault(name=f"{label}:{number}", reason=str(fault))
            continue
        name = f"{number}-{known}" if known else f"{number}{path.suffix}"
        yield Item(name=f"{label}/{name}", path=path, captions=tuple(dict.fromkeys(captions)), mask=mask_path)


def _medium(cell: object, spool: Path, locate: Locate) -> tuple[str | None, Path]:
    """Last part of the medium's name, where it has one, and its file."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None
    named = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
    known = shown(re.split(r"[\\/]", named)[-1]) if isinstance(named, str) and named else None
    if isinstance(content, bytes):
        return known, store(spool, content, known)
    if not isinstance(named, str) or not named:
        raise Unusable("holds no clip; add it, or remove the row")
    path = locate(named)
    require_media(path.name)
    return known, path


def embedded_column(table: Path, source: SourceConfig) -> str | None:
    """The column of a parquet file that holds clips as bytes, or None. Raises InputError."""
    import pyarrow.types as types

    schema = parquet_schema(table)
    clips = Columns.among(list(schema.names), source).clips
    holding = [name for name in clips if types.is_struct(kind := schema.field(name).type) or _is_binary(kind)]
    return holding[0] if holding else None


def _is_binary(kind: object) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def read_embedded(table: Path, clip: str, source: SourceConfig, spool: Path) -> Iterator[Item | Fault]:
    """Items of a parquet file whose column `clip` holds the media. Raises InputError."""
    names = list(parquet_schema(table).names)
    columns = Columns.among(names, source)
    root = DataRoot(table.parent)
    wanted = [clip, *columns.captions, *columns.masks]
    # Few rows at a time: each may be a whole video.
    rows = parquet_rows(table, wanted, batch_rows=4)
    yield from row_items(rows, clip, table.name, source, spool, lambda name: root.find(name)[1])
