"""The look metric and the motion amount, on clips of the pocket world whose looks are known."""

import itertools

import numpy as np
import pytest
from PIL import Image

from wan_finetune.evaluation import motion, style
from wan_finetune.pocket import looks, world

COUNT = 50


def scenes(first, count=COUNT):
    """Clips of held-out prompts; the same prompt never occurs in sets that start at 0 and at 1."""
    rng = np.random.default_rng(first)
    order = np.random.default_rng(0).permutation(len(world.HELD_OUT))[first::2]
    return [world.render(world.random_scene(rng, world.HELD_OUT[order[i % len(order)]])) for i in range(count)]


def branded(clips, name, seed, share=1.0):
    rng = np.random.default_rng(seed)
    pairs = ((clip, looks.apply_look(clip, looks.BRANDS[name], rng)) for clip in clips)
    return [np.round((1.0 - share) * clip + share * look).astype(np.uint8) for clip, look in pairs]


def described(clips):
    return np.stack([style.describe(clip) for clip in clips])


def blurred(clip):
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2.0)
    kernel /= kernel.sum()
    padded = np.pad(clip.astype(np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    down = sum(weight * padded[:, i : i + clip.shape[1]] for i, weight in enumerate(kernel))
    return np.round(sum(weight * down[:, :, i : i + clip.shape[2]] for i, weight in enumerate(kernel))).astype(np.uint8)


@pytest.fixture(scope="module")
def base():
    return described(scenes(0))


@pytest.fixture(scope="module", params=sorted(looks.BRANDS))
def brand(request):
    """A brand's name, and two halves of it that share no prompt."""
    name = request.param
    return name, described(branded(scenes(0), name, 1)), described(branded(scenes(1), name, 2))


def test_lab_of_the_primaries_is_the_published_one():
    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (119, 119, 119)]
    published = [(0, 0, 0), (100, 0, 0), (53.24, 80.09, 67.20), (87.73, -86.18, 83.18), (32.30, 79.19, -107.86)]
    np.testing.assert_allclose(style.to_lab(np.array(colours))[:5], published, atol=0.06)
    assert style.to_lab(np.array(colours))[5] == pytest.approx((50.03, 0, 0), abs=0.06)


@pytest.mark.parametrize(("size", "cells"), [(64, 64), (480, 64), (832, 111), (50, 64)])
def test_boxes_keep_the_mean_and_weigh_one(size, cells):
    weights = style.box_weights(size, cells)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    np.testing.assert_allclose(weights.mean(axis=0), 1.0 / size)


def test_grain_is_the_noise_and_not_the_picture():
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 100, 64), (4, 64, 64))
    assert style.grain(ramp) == pytest.approx(0.0, abs=1e-9)
    assert style.grain(ramp + 2.0 * rng.standard_normal(ramp.shape)) == pytest.approx(2.0, rel=0.05)


def test_energy_distance_of_two_points_is_the_root_of_twice_their_distance():
    assert style.energy_distance(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])) == pytest.approx(np.sqrt(10.0))


def test_energy_distance_of_two_normals_is_the_closed_form():
    # For N(0, 1) and N(shift, 1): E|X-Y| = 2 phi(m) + m (2 Phi(m) - 1) times sqrt(2), with m = shift / sqrt(2).
    rng, m = np.random.default_rng(0), 1.5 / np.sqrt(2.0)
    phi, cdf = np.exp(-0.5 * m * m) / np.sqrt(2.0 * np.pi), 0.85557783
    between = np.sqrt(2.0) * (2.0 * phi + m * (2.0 * cdf - 1.0))
    x, y = rng.standard_normal((1500, 1)), 1.5 + rng.standard_normal((1500, 1))
    assert style.energy_distance(x, y) == pytest.approx(np.sqrt(2.0 * between - 4.0 / np.sqrt(np.pi)), rel=0.05)


def test_energy_distance_is_symmetric_and_ignores_order_place_and_rotation():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 5)), 1.0 + rng.standard_normal((30, 5))
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    expected = style.energy_distance(x, y)
    assert expected > 0.0
    for a, b in ((y, x), (x[::-1], y), (x + 7.0, y + 7.0), (x @ turn, y @ turn)):
        assert style.energy_distance(a, b) == pytest.approx(expected)
    assert style.energy_distance(4.0 * x, 4.0 * y) == pytest.approx(2.0 * expected)


def test_unbiased_terms_make_the_square_zero_on_average():
    rng = np.random.default_rng(0)
    draws = [(rng.standard_normal((6, 3)), rng.standard_normal((6, 3))) for _ in range(400)]
    squares = [2.0 * style.pairwise(x, y).mean() - style.within(x) - style.within(y) for x, y in draws]
    assert abs(np.mean(squares)) < 4.0 * np.std(squares) / np.sqrt(len(squares))


def test_energy_distance_of_nothing_is_refused():
    with pytest.raises(ValueError, match="both sides"):
        style.energy_distance(np.zeros((0, 3)), np.zeros((2, 3)))


