"""Which size and which stretch of a clip is trained on, and what its frames become."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buckets import ASPECTS, Bucket, automatic_buckets, choose_bucket, parse_buckets
from data.framing import Box, crop_box, fit_frames, lost_area
from data.windows import Span, possible_starts, too_short, whole, window_starts
from tests.data_material import info_of


def chosen_for(buckets, *, upscale=False, still=False, **clip):
    info = info_of(**clip)
    long_enough = [b for b in buckets if len(possible_starts(info, whole(info), b, 16.0))]
    if not long_enough:
        return too_short(whole(info), buckets, 16.0)
    return choose_bucket(info.width, info.height, still, long_enough, buckets, upscale)


def test_the_bucket_is_the_nearest_in_shape_then_the_largest_that_fits():
    buckets = [Bucket.parse(t) for t in ("832x480x81", "832x480x17", "480x832x81", "640x640x81", "1280x720x81")]

    def choose(**clip):
        return str(chosen_for(buckets, **clip))

    assert choose(width=1920, height=1080, num_frames=200) == "1280x720x81"
    assert choose(width=1000, height=576, num_frames=200) == "832x480x81"
    assert choose(width=1000, height=576, num_frames=40) == "832x480x17"
    assert choose(width=1080, height=1920, num_frames=200) == "480x832x81"
    assert choose(width=900, height=1000, num_frames=200) == "640x640x81"
    assert "too short: lasts 1.00 s, the shortest bucket needs more than 1.00 s" in choose(num_frames=25)
    assert "too small: 400x400 is below every bucket" in choose(width=400, height=400, num_frames=200)
    assert choose(width=400, height=400, num_frames=200, upscale=True) == "640x640x81"


def test_stills_take_buckets_of_one_frame_and_videos_avoid_them():
    buckets = [Bucket(64, 64, 17), Bucket(96, 64, 1)]
    assert chosen_for(buckets, width=96, height=64, num_frames=1, still=True) == Bucket(96, 64, 1)
    assert chosen_for(buckets, width=96, height=64, num_frames=60) == Bucket(64, 64, 17)  # though worse in shape
    assert chosen_for(buckets, width=96, height=64, num_frames=10) == Bucket(96, 64, 1)  # fits no other
    only_videos = chosen_for([Bucket(64, 64, 17)], width=96, height=64, num_frames=30, still=True)
    assert only_videos == "a still needs a bucket of one frame, such as 64x64x1; add it"


SIZES = st.builds(Bucket, *[st.integers(1, 60).map(lambda n: 16 * n)] * 2, st.integers(0, 20).map(lambda n: 4 * n + 1))
CASES = st.fixed_dictionaries(
    {
        "clip": st.fixed_dictionaries(
            {
                "width": st.integers(16, 2000),
                "height": st.integers(16, 2000),
                "num_frames": st.integers(1, 300),
                "fps": st.sampled_from([12.0, 25.0, 29.97]),
            }
        ),
        "buckets": st.lists(SIZES, min_size=1, max_size=5),
        "mode": st.sampled_from(["head", "centre", "uniform", "all", "random"]),
        "count": st.integers(1, 6),
        "upscale": st.booleans(),
    }
)


def check_choice(clip, buckets, mode, count, upscale):
    """The bucket fits, none is nearer in shape, and the windows lie inside; or none fits."""
    info, chosen = info_of(**clip), chosen_for(buckets, upscale=upscale, **clip)

    def fits(bucket):
        long_enough = (bucket.num_frames - 1) / 16 < info.duration_seconds - 1e-4
        return long_enough and (upscale or (bucket.width <= clip["width"] and bucket.height <= clip["height"]))

    if isinstance(chosen, str):
        assert not any(fits(bucket) for bucket in buckets) and "; " in chosen
        return
    assert chosen in buckets and fits(chosen)

    def distance(bucket):
        return abs(math.log(bucket.width / bucket.height * clip["height"] / clip["width"]))

    moving = [bucket for bucket in filter(fits, buckets) if bucket.num_frames > 1]
    assert chosen.num_frames > 1 or not moving, "trained as a still although it fills a bucket with motion"
    for bucket in moving or filter(fits, buckets):
        assert distance(chosen) <= distance(bucket) + 1e-6
        if abs(distance(chosen) - distance(bucket)) < 1e-12:
            assert math.prod((chosen.width, chosen.height, chosen.num_frames)) >= math.prod(
                (bucket.width, bucket.height, bucket.num_frames)
            )
    starts = window_starts(info, whole(info), chosen, 16.0, mode, count, "content")
    assert list(starts) == sorted(set(starts)) and set(starts) <= set(info.pts_seconds.tolist())
    assert len(starts) >= 1 and (mode == "all" or len(starts) <= count)
    assert starts[-1] + (chosen.num_frames - 1) / 16 < info.duration_seconds
    box = crop_box(Box(0, 0, clip["width"], clip["height"]), chosen, (0.5, 0.5))
    enlarged = max(chosen.width / box.width, chosen.height / box.height)
    assert upscale or enlarged <= 1 + 1e-9
    # The crop keeps the whole of one side.
    assert box.width == pytest.approx(clip["width"]) or box.height == pytest.approx(clip["height"])


@given(CASES)
@settings(max_examples=150)
def test_the_chosen_bucket_always_fits_and_windows_lie_inside(case):
    check_choice(**case)


@pytest.mark.slow
@given(CASES)
@settings(max_examples=10_000)
def test_the_chosen_bucket_fits_ten_thousand_clips(case):
    check_choice(**case)


LARGEST = st.builds(
    Bucket,
    st.integers(1, 80).map(lambda n: 16 * n),
    st.integers(1, 60).map(lambda n: 16 * n),
    st.integers(0, 30).map(lambda n: 4 * n + 1),
)
BUDGETS = st.one_of(st.none(), st.integers(1, 40_000))


def check_automatic(largest, max_tokens):
    buckets = automatic_buckets(largest, max_tokens)
    assert len(set(buckets)) == len(buckets)
    for bucket in buckets:
        assert bucket.width * bucket.height <= max(largest.width * largest.height, 16 * bucket.width)
        assert bucket.num_frames in (1, largest.num_frames) or 17 <= bucket.num_frames < largest.num_frames
        assert max_tokens is None or bucket.tokens <= max_tokens
    if max_tokens is None:
        assert largest in buckets and any(bucket.num_frames == 1 for bucket in buckets)


@given(LARGEST, BUDGETS)
@settings(max_examples=150)
def test_automatic_buckets_keep_to_area_and_budget(largest, max_tokens):
    check_automatic(largest, max_tokens)


@pytest.mark.slow
@given(LARGEST, BUDGETS)
@settings(max_examples=10_000)
def test_ten_thousand_automatic_sets_keep_to_area_and_budget(largest, max_tokens):
    check_automatic(largest, max_tokens)


def test_automatic_buckets_spell_out_the_usual_shapes():
    buckets = parse_buckets(["auto:832x480x81"])
    assert sorted({b.num_frames for b in buckets}) == [1, 21, 41, 81] and len({b.width for b in buckets}) >= 7
    for aspect in ASPECTS:
        near = min(buckets, key=lambda b: abs(math.log(b.width / b.height / aspect)))
        assert near.width / near.height == pytest.approx(aspect, rel=0.07)
        assert 0.88 * 832 * 480 < near.width * near.height <= 832 * 480
    # 832x480x81 has 21 * 30 * 52 tokens.
    assert Bucket(832, 480, 81).tokens == 32_760
    assert max(b.num_frames for b in parse_buckets(["auto:832x480x81"], max_tokens=20_000)) == 41
    with pytest.raises(ValueError, match="none is left under max_tokens = 10"):
        parse_buckets(["auto:832x480x81"], max_tokens=10)
    with pytest.raises(ValueError, match="has 32760 tokens, more than max_tokens = 30000"):
        parse_buckets(["832x480x81"], max_tokens=30_000)
    with pytest.raises(ValueError, match="names bucket 64x64x1 twice"):
        parse_buckets(["64x64x1", "64x64x1"])


def test_each_window_mode_takes_what_its_name_says():
    info, bucket = info_of(num_frames=100), Bucket(64, 64, 17)
    # 100 frames last 4 s; the last of 17 frames at 16 fps shows 1 s after the start, so the last start is 2.96 s.

    def starts(mode, count=1, span=None, content="a"):
        return window_starts(info, span or whole(info), bucket, 16.0, mode, count, content)

    assert starts("head", 5) == (0.0,)
    assert starts("centre", 5) == pytest.approx((1.48,), abs=1 / 25)
    np.testing.assert_allclose(starts("uniform", 4), np.linspace(0, 2.96, 4), atol=1 / 25)
    assert starts("uniform", 4)[-1] == pytest.approx(2.96)
    # One after another: 17 frames at 16 a second take 1.0625 s.
    np.testing.assert_allclose(starts("all"), [0, 1.0625, 2.125], atol=1 / 25)
    assert starts("random", 3) == starts("random", 3) != starts("random", 3, content="b")
    assert starts("head", span=Span(1.0, 3.0)) == (1.0,) and starts("uniform", 9, Span(1.0, 3.0))[-1] < 2.0
    short = info_of(num_frames=20)
    assert window_starts(short, whole(short), bucket, 16.0, "all", 1, "a") == ()


def test_random_windows_reach_everywhere():
    info = info_of(num_frames=200)
    drawn = [
        start
        for clip in range(60)
        for start in window_starts(info, whole(info), Bucket(64, 64, 17), 16.0, "random", 4, str(clip))
    ]
    # 8 s of clip, starts from 0 to 6.96 s: an even spread over quarters.
    quarters = np.histogram(drawn, bins=4, range=(0, 6.96))[0] / len(drawn)
    assert (abs(quarters - 0.25) < 0.09).all()


def fit(frames, bucket, box=None):
    height, width = frames.shape[1:3]
    box = box or crop_box(Box(0, 0, width, height), bucket, (0.5, 0.5))
    return fit_frames(frames, box, bucket, width=width, height=height)


def test_fitting_is_the_identity_at_equal_size_and_keeps_the_centre():
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), dtype=np.uint8)
    assert np.array_equal(fit(frames, Bucket(96, 64, 5)), frames)
    # Cropping alone: no pixel changes.
    assert np.array_equal(fit(frames, Bucket(64, 64, 5)), frames[:, :, 16:80])
    upright = frames.transpose(0, 2, 1, 3).copy()
    assert np.array_equal(fit(upright, Bucket(64, 64, 5)), upright[:, 16:80])
    # A horizontal ramp from 0 to 255 over 160 pixels: the square crop of its middle keeps its slope and its mean.
    ramp = np.tile(np.linspace(0, 255, 160).round().astype(np.uint8)[None, None, :, None], (1, 80, 1, 3))
    fitted = fit(ramp, Bucket(32, 32, 1))[0, 16, :, 0].astype(float)
    assert np.diff(fitted)[4:-4].mean() == pytest.approx(255 / 159 * 80 / 32, rel=0.05)
    assert fitted.mean() == pytest.approx(127.5, abs=1)
    with pytest.raises(ValueError, match="needs frames"):
        fit(frames, Bucket(64, 64, 9))


def test_oblong_pixels_are_made_square_by_the_same_resampling():
    # Stored 64 wide, shown 128 wide: a square on display is half as wide as high in the file.
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    frames[:, 16:48, 24:40] = 255
    shown = fit_frames(frames, Box(0, 0, 128, 64), Bucket(128, 64, 1), width=128, height=64)[0, :, :, 0] > 127
    assert shown.any(0).sum() == shown.any(1).sum() == 32


def test_the_crop_keeps_the_focus_in_view_and_inside_the_content():
    content = Box(10, 20, 210, 120)
    assert crop_box(content, Bucket(64, 64, 1), (0.5, 0.5)) == Box(60, 20, 160, 120)
    assert crop_box(content, Bucket(64, 64, 1), (0.0, 0.5)) == Box(10, 20, 110, 120)
    assert crop_box(content, Bucket(64, 64, 1), (0.9, 0.5)) == Box(110, 20, 210, 120)
    assert lost_area(Box(60, 20, 160, 120), 220, 140) == pytest.approx(1 - 100 * 100 / (220 * 140))


@given(st.data())
@settings(max_examples=200)
def test_a_crop_is_inside_has_the_buckets_shape_and_is_as_large_as_can_be(data):
    number = st.floats(1, 4000)
    left, top, width, height = (data.draw(number) for _ in range(4))
    focus = data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1)))
    bucket = Bucket(16 * data.draw(st.integers(1, 90)), 16 * data.draw(st.integers(1, 90)), 1)
    content = Box(left, top, left + width, top + height)
    box = crop_box(content, bucket, focus)
    slack = 1e-6 * 8000
    assert box.left >= left - slack and box.top >= top - slack
    assert box.right <= content.right + slack and box.bottom <= content.bottom + slack
    assert box.width / box.height == pytest.approx(bucket.width / bucket.height)
    assert box.width == pytest.approx(width) or box.height == pytest.approx(height)
    x, y = left + focus[0] * width, top + focus[1] * height
    assert box.left - slack <= x <= box.right + slack and box.top - slack <= y <= box.bottom + slack


def test_shrinking_is_antialiased():
    noise = np.random.default_rng(0).integers(0, 255, (1, 256, 256, 3), dtype=np.uint8)
    # Mean of 8x8 pixels would leave an eighth of the deviation, picked pixels all of it.
    assert fit(noise, Bucket(32, 32, 1)).std() < noise.std() / 4
