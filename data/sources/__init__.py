"""Sources of clips: folders, tables, datasets and archives, all read into items one at a time."""

from collections.abc import Iterator
from pathlib import Path

from data.config import SourceConfig
from data.items import Fault, Item
from wan_finetune.errors import InputError

from .embedded import embedded_column, read_embedded
from .folder import read_folder
from .hub import is_saved, read_hub, read_saved
from .made import make_folder
from .rows import CLIP_LISTS, TABLE_SUFFIXES
from .shards import is_pattern, read_shards
from .table import read_table

__all__ = ["is_listed", "make_folder", "read_source"]


def read_source(source: SourceConfig, spool: Path) -> Iterator[Item | Fault]:
    """Everything that a source names, one at a time, in a stable order; no medium is opened.

    Media that lie inside archives or dataset rows are written to `spool`, under the SHA-256 of their bytes, where they
    are not there yet. What cannot be used comes as a Fault with its remedy.

    Raises:
        InputError: a fault of the whole source: missing, unreadable, nothing in it, no column or split of that name.
    """
    if source.path is None:
        yield from read_hub(source, spool)
        return
    path = source.path
    if source.make is not None:
        make_folder(path, source.make)
    suffix = path.suffix.lower()
    if is_pattern(path) or (suffix == ".tar" and not path.is_dir()):
        yield from read_shards(path, source, spool)
    elif path.is_dir():
        yield from read_saved(path, source, spool) if is_saved(path) else read_folder(path, source)
    elif path.is_file() and (suffix in TABLE_SUFFIXES or path.name.lower() in CLIP_LISTS):
        clip = embedded_column(path, source) if suffix == ".parquet" else None
        yield from read_table(path, source) if clip is None else read_embedded(path, clip, source, spool)
    else:
        raise InputError(f"data.sources: {path}: {_fault(path)}")


def is_listed(source: SourceConfig) -> bool:
    """Whether `read_source` takes names and captions alone, no media: then the items can be counted beforehand."""
    path = source.path
    if path is None or is_pattern(path) or path.suffix.lower() == ".tar":
        return False
    return not (path.is_dir() and is_saved(path)) and not (
        path.is_file() and path.suffix.lower() == ".parquet" and embedded_column(path, source) is not None
    )


def _fault(path: Path) -> str:
    if "://" in str(path) or str(path).startswith(("http:", "https:", "hf:", "s3:", "pipe:")):
        return "is a URL; download it and set path, or set dataset for one of the Hub"
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")):
        return "is compressed; unpack it to a folder or to a .tar file"
    if path.is_file():
        return "is a file, not a folder; point path at a folder of clips with .txt captions"
    if path.exists():
        return "is a pipe or a device; point path at a folder of clips with .txt captions"
    if path.suffix.lower() in TABLE_SUFFIXES:
        return "no such table; point path at a .jsonl, .json, .csv or .parquet file"
    return "no such folder; point path at a folder of clips with .txt captions"
