"""Image files: a still is a clip of one frame."""

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from .video_info import VideoFault, VideoInfo

STILL_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Lower-case endings of the files that are read as stills."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

STILL_SECONDS = 1 / 240
"""One frame at the highest rate at which clips are sampled: one frame fits, two never do."""


def probe_still(path: Path) -> VideoInfo:
    """Decode an image once, since its header does not tell whether the rest is whole.

    Raises:
        VideoFault: see `read_still`.
    """
    height, width = read_still(path).shape[:2]
    return VideoInfo(
        path=path,
        width=width,
        height=height,
        pts_seconds=np.zeros(1),
        last_frame_seconds=STILL_SECONDS,
        reader="pillow",
    )


def read_still(path: Path) -> NDArray[np.uint8]:
    """Pixels [H, W, 3], sRGB, as a viewer shows them on a white page.

    Turned as EXIF asks, converted by the embedded colour profile, transparent parts white, 16 bits rounded to 8.

    Raises:
        VideoFault: not an image of these formats, damaged, animated, too large, or CMYK without a profile.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns of images above 89 million pixels, and of palettes, which are converted here anyway.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return _pixels(path, image)
    except (VideoFault, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise VideoFault(
            path, f"has more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels; scale it down, training needs far less"
        ) from None
    except Image.UnidentifiedImageError:
        raise VideoFault(path, "not a readable image; export it again as PNG or JPEG") from None
    except Exception as error:
        raise VideoFault(
            path, f"the image is damaged or cut off ({type(error).__name__}); copy or export it again"
        ) from error


def _pixels(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    # A camera's JPEG may hold more pictures (a preview, a gain map) behind the one that it shows: that one is read.
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise VideoFault(path, "is an animated image; export it as an mp4, or keep one picture of it")
    image.load()
    picture: Image.Image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if picture.mode == "CMYK" and not profile:
        raise VideoFault(path, "holds print colours (CMYK) without a profile; export it as sRGB")
    if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
        wide = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(((wide * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
        profile = None
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    if picture.mode in ("P", "PA", "RGBA", "RGBX", "RGBa"):
        picture = picture.convert("RGB")
    elif picture.mode in ("1", "LA", "La"):
        picture = picture.convert("L")
    if profile:
        picture = _to_srgb(picture, profile)
    picture = picture.convert("RGB")
    if alpha is not None:
        white = Image.new("RGB", picture.size, (255, 255, 255))
        picture = Image.composite(picture, white, alpha)
    return np.array(picture)


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        # A damaged profile, or one of another colour model than the pixels: viewers leave it aside, too.
        return picture
    assert converted is not None
    return converted
