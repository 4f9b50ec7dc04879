"""Datasets of the Hugging Face Hub, and those that `datasets` saved to a folder, row by row and undecoded."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.items import Fault, Item
from wan_finetune.errors import InputError

from .columns import CAPTION_COLUMNS, CLIP_COLUMNS, MASK_COLUMNS, Columns, missing_column
from .embedded import Locate, row_items
from .paths import DataRoot, Unusable, is_media, shown
from .rows import Row
from .spool import store


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def read_saved(folder: Path, source: SourceConfig, spool: Path) -> Iterator[Item | Fault]:
    """Items of a saved dataset, or of one split of it.

    Raises:
        InputError: unreadable, no such split, or no column with clips or captions.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"data.sources: {folder}: cannot be read ({_line(error)}); save the dataset again") from error
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise InputError(f"data.sources: {folder}: no split {source.split}; it has {', '.join(saved)}: set split")
        saved = saved[source.split]
    root = DataRoot(folder)
    yield from _items(saved, str(folder), source, spool, lambda name: root.find(name)[1])


def read_hub(source: SourceConfig, spool: Path) -> Iterator[Item | Fault]:
    """Items of a dataset of the Hub; tokens are the Hub's own business.

    Raises:
        InputError: not found, closed, offline, no such subset, split or revision, or no column with clips or captions.
    """
    import datasets

    try:
        # With the scheme: a local folder of that name is not meant.
        dataset = datasets.load_dataset(
            f"hf://datasets/{source.dataset}",
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except Exception as error:
        raise InputError(f"data.sources: {source.dataset}: {_hub_fault(error, source)}") from error
    yield from _items(dataset, source.title, source, spool, _hub_finder(source, spool))


def _hub_fault(error: Exception, source: SourceConfig) -> str:
    from datasets.exceptions import DatasetNotFoundError

    text = str(error).lower()
    if isinstance(error, DatasetNotFoundError):
        if "gated" in text:
            return "is gated; accept its terms on its page of the Hub, then run `hf auth login`"
        if "revision" in text:
            return f"has no revision {source.revision}; correct revision"
        return "no such dataset on the Hub, or a private one; check the name, or run `hf auth login`"
    if isinstance(error, ConnectionError) or "offline" in text or "timed out" in text:
        return f"the Hub cannot be reached ({_line(error)}); check the network and HF_HUB_OFFLINE, and start again"
    if isinstance(error, ValueError) and "split" in text:
        return f"no split {source.split} ({_line(error)}); set split"
    if isinstance(error, ValueError) and "config" in text:
        return f"no subset {source.subset or 'given'} ({_line(error)}); set subset"
    return f"cannot be read ({_line(error)}); try it with datasets.load_dataset, or download it and set path"


def _line(error: BaseException) -> str:
    """The first line of an error, cut, and without anything like a token."""
    first = next(iter(str(error).splitlines()), "")[:300]
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_...", f"{type(error).__name__}: {first}".rstrip(": "))


def _items(dataset: Any, title: str, source: SourceConfig, spool: Path, locate: Locate) -> Iterator[Item | Fault]:
    import datasets

    if dataset.features is None:
        names = list(next(iter(dataset), {}))
        kinds: dict[str, Any] = dict.fromkeys(names)
    else:
        kinds = dict(dataset.features)
        names = list(kinds)
    clip = _clip_column(kinds, title, source)
    columns = Columns.among(names, source)
    nested = ["json"] if "json" in names and not columns.captions else []
    if not columns.captions and not nested:
        fault = missing_column("captions", names, "caption_column", CAPTION_COLUMNS, source.caption_column)
        raise InputError(f"data.sources: {title}: {fault}")
    used = list(dict.fromkeys([clip, *columns.captions, *columns.masks, *nested]))
    dataset = dataset.select_columns(used).with_format(None)
    for name in used:
        if isinstance(kinds[name], datasets.Video | datasets.Image):
            dataset = dataset.cast_column(name, type(kinds[name])(decode=False))
    yield from row_items(_rows(dataset, title), clip, source.split, source, spool, locate)


def _clip_column(kinds: dict[str, Any], title: str, source: SourceConfig) -> str:
    """The column with the clips: the one set, else a video, else a still, else one with a common name."""
    import datasets

    if source.video_column in kinds:
        clip = source.video_column
    else:
        by_name = Columns.among(list(kinds), source).clips
        candidates = [] if source.video_column is not None else [*by_name, *kinds]
        typed = [
            name
            for kind in (datasets.Video, datasets.Image)
            for name in candidates
            if isinstance(kinds[name], kind) and name.lower() not in MASK_COLUMNS
        ]
        if not typed and not by_name:
            fault = missing_column("clips", list(kinds), "video_column", CLIP_COLUMNS, source.video_column)
            raise InputError(f"data.sources: {title}: {fault}")
        clip = [*typed, *by_name][0]
    if source.dataset is not None and getattr(kinds[clip], "dtype", None) in ("string", "large_string"):
        raise InputError(
            f"data.sources: {title}: its column {clip} names files and holds none; download the dataset with "
            f"`hf download {title} --repo-type dataset --local-dir FOLDER` and set path to the folder"
        )
    return clip


def _rows(dataset: Any, title: str) -> Iterator[Row]:
    rows, number = iter(dataset), 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(
                f"data.sources: {title}: row {number} cannot be read ({_line(error)}); check the network and the "
                "dataset, and start again"
            ) from error
        yield number, row


def _hub_finder(source: SourceConfig, spool: Path) -> Locate:
    """Finds a file of this dataset: in the caches of the Hub's libraries, or, when streaming, on the Hub."""
    import datasets.config
    import huggingface_hub.constants

    caches = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    remote = re.compile(rf"(zip://[^:]+::)?hf://datasets/{re.escape(str(source.dataset))}(@[^/]+)?/.+")

    def locate(name: str) -> Path:
        if remote.fullmatch(name):
            return _fetch(name, spool)
        real = os.path.realpath(name)
        inside = any(f"{real}/".startswith(f"{os.path.realpath(cache)}/") for cache in caches)
        if not os.path.isabs(name) or not inside or not os.path.isfile(real):
            raise Unusable(f"names {shown(name)}, which the dataset does not hold; leave the row out")
        return Path(name)

    return locate


def _fetch(address: str, spool: Path) -> Path:
    import shutil

    from datasets.utils.file_utils import xopen

    inner = address.partition("::")[0]
    if not is_media(inner):
        raise Unusable(f"names {shown(inner.rpartition('/')[2])}, no video or still of a kind that is read; convert it")
    spool.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=spool) as file:
        with xopen(address, "rb") as remote:
            shutil.copyfileobj(remote, file, 2**20)
        return store(spool, file, inner)
