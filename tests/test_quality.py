"""What frames say against a clip, on synthetic clips and on real footage, each threshold from both sides."""

import numpy as np
import pytest

from data.quality import end_card_start, find_end_card, is_black, is_flat, is_frozen, static_corners
from tests.footage import BIKES_CUTS, dimmed, encoded, footage, footage_path, grain, pan, texture, with_logo
from wan_finetune.pocket import world
from wan_finetune.pocket.looks import BRANDS, apply_look
from wan_finetune.video import probe, write_video

SHOTS = [
    ("bigbuckbunny.mp4", 0, 131),
    *(("bikes.mp4", a, b - 1) for a, b in zip((0, *BIKES_CUTS[:-1]), BIKES_CUTS, strict=True)),
]
SOURCES = [*SHOTS, ("bikes.mp4", 0, 249)]


def solid(colour, count=4, size=(96, 160)):
    return np.broadcast_to(np.array(colour, np.uint8), (count, *size, 3)).copy()


def pocket_clips(step=7):
    for index, (colour, shape, background, motion) in enumerate(world.COMBINATIONS[::step]):
        scene = world.Scene(colour=colour, shape=shape, background=background, motion=motion)
        brand = list(BRANDS.values())[index % 2]
        frames = world.render(scene)
        yield scene, frames, apply_look(frames, brand, np.random.default_rng(index))


def test_nothing_is_said_against_good_footage():
    for source in SOURCES:
        frames = footage(*source)
        for gain in (1.0, 0.3):
            assert not is_black(dimmed(frames, gain)), source
            assert not is_flat(dimmed(frames, gain)), source
            assert not is_frozen(dimmed(frames, gain)), source
        assert static_corners(frames) == (), source
        assert end_card_start(frames, np.linspace(0, 5, len(frames))) is None, source


def test_nothing_is_said_against_the_pocket_world():
    for scene, plain, branded in pocket_clips():
        for frames in (plain, branded):
            assert not (is_black(frames) or is_flat(frames) or is_frozen(frames) or static_corners(frames)), scene
            assert end_card_start(frames, np.arange(len(frames)) / world.FPS) is None, scene


@pytest.mark.parametrize(("level", "black"), [(0, True), (16, True), (23, True), (26, False)])
def test_black_ends_at_its_level(level, black, tmp_path):
    frames = solid((level,) * 3, 8)
    assert is_black(frames) is black
    assert is_black(encoded(grain(frames, 2), tmp_path, crf=30)) is black


def test_a_lamp_in_the_night_is_not_black():
    night = solid((3, 3, 8))
    assert is_black(night)
    night[2, 40:46, 80:86] = 250
    assert not is_black(night)


@pytest.mark.parametrize(("contrast", "flat"), [(0, True), (5, True), (13, False)])
def test_flat_ends_at_its_range(contrast, flat, tmp_path):
    frames = solid((180, 60, 60), 6)
    frames[:, 30:60, 50:90] += np.uint8(contrast)
    assert is_flat(frames) is flat
    assert is_flat(encoded(grain(frames, 3), tmp_path, crf=18)) is flat


def test_flat_frames_may_differ_from_each_other():
    assert is_flat(np.concatenate([solid((180, 60, 60)), solid((10, 200, 10))]))


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "bikes.mp4"])
@pytest.mark.parametrize(("crf", "deviation"), [(18, 0), (36, 0), (18, 8)])
def test_a_still_that_was_made_a_clip_is_frozen(name, crf, deviation, tmp_path):
    frames = grain(np.repeat(footage(name)[5:6], 12, axis=0), deviation)
    assert is_frozen(encoded(frames, tmp_path, crf))


def test_the_quietest_half_second_of_real_footage_is_not_frozen():
    for name, first, last in SHOTS:
        for start in range(first, last - 12, 12):
            assert not is_frozen(footage(name, start, start + 12, 4)), (name, start)


def test_a_small_thing_that_moves_a_little_is_not_frozen(tmp_path):
    frames = np.repeat(texture(1, 320, 180)[None], 6, axis=0)
    assert is_frozen(frames)
    for k in range(6):
        frames[k, 90:98, 100 + 2 * k : 108 + 2 * k] = 255
    assert not is_frozen(encoded(frames, tmp_path, crf=28))


def test_a_single_frame_is_a_still_and_not_frozen():
    assert not is_frozen(footage("bikes.mp4")[:1])


