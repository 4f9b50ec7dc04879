"""What was learnt about files, remembered: a start with 10,000 known clips hashes and opens none of them.

A small SQLite database beside the caches. It is a memory and no source of truth: losing it costs time alone, so a
damaged one, or one of another version, is set aside and begun anew, and one that cannot be written is read. Its journal
is SQLite's rollback journal, and not the write-ahead log, because that one works neither from two machines on one
network disk nor in a folder that is read only.
"""

import json
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .claims import shared

VERSION = 1
"""Of the table below."""
SETTLED_NS = 2 * 10**9
"""A file that changed less than this before it was examined is not taken as unchanged later: disks round the times at
which files change, some to 2 s, so that it may have changed again without a sign."""
ROWS_AT_ONCE = 256
"""How much is held back before it is written: a commit waits for the disk."""
HELD_SECONDS = 2.0
"""How long it is held back at most, while files keep coming."""
LOCKED_SECONDS = 30.0
"""How long another process may keep the database to itself."""

DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY_DBMOVED)
"""What SQLite answers where a database is damaged, or another process has set it aside."""

COLUMNS = "path, size, mtime_ns, ctime_ns, inode, sha256, examiner, record, fault, checksum"


@dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """What is known of a file that has not changed since."""

    sha256: str | None
    """Of its bytes; None where it could not be read to its end."""
    record: dict[str, Any] | None
    """What the examiner found; None where it found a fault, or was another examiner."""
    fault: str | None
    """Why the file cannot be used."""


