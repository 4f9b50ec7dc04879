"""A content-addressed cache of tensors: atomic to write, checked on reading, safe to share between processes.

An entry is a file of its own: at 100,000 entries files were listed, read and pruned fast enough (benchmarks/cache.py),
and only with them a killed process loses no more than the entry it was making, and pruning rewrites nothing.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import torch
from torch import Tensor

from wan_finetune.errors import InputError

from .buckets import Bucket
from .claims import shared
from .entries import DamagedEntry, Header, describe, discard, fail, fits, pack, read_header, read_tensor
from .framing import Box

Kind = Literal["latent", "text", "mask"]
Result = TypeVar("Result")

PREPARATION = "2"
"""Raised when frames reach the encoder in another way than before, so that no older latent is taken for a new one."""
SUFFIX = ".safetensors"
STALE_SECONDS = 3600.0
"""Age at which a temporary file is somebody's remains: writing one takes seconds."""
POLL_SECONDS = 0.1
"""How often a process that has nothing else to do looks whether another has finished an entry."""


def latent_key(
    clip_sha256: str,
    start_seconds: float,
    bucket: Bucket,
    fps: float,
    box: Box,
    encoder_fingerprint: str,
    *,
    with_std: bool = False,
) -> str:
    """Address of one window's latent: all that its value depends on, and no file name."""
    kind = "latent+std" if with_std else "latent"
    return _digest(kind, *_window(clip_sha256, start_seconds, bucket, fps, box), encoder_fingerprint)


def mask_key(mask_sha256: str, start_seconds: float, bucket: Bucket, fps: float, box: Box) -> str:
    """Address of one window's mask, which no encoder sees."""
    return _digest("mask", *_window(mask_sha256, start_seconds, bucket, fps, box))


def text_key(cleaned_caption: str, encoder_fingerprint: str) -> str:
    """Address of one caption's embedding."""
    return _digest("text", cleaned_caption, encoder_fingerprint)


def _window(sha256: str, start_seconds: float, bucket: Bucket, fps: float, box: Box) -> tuple[str | float, ...]:
    edges = (box.left, box.top, box.right, box.bottom)
    return PREPARATION, sha256, float(start_seconds), str(bucket), float(fps), *(float(edge) for edge in edges)


def _digest(*parts: str | float) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise InputError, with path, need and free space, where `folder`'s disk cannot take `needed_bytes`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise InputError(
            f"{folder}: {what} needs {needed_bytes / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} GiB are free; "
            "free some space or point data.cache at another disk"
        )


