"""A table of clips and captions, read twice: once for the names in it, once for the items."""

import functools
import hashlib
import os
import posixpath
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import SourceConfig
from data.items import Fault, Item
from wan_finetune.errors import InputError

from .columns import CAPTION_COLUMNS, CLIP_COLUMNS, Columns, missing_column
from .pairs import MASK_NAME, only_mask
from .paths import DataRoot, Unusable, require_file, require_media, shown
from .rows import parquet_schema, read_rows

CLIPS_FOLDER = "videos"
"""Where some tools keep the clips that the table beside it names without this folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What one pass over a table finds out, in 8 bytes a name."""

    names: NDArray[np.uint64]
    """Hashes of all clips and masks, ascending."""
    repeated: dict[int, int]
    """How often a clip is named, by its hash, where that is more than once."""

    def __contains__(self, name: str) -> bool:
        place = int(np.searchsorted(self.names, np.uint64(_hash(name))))
        return place < len(self.names) and int(self.names[place]) == _hash(name)


@dataclass(slots=True)
class _Repeated:
    """A clip of several rows, until the last of them has been read."""

    item: Item | None = None
    rows_left: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    """Which row gave which caption."""


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def read_table(table: Path, source: SourceConfig) -> Iterator[Item | Fault]:
    """Items of a table in its order; names are relative to its folder. A clip of several rows comes with the last.

    Raises:
        InputError: no readable table, no row, or no column with clips or captions.
    """
    root = DataRoot(table.parent)
    yield from table_items(table, table.name, root, survey_table(table, root, source), source)


def survey_table(table: Path, root: DataRoot, source: SourceConfig) -> Survey:
    """One pass over the table; sets `root.below` where the clips lie in a folder of their own.

    Raises:
        InputError: as `read_table`.
    """
    try:
        require_file(table, table.name)
    except Unusable as error:
        raise InputError(f"data.sources: {table.parent}: {error}") from None
    columns_of = _columns_finder(source)
    clips, masks = array("Q"), array("Q")
    first: tuple[str, ...] | None = None
    has_clips = has_captions = False
    rows = 0
    for _, row in read_rows(table, _wanted(table, source)):
        rows += 1
        if isinstance(row, str):
            continue
        names = tuple(row)
        first = names if first is None else first
        columns = columns_of(names)
        has_captions = has_captions or bool(columns.captions)
        try:
            value = columns.clip_in(row)
            if not has_clips:
                root.below = _folder_of_clips(root, value)
                has_clips = True
            clips.append(_hash(root.name(value)))
            if (mask := columns.mask_in(row)) is not None:
                masks.append(_hash(root.name(mask)))
        except Unusable:
            has_clips = has_clips or bool(columns.clips)
    if not rows:
        raise InputError(f"data.sources: {table}: holds no row; add one for each clip")
    if first is not None and not has_clips:
        fault = missing_column("clips", first, "video_column", CLIP_COLUMNS, source.video_column)
        raise InputError(f"data.sources: {table}: {fault}")
    if first is not None and not has_captions:
        fault = missing_column("captions", first, "caption_column", CAPTION_COLUMNS, source.caption_column)
        raise InputError(f"data.sources: {table}: {fault}")
    hashes, counts = np.unique(np.frombuffer(clips, np.uint64), return_counts=True)
    repeated = {int(hashes[index]): int(counts[index]) for index in np.flatnonzero(counts > 1)}
    return Survey(names=np.union1d(hashes, np.frombuffer(masks, np.uint64)), repeated=repeated)


def _wanted(table: Path, source: SourceConfig) -> list[str] | None:
    """Columns to read of a parquet file: those that are used, or all where none is, for the message."""
    if table.suffix.lower() != ".parquet":
        return None
    columns = Columns.among(list(parquet_schema(table).names), source)
    return columns.all if columns.clips and columns.captions else None


def _columns_finder(source: SourceConfig) -> Any:
    return functools.lru_cache(maxsize=256)(lambda names: Columns.among(names, source))


