"""Images as clips of one frame: as a viewer shows them, and every bad one named with its fault."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from wan_finetune.errors import InputError
from wan_finetune.video import VideoFault, VideoInfo, frame_indices, probe, read_frames


def shown(path):
    """Pixels [H, W, 3] of the only frame."""
    info = probe(path)
    assert info.is_still and info.num_frames == 1 and info.reader == "pillow"
    frames = read_frames(info, np.array([0, 0]))
    assert frames.shape == (2, info.height, info.width, 3)
    np.testing.assert_array_equal(frames[0], frames[1])
    return frames[0]


def picture(width=40, height=24, seed=0):
    """A picture with large random patches, which JPEG keeps."""
    colours = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return colours.repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.jpg", "a.JPEG", "a.PNG"])
def test_every_format_gives_its_pixels(tmp_path, name):
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    suffix = name.split(".")[1].lower().replace("jpeg", "jpg")
    Image.fromarray(picture()).save(tmp_path / name, **options.get(suffix, {}))
    error = np.abs(shown(tmp_path / name).astype(int) - picture())
    assert error.max() <= (3 if suffix == "jpg" else 0)


def test_one_frame_fits_into_a_window_and_two_never_do(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    info = probe(tmp_path / "a.png")
    for fps in (0.1, 16, 240):
        assert frame_indices(info, start_seconds=0, num_frames=1, fps=fps).tolist() == [0]
        with pytest.raises(InputError, match="needs 2 frames"):
            frame_indices(info, start_seconds=0, num_frames=2, fps=fps)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_camera_was(tmp_path, orientation):
    """EXIF 2.32, 4.6.4 A: where row 0 and column 0 of the stored picture are on display."""
    stored = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    expected = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    np.testing.assert_array_equal(shown(tmp_path / "a.png"), expected)


def test_what_is_transparent_is_white(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    share = rgba[..., 3:] / 255
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True, "exact": True})):
        Image.fromarray(rgba).save(tmp_path / name, **options)
        assert np.abs(shown(tmp_path / name) - (share * rgba[..., :3] + (1 - share) * 255)).max() <= 0.51
    Image.fromarray(rgba).convert("LA").save(tmp_path / "grey.png")
    grey = np.asarray(Image.fromarray(rgba).convert("LA")).astype(float)
    expected = share * grey[..., :1] + (1 - share) * 255
    assert np.abs(shown(tmp_path / "grey.png") - expected).max() <= 0.51


def test_a_palette_with_a_transparent_entry_is_read(tmp_path):
    image = Image.fromarray(np.arange(3, dtype=np.uint8)[None].repeat(2, 0), mode="P")
    image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    image.save(tmp_path / "a.png", transparency=2)
    np.testing.assert_array_equal(shown(tmp_path / "a.png")[0], [[250, 0, 0], [0, 250, 0], [255, 255, 255]])


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.rint(values / 257)
    for channel in range(3):
        np.testing.assert_array_equal(shown(tmp_path / "a.png")[..., channel], expected)


def test_one_bit_and_grey_pictures_are_read(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(shown(tmp_path / "grey.png"), np.stack([grey] * 3, axis=-1))
    Image.fromarray(grey > 100).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(shown(tmp_path / "bit.png")[..., 1], np.where(grey > 100, 255, 0))


def swapped_profile():
    """The sRGB profile with red and blue exchanged, in the table of tags that follows its header of 128 bytes."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = slice(132, 132 + 12 * int.from_bytes(profile[128:132], "big"))
    exchanged = profile[table].replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
    assert exchanged != profile[table]
    profile[table] = exchanged
    return bytes(profile)


def test_an_embedded_profile_is_converted_from(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert np.abs(shown(tmp_path / "a.png").astype(int) - picture()[..., ::-1]).max() <= 1
    Image.fromarray(picture()).save(tmp_path / "broken.png", icc_profile=b"not a profile")
    np.testing.assert_array_equal(shown(tmp_path / "broken.png"), picture())


def bad_stills(folder):
    """One of each sort: name -> what its message must say."""
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.bmp"):
        kept = io.BytesIO()
        whole.save(kept, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP"}[name[4:]])
        (folder / name).write_bytes(kept.getvalue()[: len(kept.getvalue()) // 2])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    whole.save(folder / "other.tiff")
    (folder / "other.tiff").rename(folder / "tiff.png")
    whole.save(folder / "moves.png", save_all=True, append_images=[whole.rotate(90)])
    whole.save(folder / "moves.webp", save_all=True, append_images=[whole.rotate(90)])
    Image.new("CMYK", (8, 8)).save(folder / "print.jpg")
    # Only their headers are that large: nobody is to look further.
    for name, size in {"bomb.png": (10_000, 9_000), "bomb2.png": (20_000, 10_000)}.items():
        kept = io.BytesIO()
        whole.save(kept, "PNG")
        header = b"IHDR" + struct.pack(">II", *size) + kept.getvalue()[24:29]
        content = kept.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + kept.getvalue()[33:]
        (folder / name).write_bytes(content)
    return {
        "cut.png": "damaged or cut off.*copy or export",
        "cut.jpg": "damaged or cut off.*copy or export",
        "cut.webp": "damaged or cut off.*copy or export|not a readable image",
        "cut.bmp": "damaged or cut off.*copy or export",
        "zero.png": "is empty.*copy or export",
        "text.jpg": "not a readable image; export",
        "tiff.png": "not a readable image; export",
        "moves.png": "is an animated image; export it as an mp4",
        "moves.webp": "is an animated image; export it as an mp4",
        "print.jpg": r"print colours \(CMYK\) without a profile; export",
        "bomb.png": "more than 89,478,485 pixels; scale it down",
        "bomb2.png": "more than 89,478,485 pixels; scale it down",
    }


def test_each_bad_still_is_named_with_fault_and_remedy(tmp_path):
    messages = bad_stills(tmp_path)
    assert set(messages) == {path.name for path in tmp_path.iterdir()}
    for name, message in messages.items():
        with pytest.raises(VideoFault, match=message) as caught:
            probe(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {caught.value.reason}", name


def test_a_still_that_changed_after_it_was_seen_is_refused(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    info = probe(tmp_path / "a.png")
    Image.fromarray(picture(48, 32)).save(tmp_path / "a.png")
    with pytest.raises(VideoFault, match="a frame is 48x32 where 40x24 was due"):
        read_frames(info, np.array([0]))


def test_a_still_goes_through_its_record(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    info = VideoInfo.from_record(tmp_path / "a.png", probe(tmp_path / "a.png").to_record())
    assert info.is_still and (info.width, info.height, info.num_frames) == (40, 24, 1)
    np.testing.assert_array_equal(read_frames(info, np.array([0]))[0], picture())
