"""A content-addressed cache of tensors: atomic to write, checked on reading, safe to share between processes."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from wan_finetune.errors import InputError

from .buckets import Bucket

Kind = Literal["latent", "text"]

PREPARATION = "1"
"""Raised when frames reach the encoder in another way than before, so that no older latent is taken for a new one."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latent_key(clip_sha256: str, start_seconds: float, bucket: Bucket, fps: float, encoder_fingerprint: str) -> str:
    """Address of one window's latent: all that its value depends on, and no file name."""
    return _digest(
        "latent", PREPARATION, clip_sha256, float(start_seconds), str(bucket), float(fps), encoder_fingerprint
    )


def text_key(cleaned_caption: str, encoder_fingerprint: str) -> str:
    """Address of one caption's embedding."""
    return _digest("text", cleaned_caption, encoder_fingerprint)


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
    """Files `folder/kind/ab/abcd....safetensors`, one an entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: Kind, key: str) -> Path:
        """Where an entry lies, or would."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: Kind, key: str) -> bool:
        """Whether the entry is there; only `read` says whether it is sound."""
        return self.path(kind, key).is_file()

    def read(self, kind: Kind, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors, or None where there is none. A damaged one is removed, with a line on standard error."""
        path = self.path(kind, key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _unpack(content, key)
        except (ValueError, KeyError, SafetensorError) as error:
            print(f"warning: {path}: damaged cache entry removed ({error})", file=sys.stderr)
            path.unlink(missing_ok=True)
            return None

    def write(self, kind: Kind, key: str, tensors: dict[str, Tensor], record: dict[str, str]) -> None:
        """Add an entry; `record` says in its header what it was made from. It appears whole or not at all.

        Raises:
            ValueError: a tensor that is not finite.
            InputError: the disk is full.
        """
        if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise ValueError(f"{kind} {key[:12]}: {', '.join(bad)} holds NaN or infinity; not cached")
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        checks = {"key": key, "sha256": _payload_sha256(safetensors.torch.save(contiguous))}
        content = safetensors.torch.save(contiguous, metadata={**record, **checks})
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
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{path}: the disk is full, {len(content)} more bytes were due; "
                "free some space or point data.cache at another disk, then run again: what is cached stays"
            ) from error
        finally:
            # Also reached by KeyboardInterrupt; a killed process leaves its file behind, and nothing ever reads it.
            partial.unlink(missing_ok=True)


def _payload_sha256(content: bytes) -> str:
    """Checksum of the tensors' bytes, which lie behind safetensors' length-prefixed header."""
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _unpack(content: bytes, key: str) -> dict[str, Tensor]:
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    record = header["__metadata__"]
    if record["key"] != key:
        raise ValueError("it belongs to another key")
    if record["sha256"] != _payload_sha256(content):
        raise ValueError("its checksum does not match")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("it is not finite")
    return tensors
