"""A converted folder is the original checkpoint: held against plain arithmetic on the original names."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from tests.original_checkpoints import (
    tiny_autoencoder,
    tiny_denoiser,
    tiny_text_encoder,
    write_a14b,
    write_wan21,
)
from tests.original_wan import (
    TINY_HEADS,
    TINY_TEXT,
)
from wan_finetune.cli import main
from wan_finetune.convert import tensor_files
from wan_finetune.convert.job import convert
from wan_finetune.convert.planning import ConvertSettings
from wan_finetune.convert.reference_autoencoder import ReferenceAutoencoder
from wan_finetune.convert.reference_denoiser import denoiser_states
from wan_finetune.convert.reference_text_encoder import text_encoder_states
from wan_finetune.pipeline import load_pipeline

PROMPT = "a red circle moves up in a desert"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "Wan2.2-T2V-A14B"
    write_a14b(folder)
    return folder


@pytest.fixture(scope="module")
def exact(checkpoint, tmp_path_factory):
    """Converted in fp32: nothing is rounded."""
    out = tmp_path_factory.mktemp("converted") / "exact"
    convert(ConvertSettings(checkpoint=checkpoint, out=out, dtype="fp32", max_shard_bytes=60_000))
    return out


@pytest.fixture(scope="module")
def usual(checkpoint, tmp_path_factory):
    """Converted as by default, by the command."""
    out = tmp_path_factory.mktemp("converted") / "usual"
    assert main(["convert", str(checkpoint), str(out)]) == 0
    return out


def reference_output(weights, latents, t, text):
    return denoiser_states(weights.__getitem__, 2, TINY_HEADS, 1e-6, latents, t, text)[-1]


def reference_autoencoder():
    weights = tiny_autoencoder()
    return ReferenceAutoencoder(weights.__getitem__, weights)


def close(value, wanted, tolerance=1e-5):
    return (value - wanted).norm() <= tolerance * wanted.norm()


@torch.inference_mode()
def test_each_converted_expert_gives_what_the_original_one_gives(exact):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator)
    text = torch.randn(1, 7, 32, generator=generator)
    outputs = []
    for component, seed in (("transformer", 1), ("transformer_2", 2)):
        model = WanTransformer3DModel.from_pretrained(exact, subfolder=component)
        for t in (3.0, 875.0, 999.0):
            outputs.append(model(latents, torch.tensor([t]), text, return_dict=False)[0])
            assert close(outputs[-1], reference_output(tiny_denoiser(seed), latents, torch.tensor([t]), text))
    assert not close(outputs[0], outputs[3], 0.1), "the experts differ"


@torch.inference_mode()
def test_the_converted_text_encoder_gives_what_the_original_one_gives(exact):
    weights = {name: value.bfloat16().float() for name, value in tiny_text_encoder().items()}
    model = UMT5EncoderModel.from_pretrained(exact, subfolder="text_encoder", dtype=torch.float32)
    ids = torch.randint(TINY_TEXT["vocab"], (1, 150), generator=torch.Generator().manual_seed(0))
    embedded = weights["token_embedding.weight"][ids]
    wanted = text_encoder_states(weights.__getitem__, 2, TINY_TEXT["num_heads"], embedded)[-1]
    assert close(model(ids).last_hidden_state, wanted)


@torch.inference_mode()
def test_the_converted_autoencoder_codes_and_decodes_as_the_original_one(exact):
    model = AutoencoderKLWan.from_pretrained(exact, subfolder="vae")
    reference = reference_autoencoder()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 2, 2, generator=generator)
    assert close(model.decode(latents).sample, reference.decode(latents).clamp(-1, 1))
    video = torch.randn(1, 3, 9, 16, 16, generator=generator)
    assert close(model.encode(video).latent_dist.parameters, reference.encode(video))


@torch.inference_mode()
def test_a_clip_of_the_converted_pipeline_is_the_one_that_the_original_weights_make(exact):
    """Prompt to pixels, in reference arithmetic; the scheduler alone is diffusers'."""
    pipe = load_pipeline(str(exact), dtype=torch.float32)
    steps, guidance, size = 4, (4.0, 3.0), (1, 16, 2, 4, 4)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    clip = pipe(
        PROMPT, height=32, width=32, num_frames=5, num_inference_steps=steps, guidance_scale=guidance[0],
        guidance_scale_2=guidance[1], latents=noise.clone(), output_type="pt", max_sequence_length=512,
    ).frames  # fmt: skip

    text_weights = {name: value.bfloat16().float() for name, value in tiny_text_encoder().items()}
    contexts = []
    for prompt in (PROMPT, ""):
        ids = pipe.tokenizer(prompt, return_tensors="pt").input_ids
        embedded = text_weights["token_embedding.weight"][ids]
        rows = text_encoder_states(text_weights.__getitem__, 2, TINY_TEXT["num_heads"], embedded)[-1]
        contexts.append(torch.cat([rows, rows.new_zeros(1, 512 - rows.shape[1], rows.shape[2])], 1))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0)
    scheduler.set_timesteps(steps)
    experts = {True: tiny_denoiser(1), False: tiny_denoiser(2)}
    x, sides = noise, []
    for t in scheduler.timesteps:
        sides.append(bool(t >= 875))
        with_text, without = (reference_output(experts[sides[-1]], x, t[None].float(), text) for text in contexts)
        scale = guidance[0] if sides[-1] else guidance[1]
        x = scheduler.step(without + scale * (with_text - without), t, x).prev_sample
    assert set(sides) == {True, False}, "both experts have had their steps"
    mean, std = (
        torch.tensor(pipe.vae.config[name]).reshape(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    decoded = reference_autoencoder().decode(x * std + mean).clamp(-1, 1)
    assert clip.std() > 0.01
    assert close(clip[0].transpose(0, 1) * 2 - 1, decoded[0], 1e-4)


def test_the_folder_is_a_diffusers_pipeline_with_the_official_sampling(usual):
    index = json.loads((usual / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and index["boundary_ratio"] == 0.875
    pipe = WanPipeline.from_pretrained(usual)
    assert pipe.transformer_2 is not None and pipe.config.boundary_ratio == 0.875
    scheduler = pipe.scheduler
    assert isinstance(scheduler, UniPCMultistepScheduler) and scheduler.config.flow_shift == 12.0
    assert scheduler.config.prediction_type == "flow_prediction" and scheduler.config.use_flow_sigmas
    assert not list(usual.parent.glob("*.partial")) and not list(usual.rglob("*.partial"))
    assert {path.name for path in usual.iterdir()} == {
        "conversion.json", "model_index.json", "scheduler", "text_encoder", "tokenizer",
        "transformer", "transformer_2", "vae",
    }  # fmt: skip


def test_reading_in_small_pieces_changes_no_byte(checkpoint, exact, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 2_000)
    monkeypatch.setattr(tensor_files, "REMAP_BYTES", 50_000)
    out = tmp_path / "out"
    convert(ConvertSettings(checkpoint=checkpoint, out=out, dtype="fp32", max_shard_bytes=60_000, verify=False))
    files = [path.relative_to(exact) for path in exact.rglob("*.safetensors")]
    assert len(files) > 10 and all((out / name).read_bytes() == (exact / name).read_bytes() for name in files)


def test_wan21_has_one_denoiser_and_its_own_shift(tmp_path):
    weights = write_wan21(tmp_path / "wan21")
    convert(ConvertSettings(checkpoint=tmp_path / "wan21", out=tmp_path / "out", dtype="fp32"))
    pipe = WanPipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer_2 is None and pipe.config.boundary_ratio is None
    assert pipe.scheduler.config.flow_shift == 8.0, "the README's for the small model"
    latents, text, t = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, 32), torch.tensor([500.0])
    with torch.inference_mode():
        assert close(
            pipe.transformer(latents, t, text, return_dict=False)[0], reference_output(weights, latents, t, text)
        )


def test_what_diffusers_holds_in_fp32_is_written_so_and_nothing_else_is(usual, exact):
    for part in ("transformer", "transformer_2"):
        written = {}
        for file in (usual / part).glob("*.safetensors"):
            written |= {name: value.dtype for name, value in load_file(file).items()}
        kept = {name for name, dtype in written.items() if dtype == torch.float32}
        assert set(written.values()) == {torch.float32, torch.bfloat16}
        assert {
            name for name in written if "time_embedder" in name or "scale_shift_table" in name or ".norm2." in name
        } == kept
        # So bf16 costs no more than loading the original in bf16 does.
        small, large = (
            WanTransformer3DModel.from_pretrained(folder, subfolder=part, dtype=torch.bfloat16).state_dict()
            for folder in (usual, exact)
        )
        assert all(torch.equal(small[name], large[name]) and small[name].dtype == large[name].dtype for name in large)


@pytest.mark.parametrize(("dtype", "wanted"), [("fp16", torch.float16), ("keep", torch.float32)])
def test_other_types_are_what_was_asked_for(checkpoint, tmp_path, dtype, wanted):
    convert(ConvertSettings(checkpoint=checkpoint, out=tmp_path / "out", dtype=dtype))
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["blocks.0.ffn.net.2.weight"].dtype == wanted
    text_encoder = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert text_encoder["shared.weight"].dtype == (torch.bfloat16 if dtype == "keep" else wanted)
    assert (
        UMT5EncoderModel.from_pretrained(tmp_path / "out", subfolder="text_encoder").dtype
        == text_encoder["shared.weight"].dtype
    )


def test_the_manifest_names_every_file_by_its_hash_and_no_folder_of_this_machine(usual, checkpoint):
    from hashlib import file_digest

    text = (usual / "conversion.json").read_text()
    manifest = json.loads(text)
    assert str(checkpoint) not in text and str(checkpoint.parent) not in text
    files = {path.relative_to(usual).as_posix() for path in usual.rglob("*") if path.is_file()} - {"conversion.json"}
    assert set(manifest["outputs_sha256"]) == files
    for name, digest in manifest["outputs_sha256"].items():
        with (usual / name).open("rb") as stream:
            assert file_digest(stream, "sha256").hexdigest() == digest
    read = {name for inputs in manifest["inputs_sha256"].values() for name in inputs}
    assert "models_t5_umt5-xxl-enc-bf16.pth" in read and "Wan2.1_VAE.pth" in read
    assert manifest["weights"]["transformer"]["weights"] == len(tiny_denoiser(1))
    assert manifest["verified"] is True


def test_files_are_no_larger_than_asked_and_hold_each_weight_once(exact):
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = json.loads((exact / part / f"{stem}.safetensors.index.json").read_text())
        files = sorted((exact / part).glob("*.safetensors"))
        held = {}
        for file in files:
            assert file.stat().st_size < 60_000 + 20_000, "numbers, and a table"
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    assert name not in held
                    held[name] = file.name
        assert held == index["weight_map"] and len(files) > 1
