"""Which files are opened at all: regular ones, in formats and codecs that are known, up to 8K."""

import os
import stat
from pathlib import Path
from typing import Any

import av

from .video_info import VideoFault

FORMATS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,mxf,dv,gif,yuv4mpegpipe"
"""Demuxers that may open a file. Playlists (hls, dash, concat) are left out: they read other files than this one."""

DECODERS = (
    "h264,hevc,av1,libdav1d,libaom-av1,vp8,vp9,libvpx,libvpx-vp9,mpeg4,mpeg2video,mpeg1video,h263,msmpeg4v2,msmpeg4,flv,"
    "wmv1,wmv2,wmv3,vc1,theora,prores,dnxhd,cfhd,hap,mjpeg,ffv1,huffyuv,ffvhuff,utvideo,rawvideo,v210,qtrle,png,gif,dvvideo"
)
"""What cameras, editors and generators write. Each further decoder is one more that a hostile file could attack."""

MAX_PIXELS = 8192 * 4320
"""Largest frame, 8K."""


def check_regular(path: Path) -> int:
    """Size in bytes of a file that may be opened; a FIFO, a device or a socket could block for ever.

    Raises:
        VideoFault: no such file, none of the kind that holds bytes, empty, or not to be read.
    """
    try:
        str(path).encode()
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and not os.access(path, os.R_OK):
            raise PermissionError(0, "no permission to read it")
    except FileNotFoundError:
        raise VideoFault(path, "no such file; check the name", lasting=False) from None
    except UnicodeEncodeError:
        raise VideoFault(path, "its name is not UTF-8; rename it", lasting=False) from None
    except (OSError, ValueError) as error:
        raise VideoFault(
            path, f"cannot be opened ({getattr(error, 'strerror', error)}); check name and rights", lasting=False
        ) from None
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise VideoFault(path, f"is {kind}, not a file; put the clip itself in its place", lasting=False)
    if status.st_size == 0:
        raise VideoFault(path, "the file is empty (0 bytes); copy or export it again")
    return status.st_size


def open_container(path: Path) -> Any:
    """A PyAV container for reading, to be closed by `with`."""
    # An absolute path cannot be taken for a URL, and nothing in the file can make FFmpeg open another one.
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "codec_whitelist": DECODERS}
    # Titles in another encoding than UTF-8 are no reason to refuse a clip.
    container = av.open(str(path.absolute()), options=options, metadata_errors="replace")
    for stream in container.streams.video:
        # Several clips are decoded at once; threads for each of them would cost more time and memory than they save.
        if stream.codec_context is not None:
            stream.codec_context.thread_count = 1
    return container


def is_playlist(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith((b"ffconcat", b"#EXTM3U", b"[playlist]")) or b"<MPD" in head or b"<smil" in head


def check_limits(path: Path, context: Any) -> None:
    if context is None or context.name not in DECODERS.split(","):
        name = "of its video" if context is None else context.name
        raise VideoFault(path, f"its codec ({name}) is not one that is read here; export it as H.264 in mp4")
    if context.width * context.height > MAX_PIXELS:
        raise VideoFault(
            path,
            f"its frames are {context.width}x{context.height}, {MAX_PIXELS:,} pixels (8K) are the limit; "
            "scale it down, training needs far less",
        )
