"""Copies of a clip are found in another encoding and size; different clips are kept apart."""

import itertools
import time

import imagehash
import numpy as np
import pytest
from PIL import Image

from data.likeness import (
    FINGERPRINT_BYTES,
    HASH_BYTES,
    MAX_BITS,
    MAX_CHANGE,
    duplicates,
    fingerprint,
    perceptual_hash,
)
from tests.footage import BIKES_CUTS, encoded, footage, grain, resized
from wan_finetune.pocket import world

BIKES_SHOTS = itertools.pairwise((0, *BIKES_CUTS))
SHOTS = [("bigbuckbunny.mp4", 0, 131), *(("bikes.mp4", first, end - 1) for first, end in BIKES_SHOTS)]


def brute_force(fingerprints):
    """The same groups by comparing every pair, and by the definition of likeness alone."""
    rows = np.frombuffer(b"".join(fingerprints), np.uint8).reshape(-1, FINGERPRINT_BYTES)
    bits, pictures = np.unpackbits(rows[:, :HASH_BYTES], axis=1), rows[:, HASH_BYTES:].astype(int)
    label = list(range(len(rows)))
    for one, other in itertools.combinations(range(len(rows)), 2):
        alike = (bits[one] != bits[other]).sum() <= MAX_BITS and abs(
            pictures[one] - pictures[other]
        ).max() <= MAX_CHANGE
        if alike and label[one] != label[other]:
            old, new = sorted((label[one], label[other]), reverse=True)
            label = [new if value == old else value for value in label]
    groups = {value: tuple(k for k, other in enumerate(label) if other == value) for value in label}
    return sorted(group for group in groups.values() if len(group) > 1)


def test_the_hash_is_imagehashs():
    noise = np.random.default_rng(0).integers(0, 256, (20, 90, 160, 3), dtype=np.uint8)
    for frame in (*footage(*SHOTS[0]), *footage(*SHOTS[2]), *noise):
        assert np.array_equal(perceptual_hash(frame), imagehash.phash(Image.fromarray(frame)).hash)


@pytest.mark.parametrize("shot", SHOTS, ids=str)
def test_a_copy_is_found_in_another_encoding_and_size(shot, tmp_path):
    frames = footage(*shot)
    height = frames.shape[1] * 320 // frames.shape[2] // 2 * 2
    copies = [frames, encoded(frames, tmp_path, crf=36), grain(frames, 6)]
    copies += [encoded(resized(frames, 320, height), tmp_path, crf) for crf in (20, 34)]
    assert duplicates([fingerprint(copy) for copy in copies]) == [(0, 1, 2, 3, 4)]


def test_shots_of_one_film_are_kept_apart():
    assert duplicates([fingerprint(footage(*shot)) for shot in SHOTS]) == []


def test_clips_of_the_pocket_world_are_kept_apart():
    # The same place and size for all is the hardest case: they differ by colour, shape, background or motion alone.
    scenes = [world.Scene(colour=c[0], shape=c[1], background=c[2], motion=c[3]) for c in world.COMBINATIONS]
    scenes += [world.random_scene(np.random.default_rng(k), c) for k, c in enumerate(world.COMBINATIONS)]
    assert duplicates([fingerprint(world.render(scene)) for scene in scenes]) == []


def noisy_copies(rng, base, count):
    """Fingerprints at all distances from `base`, around both limits."""
    rows = np.repeat(base[None], count, axis=0)
    for row in rows:
        for bit in rng.choice(HASH_BYTES * 8, rng.integers(0, MAX_BITS + 6), replace=False):
            row[bit // 8] ^= 1 << bit % 8
        row[rng.integers(HASH_BYTES, FINGERPRINT_BYTES)] ^= rng.integers(0, 2 * MAX_CHANGE)
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_bands_find_what_comparing_every_pair_finds(seed):
    rng = np.random.default_rng(seed)
    bases = rng.integers(0, 256, (12, FINGERPRINT_BYTES), dtype=np.uint8)
    rows = np.concatenate([bases, *(noisy_copies(rng, base, 12) for base in bases), bases[:3]])
    prints = [row.tobytes() for row in rng.permutation(rows)]
    expected = brute_force(prints)
    assert len(expected) > 3
    assert duplicates(prints) == expected


@pytest.mark.parametrize(("bits", "change", "alike"), [(16, 0, True), (17, 0, False), (0, 24, True), (0, 25, False)])
def test_likeness_ends_at_its_limits(bits, change, alike):
    rng = np.random.default_rng(5)
    base = rng.integers(0, 200, FINGERPRINT_BYTES, dtype=np.uint8)
    for _ in range(50):
        other = base.copy()
        for bit in rng.choice(HASH_BYTES * 8, bits, replace=False):
            other[bit // 8] ^= 1 << bit % 8
        other[-1] += change
        assert duplicates([base.tobytes(), other.tobytes()]) == ([(0, 1)] if alike else [])


def test_a_hundred_thousand_clips_take_seconds():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (100_000, FINGERPRINT_BYTES), dtype=np.uint8)
    rows[-10:] = rows[:10]
    rows[50_000:60_000] = rows[50_000]
    prints = [row.tobytes() for row in rows]
    started = time.process_time()
    found = duplicates(prints)
    assert time.process_time() - started < 20
    assert found == [*((k, 99_990 + k) for k in range(10)), tuple(range(50_000, 60_000))]


def test_few_and_odd_fingerprints():
    assert duplicates([]) == []
    assert duplicates([bytes(FINGERPRINT_BYTES)]) == []
    assert duplicates([bytes(FINGERPRINT_BYTES)] * 3) == [(0, 1, 2)]
    with pytest.raises(ValueError, match="make them anew"):
        duplicates([bytes(8)])
    still = footage("bikes.mp4")[:1]
    assert len(fingerprint(still)) == FINGERPRINT_BYTES
    assert duplicates([fingerprint(still), fingerprint(np.repeat(still, 9, axis=0))]) == [(0, 1)]