class Cache:
    """Files `folder/kind/ab/abcd....safetensors`, one an entry. Keys are 64 hexadecimal digits.

    Every method raises InputError where the disk, its permissions or `folder` itself are in the way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: Kind, key: str) -> Path:
        """Where an entry lies, or would."""
        return self.folder / kind / key[:2] / f"{key}{SUFFIX}"

    def has(self, kind: Kind, key: str) -> bool:
        """Whether the entry is there; only reading says whether it is sound."""
        # Asked a million times at a start: pathlib would take four times as long.
        return os.path.isfile(f"{self.folder}/{kind}/{key[:2]}/{key}{SUFFIX}")

    def keys(self, kind: Kind) -> set[str]:
        """The keys of all entries that are there, found without opening any."""
        return {file.name.removesuffix(SUFFIX) for file in self._files(kind) if file.name.endswith(SUFFIX)}

    def read(
        self, kind: Kind, key: str, shapes: Mapping[str, Sequence[int | None]] | None = None
    ) -> dict[str, Tensor] | None:
        """The entry's tensors, or None where there is none. A damaged one is removed, with a line on standard error.

        `shapes` names tensors that must be there, and their shapes, in which None stands for any size. A sound entry
        of another shape raises InputError and stays, as then it is a program that is at fault and not the file.
        """
        wanted = shapes or {}

        def tensors(file: FileIO, header: Header) -> dict[str, Tensor]:
            found = {}
            for name in {**header.tensors, **wanted}:
                dtype, shape = describe(header, name)
                found[name] = torch.empty(shape, dtype=dtype)
                read_tensor(file, header, key, name, found[name])
                if name in wanted and not fits(shape, wanted[name]):
                    self._refuse_shape(kind, key, f"{name} {list(shape)}", f"{name} {list(wanted[name])}")
            return found

        return self._use(kind, key, tensors)

    def read_into(self, kind: Kind, key: str, out: Tensor) -> bool:
        """Read the tensor that is named like its kind into `out`, contiguous and on the CPU: a place in a batch.

        False where there is no entry. Damage and other shapes (or another dtype) as in `read`; `out` is then undefined.
        """

        def filled(file: FileIO, header: Header) -> bool:
            dtype, shape = describe(header, kind)
            if (dtype, shape) != (out.dtype, tuple(out.shape)):
                self._refuse_shape(kind, key, f"{dtype} {list(shape)}", f"{out.dtype} {list(out.shape)}")
            read_tensor(file, header, key, kind, out)
            return True

        return self._use(kind, key, filled) or False

    def record(self, kind: Kind, key: str) -> dict[str, str] | None:
        """What an entry was made from, such as the caption as the encoder saw it; None where there is no entry."""
        return self._use(kind, key, lambda _, header: header.record)

    def write(self, kind: Kind, key: str, tensors: Mapping[str, Tensor], record: Mapping[str, str]) -> None:
        """Add an entry; `record` says in its header what it was made from. It appears whole or not at all.

        Raises:
            InputError: a tensor is not finite, too.
            ValueError: a tensor of a dtype that no entry holds.
        """
        if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise InputError(
                f"{kind} {key[:12]}: {', '.join(bad)} holds NaN or infinity; not cached. Made from {dict(record)}; "
                "check the encoder's weights and model.dtype"
            )
        content = pack(key, tensors, record)
        path = self.path(kind, key)
        partial = path.with_name(f".{key[:12]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            fail(path, f"cannot write {len(content)} bytes", error)
        finally:
            # Also reached by KeyboardInterrupt; a killed process leaves its file behind, and nothing ever reads it.
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    @contextmanager
    def claim(self, kind: Kind, key: str) -> Iterator[bool]:
        """Whether this process is the one to make an entry now; while the block runs, no other is. See `claims`."""
        path = self.folder / ".claims"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            claims = shared(path)
        except OSError as error:
            fail(path, "cannot write to the cache", error)
        with claims.claim(f"{kind} {key}") as mine:
            yield mine

    def fill(self, kind: Kind, keys: Sequence[str], make: Callable[[str], None], done: Callable[[], None]) -> None:
        """Have `make(key)` write each entry that is not there; call `done` once for each key.

        Any number of processes may fill the same cache: an entry that another one is making is passed over and looked
        at again at the end, and made here only if that process died or gave up.
        """
        waiting = list(keys)
        while waiting:
            others = []
            for key in waiting:
                if self._made(kind, key, make):
                    done()
                else:
                    others.append(key)
            if len(others) == len(waiting):
                time.sleep(POLL_SECONDS)
            waiting = others

    def prune(self, kind: Kind, keep: AbstractSet[str], older_than_days: float | None = None) -> tuple[int, int]:
        """Remove entries whose keys are not in `keep`, and killed writers' remains; return how many files and bytes.

        With `older_than_days` only entries that were neither written nor read for so long go: other runs may use this
        cache. (Disks mounted noatime remember the writing alone.)
        """
        now = time.time()

        def size_if_due(file: os.DirEntry[str]) -> int | None:
            status = file.stat()
            if not file.name.endswith(SUFFIX):
                remains = file.name.endswith(".tmp") and now - status.st_mtime > STALE_SECONDS
                return status.st_size if remains else None
            idle_seconds = now - max(status.st_mtime, status.st_atime)
            if file.name.removesuffix(SUFFIX) in keep:
                return None
            return status.st_size if older_than_days is None or idle_seconds > older_than_days * 86400 else None

        def removed_bytes(file: os.DirEntry[str]) -> int | None:
            try:
                if (size := size_if_due(file)) is not None:
                    os.unlink(file.path)
                return size
            except FileNotFoundError:
                return None  # another process prunes, too
            except OSError as error:
                fail(Path(file.path), "cannot be removed", error)

        # A disk takes milliseconds over each file, most of them waiting: one thread was 15 times slower than eight.
        with ThreadPoolExecutor(8) as threads:
            sizes = [size for size in threads.map(removed_bytes, list(self._files(kind))) if size is not None]
        return len(sizes), sum(sizes)

    def _made(self, kind: Kind, key: str, make: Callable[[str], None]) -> bool:
        """Whether nothing is left to do for an entry; False while another process makes it."""
        if self.has(kind, key):
            return True
        with self.claim(kind, key) as mine:
            if not mine:
                return False
            if not self.has(kind, key):
                make(key)
            return True

    def _use(self, kind: Kind, key: str, use: Callable[[FileIO, Header], Result]) -> Result | None:
        """What `use` makes of an entry's open file; None where there is no sound one."""
        path = self.path(kind, key)
        try:
            with FileIO(path) as file:
                try:
                    return use(file, read_header(file, key))
                except DamagedEntry as error:
                    replaced = discard(path, os.fstat(file.fileno()), str(error))
        except FileNotFoundError:
            return None
        except OSError as error:
            fail(path, "cannot be read", error)
        return self._use(kind, key, use) if replaced else None

    def _refuse_shape(self, kind: Kind, key: str, held: str, due: str) -> NoReturn:
        raise InputError(
            f"{self.path(kind, key)}: this cache entry holds {held}, {due} is due; "
            "remove the file and run again, it is then made anew"
        )

    def _files(self, kind: Kind) -> Iterator[os.DirEntry[str]]:
        """All files of one kind, temporary ones too."""
        folder = self.folder / kind
        try:
            with os.scandir(folder) as parts:
                for part in parts:
                    if part.is_dir():
                        with os.scandir(part.path) as files:
                            yield from files
        except FileNotFoundError:
            return
        except OSError as error:
            fail(folder, "cannot be listed", error)