@pytest.mark.parametrize("opacity", [1.0, 0.4])
@pytest.mark.parametrize(("left", "top", "corner"), [(0.78, 0.05, "top right"), (0.03, 0.85, "bottom left")])
def test_a_logo_is_found_in_its_corner(left, top, corner, opacity):
    for frames in (footage("bikes.mp4"), pan(3, 12, step=20)):
        assert static_corners(frames) == ()
        assert static_corners(with_logo(frames, left, top, opacity)) == (corner,)


def test_a_logo_is_found_after_compression(tmp_path):
    frames = with_logo(pan(4, 12, step=20), 0.03, 0.05, 0.6)
    assert static_corners(encoded(frames, tmp_path, crf=30)) == ("top left",)


def test_what_moves_with_the_picture_is_no_logo():
    frames = pan(3, 12, step=20)
    moving = np.concatenate([with_logo(frames[k : k + 1], 0.7 + 0.02 * k, 0.05) for k in range(12)])
    assert static_corners(moving) == ()
    assert static_corners(with_logo(frames, 0.4, 0.45)) == ()  # in the middle it is a thing that is filmed


def test_a_tripod_tells_nothing_about_logos():
    frames = np.repeat(texture(5, 320, 180)[None], 12, axis=0)
    for k in range(12):
        frames[k, 60:120, 20 * k : 20 * k + 40] = texture(6, 40, 60)
    assert static_corners(with_logo(frames, 0.03, 0.05)) == ()


def test_a_frame_around_the_picture_is_no_logo():
    frames = pan(3, 12, step=20)
    frames[:, 8:10] = frames[:, -10:-8] = frames[:, :, 8:10] = frames[:, :, -10:-8] = 255
    assert static_corners(frames) == ()


@pytest.fixture(scope="module")
def moving():
    return pan(7, 50, 320, 180)


def card(num_frames, seed=9):
    return with_logo(np.repeat(np.zeros((1, 180, 320, 3), np.uint8) + 40, num_frames, axis=0), 0.3, 0.4 + seed % 2 / 10)


def test_an_end_card_is_found_at_its_first_frame(moving):
    frames = np.concatenate([moving, card(25)])
    times = np.arange(75) / 25
    assert end_card_start(frames, times) == times[50]
    assert end_card_start(frames[::10], times[::10]) == times[50]
    assert end_card_start(grain(frames, 6), times) == times[50]


@pytest.mark.parametrize(("num_frames", "found"), [(13, False), (14, True)])
def test_an_end_card_lasts_half_a_second(moving, num_frames, found):
    frames = np.concatenate([moving, card(num_frames)])
    assert (end_card_start(frames, np.arange(len(frames)) / 25) is not None) is found


def test_a_camera_that_comes_to_rest_is_no_end_card(moving):
    frames = np.concatenate([moving, np.repeat(moving[-1:], 25, axis=0)])
    assert end_card_start(frames, np.arange(75) / 25) is None
    # ... nor is the empty room after somebody left it.
    room = np.repeat(texture(8, 320, 180)[None], 50, axis=0)
    for k in range(25):
        room[k, 60:150, 6 * k : 6 * k + 40] = 250
    assert end_card_start(room, np.arange(50) / 25) is None


def test_a_black_tail_is_an_end_card_even_after_a_fade(moving):
    fade = np.stack([dimmed(moving[k], 1 - k / 20) for k in range(20)])
    frames = np.concatenate([moving, fade, np.zeros((20, 180, 320, 3), np.uint8)])
    start = end_card_start(frames, np.arange(90) / 25)
    assert start is not None
    assert 66 / 25 <= start <= 70 / 25


def test_a_still_as_a_whole_has_no_end_card():
    assert end_card_start(card(50), np.arange(50) / 25) is None
    assert end_card_start(card(1), np.zeros(1)) is None


@pytest.mark.parametrize("fps", [25, 30000 / 1001])
@pytest.mark.parametrize("card_frames", [20, 200, 500])
def test_the_end_card_of_a_file_is_found_to_the_frame(moving, card_frames, fps, tmp_path):
    small = np.concatenate([moving, card(card_frames)])[:, ::2, ::2]
    write_video(tmp_path / "clip.mp4", small, fps, crf=26)
    info = probe(tmp_path / "clip.mp4")
    assert find_end_card(info) == info.pts_seconds[50]


def test_a_file_without_end_card_has_none(moving, tmp_path):
    for name in ("bigbuckbunny.mp4", "bikes.mp4"):
        assert find_end_card(probe(footage_path(name))) is None
    for number, frames in enumerate((moving, card(400))):
        path = tmp_path / f"{number}.mp4"
        write_video(path, frames[:, ::2, ::2], 25)
        assert find_end_card(probe(path)) is None