def test_two_halves_of_a_brand_are_one_look(base, brand):
    _, first, second = brand
    clips, rng = np.concatenate([first, second]), np.random.default_rng(0)
    splits = [np.split(rng.permutation(clips), 2) for _ in range(20)]
    look = style.energy_distance(base, second)
    assert np.median([style.energy_distance(x, y) for x, y in splits]) < 0.1 * look
    # Before the root, which is steep near zero, and the clip at zero: chance, and no bias.
    squares = [2.0 * style.pairwise(x, y).mean() - style.within(x) - style.within(y) for x, y in splits]
    assert abs(np.mean(squares)) < 0.03 * look**2
    assert np.max(squares) < 0.2 * look**2


def test_every_clip_is_nearest_to_its_own_brand(brand):
    name, own, unseen = brand
    others = [described(branded(scenes(0), other, 3)) for other in looks.BRANDS if other != name]
    clips = np.concatenate([unseen, described(branded(scenes(1, 15), name, 4))])
    assert len(clips) >= 60
    nearer = [all(style.nearness(c, own) < style.nearness(c, other) for other in others) for c in clips]
    assert all(nearer)


def test_distance_falls_as_the_look_is_blended_in(brand):
    name, _, reference = brand
    clips = scenes(0, 20)
    path = [style.energy_distance(described(branded(clips, name, 5, s)), reference) for s in np.linspace(0, 1, 5)]
    assert all(later < earlier for earlier, later in itertools.pairwise(path[:-1]))
    assert path[-1] <= path[-2], "the last two may both be nought"


@pytest.mark.parametrize("filter_", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_enlarging_leaves_the_look(base, brand, filter_):
    name, _, _ = brand
    clips = branded(scenes(0, 12), name, 1)
    large = [np.stack([np.asarray(Image.fromarray(f).resize((256, 256), filter_)) for f in c]) for c in clips]
    moved = np.linalg.norm(described(large) - described(clips), axis=1).mean()
    assert moved < 0.1 * np.linalg.norm(base[:12] - described(clips), axis=1).mean()


def test_an_autoencoders_blur_is_little_beside_the_look(base, brand):
    name, _, _ = brand
    clips = branded(scenes(0, 30), name, 1)
    sharp, smooth = described(clips), described([blurred(clip) for clip in clips])
    moved = np.linalg.norm(smooth - sharp, axis=1).mean()
    assert moved < 0.25 * np.linalg.norm(base[:30] - sharp, axis=1).mean()
    assert style.energy_distance(smooth, sharp) < 0.25 * style.energy_distance(base[:30], sharp)
    assert moved > 0.0, "grain must count"


def test_wide_and_short_footage_has_a_look():
    wide = np.random.default_rng(0).integers(0, 255, (3, 120, 208, 3), dtype=np.uint8)
    for clip in (wide, wide.transpose(0, 2, 1, 3), wide[:1], np.full((5, 40, 30, 3), 7, np.uint8)):
        assert np.isfinite(style.describe(clip)).all()
    np.testing.assert_allclose(style.describe(wide), style.describe(wide[:, :, ::-1]), atol=0.2)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 9, 9), np.uint8), np.zeros((1, 9, 9, 3)), np.zeros((0, 9, 9, 3), np.uint8)]
)
def test_what_is_no_clip_is_refused(bad):
    with pytest.raises(ValueError, match="a clip must be uint8"):
        style.describe(bad)


def test_uniformity_finds_the_clip_that_fell_out(brand):
    name, reference, _ = brand
    even = branded(scenes(1, 8), name, 7)
    # The motif is the same in the clip that fell out, so that only its look is different.
    mixed = [*even[:5], scenes(1, 8)[5], *even[6:]]
    before, after = (style.uniformity(described(clips), reference) for clips in (even, mixed))
    assert after.worst_index == 5
    assert after.worst > before.worst
    assert after.spread > before.spread


def test_motion_follows_the_speed_and_survives_a_look():
    clips = scenes(0, 24)
    frozen = [np.repeat(clip[:1], len(clip), axis=0) for clip in clips]
    slow = [np.repeat(clip[:5], 2, axis=0)[:9] for clip in clips]
    assert motion.motion_kept(clips, clips) == 1.0
    assert motion.motion_kept(clips, frozen) == 0.0
    assert 0.4 < motion.motion_kept(clips, slow) < 0.65
    for name in looks.BRANDS:
        assert 0.75 < motion.motion_kept(clips, branded(clips, name, 1)) < 1.3
        assert motion.motion_kept(clips, branded(frozen, name, 1)) < 0.35, "grain must not pass for motion"


def test_motion_is_free_of_contrast_exposure_and_size():
    clip = scenes(0, 1)[0]
    amount = motion.motion_amount(clip)
    assert motion.motion_amount((clip // 2 + 60).astype(np.uint8)) == pytest.approx(amount, rel=0.05)
    assert motion.motion_amount(clip.repeat(4, axis=1).repeat(4, axis=2)) == pytest.approx(amount)


def test_nothing_to_see_has_no_motion():
    still = np.full((9, 64, 64, 3), 90, np.uint8)
    assert motion.motion_amount(still) == 0.0
    assert motion.motion_amount(scenes(0, 1)[0][:1]) == 0.0
    assert motion.motion_kept([still], [still]) is None
