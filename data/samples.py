"""Training samples in an Arrow file, memory-mapped: a million of them cost no more memory than ten."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from .buckets import Bucket
from .cache import latent_key, mask_key
from .clips import Clip
from .framing import Box

ROWS_AT_ONCE = 4096
"""Samples held in memory while the file is written."""

SCHEMA = pa.schema(
    {
        "clip": pa.string(),
        "path": pa.string(),
        "source": pa.int32(),
        "still": pa.bool_(),
        "bucket": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "box": pa.list_(pa.float64(), 4),
        "start_seconds": pa.list_(pa.float64()),
        "latent_keys": pa.list_(pa.string()),
        "captions": pa.list_(pa.list_(pa.string())),
        "mask": pa.string(),
        "mask_keys": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What one visit trains on: a window of a clip, or one of several that are drawn anew each epoch."""

    clip: str
    """Name within its source."""
    path: Path
    source: int
    """Number of its source in the configuration."""
    still: bool
    bucket: Bucket
    width: int
    """Of the picture on display, in pixels."""
    height: int
    box: Box
    """What of it the bucket shows."""
    start_seconds: tuple[float, ...]
    """Where its windows begin, one for each latent."""
    latent_keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    """Each in all orders of its tags that are used."""
    mask: Path | None
    mask_keys: tuple[str, ...]
    """One for each latent, or none."""

    def to_row(self) -> dict[str, Any]:
        """As a row of the table."""
        box = [self.box.left, self.box.top, self.box.right, self.box.bottom]
        changed = {"path": str(self.path), "bucket": str(self.bucket), "box": box, "mask": None}
        if self.mask is not None:
            changed["mask"] = str(self.mask)
        return {**{name: getattr(self, name) for name in SCHEMA.names}, **changed}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Sample":
        """The inverse of `to_row`."""
        changed = {
            "path": Path(row["path"]),
            "bucket": Bucket.parse(row["bucket"]),
            "box": Box(*row["box"]),
            "start_seconds": tuple(row["start_seconds"]),
            "latent_keys": tuple(row["latent_keys"]),
            "captions": tuple(tuple(orders) for orders in row["captions"]),
            "mask": Path(row["mask"]) if row["mask"] else None,
            "mask_keys": tuple(row["mask_keys"]),
        }
        return cls(**{**row, **changed})


def samples_of(
    clip: Clip, *, fps: float, draw_window: bool, encoder: str, with_std: bool, mask_sha256: str | None
) -> list[Sample]:
    """A sample for each window of a clip, or one for them all where a window is drawn each epoch."""

    def sample(starts: tuple[float, ...]) -> Sample:
        views = [(start, clip.bucket, fps, clip.box) for start in starts]
        return Sample(
            clip=clip.name,
            path=clip.path,
            source=clip.source,
            still=clip.still,
            bucket=clip.bucket,
            width=clip.width,
            height=clip.height,
            box=clip.box,
            start_seconds=starts,
            latent_keys=tuple(latent_key(clip.sha256, *view, encoder, with_std=with_std) for view in views),
            captions=clip.captions,
            mask=clip.mask,
            mask_keys=tuple(mask_key(mask_sha256, *view) for view in views) if mask_sha256 else (),
        )

    if draw_window:
        return [sample(clip.start_seconds)]
    return [sample((start,)) for start in clip.start_seconds]


class SampleTable(Sequence[Sample]):
    """The samples of an Arrow file; a row becomes a `Sample` when it is asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with pa.memory_map(str(file)) as source:
            self.table = pa.ipc.open_file(source).read_all()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = {name: column[int(index)].as_py() for name, column in zip(SCHEMA.names, self.table.columns, strict=True)}
        return Sample.from_row(row)

    def __iter__(self) -> Iterator[Sample]:
        # A row at a time, each cell would be looked up by itself.
        for batch in self.table.to_batches(max_chunksize=ROWS_AT_ONCE):
            yield from map(Sample.from_row, batch.to_pylist())

    def column(self, name: str) -> NDArray[Any]:
        """One column as an array [N]; equal texts are one object."""
        column = self.table.column(name)
        if not pa.types.is_string(column.type):
            return column.to_numpy()
        # A million names of buckets would be a million objects.
        coded = column.combine_chunks().dictionary_encode()
        return coded.dictionary.to_numpy(zero_copy_only=False)[coded.indices.to_numpy()]


def write_samples(folder: Path, samples: Iterable[Sample]) -> Path:
    """Write samples into `folder`, in a file named by their content; it appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    digest = hashlib.sha256()
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for rows in _chunks(sample.to_row() for sample in samples):
                digest.update(json.dumps(rows, sort_keys=True).encode())
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
        file = folder / f"{digest.hexdigest()[:32]}.arrow"
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == ROWS_AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
