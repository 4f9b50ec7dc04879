"""Which clips show the same: a fingerprint that survives another encoding or size, and groups of equal ones."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LOOKS = 4
"""Frames of a clip that are hashed, evenly spread."""
HASH_BYTES = LOOKS * 8
HASHED = 32
"""Width and height of the small picture whose frequencies are hashed."""
PICTURE = 16
"""Width and height of the small picture that is kept of the middle frame."""
FINGERPRINT_BYTES = HASH_BYTES + PICTURE * PICTURE * 3

MAX_BITS = 16
"""Most bits of the hash, of 256, in which equal clips differ. Re-encoding changes up to 16 of them, except at 160x90
and crf 40, where it is up to 28."""
MAX_CHANGE = 24
"""Largest difference of a pixel of the small picture, 0-255, between equal clips. The hash sees neither colour nor
small shapes; re-encoding changes up to 19."""
BANDS = MAX_BITS + 1
"""Hashes that differ in fewer bits than there are bands are equal in one band at least."""


def fingerprint(frames: NDArray[np.uint8]) -> bytes:
    """`FINGERPRINT_BYTES` that say what frames [F, H, W, 3], uint8 RGB, evenly spread over a clip, look like.

    Perceptual hashes of four of them, and the middle one in small.
    """
    chosen = frames[((np.arange(LOOKS) + 0.5) * len(frames) / LOOKS).astype(int)]
    hashes = [perceptual_hash(frame) for frame in chosen]
    middle = Image.fromarray(frames[len(frames) // 2])
    picture = middle.resize((PICTURE, PICTURE), Image.Resampling.BOX)
    return np.packbits(np.concatenate(hashes)).tobytes() + picture.tobytes()


def perceptual_hash(frame: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The bits [8, 8] that `imagehash.phash` gives a frame [H, W, 3]: which low frequencies are above their median.

    Written out, because that package imports SciPy's transforms, which takes 0.3 s of the 0.7 s of a short check.
    """
    small = Image.fromarray(frame).convert("L").resize((HASHED, HASHED), Image.Resampling.LANCZOS)
    waves = 2 * np.cos(np.pi / (2 * HASHED) * np.outer(np.arange(8), 2 * np.arange(HASHED) + 1))  # of a DCT-II
    low: NDArray[np.float64] = waves @ np.asarray(small, dtype=np.float64) @ waves.T
    return low > np.median(low)


def duplicates(fingerprints: Sequence[bytes]) -> list[tuple[int, ...]]:
    """Groups of clips that show the same, as their places in `fingerprints`, each group and the list ascending.

    Clips are compared where a band of their hashes is equal, which takes about 1 s for 100,000 different ones. Likeness
    is passed on: a group may hold two clips that are only both like a third.

    Raises:
        ValueError: a fingerprint of another length.
    """
    if any(len(print_) != FINGERPRINT_BYTES for print_ in fingerprints):
        raise ValueError(f"each fingerprint must have {FINGERPRINT_BYTES} bytes; make them anew")
    parents: dict[int, int] = {}

    def root(place: int) -> int:
        while (parent := parents.get(place, place)) != place:
            parents[place] = parents.get(parent, parent)
            place = parent
        return place

    # Exact copies first, so that a thousand of them are one clip to what follows.
    first: dict[bytes, int] = {}
    for place, content in enumerate(fingerprints):
        if (original := first.setdefault(content, place)) != place:
            parents[place] = original
    places = np.fromiter(first.values(), np.int64, len(first))
    rows = np.frombuffer(b"".join(first), np.uint8).reshape(-1, FINGERPRINT_BYTES)
    for one, other in _like(rows):
        low, high = sorted((root(int(places[one])), root(int(places[other]))))
        if low != high:
            parents[high] = low
    groups: dict[int, list[int]] = {}
    for place in sorted(parents):
        groups.setdefault(root(place), [root(place)]).append(place)
    return sorted(tuple(group) for group in groups.values())


def _like(rows: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Pairs of rows [N, FINGERPRINT_BYTES] that show the same, each once."""
    words = np.ascontiguousarray(rows[:, :HASH_BYTES]).view(np.uint64)
    bits = np.unpackbits(rows[:, :HASH_BYTES], axis=1)
    # Every 17th bit: neighbours say much the same, of one frame as of two frames of a quiet clip.
    in_band = np.arange(HASH_BYTES * 8) % BANDS == np.arange(BANDS)[:, None]
    masks = np.packbits(in_band, axis=1).view(np.uint64)
    for band in range(BANDS):
        keys = np.packbits(bits[:, in_band[band]], axis=1).astype(np.int32) @ np.array([256, 1], np.int32)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        active = np.arange(len(order) - 1)
        distance = 1
        while len(active := active[active + distance < len(order)]):
            active = active[ordered[active] == ordered[active + distance]]
            one, other = order[active], order[active + distance]
            difference = words[one] ^ words[other]
            near = np.flatnonzero(np.bitwise_count(difference).sum(axis=1) <= MAX_BITS)
            for earlier in masks[:band]:  # compared there already
                near = near[(difference[near] & earlier).any(axis=1)]
            yield from _with_like_pictures(rows[:, HASH_BYTES:], one[near], other[near])
            distance += 1


def _with_like_pictures(
    pictures: NDArray[np.uint8], one: NDArray[np.int64], other: NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """Those of the pairs whose pictures are alike."""
    # Unlike pictures show it in a few pixels.
    for pixels in (slice(None, None, 61), slice(None)):
        change = np.abs(pictures[one, pixels].astype(np.int16) - pictures[other, pixels]).max(axis=1, initial=0)
        one, other = one[change <= MAX_CHANGE], other[change <= MAX_CHANGE]
    yield from zip(one.tolist(), other.tolist(), strict=True)
