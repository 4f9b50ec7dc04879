"""Which captions and masks belong to which clip, by their file names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .paths import MEDIA_SUFFIXES, Unusable, is_media, shown

MASK_NAME = re.compile(rf"(?P<clip>.+)\.mask({'|'.join(map(re.escape, MEDIA_SUFFIXES))})", re.IGNORECASE | re.DOTALL)
_NUMBERED = re.compile(r"(.+)\.(\d{1,9})", re.ASCII | re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A clip and the files that belong to it, by name."""

    clip: str
    captions: tuple[str, ...]
    """Files with captions: by kind, the plain one first, then those with numbers."""
    masks: tuple[str, ...]


def group_key(name: str) -> str:
    """What names of one clip's files share: everything before the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def pair_files(names: Sequence[str], caption_suffixes: tuple[str, ...]) -> tuple[list[Pair], list[str]]:
    """Pair the files of one group; gives the pairs in the order of `names`, and captions and masks without a clip.

    `a.txt` and `a.1.txt` belong to every clip called `a`, whatever its suffix; `a.mp4.txt` to `a.mp4` alone. A mask is
    called `a.mask.png`, or with another suffix of a video or still.
    """
    clips = [name for name in names if is_media(name) and not MASK_NAME.fullmatch(name)]
    owners_of: dict[str, list[str]] = {}
    for name in clips:
        owners_of.setdefault(name.rpartition(".")[0], []).append(name)
    owners_of.update({name: [name] for name in clips})
    captions: dict[str, list[tuple[int, int, str]]] = {name: [] for name in clips}
    masks: dict[str, list[str]] = {name: [] for name in clips}
    alone = []
    for name in names:
        if mask := MASK_NAME.fullmatch(name):
            owners = owners_of.get(mask["clip"], [])
            for owner in owners:
                masks[owner].append(name)
        elif name.lower().endswith(caption_suffixes):
            base, _, suffix = name.rpartition(".")
            kind, number = caption_suffixes.index(f".{suffix.lower()}"), 0
            owners = owners_of.get(base, [])
            if not owners and (numbered := _NUMBERED.fullmatch(base)):
                owners, number = owners_of.get(numbered[1], []), int(numbered[2])
            for owner in owners:
                captions[owner].append((kind, number, name))
        else:
            continue
        if not owners:
            alone.append(name)
    pairs = [
        Pair(clip=name, captions=tuple(file for *_, file in sorted(captions[name])), masks=tuple(masks[name]))
        for name in clips
    ]
    return pairs, alone


def only_mask(masks: Sequence[str]) -> str | None:
    """The one mask, or None. Raises Unusable where there are several."""
    if len(masks) > 1:
        raise Unusable(f"has {len(masks)} masks, {' and '.join(map(shown, masks))}; keep one of them")
    return masks[0] if masks else None


def unpaired_reason(name: str) -> str:
    """Fault and remedy for a caption or a mask that belongs to no clip."""
    what = "mask" if MASK_NAME.fullmatch(name) else "caption"
    return f"a {what} without a clip; add the clip of the same name or remove the {what}"
