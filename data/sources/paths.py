"""Which files a source may name: their kinds, and places inside its own folder only."""

import functools
import os
import posixpath
import re
import stat
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
STILL_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + STILL_SUFFIXES
UNREAD_SUFFIXES = (
    *(".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".mts", ".3gp", ".ogv", ".vob", ".y4m"),
    *(".gif", ".apng", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"),
)
"""Videos and stills that are not read: said of each, so that none is left out in silence."""


class Unusable(ValueError):
    """Why a row or a file cannot be used, and what to do; without a local path."""


def is_media(name: str) -> bool:
    """Whether the suffix, in any case, is one of a video or still that is read."""
    return name.lower().endswith(MEDIA_SUFFIXES)


def require_media(name: str) -> None:
    """Raise Unusable for a name whose suffix is not one of a video or still that is read."""
    if not is_media(name):
        raise Unusable(f"{shown(name)} {unread_reason(name)}")


def unread_reason(name: str) -> str:
    """Fault and remedy for a file whose suffix is not one of a video or still that is read."""
    kind = f"of a kind that is read ({' '.join(MEDIA_SUFFIXES)})"
    return f"is no video or still {kind}; convert it" if "." in name else f"has no suffix {kind}; give it its own"


def shown(text: str) -> str:
    """A file name for a message: on one line, at most 80 characters, an absolute one without its folders."""
    if text.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        text = ".../" + re.split(r"[\\/]", text)[-1]
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return text if len(text) <= 80 else f"{text[:30]}...{text[-47:]}"


def path_text(value: object) -> str:
    """The file name that a table's cell holds.

    Raises:
        Unusable: nothing, no text, a URL, or characters that no file name holds.
    """
    if value is None or value == "":
        raise Unusable("names no clip; write its file name, or remove the row")
    if not isinstance(value, str):
        kind = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
        raise Unusable(
            f"its file name is {kind.get(type(value), 'no text')}; write the name as text, or remove the row"
        )
    if scheme := re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*)(://|::)|\s*(data):", value):
        raise Unusable(f"is a URL ({scheme[1] or scheme[3]}:); download the clip and name the file")
    try:
        unfit = "\0" in value or not value.strip() or value.encode() is None
    except UnicodeEncodeError:
        unfit = True
    if unfit:
        raise Unusable(f"{shown(value)!r} is no file name; correct it, or remove the row")
    return value


class DataRoot:
    """The folder that a source's files lie in. What it finds lies inside, links followed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.below = ""
        """Folder inside that relative names start from."""
        self._real = os.path.realpath(folder)
        # Rows name files of few folders: each is resolved once.
        self._real_folder = functools.lru_cache(maxsize=1024)(os.path.realpath)

    def name(self, value: object) -> str:
        """The name, relative to the folder, that `find` would give; does not look for the file where it need not.

        Raises:
            Unusable: as `path_text`, or as `find` for an absolute path, `..` or backslashes.
        """
        text = path_text(value)
        if os.path.isabs(text) or "\\" in text or ".." in text.split("/"):
            return self.find(text)[0]
        return posixpath.normpath(posixpath.join(self.below, text))

    def find(self, value: object) -> tuple[str, Path]:
        """Name relative to the folder, with forward slashes, and path of the file that a cell names.

        Raises:
            Unusable: as `path_text`; outside of the folder, missing, or no regular file.
        """
        return self._find(path_text(value), self.below)

    def find_listed(self, name: str) -> tuple[str, Path]:
        """As `find`, for a name relative to the folder itself that a listing of it gave."""
        return self._find(path_text(name), "")

    def _find(self, text: str, below: str) -> tuple[str, Path]:
        if "\\" in text and not os.path.lexists(self.folder / below / text):
            text = text.replace("\\", "/")
        path = os.path.join(self.folder, below, text)
        real = self._resolve(path)
        if not f"{real}/".startswith(f"{self._real.rstrip('/')}/"):
            raise Unusable(f"{shown(text)} {_way_out(text)}; put the clip below that folder and name it relative to it")
        # Of the path itself: to the system, unlike to realpath, `gone/../a.mp4` does not exist.
        require_file(path, text)
        if os.path.isabs(text) or ".." in text.split("/"):
            name = Path(os.path.relpath(real, self._real)).as_posix()
        else:
            name = posixpath.normpath(posixpath.join(below, text))
        return name, self.folder / name

    def _resolve(self, path: str) -> str:
        head, tail = os.path.split(path)
        if tail in ("", ".", ".."):
            return os.path.realpath(path)
        full = os.path.join(self._real_folder(head), tail)
        return os.path.realpath(full) if os.path.islink(full) else full


def _way_out(text: str) -> str:
    if os.path.isabs(text):
        return "is an absolute path out of the data folder"
    if ".." in text.split("/"):
        return "leads out of the data folder by `..`"
    return "is a link, or lies behind one, that leads out of the data folder"


def require_file(path: str | Path, name: str) -> None:
    """Raise Unusable, speaking of `name`, where there is no regular file. Opening a pipe would wait forever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        what = "does not exist" if missing else f"cannot be reached ({error.strerror})"
        raise Unusable(f"{shown(name)} {what}; check the name and the file") from None
    if stat.S_ISDIR(mode):
        raise Unusable(f"{shown(name)} is a folder; name a video or a still")
    if not stat.S_ISREG(mode):
        raise Unusable(f"{shown(name)} is a pipe or a device; put a regular file there")
