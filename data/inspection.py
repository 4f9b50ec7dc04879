"""What there is to know about a file, found out in a child process once and then remembered."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wan_finetune.decoding import Decoder
from wan_finetune.video import VideoFault, VideoInfo
from wan_finetune.video_info import RECORD_VERSION

from .borders import find_borders
from .config import SourceConfig
from .framing import Box
from .index import Index
from .quality import find_end_card
from .shots import find_shots
from .windows import Span, whole

FINDINGS = 1
"""Raised when anything that is found out about a file is found in another way than before."""
LOOKS_AT = 12
"""Frames of a clip, evenly spread, in which black borders are looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """A file that can be used."""

    info: VideoInfo
    sha256: str
    """Of the file's bytes."""
    spans: tuple[Span, ...]
    """Its shots, or the whole of it; at least one."""
    content: Box
    """The picture inside its black borders, or the whole of it, in pixels on display."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Inspector:
    """Looks at files through a decoder in a child process, and remembers in `folder` what it saw.

    Args:
        decoder: one that has begun already; it is closed with this.
    """

    def __init__(self, folder: Path, timeout_seconds: float, decoder: Decoder | None = None) -> None:
        self.decoder = decoder or Decoder()
        self.decoder.timeout_seconds = timeout_seconds
        self.index = Index(folder, f"{FINDINGS}.{RECORD_VERSION} av {version('av')} pillow {version('pillow')}")
        self.faults: dict[Path, str] = {}
        """Found while frames were read."""

    def __enter__(self) -> "Inspector":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.index.close()
        self.decoder.close()

    def inspect(self, path: Path, source: SourceConfig) -> Inspected | str:
        """A file as its source wants it: its shots, its picture; or the reason why it cannot be used."""
        try:
            sha256, record = self.record(path)
            info = VideoInfo.from_record(path, record["info"])
            spans: tuple[Span, ...] = (whole(info),)
            content = Box(0, 0, info.width, info.height)
            if not info.is_still:
                if source.crop_borders:
                    content = Box(*self.learn(path, "content", lambda: self.find_content(info)))
                if source.shots:
                    spans = self.shots(info)
                if source.cut_end_card:
                    end = self.learn(path, "end_seconds", lambda: self.find_end(info))
                    spans = tuple(
                        Span(s.start_seconds, min(s.end_seconds, end)) for s in spans if s.start_seconds < end
                    )
        except VideoFault as fault:
            return fault.reason
        return Inspected(info=info, sha256=sha256, spans=spans, content=content)

    def record(self, path: Path) -> tuple[str, dict[str, Any]]:
        """SHA-256 and what is known of a file, looked at now if it never was. Raises VideoFault."""
        known = self.index.get(path)
        if known is not None and known.fault is not None:
            raise VideoFault(path, known.fault)
        if known is not None and known.record is not None and known.sha256 is not None:
            return known.sha256, known.record
        try:
            record: dict[str, Any] = {"info": self.decoder.inspect(path).to_record()}
            sha256 = known.sha256 if known is not None and known.sha256 else file_sha256(path)
        except OSError as error:
            raise VideoFault(path, f"cannot be read ({error.strerror}); check its permissions") from None
        except VideoFault as fault:
            if fault.lasting:
                self.index.put(path, None, fault=fault.reason)
            raise
        self.index.put(path, sha256, record)
        return sha256, record

    def learn(self, path: Path, what: str, find: Any) -> Any:
        """A further fact about a file, found now if it never was. Raises VideoFault."""
        sha256, record = self.record(path)
        if what not in record:
            record = {**record, what: find()}
            self.index.renew(path)
            self.index.put(path, sha256, record)
        return record[what]

    def find_content(self, info: VideoInfo) -> tuple[float, float, float, float]:
        """The picture inside its black borders, in pixels on display."""
        chosen = np.unique(np.linspace(0, info.num_frames - 1, LOOKS_AT).astype(int))
        frames = self.read(info, chosen)
        x, y = info.width / frames.shape[2], info.height / frames.shape[1]
        box = find_borders(frames) or (0, 0, frames.shape[2], frames.shape[1])
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y

    def shots(self, info: VideoInfo) -> tuple[Span, ...]:
        """The shots of a video, at least one. Raises VideoFault."""
        return tuple(Span(*shot) for shot in self.learn(info.path, "shots", lambda: find_shots(info, self.read)))

    def find_end(self, info: VideoInfo) -> float:
        """Where the end card begins, in seconds; the clip's end where there is none."""
        return find_end_card(info, self.read) or info.duration_seconds

    def info(self, path: Path) -> VideoInfo:
        """What demuxing says about a file. Raises VideoFault."""
        return VideoInfo.from_record(path, self.record(path)[1]["info"])

    def sha256(self, path: Path) -> str:
        """Of a file's bytes. Raises VideoFault."""
        return self.record(path)[0]

    def read(self, info: VideoInfo, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Frames [F, H, W, 3] for these indices. Raises VideoFault."""
        return self.decoder.read(info, indices)

    def remember_fault(self, path: Path, fault: VideoFault) -> None:
        """Keep the reason why a file's frames could not be read, so that its report can tell."""
        self.faults[path] = fault.reason
        if fault.lasting:
            self.index.renew(path)
            self.index.put(path, None, fault=fault.reason)

    def fault(self, path: Path) -> str | None:
        """Why a file cannot be used, where that is known."""
        known = self.index.get(path)
        return self.faults.get(path) or (known.fault if known else None)
