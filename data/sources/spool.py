"""Media that lie inside archives or table rows, put where a decoder can open them: under the hash of their bytes."""

import contextlib
import hashlib
import io
import os
import secrets
import shutil
from pathlib import Path
from typing import IO

from wan_finetune.errors import InputError

from .paths import Unusable, is_media

HEAD_BYTES = 64


def suffix_of(head: bytes) -> str:
    """The suffix of a medium whose first bytes these are. Raises Unusable for one of no kind that is read."""
    if head[4:8] == b"ftyp":
        return {b"qt  ": ".mov", b"M4V ": ".m4v"}.get(head[8:12], ".mp4")
    if head[:4] == b"\x1aE\xdf\xa3":
        return ".webm" if b"webm" in head[:HEAD_BYTES] else ".mkv"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP"):
        return ".avi" if head[8:12] == b"AVI " else ".webp"
    for mark, suffix in ((b"\x89PNG\r\n\x1a\n", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"BM", ".bmp")):
        if head.startswith(mark):
            return suffix
    raise Unusable("is no video or still of a kind that is read; convert it to mp4 or png")


def store(spool: Path, content: bytes | IO[bytes], name: str | None) -> Path:
    """The file in the spool that holds these bytes; written, whole or not at all, where it is not there yet.

    A stream is read from its start, twice where it has to be written. The suffix is the name's, or, where that says
    nothing, that of the content.

    Raises:
        Unusable: nothing in it, or content of no kind that is read.
        InputError: the spool cannot be written.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    stream.seek(0)
    digest, size, head = hashlib.sha256(), 0, b""
    while block := stream.read(2**20):
        head = head or block[:HEAD_BYTES]
        digest.update(block)
        size += len(block)
    if not size:
        raise Unusable("is empty (0 bytes); pack it again, or remove it")
    suffix = Path(name).suffix.lower() if name is not None and is_media(name) else suffix_of(head)
    target = spool / f"{digest.hexdigest()}{suffix}"
    if target.is_file() and target.stat().st_size == size:
        return target
    stream.seek(0)
    partial = target.with_name(f".{target.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        spool.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            shutil.copyfileobj(stream, file, 2**20)
        os.replace(partial, target)
    except OSError as error:
        raise InputError(
            f"{spool}: cannot write {size:,} bytes of a clip ({error.strerror}); free space there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return target
