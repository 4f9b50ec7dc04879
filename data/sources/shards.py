"""WebDataset shards: tar archives whose members share a key, read from start to end without unpacking."""

import glob
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.items import Fault, Item
from wan_finetune.errors import InputError

from .columns import Columns
from .pairs import MASK_NAME, Pair, group_key, only_mask, pair_files, unpaired_reason
from .paths import UNREAD_SUFFIXES, Unusable, require_file, shown, unread_reason
from .rows import json_object
from .spool import store
from .text import MAX_CAPTION_FILE_BYTES, captions_in, split_captions

MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{},]*(?:,[^{},]*)+))\}")


def is_pattern(path: Path) -> bool:
    """Whether a path stands for several files: it holds braces or wildcards, and no file has it for a name."""
    return bool(_BRACES.search(str(path)) or glob.has_magic(str(path))) and not path.exists()


def read_shards(path: Path, source: SourceConfig, spool: Path) -> Iterator[Item | Fault]:
    """Items of one archive or of all that a pattern stands for, shard by shard, called `SHARD/KEY.SUFFIX`.

    Raises:
        InputError: no such shard, or no clip in any.
    """
    shards = list_shards(path)
    base = os.path.commonpath([shard.parent for shard in shards])
    found = False
    for shard in shards:
        label = shard.relative_to(base).as_posix()
        for one in _read_shard(shard, label, source, spool):
            found = True
            yield one
    if not found:
        raise InputError(f"data.sources: {path}: {len(shards)} shards and no clip in them; pack KEY.mp4 and KEY.txt")


def list_shards(path: Path) -> list[Path]:
    """Files that a path or pattern stands for: braces in their order, wildcards sorted.

    Raises:
        InputError: none of them exists, or a pattern for too many.
    """
    shards: dict[Path, None] = {}
    for text in expand_braces(str(path)):
        if glob.has_magic(text) and not os.path.exists(text):
            shards.update(dict.fromkeys(Path(match) for match in sorted(glob.glob(text, recursive=True))))
        else:
            shards[Path(text)] = None
    if not any(shard.is_file() for shard in shards):
        raise InputError(f"data.sources: {path}: no such file; name a .tar file, or a pattern such as shards/*.tar")
    return list(shards)


def expand_braces(text: str) -> list[str]:
    """`x{000..002}.tar` and `x{a,b}.tar` written out, from left to right. Raises InputError for too many."""
    texts = list(islice(_expansions(text), MAX_SHARDS + 1))
    if len(texts) > MAX_SHARDS:
        raise InputError(f"data.sources: {text}: stands for more than {MAX_SHARDS:,} shards; use a narrower pattern")
    return texts


def _expansions(text: str) -> Iterator[str]:
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    parts: Iterable[str]
    if match[3] is not None:
        parts = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        step = 1 if last >= first else -1
        width = max(len(match[1]), len(match[2])) if re.match(r"0\d", match[1]) or re.match(r"0\d", match[2]) else 0
        parts = (f"{number:0{width}d}" for number in range(first, last + step, step))
    for part in parts:
        yield from _expansions(text[: match.start()] + part + text[match.end() :])


def _read_shard(shard: Path, label: str, source: SourceConfig, spool: Path) -> Iterator[Item | Fault]:
    cut = "is cut off or damaged{}; what lies beyond is not read: copy or pack the shard again"
    after = ""
    try:
        require_file(shard, "the shard")
        with tarfile.open(shard, "r:") as archive:
            for key, members in groupby(_members(archive), key=lambda member: group_key(_clean(member.name))):
                after = f" at {shown(key)}"
                yield from _sample(archive, list(members), label, source, spool)
            after = f" after {after[4:]}" if after else ""
            archive.fileobj.seek(archive.offset)
            # tarfile takes a broken header for the end of the archive, which is a block of zeros.
            if archive.fileobj.read(512) != bytes(512):
                yield Fault(name=label, reason=cut.format(after))
    except Unusable as fault:
        yield Fault(name=label, reason=str(fault))
    except tarfile.TarError as error:
        if not after:
            yield Fault(name=label, reason=f"is no tar archive ({error}); pack it again, without compression")
        else:
            yield Fault(name=label, reason=cut.format(after))
    except OSError as error:
        yield Fault(name=label, reason=f"cannot be read ({error.strerror or error}); check the shard")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # it would hold every header until the end
        parts = _clean(member.name).split("/")
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if not member.isdir() and not hidden:
            yield member


def _clean(name: str) -> str:
    """A member's name without leading slashes and steps upwards; it is a name only, never a place on disk."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _sample(
    archive: tarfile.TarFile, members: list[tarfile.TarInfo], label: str, source: SourceConfig, spool: Path
) -> Iterator[Item | Fault]:
    files: dict[str, tarfile.TarInfo] = {}
    for member in members:
        name = _clean(member.name)
        title = f"{label}/{shown(name)}"
        if not member.isfile() or member.sparse is not None:
            yield Fault(name=title, reason="is a link or no plain file in the archive; pack the file itself")
        elif name in files:
            yield Fault(name=title, reason="is in the archive twice; remove one of the two")
        elif name.lower().endswith(UNREAD_SUFFIXES):
            yield Fault(name=title, reason=unread_reason(name))
        else:
            files[name] = member
    pairs, alone = pair_files(list(files), (".txt", ".json"))
    if source.video_column is not None:
        pairs = [pair for pair in pairs if pair.clip.endswith(f".{source.video_column}")]
    for pair in pairs:
        title = f"{label}/{pair.clip}"
        try:
            yield _item(archive, files, pair, title, source, spool)
        except Unusable as fault:
            yield Fault(name=title, reason=str(fault))
    for name in alone:
        if MASK_NAME.fullmatch(name) or not name.lower().endswith(".json"):
            yield Fault(
                name=f"{label}/{name}", reason=f"{unpaired_reason(name)}; files of one clip must follow each other"
            )


def _item(
    archive: tarfile.TarFile,
    files: dict[str, tarfile.TarInfo],
    pair: Pair,
    title: str,
    source: SourceConfig,
    spool: Path,
) -> Item:
    captions: dict[str, None] = {}
    for name in pair.captions:
        captions.update(dict.fromkeys(_captions(archive, files[name], name, source)))
    if not captions:
        key = group_key(pair.clip).rpartition("/")[2]
        raise Unusable(f"has no caption; pack {shown(key)}.txt, or {shown(key)}.json with a caption, right beside it")
    mask = only_mask(pair.masks)
    return Item(
        name=title,
        path=_store(archive, files[pair.clip], spool),
        captions=tuple(captions),
        mask=None if mask is None else _store(archive, files[mask], spool),
    )


def _store(archive: tarfile.TarFile, member: tarfile.TarInfo, spool: Path) -> Path:
    stream: Any = archive.extractfile(member)
    return store(spool, stream, _clean(member.name))


def _captions(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, source: SourceConfig) -> list[str]:
    column = source.caption_column
    is_text = name.lower().endswith(".txt")
    if column is not None and is_text != (column == "txt"):
        return []
    stream: Any = archive.extractfile(member)
    content = stream.read(MAX_CAPTION_FILE_BYTES + 1)
    last = shown(name.rpartition("/")[2])
    if is_text:
        return split_captions(content, last)
    row = json_object(content[:MAX_CAPTION_FILE_BYTES].decode("utf-8-sig", "surrogateescape"))
    if isinstance(row, str):
        raise Unusable(f"its {last} {row}")
    found = (captions_in(row[name], name) for name in Columns.among(tuple(row), source).captions)
    return next((captions for captions in found if captions), [])
