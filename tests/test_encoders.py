"""Encoders: what diffusers' own classes give, and how much memory large clips take."""

import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from wan_finetune.encoders import UNTILED_PIXELS, VideoEncoder, encode_bytes, tile_side
from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder

CPU = torch.device("cpu")


def frames_of(num_frames, height, width, seed=0):
    """Smooth, moving colours, uint8 [F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, (3, 3))
    t, y, x = np.meshgrid(np.arange(num_frames) / 16, np.arange(height) / 40, np.arange(width) / 40, indexing="ij")
    waves = [
        np.sin(3 * t + p) + np.sin(y * (1 + c) + q) + np.sin(x * (2 - c / 2) + r) for c, (p, q, r) in enumerate(phase)
    ]
    return ((np.stack(waves, axis=-1) / 6 + 0.5) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pocket_vae():
    return base_folder("pocket", ("vae",))


def test_latent_is_the_posterior_of_diffusers_own_encode(tiny_base):
    frames = frames_of(9, 48, 64)
    vae = AutoencoderKLWan.from_pretrained(tiny_base, subfolder="vae")
    pixels = torch.from_numpy(frames / 127.5 - 1.0).float().permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    plain = VideoEncoder(tiny_base, CPU)(frames)
    both = VideoEncoder(tiny_base, CPU, with_std=True)(frames)
    assert plain.keys() == {"latent"} and both.keys() == {"latent", "std"}
    for found, wanted in (
        (plain["latent"], posterior.mean),
        (both["latent"], posterior.mean),
        (both["std"], posterior.std),
    ):
        assert found.dtype == torch.float32 and found.shape == (16, 3, 6, 8)
        torch.testing.assert_close(found, wanted[0], atol=1e-5, rtol=1e-4)
    assert both["std"].min() > 0


def test_chunks_in_time_change_nothing(pocket_vae):
    # The encoder is causal and works through four frames at a time: more frames leave the first latents as they are.
    encoder, frames = VideoEncoder(pocket_vae, CPU), frames_of(17, 64, 64)
    whole, start = encoder(frames)["latent"], encoder(frames[:9])["latent"]
    torch.testing.assert_close(whole[:, :3], start, atol=1e-5, rtol=1e-5)
    assert whole.shape[1] == 5


def test_tiles_follow_from_the_size_of_a_frame_alone():
    sizes = [(832, 480), (1280, 720), (720, 1280), (960, 960), (1024, 1024), (1040, 1024), (1920, 1088)]
    assert [tile_side(*size) for size in sizes] == [None] * 5 + [1024] * 2
    assert tile_side(1280, 720, untiled_pixels=400_000) == 576 and tile_side(1280, 720, untiled_pixels=1) == 64


def test_tiled_latent_has_the_same_shape_and_nearly_the_same_values(pocket_vae):
    frames = frames_of(5, 144, 208)
    whole = VideoEncoder(pocket_vae, CPU)
    tiled = VideoEncoder(pocket_vae, CPU, untiled_pixels=128 * 128)
    std = torch.tensor(whole.vae.config.latents_std).view(-1, 1, 1, 1)
    difference = ((whole(frames)["latent"] - tiled(frames)["latent"]) / std).square().mean().sqrt()
    # Not equal: so a cache may not take the one for the other.
    assert 1e-4 < difference < 0.1
    small = frames_of(1, 128, 128)
    assert torch.equal(whole(small)["latent"], tiled(small)["latent"])


def test_encoder_goes_back_to_whole_frames_after_a_tiled_clip(pocket_vae):
    encoder = VideoEncoder(pocket_vae, CPU, untiled_pixels=64 * 64)
    small, large = frames_of(1, 64, 64), frames_of(1, 128, 128)
    before = encoder(small)["latent"]
    encoder(large)
    assert torch.equal(encoder(small)["latent"], before)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key, size):
        self.alive.discard(key)
        self.now -= size


def traced_bytes(width, height, num_frames, tiled=False):
    """Peak of Wan's own VAE, weights included, without running it."""
    with FakeTensorMode(), torch.no_grad(), LiveBytes() as live:
        vae = AutoencoderKLWan().requires_grad_(False)
        if tiled:
            side = tile_side(width, height)
            vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
        vae.encode(torch.empty(1, 3, num_frames, height, width)).latent_dist.mode()
        return live.peak


@pytest.mark.parametrize("size", [(256, 256, 9), (832, 480, 33), (1280, 720, 81)])
def test_memory_is_what_the_trace_of_wans_own_vae_says(size):
    width, height, num_frames = size
    traced = traced_bytes(*size)
    assert encode_bytes(width * height, num_frames) == pytest.approx(traced, rel=0.02)
    assert traced < 14 * 2**30, "24 GB leave room for the workspace of convolutions"


def test_tiled_clips_stay_below_the_largest_that_is_encoded_whole():
    assert traced_bytes(1040, 1040, 5, tiled=True) < encode_bytes(UNTILED_PIXELS, 5) < 16 * 2**30


def test_too_little_memory_is_told_with_the_need(pocket_vae, monkeypatch):
    encoder = VideoEncoder(pocket_vae, CPU)

    def full(_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(encoder.vae, "encode", full)
    with pytest.raises(InputError, match=r"64x64x5 does not fit into the memory of cpu.*0\.5 GiB.*smaller buckets"):
        encoder(frames_of(5, 64, 64))
