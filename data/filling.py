"""Filling the caches: what is not there yet of windows, masks and captions is encoded once, by many processes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_finetune.spec import TEXT_TOKENS
from wan_finetune.video import VideoFault, frame_indices

from .cache import Cache, Kind, require_space, text_key
from .framing import Box, fit_frames
from .inspection import Inspector
from .samples import Sample, SampleTable
from .viewing import window_frames

EncodeVideo = Callable[[NDArray[np.uint8]], dict[str, Tensor]]
"""Frames [F, H, W, 3], uint8 RGB -> "latent", the raw posterior mean [C, f, h, w], fp32, and "std" where asked for."""
EncodeText = Callable[[str], Tensor]
"""A cleaned caption -> its real rows [L, D], without padding."""
Progress = Callable[[str, int, int], None]
"""Called as (stage "text", "latent" or "mask", done, total) after each item."""


@dataclass(frozen=True, kw_only=True)
class Filling:
    """What is to be encoded, how, and where it goes."""

    samples: SampleTable
    cache: Cache
    inspector: Inspector
    fps: float
    video_fingerprint: str
    text_fingerprint: str
    encode_video: EncodeVideo
    encode_text: EncodeText
    progress: Progress
    rank: int = 0
    world_size: int = 1

    def run(self) -> None:
        """Encode what is missing; the dropped caption, "", is always among the texts.

        Each process begins at its own place and leaves to others what they are at, so that they share the work without
        talking. A clip that cannot be decoded is remembered as faulty and passed over.

        Raises:
            InputError: the disk is too small, or in the way.
        """
        texts: dict[str, str] = {}
        for caption in self.captions():
            key = text_key(caption, self.text_fingerprint)
            if key not in texts and not self.cache.has("text", key):
                texts[key] = caption
        latents, masks = self.missing("latent"), self.missing("mask")
        latent_bytes = sum(self.samples[index].bucket.latent_bytes for index, _ in latents.values())
        require_space(self.cache.folder, latent_bytes, f"the cache of {len(latents)} latents")
        self.fill("text", list(texts), lambda key: self.encode_caption(key, texts, latent_bytes))
        self.fill("latent", list(latents), lambda key: self.encode_window(key, *latents[key]))
        self.fill("mask", list(masks), lambda key: self.reduce_mask(key, *masks[key]))

    def fill(self, kind: Kind, keys: list[str], make: Callable[[str], None]) -> None:
        """Make the entries of these keys, beginning at this process's own place."""
        count = itertools.count(1)
        first = len(keys) * self.rank // self.world_size
        self.cache.fill(kind, keys[first:] + keys[:first], make, lambda: self.progress(kind, next(count), len(keys)))

    def missing(self, kind: Literal["latent", "mask"]) -> dict[str, tuple[int, int]]:
        """Sample and window of each latent or mask that is not in the cache, by its key."""
        missing = {}
        for index, keys in enumerate(self.samples.column(f"{kind}_keys")):
            for window, key in enumerate(keys):
                if not self.cache.has(kind, key):
                    missing[key] = (index, window)
        return missing

    def encode_caption(self, key: str, texts: dict[str, str], latent_bytes: int) -> None:
        """One caption's rows; after the first it is known whether the disk can take them all."""
        rows = self.encode_text(texts[key])
        row_bytes = rows.shape[1] * rows.element_size()
        text_bytes = sum(min(TEXT_TOKENS, len(text.encode()) + 2) for text in texts.values()) * row_bytes
        require_space(self.cache.folder, text_bytes + latent_bytes, "the cache of captions and latents")
        self.cache.write("text", key, {"text": rows}, {"caption": texts[key], "encoder": self.text_fingerprint})

    def encode_window(self, key: str, index: int, window: int) -> None:
        """One window's latent."""
        sample: Sample = self.samples[index]
        start = sample.start_seconds[window]
        try:
            frames = window_frames(sample, start, self.fps, self.inspector)
        except VideoFault as fault:
            self.inspector.remember_fault(sample.path, fault)
            return
        record = {**self.record(sample, start), "encoder": self.video_fingerprint}
        self.cache.write("latent", key, self.encode_video(frames), record)

    def reduce_mask(self, key: str, index: int, window: int) -> None:
        """One window's mask."""
        sample: Sample = self.samples[index]
        assert sample.mask is not None
        start = sample.start_seconds[window]
        try:
            mask = window_mask(sample, start, self.fps, self.inspector)
        except VideoFault as fault:
            self.inspector.remember_fault(sample.mask, fault)
            return
        self.cache.write("mask", key, {"mask": mask}, self.record(sample, start))

    def record(self, sample: Sample, start_seconds: float) -> dict[str, str]:
        """What an entry's header says of a window."""
        return {"bucket": str(sample.bucket), "start_seconds": repr(start_seconds), "fps": repr(self.fps)}

    def captions(self) -> Iterator[str]:
        """Every text that training may ask for; one may come several times."""
        yield ""
        for sample in self.samples:
            for orders in sample.captions:
                yield from orders


def window_mask(sample: Sample, start_seconds: float, fps: float, inspector: Inspector) -> Tensor:
    """How much each place of the latent counts, fp32 [f, h, w] in 0..1: the mask's brightness, averaged.

    The first frame stands alone, as in the latent, and then four frames make one. A still mask is there all the time;
    a mask video is read at the clip's times. It is stretched over the whole picture.

    Raises:
        VideoFault: the mask cannot be read, or is shorter than the clip.
    """
    assert sample.mask is not None
    info = inspector.info(sample.mask)
    bucket = sample.bucket
    if info.reader == "pillow":
        frames = np.repeat(inspector.read(info, np.array([0])), bucket.num_frames, axis=0)
    else:
        indices = frame_indices(info, start_seconds=start_seconds, num_frames=bucket.num_frames, fps=fps)
        frames = inspector.read(info, indices)
    x, y = info.width / sample.width, info.height / sample.height
    box = Box(sample.box.left * x, sample.box.top * y, sample.box.right * x, sample.box.bottom * y)
    fitted = fit_frames(frames, box, bucket, width=info.width, height=info.height)
    light = torch.from_numpy(fitted.mean(axis=3)) / 255.0
    small = torch.nn.functional.avg_pool2d(light[:, None].float(), 8)[:, 0]
    first, rest = small[:1], small[1:]
    return torch.cat([first, rest.unflatten(0, (-1, 4)).mean(1)]) if len(rest) else first


def is_complete(samples: SampleTable, cache: Cache) -> NDArray[np.bool_]:
    """Which samples have all their latents and masks in the cache, [N]."""

    def complete(sample: Sample) -> bool:
        return all(cache.has("latent", key) for key in sample.latent_keys) and all(
            cache.has("mask", key) for key in sample.mask_keys
        )

    return np.array([complete(sample) for sample in samples], dtype=bool)
