"""Which size and which stretch of a clip is trained on, and what its frames become."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buckets import Bucket, choose_bucket, fit_frames
from data.windows import window_starts
from tests.data_material import info_of


def test_bucket_is_the_nearest_in_shape_then_the_largest_that_fits():
    buckets = [Bucket.parse(t) for t in ("832x480x81", "832x480x17", "480x832x81", "640x640x81", "1280x720x81")]

    def choose(**clip):
        return str(choose_bucket(info_of(**clip), buckets, 16.0, False))

    assert choose(width=1920, height=1080, num_frames=200) == "1280x720x81"
    assert choose(width=1000, height=576, num_frames=200) == "832x480x81"
    assert choose(width=1000, height=576, num_frames=40) == "832x480x17"
    assert choose(width=1080, height=1920, num_frames=200) == "480x832x81"
    assert choose(width=900, height=1000, num_frames=200) == "640x640x81"
    assert "too short" in choose(width=1000, height=576, num_frames=25)
    assert "too small" in choose(width=400, height=400, num_frames=200)
    small = info_of(width=400, height=400, num_frames=200)
    assert str(choose_bucket(small, buckets, 16.0, True)) == "640x640x81"


@given(
    st.integers(16, 2000), st.integers(16, 2000), st.integers(1, 300), st.sampled_from([12.0, 25.0, 29.97]), st.data()
)
@settings(max_examples=150, deadline=None)
def test_chosen_bucket_always_fits_and_windows_lie_inside(width, height, num_frames, rate, data):
    sizes = st.builds(
        Bucket, *[st.integers(1, 60).map(lambda n: 16 * n)] * 2, st.integers(0, 20).map(lambda n: 4 * n + 1)
    )
    buckets = data.draw(st.lists(sizes, min_size=1, max_size=5))
    windows = data.draw(st.integers(1, 6))
    info = info_of(width, height, num_frames, rate)
    chosen = choose_bucket(info, buckets, 16.0, False)

    def fits(bucket):
        long_enough = (bucket.num_frames - 1) / 16 < info.duration_seconds - 1e-4
        return bucket.width <= width and bucket.height <= height and long_enough

    if isinstance(chosen, str):
        assert not any(fits(bucket) for bucket in buckets)
        return
    assert chosen in buckets and fits(chosen)
    distance = abs(math.log(chosen.width / chosen.height * height / width))
    for bucket in filter(fits, buckets):
        assert distance <= abs(math.log(bucket.width / bucket.height * height / width)) + 1e-6
    starts = window_starts(info, chosen, 16.0, windows)
    assert 1 <= len(starts) <= windows and list(starts) == sorted(set(starts)) and starts[0] == 0
    assert starts[-1] + (chosen.num_frames - 1) / 16 < info.duration_seconds


def test_windows_are_evenly_spaced_and_reach_the_end():
    starts = window_starts(info_of(num_frames=100), Bucket(64, 64, 17), 16.0, 4)
    # 100 frames last 4 s; the last of 17 frames at 16 fps shows 1 s after the start, so the last start is 2.96 s.
    np.testing.assert_allclose(starts, np.linspace(0, 2.96, 4), atol=1 / 25)
    assert starts[-1] == pytest.approx(2.96)
    assert window_starts(info_of(num_frames=20), Bucket(64, 64, 17), 16.0, 1) == ()


def test_fitting_is_the_identity_at_equal_size_and_keeps_the_centre():
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), dtype=np.uint8)
    assert np.array_equal(fit_frames(frames, Bucket(96, 64, 5)), frames)
    # Cropping alone: no pixel changes.
    assert np.array_equal(fit_frames(frames, Bucket(64, 64, 5)), frames[:, :, 16:80])
    upright = frames.transpose(0, 2, 1, 3).copy()
    assert np.array_equal(fit_frames(upright, Bucket(64, 64, 5)), upright[:, 16:80])
    # A horizontal ramp from 0 to 255 over 160 pixels: the square crop of its middle keeps its slope and its mean.
    ramp = np.tile(np.linspace(0, 255, 160).round().astype(np.uint8)[None, None, :, None], (1, 80, 1, 3))
    fitted = fit_frames(ramp, Bucket(32, 32, 1))[0, 16, :, 0].astype(float)
    assert np.diff(fitted)[4:-4].mean() == pytest.approx(255 / 159 * 80 / 32, rel=0.05)
    assert fitted.mean() == pytest.approx(127.5, abs=1)
    with pytest.raises(ValueError, match="needs frames"):
        fit_frames(frames, Bucket(64, 64, 9))


def test_shrinking_is_antialiased():
    noise = np.random.default_rng(0).integers(0, 255, (1, 256, 256, 3), dtype=np.uint8)
    # Mean of 8x8 pixels would leave an eighth of the deviation, picked pixels all of it.
    assert fit_frames(noise, Bucket(32, 32, 1)).std() < noise.std() / 4
