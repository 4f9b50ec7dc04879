"""From folders to clips: each video file with its captions, bucket and windows, or the reason why it is left out."""

import importlib
import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from wan_finetune.captions import clean_caption, with_trigger
from wan_finetune.errors import InputError
from wan_finetune.video import VideoFault, VideoInfo, probe

from .buckets import Bucket, choose_bucket
from .config import DataConfig, SourceConfig
from .windows import window_starts

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A video file that is trained on."""

    name: str
    """Path relative to its source folder, with forward slashes."""
    info: VideoInfo
    captions: tuple[str, ...]
    """At least one; cleaned as the pipeline cleans a prompt, trigger included."""
    bucket: Bucket
    start_seconds: tuple[float, ...]
    """Where its windows begin, ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of data_report.jsonl: a file, and what became of it."""

    file: str
    """Path relative to its source folder, so that the report leaks no local path."""
    used: bool
    bucket: str | None = None
    windows: tuple[float, ...] = ()
    """Start times in seconds."""
    reader: str | None = None
    captions: tuple[str, ...] = ()
    reason: str | None = None
    """Fault and remedy where the file is not used."""

    def to_json(self) -> str:
        """One line, keys in a fixed order, Chinese left readable."""
        return json.dumps(asdict(self), ensure_ascii=False)


def find_clips(config: DataConfig) -> tuple[list[Clip], list[Row]]:
    """Read every source folder: the clips to train on, and a row for every file, sources and names in order.

    Raises:
        InputError: a source is missing or holds no video; any fault at all under on_error "fail", all of them listed;
            no clip left under "skip".
    """
    clips: list[Clip] = []
    rows: list[Row] = []
    faults: list[str] = []
    for source in config.sources:
        make_folder(source)
        videos, sidecars = list_files(source.path)
        stems = {path.with_suffix("") for path in videos}
        for path in videos:
            name = path.relative_to(source.path).as_posix()
            found = read_clip(path, name, config)
            if isinstance(found, Clip):
                clips.append(found)
            else:
                faults.append(f"{path}: {found}")
            rows.append(row_of(name, found))
        for path in sidecars:
            if path.with_suffix("") not in stems:
                reason = "a caption without a clip; add the clip of the same name or remove the caption"
                faults.append(f"{path}: {reason}")
                rows.append(row_of(path.relative_to(source.path).as_posix(), reason))
    if faults and config.on_error == "fail":
        raise InputError(
            f"{len(faults)} of {len(rows)} files cannot be used:\n"
            + "\n".join(f"  {fault}" for fault in faults)
            + '\nMend them, or set data.on_error = "skip" to leave them out.'
        )
    if not clips:
        raise InputError(
            f"no clip is left of {len(rows)} files; mend at least one:\n" + "\n".join(f"  {fault}" for fault in faults)
        )
    return clips, rows


def row_of(name: str, found: Clip | str) -> Row:
    """The report's line for a clip, or for a reason why there is none."""
    if isinstance(found, str):
        return Row(file=name, used=False, reason=found)
    return Row(
        file=name,
        used=True,
        bucket=str(found.bucket),
        windows=found.start_seconds,
        reader=found.info.reader,
        captions=found.captions,
    )


def make_folder(source: SourceConfig) -> None:
    """Call the source's maker where its folder does not exist yet.

    The maker fills a temporary neighbour, which is then renamed: an interrupted maker leaves no half-filled folder,
    and of two processes that start at once one prevails.
    """
    folder = source.path
    if folder.exists() or source.make is None:
        return
    module_name, _, function_name = source.make.partition(":")
    try:
        maker = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"data.sources: make = {source.make!r} cannot be imported: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        maker(partial)
        if not partial.is_dir():
            raise InputError(f"data.sources: make = {source.make!r} returned without making the folder it was given")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Video files and .txt files below a folder, hidden ones left out, sorted by name.

    Raises:
        InputError: no such folder, nothing in it, or no video among its files.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise InputError(f"data.sources: {folder}: {what}; point path at a folder of clips with .txt captions")
    everything = (path for path in folder.rglob("*") if path.is_file())
    files = [p for p in everything if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files.sort(key=lambda path: path.relative_to(folder).as_posix())
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        held = f"holds {len(files)} files and no video" if files else "the folder is empty"
        raise InputError(f"data.sources: {folder}: {held}; put clips there ({' '.join(VIDEO_SUFFIXES)})")
    return videos, [path for path in files if path.suffix.lower() == ".txt"]


def read_clip(path: Path, name: str, config: DataConfig) -> Clip | str:
    """A clip with its captions, bucket and windows, or the reason, with its remedy, why it cannot be used."""
    try:
        captions = read_captions(path, config.trigger)
        info = probe(path)
    except VideoFault as fault:
        return fault.reason
    bucket = choose_bucket(info, config.parsed_buckets, config.fps, config.upscale)
    if isinstance(bucket, str):
        return bucket
    starts = window_starts(info, bucket, config.fps, config.windows_per_clip)
    return Clip(name=name, info=info, captions=captions, bucket=bucket, start_seconds=starts)


def read_captions(path: Path, trigger: str) -> tuple[str, ...]:
    """Captions of a clip, one for each line of its sidecar that is not empty, cleaned, with the trigger.

    Raises:
        VideoFault: no sidecar, one that is not UTF-8, or one without a caption.
    """
    sidecar = next((p for p in (path.with_suffix(".txt"), path.with_suffix(".TXT")) if p.is_file()), None)
    if sidecar is None:
        raise VideoFault(path, f"has no caption; write one into {path.stem}.txt beside it")
    try:
        lines = sidecar.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise VideoFault(path, f"its caption {sidecar.name} is not UTF-8; save it as UTF-8") from None
    cleaned = [caption for line in lines if (caption := clean_caption(line))]
    if not cleaned:
        raise VideoFault(path, f"its caption {sidecar.name} is empty; describe the clip in it")
    return tuple(with_trigger(caption, clean_caption(trigger)) for caption in cleaned)