def _folder_of_clips(root: DataRoot, value: object) -> str:
    """`videos` where the first clip named lies there and not beside the table."""
    try:
        root.name(value)
        first = str(value)
        beside, below = (os.path.isfile(root.folder / part / first) for part in ("", CLIPS_FOLDER))
    except ValueError:
        return ""
    return CLIPS_FOLDER if below and not beside else ""


def table_items(
    table: Path, label: str, root: DataRoot, survey: Survey, source: SourceConfig
) -> Iterator[Item | Fault]:
    """The second pass. `label` is what faults call the table."""
    columns_of = _columns_finder(source)
    masks_beside = functools.lru_cache(maxsize=64)(functools.partial(_masks_in, root.folder))
    waiting: dict[str, _Repeated] = {}
    for number, row in read_rows(table, _wanted(table, source)):
        try:
            if isinstance(row, str):
                raise Unusable(row)
            columns = columns_of(tuple(row))
            cell = columns.clip_in(row)
            name = root.name(cell)
        except Unusable as fault:
            yield Fault(name=f"{label}:{number}", reason=str(fault))
            continue
        count = survey.repeated.get(_hash(name), 1) if survey.repeated else 1
        if count > 1:
            held = waiting.setdefault(name, _Repeated(rows_left=count))
            held.rows_left -= 1
        try:
            item = _item(root, columns, row, cell, masks_beside)
            if count > 1:
                _add(held, item, number)
            else:
                yield item
        except Unusable as fault:
            yield Fault(name=f"{label}:{number}", reason=_naming(name, str(fault)))
        if count > 1 and held.rows_left == 0:
            del waiting[name]
            if held.item is not None:
                yield held.item
    yield from (held.item for held in waiting.values() if held.item is not None)


def _naming(name: str, reason: str) -> str:
    return reason if shown(posixpath.basename(name)) in reason else f"{shown(name)}: {reason}"


def _item(root: DataRoot, columns: Columns, row: dict[str, Any], cell: object, masks_beside: Any) -> Item:
    name, path = root.find(cell)
    require_media(name)
    captions = columns.captions_in(row)
    mask = _mask(root, name, columns.mask_in(row), masks_beside)
    return Item(name=name, path=path, captions=tuple(dict.fromkeys(captions)), mask=mask)


def _mask(root: DataRoot, name: str, cell: object, masks_beside: Any) -> Path | None:
    """The mask that the row names, else the one beside the clip."""
    folder, last = posixpath.split(name)
    beside = masks_beside(folder) if cell is None else {}
    found = only_mask(beside.get(last, ()) or beside.get(posixpath.splitext(last)[0], ()))
    if cell is None and found is None:
        return None
    try:
        mask, path = root.find(cell) if found is None else root.find_listed(posixpath.join(folder, found))
        require_media(mask)
    except Unusable as fault:
        raise Unusable(f"its mask: {fault}") from None
    return path


def _masks_in(root: Path, folder: str) -> dict[str, list[str]]:
    """Masks in one folder by the clip that they are called after."""
    found: dict[str, list[str]] = {}
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if mask := MASK_NAME.fullmatch(entry.name):
                    found.setdefault(mask["clip"], []).append(entry.name)
    except OSError:
        return {}
    return {clip: sorted(names) for clip, names in found.items()}


def _add(held: _Repeated, item: Item, number: int) -> None:
    """Add the captions of a further row of the same clip. Raises Unusable where the row adds none, or contradicts."""
    new = [caption for caption in item.captions if caption not in held.rows]
    if held.item is not None and item.mask != held.item.mask:
        raise Unusable(f"{shown(item.name)} has another mask in row {next(iter(held.rows.values()))}; keep one of them")
    if not new:
        row = held.rows[item.captions[0]]
        raise Unusable(f"{shown(item.name)} has this caption in row {row} already; remove one of the two rows")
    held.rows.update(dict.fromkeys(new, number))
    before = () if held.item is None else held.item.captions
    held.item = Item(name=item.name, path=item.path, captions=(*before, *new), mask=item.mask)
