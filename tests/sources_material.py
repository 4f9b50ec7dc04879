"""Files, and what a source makes of them, for the tests of the readers of sources."""

import io
import tarfile
from pathlib import Path

from data.config import SourceConfig
from data.items import Fault, Item
from data.sources import read_source

PNG = b"\x89PNG\r\n\x1a\n"
MP4 = b"\0\0\0\x18ftypisom"
ROOT = Path(__file__).resolve().parent.parent


def write(folder, **files):
    """Files by name, `__` standing for a slash; text in UTF-8, a clip's bytes made up where None is given."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = f"bytes of {name}" if content is None else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(path, tmp_path, **settings):
    """Items by name, faults by name."""
    key = {} if "dataset" in settings else {"path": path}
    everything = list(read_source(SourceConfig(**key, **settings), tmp_path / "spool"))
    items = [one for one in everything if isinstance(one, Item)]
    faults = [one for one in everything if isinstance(one, Fault)]
    assert len({item.name for item in items}) == len(items)
    assert all(item.captions and str(tmp_path) not in item.name for item in items)
    assert all(str(tmp_path) not in fault.reason + fault.name for fault in faults)
    return {item.name: item for item in items}, {fault.name: fault.reason for fault in faults}


def captions(path, tmp_path, **settings):
    items, faults = read(path, tmp_path, **settings)
    assert not faults
    return {name: item.captions for name, item in items.items()}


def spooled(tmp_path):
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "spool").iterdir()}


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.get("mode", "w")) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