@dataclass(frozen=True, slots=True)
class _State:
    """By which a file is taken as unchanged. The change time shows what a copied modification time hides."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: str
    """Written out: some disks number beyond the integers of SQLite."""


class Index:
    """`folder/index.sqlite3`, for any number of processes at once; not for several threads.

    `examiner` names what examines the files (libraries and their versions, the version of the record): what another
    examiner found is not given back, hashes are. Use it in a `with` block, or `close` it: what was put last is written
    then.
    """

    def __init__(self, folder: Path, examiner: str) -> None:
        self.file = folder / "index.sqlite3"
        self._examiner = examiner
        self._looked_at: dict[bytes, tuple[_State, int]] = {}
        self._held: dict[bytes, tuple[Any, ...]] = {}
        self._held_since = 0.0
        self._writes = True
        self._opened: os.stat_result
        self._database = self._open()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def get(self, path: Path) -> Remembered | None:
        """What is known of a file; None where nothing is, or it has changed, or is not there.

        Call it before a file is examined, so that `put` can tell whether the file changed while it was.
        """
        name, now = os.fsencode(os.path.abspath(path)), time.time_ns()
        state = _state_of(path)
        if state is None:
            return None
        row = self._held.get(name) or self._row(name)
        known = row is not None and _State(*row[1:5]) == state
        if row is None or not known or row[6] != self._examiner:
            self._looked_at[name] = (state, now)
            return Remembered(sha256=row[5], record=None, fault=None) if row is not None and known else None
        record, fault = row[7:9]
        return Remembered(sha256=row[5], record=None if record is None else json.loads(record), fault=fault)

    def renew(self, path: Path) -> None:
        """Look at a file that is known, so that `put` can replace what is remembered of it."""
        if (state := _state_of(path)) is not None:
            self._looked_at[os.fsencode(os.path.abspath(path))] = (state, time.time_ns())

    def put(
        self, path: Path, sha256: str | None, record: Mapping[str, Any] | None = None, fault: str | None = None
    ) -> bool:
        """Remember what was found of a file since `get` or `renew` looked at it: a record, or a fault that will last.

        A fault that may not show the next time is not for here: a timeout, a killed child, a missing permission.
        Returns whether it will be remembered; not so where `get` did not see the file, or where it has changed since,
        or had changed too shortly before.

        Raises:
            ValueError: both a record and a fault, or neither.
        """
        if (record is None) == (fault is None):
            raise ValueError(f"{path}: needs either a record or a fault")
        name = os.fsencode(os.path.abspath(path))
        state, examined_ns = self._looked_at.pop(name, (None, 0))
        if state is None or _state_of(path) != state or state.mtime_ns > examined_ns - SETTLED_NS:
            return False
        known = (state.size, state.mtime_ns, state.ctime_ns, state.inode)
        row = (name, *known, sha256, self._examiner, None if record is None else json.dumps(record), fault)
        if not self._held:
            self._held_since = time.monotonic()
        self._held[name] = (*row, _checksum(row))
        if len(self._held) >= ROWS_AT_ONCE or time.monotonic() - self._held_since > HELD_SECONDS:
            self._write()
        return True

    def forget_missing(self) -> int:
        """Forget the files that are no longer there; returns how many. Only on request: a disk may be unplugged."""
        self._write()
        gone = [row for row in self._ask("SELECT path FROM files") if not os.path.lexists(row[0])]
        self._change("DELETE FROM files WHERE path = ?", gone)
        return len(gone)

    def close(self) -> None:
        """Write what is held back, and let go of the database."""
        self._write()
        self._database.close()

    def _row(self, name: bytes) -> tuple[Any, ...] | None:
        rows = self._ask(f"SELECT {COLUMNS} FROM files WHERE path = ?", name)
        return rows[0] if rows and rows[0][-1] == _checksum(rows[0][:-1]) else None

    def _write(self) -> None:
        rows = list(self._held.values())
        self._change(f"INSERT OR REPLACE INTO files ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        self._held.clear()

    def _ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(question, values).fetchall()
        except sqlite3.DatabaseError as error:
            self._go_on_after(error)
            return []

    def _change(self, command: str, rows: Sequence[tuple[Any, ...]]) -> None:
        for attempt in range(2):
            if not rows or not self._writes:
                return
            try:
                # Without this, two processes that both read first and write then would wait for each other.
                self._database.execute("BEGIN IMMEDIATE")
                with self._database:
                    self._database.executemany(command, rows)
                return
            except sqlite3.DatabaseError as error:
                self._go_on_after(error)
                if attempt:
                    self._writes = False

    def _go_on_after(self, error: sqlite3.DatabaseError) -> None:
        """Begin a damaged database anew; where the disk is in the way, or another process for long, write no more."""
        if _is_damage(error):
            self._database.close()
            self._set_aside(error)
            self._database = self._open()
        else:
            self._tell(f"cannot be used ({error}); what is not in it is examined again in the next run")
            self._writes = False

    def _open(self) -> sqlite3.Connection:
        """The database, begun anew where it is damaged; one in memory where none can be had."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(2):
                try:
                    database = _connect(self.file)
                    self._opened = os.stat(self.file)
                    return database
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    self._opened = os.stat(self.file)
                    self._set_aside(error)
            return _connect(self.file)
        except (OSError, sqlite3.DatabaseError) as error:
            self._tell(f"cannot be opened ({error}); every file is examined again")
            self._writes = False
            return _connect(None)

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Rename the database that was opened, unless another process has just done so."""
        with shared(self.file.with_name(".claims")).claim("index") as mine, suppress(FileNotFoundError):
            if not mine:
                time.sleep(0.1)  # another process is at it, which takes it no longer
            if not mine or not os.path.samestat(os.stat(self.file), self._opened):
                return
            self._tell(f"is unusable ({error}); it is kept as {self.file.name}.damaged, and begun anew")
            for end in ("-journal", "-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    os.replace(f"{self.file}{end}", f"{self.file}.damaged{end}")

    def _tell(self, what: str) -> None:
        print(f"warning: {self.file}: the index of known files {what}", file=sys.stderr)


class _WrongVersion(sqlite3.DatabaseError):
    """Raised like damage, and cured like it."""

    sqlite_errorcode = sqlite3.SQLITE_NOTADB


def _connect(file: Path | None) -> sqlite3.Connection:
    """An open database with the table in it; without a file one in memory. Raises sqlite3.DatabaseError."""
    database = sqlite3.connect(file or ":memory:", timeout=LOCKED_SECONDS, isolation_level=None)
    try:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise _WrongVersion(f"it is of version {version}, this program knows {VERSION}")
        if version == 0:
            database.execute("BEGIN IMMEDIATE")
            with database:
                database.execute(f"CREATE TABLE IF NOT EXISTS files ({COLUMNS}, PRIMARY KEY (path))")
                database.execute(f"PRAGMA user_version = {VERSION}")
        # Finds a file that is cut short, without reading all of it.
        database.execute("SELECT max(rowid) FROM files").fetchone()
    except BaseException:
        database.close()
        raise
    return database


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)
    return code in DAMAGE or code & 0xFF in DAMAGE  # the lower byte of an extended code is its family


def _state_of(path: Path) -> _State | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _State(status.st_size, status.st_mtime_ns, status.st_ctime_ns, str(status.st_ino))


def _checksum(row: tuple[Any, ...]) -> int:
    """SQLite notices damage to its pages' structure, not to the values in them."""
    return zlib.crc32(repr(row).encode())
