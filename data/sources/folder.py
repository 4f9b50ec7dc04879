"""A folder of clips and stills: captions and masks beside them, or a table in it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from data.config import SourceConfig
from data.items import Fault, Item
from wan_finetune.errors import InputError

from .pairs import MASK_NAME, Pair, only_mask, pair_files, unpaired_reason
from .paths import MEDIA_SUFFIXES, UNREAD_SUFFIXES, DataRoot, Unusable, is_media, shown, unread_reason
from .rows import CAPTION_LISTS, CLIP_LISTS, TABLE_SUFFIXES
from .table import Survey, survey_table, table_items
from .text import read_caption_file

TABLE_NAMES = (*(f"metadata{suffix}" for suffix in TABLE_SUFFIXES), "videos2caption.json", "captions.json")
"""Tables that a folder is read by where it holds one; others are read by their own path."""


@dataclass(slots=True)
class _Listing:
    """One folder, its names only, so that a million files fit into memory."""

    names: list[str] = field(default_factory=list)
    """Packed: the first dot replaced by NUL, so that plain sorting brings together the files of one clip. Folders end
    with a slash."""
    faults: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return _packed(name) in self.names


def _packed(name: str) -> str:
    return name.replace(".", "\0", 1)


def _unpacked(name: str) -> str:
    return name.replace("\0", ".", 1)


@dataclass(slots=True)
class _Tally:
    files: int = 0
    clips: int = 0
    shards: int = 0


def read_folder(folder: Path, source: SourceConfig) -> Iterator[Item | Fault]:
    """Items of a folder and those below it, in a stable order; hidden files are left out.

    Memory is that of the names in the largest single folder.

    Raises:
        InputError: nothing in it, no clip among its files, or a table in it that cannot be read.
    """
    tally = _Tally()
    yield from _read(DataRoot(folder), "", None, source, tally)
    if not tally.clips and tally.shards:
        raise InputError(
            f"data.sources: {folder}: holds {tally.shards} .tar files and no video; set path to {folder / '*.tar'} for "
            "WebDataset shards"
        )
    if not tally.clips:
        held = f"holds {tally.files} files and no video" if tally.files else "the folder is empty"
        raise InputError(f"data.sources: {folder}: {held}; put clips there ({' '.join(MEDIA_SUFFIXES)})")


def _read(
    root: DataRoot, below: str, named: "_Named | None", source: SourceConfig, tally: _Tally
) -> Iterator[Item | Fault]:
    """One folder and those below it. `below` ends with a slash, or is empty; `named` is what a table above names."""
    try:
        listing = _list(root.folder / below)
    except OSError as error:
        if not below:
            raise InputError(
                f"data.sources: {root.folder}: cannot be read ({error.strerror}); check its rights"
            ) from error
        yield Fault(name=below.rstrip("/"), reason=f"the folder cannot be read ({error.strerror}); check its rights")
        return
    tally.files += sum(not name.endswith("/") for name in listing.names)
    tally.shards += sum(name.endswith("\0tar") for name in listing.names)
    for name, reason in sorted(listing.faults.items()):
        yield Fault(name=below + shown(name), reason=reason)
    table = _table_among(root.folder / below, listing) if named is None else None
    if table is not None:
        tally.clips += 1
        own = DataRoot(root.folder / below)
        survey = survey_table(table, own, source)
        for one in table_items(table, table.name, own, survey, source):
            yield _prefixed(one, below)
        named = _Named(table=table.name, below=below, survey=survey)
    for _, group in groupby(listing.names, key=lambda name: name if name.endswith("/") else name.partition("\0")[0]):
        names = [_unpacked(name) for name in group]
        if names[0].endswith("/"):
            yield from _read(root, below + names[0], named, source, tally)
        else:
            yield from _read_group(root, below, names, named, tally)
    if named is not None and named.below == below and named.doubled:
        yield named.doubled_fault()


def _list(folder: Path) -> _Listing:
    listing = _Listing()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            try:
                name.encode()
            except UnicodeEncodeError:
                listing.faults[name.encode(errors="surrogateescape").decode(errors="replace")] = (
                    "its name is not UTF-8; rename it"
                )
                continue
            if entry.is_dir(follow_symlinks=False):
                listing.names.append(f"{_packed(name)}/")
            elif os.path.isdir(entry):  # unlike entry.is_dir, no error for a link that leads in a circle
                listing.faults[name] = "is a link to a folder, which is not followed; give that folder as a source"
            else:
                listing.names.append(_packed(name))
    listing.names.sort()
    return listing


def _table_among(folder: Path, listing: _Listing) -> Path | None:
    """The one table that a folder is read by, if any. Raises InputError for several."""
    tables = [name for name in TABLE_NAMES if name in listing]
    listed = [name for name in CLIP_LISTS if name in listing]
    if listed and any(name in listing for name in CAPTION_LISTS):
        # With a clip of the same name the file is that clip's caption.
        clips = {name.partition("\0")[0] for name in listing.names if is_media(_unpacked(name))}
        tables += [name for name in listed if os.path.splitext(name)[0] not in clips]
    if len(tables) > 1:
        raise InputError(
            f"data.sources: {folder}: holds {len(tables)} tables, {' and '.join(tables)}; set path to the one meant"
        )
    return folder / tables[0] if tables else None


def _prefixed(one: Item | Fault, below: str) -> Item | Fault:
    if not below:
        return one
    if isinstance(one, Fault):
        return Fault(name=below + one.name, reason=one.reason)
    return Item(name=below + one.name, path=one.path, captions=one.captions, mask=one.mask)


@dataclass(slots=True)
class _Named:
    """What the table of a folder names, to tell what it does not."""

    table: str
    below: str
    survey: Survey
    doubled: str = ""
    """The first clip that has captions in the table and beside it."""
    doubled_count: int = 0

    def __contains__(self, name: str) -> bool:
        return name.removeprefix(self.below) in self.survey

    def doubled_fault(self) -> Fault:
        others = f" and {self.doubled_count - 1} others" if self.doubled_count > 1 else ""
        return Fault(
            name=self.below + self.table,
            reason=f"{shown(self.doubled)}{others} have captions in it and beside them as well; set path to the "
            "table to use it alone, or remove it, or them",
        )


def _read_group(
    root: DataRoot, below: str, names: list[str], named: _Named | None, tally: _Tally
) -> Iterator[Item | Fault]:
    """Clips whose names share what comes before the first dot."""
    pairs, alone = pair_files(names, (".txt",))
    tally.clips += len(pairs)
    for pair in pairs:
        name = below + pair.clip
        if named is not None and name in named:
            if pair.captions:
                named.doubled_count += 1
                named.doubled = named.doubled or name
            continue
        try:
            yield _item(root, below, pair, named)
        except Unusable as fault:
            yield Fault(name=name, reason=str(fault))
    listed = () if named is None or named.table not in CLIP_LISTS else (named.table, *CAPTION_LISTS)
    for name in alone:
        used = named is not None and (below + name in named or (below == named.below and name in listed))
        if not used:
            yield Fault(name=below + name, reason=unpaired_reason(name))
    for name in names:
        if name.lower().endswith(UNREAD_SUFFIXES) and not MASK_NAME.fullmatch(name):
            yield Fault(name=below + name, reason=unread_reason(name))


def _item(root: DataRoot, below: str, pair: Pair, named: _Named | None) -> Item:
    name, path = root.find_listed(below + pair.clip)
    mask = only_mask(pair.masks)
    mask_path = None if mask is None else root.find_listed(below + mask)[1]
    captions: dict[str, None] = {}
    for file in pair.captions:
        captions.update(dict.fromkeys(read_caption_file(root.find_listed(below + file)[1])))
    if not captions:
        stem = shown(os.path.splitext(pair.clip)[0])
        if named is not None:
            raise Unusable(
                f"is not in {named.table} and has no caption; add a row or {stem}.txt, or set path to the table to use "
                "only what it names"
            )
        if not pair.captions:
            raise Unusable(f"has no caption; write one into {stem}.txt beside it")
        raise Unusable(f"its caption {shown(pair.captions[0])} is empty; describe the clip in it")
    return Item(name=name, path=path, captions=tuple(captions), mask=mask_path)
