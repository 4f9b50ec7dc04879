"""Training samples, and the caches filled for them: every window and every caption is encoded once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wan_finetune.video import frame_indices, read_frames

from .buckets import Bucket, fit_frames
from .cache import Cache, file_sha256, latent_key, require_space, text_key
from .clips import Clip

EncodeVideo = Callable[[NDArray[np.uint8]], Tensor]
"""Frames [F, H, W, 3], uint8 RGB -> raw latent mean [C, f, h, w], fp32, not normalised."""
EncodeText = Callable[[str], Tensor]
"""A cleaned caption -> its real rows [L, D], without padding."""
Progress = Callable[[str, int, int], None]
"""Called as (stage "text" or "latent", done, total) after each item."""

MAX_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One window of one clip."""

    clip: str
    """Name relative to the source folder."""
    bucket: Bucket
    start_seconds: float
    captions: tuple[str, ...]
    latent_key: str


def list_samples(clips: Sequence[Clip], *, fps: float, video_fingerprint: str) -> list[Sample]:
    """Every window of every clip, in the clips' order, then by start. Reads each file for its hash, decodes nothing."""
    samples = []
    for clip in clips:
        digest = file_sha256(clip.info.path)
        for start in clip.start_seconds:
            key = latent_key(digest, start, clip.bucket, fps, video_fingerprint)
            samples.append(
                Sample(clip=clip.name, bucket=clip.bucket, start_seconds=start, captions=clip.captions, latent_key=key)
            )
    return samples


def precompute(
    clips: Sequence[Clip],
    cache: Cache,
    *,
    fps: float,
    video_fingerprint: str,
    text_fingerprint: str,
    encode_video: EncodeVideo,
    encode_text: EncodeText,
    progress: Progress,
    rank: int = 0,
    world_size: int = 1,
) -> list[Sample]:
    """Fill the cache with what is missing or damaged, and return all samples in a stable order.

    The dropped caption, "", is always among the texts. Each of `world_size` processes begins at its own place and
    passes over what others have written meanwhile, so that any number of them share the work without talking.

    Raises:
        InputError: the disk is too small, or a clip cannot be decoded.
    """
    samples = list_samples(clips, fps=fps, video_fingerprint=video_fingerprint)
    sources = {s.latent_key: (clip, s) for clip, s in zip(_owners(clips), samples, strict=True)}
    latents = [key for key in sources if cache.read("latent", key) is None]
    texts = list(dict.fromkeys(["", *(caption for clip in clips for caption in clip.captions)]))
    texts = [caption for caption in texts if cache.read("text", text_key(caption, text_fingerprint)) is None]

    latent_bytes = sum(sources[key][1].bucket.latent_bytes for key in latents)
    require_space(cache.folder, latent_bytes, f"the cache of {len(latents)} latents")
    for done, caption in enumerate(_from_own_place(texts, rank, world_size), 1):
        key = text_key(caption, text_fingerprint)
        if not cache.has("text", key):
            rows = encode_text(caption)
            if done == 1:
                row_bytes = rows.shape[1] * rows.element_size()
                text_bytes = sum(min(MAX_TOKENS, len(text.encode()) + 2) for text in texts) * row_bytes
                require_space(cache.folder, text_bytes + latent_bytes, "the cache of captions and latents")
            cache.write("text", key, {"text": rows}, {"caption": caption, "encoder": text_fingerprint})
        progress("text", done, len(texts))
    for done, key in enumerate(_from_own_place(latents, rank, world_size), 1):
        if not cache.has("latent", key):
            clip, sample = sources[key]
            latent = encode_video(window_frames(clip, sample.start_seconds, fps))
            record = {
                "bucket": str(sample.bucket),
                "start_seconds": repr(sample.start_seconds),
                "fps": repr(fps),
                "encoder": video_fingerprint,
            }
            cache.write("latent", key, {"latent": latent.float()}, record)
        progress("latent", done, len(latents))
    return samples


def window_frames(clip: Clip, start_seconds: float, fps: float) -> NDArray[np.uint8]:
    """One window as the encoder sees it: frames [F, H, W, 3] of the clip's bucket. Raises InputError."""
    indices = frame_indices(clip.info, start_seconds=start_seconds, num_frames=clip.bucket.num_frames, fps=fps)
    return fit_frames(read_frames(clip.info, indices), clip.bucket)


def _owners(clips: Sequence[Clip]) -> list[Clip]:
    return [clip for clip in clips for _ in clip.start_seconds]


def _from_own_place(work: list[str], rank: int, world_size: int) -> list[str]:
    first = len(work) * rank // world_size
    return work[first:] + work[:first]
