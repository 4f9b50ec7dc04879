"""A conversion on its way: OUT.partial holds what is finished, with hashes, until all of it is.

OUT itself appears by one rename, whole. A conversion that was killed goes on with the same command: files of
OUT.partial that are as their hash says are kept, all others are made again.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from .writing import PARTIAL, hash_file, sync_folder, write_json

JOURNAL = ".journal.json"
LOCK = ".lock"


class Journal:
    """What is finished in OUT.partial."""

    def __init__(self, folder: Path, identity: dict[str, Any], done: dict[str, str]) -> None:
        self.folder = folder
        self.identity = identity
        self.done = done
        """SHA-256 of each finished file, by its path below the folder."""

    def make(self, name: str, write: Callable[[Path], str]) -> None:
        """Write a file by `write`, which gives its hash, and remember it."""
        self.done[name] = write(self.folder / name)
        self.save()

    def save(self) -> None:
        write_json(self.folder / JOURNAL, {"identity": self.identity, "done": self.done})


def partial_folder(out: Path) -> Path:
    """Where a conversion into `out` is made."""
    return out.with_name(out.name + PARTIAL)


def refuse_existing(out: Path) -> None:
    """Nothing that exists is written over.

    Raises:
        InputError: `out` is there already, or is no name for a folder.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; give another folder, or remove it")
    if out.name in {"", ".."}:
        raise InputError(f"{out}: is no name for a new folder")


@contextmanager
def opened(out: Path, identity: dict[str, Any]) -> Iterator[Journal]:
    """OUT.partial, for this process alone, with what an earlier try has finished there.

    Raises:
        InputError: another process works on it, or it is of another conversion.
    """
    folder = partial_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another conversion writes there; wait for it, or give another OUT") from None
        yield read_journal(folder, identity)
    finally:
        os.close(descriptor)


def read_journal(folder: Path, identity: dict[str, Any]) -> Journal:
    """The journal of a folder; a new one in a folder without."""
    path = folder / JOURNAL
    if not path.is_file():
        strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in {LOCK, JOURNAL + PARTIAL})
        if strangers:
            raise InputError(f"{folder}: holds {strangers[0]} but no record of a conversion; remove the folder")
        journal = Journal(folder, identity, {})
        journal.save()
        return journal
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        earlier, done = dict(kept["identity"]), {str(name): str(digest) for name, digest in kept["done"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is damaged; remove {folder} and begin again") from None
    if not done:
        # Nothing would be mixed: a try that ended before its first file binds nobody to its settings.
        return Journal(folder, identity, {})
    if differing := [key for key in identity if earlier.get(key) != identity[key]]:
        key = differing[0]
        raise InputError(
            f"{folder}: was begun with {what_differs(key, earlier.get(key), identity[key])}; "
            "give the same again, or remove the folder"
        )
    return Journal(folder, identity, done)


def what_differs(key: str, earlier: Any, now: Any) -> str:
    """One difference, in words."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        names = sorted(name for name in earlier.keys() | now.keys() if earlier.get(name) != now.get(name))
        return f"other {key} ({', '.join(names[:3])} changed)"
    return f"{key} = {earlier}, and is asked to go on with {now}"


def keep_whole_files(journal: Journal) -> list[str]:
    """Files of an earlier try that are as their hash says; the others are forgotten, and made again."""
    whole = {}
    for name, digest in journal.done.items():
        path = journal.folder / name
        if path.is_file() and hash_file(path) == digest:
            whole[name] = digest
    journal.done = whole
    return sorted(whole)


def publish(journal: Journal, out: Path) -> None:
    """Give the finished folder its name."""
    expected = {*journal.done, JOURNAL, LOCK}
    for path in sorted(journal.folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(journal.folder).as_posix() not in expected:
            path.unlink()
    refuse_existing(out)
    os.rename(journal.folder, out)
    # Only now: without them the folder could neither be gone on with nor be told from a stranger's.
    for name in (JOURNAL, LOCK):
        (out / name).unlink()
    sync_folder(out.parent)
