"""Black bars are found to two pixels; dark footage is left alone."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data.borders import find_borders
from tests.footage import dimmed, encoded, footage, grain, pan, with_bars
from wan_finetune.pocket import world
from wan_finetune.pocket.looks import BRANDS, apply_look

CLIPS = ("bigbuckbunny.mp4", "bikes.mp4")
BARS = [(0, 44, 0, 44), (80, 0, 80, 0), (60, 32, 60, 32), (219, 0, 219, 0)]
"""Left, top, right, bottom: a wide film, a square one, both, and a telephone's held upright."""


def off_by(box, bars, frames):
    left, top, right, bottom = bars
    height, width = frames.shape[1:3]
    return max(abs(a - b) for a, b in zip(box, (left, top, width - right, height - bottom), strict=True))


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("bars", BARS)
@pytest.mark.parametrize(("gain", "deviation", "crf"), [(1.0, 0, 20), (1.0, 3, 36), (0.15, 0, 20), (0.15, 2, 30)])
def test_bars_are_found_to_two_pixels(name, bars, gain, deviation, crf, tmp_path):
    frames = grain(dimmed(with_bars(footage(name)[::4], *bars), gain), deviation)
    frames = encoded(frames, tmp_path, crf)
    box = find_borders(frames)
    assert box is not None
    assert off_by(box, bars, frames) <= 2


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("gain", [1.0, 0.3, 0.1, 0.04, 0.01])
def test_real_footage_is_left_alone_however_dark(name, gain, tmp_path):
    frames = footage(name)
    assert find_borders(dimmed(frames, gain)) is None
    assert find_borders(encoded(dimmed(frames[::4], gain), tmp_path, 30)) is None
    for frame in frames:  # one frame has to do without the help of others
        assert find_borders(dimmed(frame[None], gain)) is None


def test_the_pocket_world_and_its_brands_are_left_alone():
    for index, (colour, shape, background, motion) in enumerate(world.COMBINATIONS[::11]):
        frames = world.render(world.Scene(colour=colour, shape=shape, background=background, motion=motion))
        assert find_borders(frames) is None
        for look in BRANDS.values():
            assert find_borders(apply_look(frames, look, np.random.default_rng(index))) is None


def night(draw_on, num_frames=6, size=(320, 180)):
    """A black picture on which `draw_on(draw, frame number)` has drawn."""
    frames = []
    for number in range(num_frames):
        image = Image.new("RGB", size)
        draw_on(ImageDraw.Draw(image), number)
        frames.append(np.asarray(image))
    return np.stack(frames)


def skyline(draw, _):
    for left, top in ((0, 90), (40, 60), (110, 30), (220, 70), (270, 100)):
        draw.rectangle((left, top, left + 60, 180), fill=(70, 60, 40))


def hall(draw, _):  # a flat roof as wide as two thirds of the picture
    draw.rectangle((50, 40, 270, 180), fill=(90, 90, 80))


def horizon(draw, _):
    draw.rectangle((0, 100, 320, 180), fill=(40, 60, 90))


def planet(draw, number):
    draw.ellipse((100 + number, 30, 220 + number, 150), fill=(60, 90, 160))


def bottle(draw, number):
    draw.rectangle((140, 30, 180, 150), fill=(30 * number, 90, 60))


@pytest.mark.parametrize("scene", [skyline, hall, horizon, planet, bottle])
@pytest.mark.parametrize("crf", [18, 32])
def test_night_and_studio_black_are_left_alone(scene, crf, tmp_path):
    assert find_borders(night(scene)) is None
    assert find_borders(encoded(night(scene), tmp_path, crf)) is None


def test_dark_frames_do_not_hide_the_bars_that_others_show():
    frames = with_bars(pan(1, 8), 0, 20, 0, 20)
    frames[:5] = 0
    assert find_borders(frames) == (0, 20, 320, 160)


def test_a_bar_on_one_side_alone_must_be_narrow_and_end_all_along():
    frames = pan(1, 6)
    assert find_borders(with_bars(frames, 0, 30, 0, 0)) == (0, 30, 320, 180)
    assert find_borders(with_bars(frames, 0, 0, 60, 0)) == (0, 0, 260, 180)
    assert find_borders(with_bars(frames, 0, 0, 68, 0)) is None
    broken = with_bars(frames, 0, 30, 0, 0)
    broken[:, 30:, 100:140] = 0
    assert find_borders(broken) is None


def test_a_bar_with_something_in_it_stays():
    frames = with_bars(pan(1, 6), 0, 30, 0, 30)
    assert find_borders(frames) == (0, 30, 320, 150)
    frames[:, 165:170, 140:180] = 230  # a subtitle
    top = find_borders(frames)
    assert top == (0, 30, 320, 180)


@pytest.mark.parametrize(("level", "found"), [(16, True), (28, True), (36, False)])
def test_bars_are_black_up_to_their_level(level, found):
    frames = with_bars(pan(1, 6), 0, 30, 0, 30)
    frames[:, :30] = frames[:, -30:] = level
    assert (find_borders(frames) is not None) is found


@pytest.mark.parametrize(("deviation", "found"), [(2, True), (6, False)])
def test_bars_are_even_up_to_their_deviation(deviation, found):
    frames = with_bars(pan(1, 6), 0, 30, 0, 30)
    frames[:, :30] = frames[:, -30:] = 14
    noisy = frames.copy()
    noisy[:, :30], noisy[:, -30:] = grain(frames[:, :30], deviation, 1), grain(frames[:, -30:], deviation, 2)
    assert (find_borders(noisy) is not None) is found


def test_nothing_but_black_has_no_borders():
    assert find_borders(np.zeros((3, 90, 160, 3), np.uint8)) is None
    assert find_borders(with_bars(pan(1, 4), 150, 80, 150, 80)) is None
