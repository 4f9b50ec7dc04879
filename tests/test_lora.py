"""Every kind of LoRA: what is trained is what each file says and does, in diffusers and out of it."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_model import write_tiny_base
from wan_finetune.adapters import Adapter, as_adapter, inject_lora, lora_weights, set_lora_weights
from wan_finetune.cli import main
from wan_finetune.errors import InputError
from wan_finetune.experts import HIGH, LOW, SINGLE, load_expert
from wan_finetune.export import probe_output, verify_adapter_folder, write_adapter_folder
from wan_finetune.formats import comfyui
from wan_finetune.formats import diffusers as diffusers_format
from wan_finetune.formats.files import open_adapter
from wan_finetune.formats.reading import read_file
from wan_finetune.lora import LoraSettings, layout, targeted
from wan_finetune.pipeline import add_adapters, load_pipeline, read_adapters
from wan_finetune.video import read_video

PATTERNS = {
    "rank_pattern": {"ffn.net.0.proj": 2, r"re:blocks\.1\.attn1\..*": 6},
    "alpha_pattern": {"attn2.to_v": 3.0, r"re:blocks\.0\.attn2\.to_out.*": 5.5},
}
SOME = {"targets": (r"re:blocks\.1\..*attn1.*", "ffn.net.2"), "exclude": (r"re:blocks\.0\..*", "attn1.to_k")}
VARIANTS = {
    "plain": {"alpha": 7.0},
    "patterns": {"alpha": 7.0, **PATTERNS},
    "ranks alone": {"rank_pattern": PATTERNS["rank_pattern"]},
    "expressions": SOME,
    "rslora": {"alpha": 7.0, "rslora": True, **PATTERNS},
    "gaussian": {"initialisation": "gaussian"},
    "dora": {"alpha": 7.0, "dora": True},
    "dora, rslora, patterns": {"dora": True, "rslora": True, **PATTERNS},
    "pissa": {"alpha": 7.0, "initialisation": "pissa"},
    "pissa, rslora, patterns": {"initialisation": "pissa", "rslora": True, **PATTERNS},
    "olora": {"alpha": 2.0, "initialisation": "olora"},
    "olora, expressions": {"initialisation": "olora", **SOME},
}


@pytest.fixture(scope="module")
def single_base(tmp_path_factory) -> Path:
    """A base with one denoiser, as Wan2.1 has it."""
    folder = tmp_path_factory.mktemp("single") / "tiny"
    write_tiny_base(folder, num_experts=1)
    return folder


def injected(base: Path, expert, settings: LoraSettings, dtype=torch.float32, **more):
    model = load_expert(base, expert, dtype)
    return model, inject_lora(model, settings, expert.name, 0, **more)


def train(base: Path, expert, settings: LoraSettings) -> tuple[Adapter, Tensor]:
    """An adapter with weights as after some training, and the output of the model that it was taken from."""
    model, taken = injected(base, expert, settings)
    generator = torch.Generator().manual_seed(5)
    moved = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in lora_weights(model).items()}
    set_lora_weights(model, moved)
    adapter = as_adapter(expert.name, settings, moved, taken, {"base": "tiny", "trigger": "ember style"})
    return adapter, probe_output(model, base, adapter)


def update(adapter: Adapter, module: str) -> Tensor:
    a, b = (adapter.weights[f"{module}.lora_{half}.weight"].double() for half in "AB")
    return adapter.scale(module) * b @ a


def bare_pipeline(base: Path) -> WanPipeline:
    """The denoisers of a pipeline; the rest takes longer to load than a test to run."""
    return WanPipeline.from_pretrained(base, vae=None, text_encoder=None, tokenizer=None)


def load_plainly(base: Path, folder: Path, expert):
    pipe = bare_pipeline(base)
    if expert is SINGLE:
        pipe.load_lora_weights(folder)
    else:
        pipe.load_lora_weights(folder, weight_name=expert.file_name, load_into_transformer_2=expert is LOW)
    return getattr(pipe, expert.component)


@pytest.mark.parametrize(
    ("variant", "expert"),
    [(variant, LOW) for variant in VARIANTS] + [(v, SINGLE) for v in ("patterns", "expressions", "dora", "pissa")],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_variant_is_written_read_and_run_as_it_was_trained(
    tiny_base, single_base, tmp_path, variant, expert, capsys
):
    base = single_base if expert is SINGLE else tiny_base
    settings = LoraSettings(**{"rank": 4, **VARIANTS[variant]})
    adapter, trained_output = train(base, expert, settings)
    files = write_adapter_folder(tmp_path, [adapter])
    verify_adapter_folder(str(base), tmp_path, [adapter])
    for file in files:
        back = read_file(file, expert.name)
        assert back.modules == adapter.modules and back.about["trigger"] == "ember style"
        for module in adapter.modules:
            assert torch.allclose(update(back, module), update(adapter, module), rtol=1e-6, atol=0)
    kinds = ["", "comfyui"]
    if settings.dora:
        assert "no comfyui/" in capsys.readouterr().out and len(files) == 1
        kinds = [""]
    for kind in kinds:
        model = load_plainly(base, tmp_path / kind, expert)
        assert torch.allclose(probe_output(model, base, adapter), trained_output, atol=2e-5)
    pipe = bare_pipeline(base)
    add_adapters(pipe, read_adapters(tmp_path))
    assert torch.allclose(probe_output(getattr(pipe, expert.component), base, adapter), trained_output, atol=2e-5)


def test_patterns_give_each_module_its_rank_and_alpha_and_files_say_so_shortly(tiny_base, tmp_path):
    settings = LoraSettings(rank=4, alpha=7.0, **PATTERNS)
    adapter, _ = train(tiny_base, HIGH, settings)
    for name, value in adapter.weights.items():
        module = name.split(".lora_")[0]
        rank = 2 if "ffn.net.0" in name else 6 if module.startswith("blocks.1.attn1.") else 4
        alpha = 3.0 if module.endswith("attn2.to_v") else 5.5 if "blocks.0.attn2.to_out" in name else 7.0
        assert value.shape[0 if "lora_A" in name else 1] == rank and adapter.scale(module) == alpha / rank
    write_adapter_folder(tmp_path, [adapter])
    with safe_open(tmp_path / "high_noise.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config.keys() == {
        f"transformer.{key}" for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    }
    assert config["transformer.alpha_pattern"] == {"attn2.to_v": 3.0, "blocks.0.attn2.to_out.0": 5.5}
    assert config["transformer.rank_pattern"]["ffn.net.0.proj"] == 2
    tensors = open_adapter(tmp_path / "comfyui" / "high_noise.safetensors").tensors
    assert float(tensors["diffusion_model.blocks.0.cross_attn.v.alpha"]) == 3.0


def test_without_alpha_every_modules_scale_is_one(tiny_base):
    adapter, _ = train(tiny_base, HIGH, LoraSettings(rank=4, rank_pattern=PATTERNS["rank_pattern"]))
    assert {adapter.scale(module) for module in adapter.modules} == {1.0}


def test_rslora_goes_into_comfyuis_alpha(tiny_base, tmp_path):
    adapter, _ = train(tiny_base, HIGH, LoraSettings(rank=6, alpha=5.0, rslora=True))
    comfyui.write(tmp_path / "a.safetensors", adapter)
    back = comfyui.read(tmp_path / "a.safetensors", "high")
    assert not back.rslora and back.alpha == pytest.approx(5.0 * math.sqrt(6), rel=1e-7)


def test_a_dora_for_comfyui_is_refused_because_diffusers_cannot_read_one(tiny_base, tmp_path):
    adapter, _ = train(tiny_base, HIGH, LoraSettings(rank=4, dora=True))
    with pytest.raises(InputError, match="dora_scale makes diffusers' reader of that format fail"):
        comfyui.write(tmp_path / "a.safetensors", adapter)
    # The reason, as it stands in diffusers.
    plain, _ = train(tiny_base, HIGH, LoraSettings(rank=4))
    comfyui.write(tmp_path / "a.safetensors", plain)
    tensors = open_adapter(tmp_path / "a.safetensors").tensors
    tensors["diffusion_model.blocks.0.self_attn.q.dora_scale"] = torch.ones(24, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="dora_scale"):
        WanPipeline.lora_state_dict(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("to_query",)}, "lora.targets: 'to_query' matches no module"),
        ({"targets": ("attn1",)}, "lora.targets: 'attn1' matches no module"),
        ({"targets": ("re:blocks.*attn3.*",)}, "lora.targets: 're:blocks.*attn3.*' matches no module"),
        ({"targets": ("re:.*",)}, "lora.targets: reaches condition_embedder"),
        ({"exclude": ("attn3.to_q",)}, "lora.exclude: 'attn3.to_q' matches none of the 20 modules"),
        ({"exclude": (r"re:blocks.*",)}, "lora.exclude: leaves nothing"),
        ({"rank_pattern": {"attn3.to_q": 2}}, "lora.rank_pattern: 'attn3.to_q' matches none of the modules"),
        (
            {"alpha_pattern": {"attn1.to_q": 2.0, r"re:blocks\.1\..*": 3.0}},
            r"lora.alpha_pattern: 'attn1.to_q' and 're:blocks\\.1\\..*' say different things of blocks.1.attn1.to_q",
        ),
    ],
)
def test_names_that_reach_nothing_or_contradict_each_other_are_refused(tiny_base, settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        injected(tiny_base, HIGH, LoraSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("re:blocks.(",)}, "is no regular expression"),
        ({"initialisation": "eva"}, "Input should be 'kaiming', 'gaussian', 'pissa' or 'olora'"),
        ({"initialisation": "pissa", "dora": True}, "changes the base that dora measures"),
        ({"initialisation": "olora", "rank": 600}, "at twice the rank: at most 512"),
        ({"initialisation": "pissa", "start_from": "a"}, "are two starts"),
        ({"rank_pattern": {"ffn.net.2": 0}}, "greater than or equal to 1"),
        ({"alpha_pattern": {"ffn.net.2": 0}}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_excluded_modules_carry_nothing():
    names = [f"blocks.{block}.attn1.to_{part}" for block in range(12) for part in "qk"]
    settings = LoraSettings(targets=(r"re:blocks\.(1[0-9])\..*attn1.*",), exclude=("to_k",))
    assert targeted(names, settings) == ["blocks.10.attn1.to_q", "blocks.11.attn1.to_q"]
    # The end of a name is its last parts, not its last letters.
    assert targeted(["blocks.0.attn1.into_q", *names[:1]], LoraSettings(targets=("to_q",))) == names[:1]
    assert layout(
        ["blocks.1.ffn.net.2", "blocks.11.ffn.net.2"], LoraSettings(rank_pattern={r"re:blocks\.1\..*": 8})
    ) == {
        "blocks.1.ffn.net.2": (8, 8.0),
        "blocks.11.ffn.net.2": (32, 32.0),
    }


@pytest.mark.parametrize("initialisation", ["kaiming", "gaussian", "pissa", "olora"])
def test_a_start_is_a_function_of_seed_expert_and_module(tiny_base, initialisation):
    settings = LoraSettings(rank=4, initialisation=initialisation)
    first, _ = injected(tiny_base, HIGH, settings)
    fewer = load_expert(tiny_base, HIGH, torch.float32)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    inject_lora(fewer, settings.model_copy(update={"targets": ("ffn.net.2",)}), "high", 0)
    assert torch.equal(torch.get_rng_state(), before), "a draw elsewhere must not notice"
    expected = lora_weights(first)
    assert all(torch.equal(value, expected[name]) for name, value in lora_weights(fewer).items())
    assert all(p.dtype == torch.float32 for p in first.parameters() if p.requires_grad)


def test_the_start_of_a_bfloat16_base_is_drawn_in_fp32(tiny_base):
    fp32, _ = injected(tiny_base, HIGH, LoraSettings(rank=4))
    bf16, _ = injected(tiny_base, HIGH, LoraSettings(rank=4), torch.bfloat16)
    expected = lora_weights(fp32)
    assert all(torch.equal(value, expected[name]) for name, value in lora_weights(bf16).items())
    a = expected["blocks.0.attn1.to_q.lora_A.weight"]
    assert not torch.equal(a, a.bfloat16().float()), "PEFT rounds it to the base's precision"


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_what_the_start_adds_is_taken_out_of_the_base(tiny_base, initialisation):
    adapter = Adapter(expert="high", rank=4, alpha=4, targets=(), weights={})
    plain = probe_output(load_expert(tiny_base, HIGH, torch.float32), tiny_base, adapter)
    settings = LoraSettings(rank=4, alpha=6.0, initialisation=initialisation)
    model, taken = injected(tiny_base, HIGH, settings)
    assert torch.allclose(probe_output(model, tiny_base, adapter), plain, atol=1e-5)
    layer = model.blocks[0].attn1.to_q
    assert layer.lora_B["default"].weight.any() and taken.keys() == lora_weights(model).keys()
    # Going on takes out the same, to the bit, without the decomposition.
    again, _ = injected(tiny_base, HIGH, settings, taken=taken)
    for name, value in model.state_dict().items():
        if "base_layer" in name:
            assert torch.equal(value, again.state_dict()[name])
    original = load_expert(tiny_base, HIGH, torch.float32).blocks[0].attn1.to_q.weight
    if initialisation == "pissa":
        # Nearly the best approximation of its rank, which leaves the singular values from the fifth on.
        least = torch.linalg.svdvals(original)[4:].square().sum()
        assert least <= layer.base_layer.weight.square().sum() * 1.0001 <= 1.02 * least


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_in_bfloat16_the_adapter_is_exact_but_for_the_bases_own_rounding(tiny_base, initialisation):
    settings = LoraSettings(rank=4, initialisation=initialisation)
    model, taken = injected(tiny_base, HIGH, settings, torch.bfloat16)
    moved = {name: value + 0.05 for name, value in lora_weights(model).items()}
    adapter = as_adapter("high", settings, moved, taken, {})
    original = load_expert(tiny_base, HIGH, torch.bfloat16)
    for module in adapter.modules:
        layer = model.get_submodule(module)
        trained = layer.base_layer.weight.double() + 1.0 * (
            moved[f"{module}.lora_B.weight"].double() @ moved[f"{module}.lora_A.weight"].double()
        )
        exported = original.get_submodule(module).weight.double() + update(adapter, module)
        # bfloat16 keeps eight bits of each number.
        assert (trained - exported).abs().max() <= 2**-8 * layer.base_layer.weight.abs().max()


class Quantised(torch.nn.Parameter):
    """As bitsandbytes' and torchao's weights are: a Parameter of another class."""


def test_starts_that_change_the_base_and_dora_refuse_a_quantised_one(tiny_base):
    model = load_expert(tiny_base, HIGH, torch.float32)
    model.blocks[1].ffn.net[2].weight = Quantised(model.blocks[1].ffn.net[2].weight.data, requires_grad=False)
    for settings in ({"initialisation": "pissa"}, {"initialisation": "olora"}, {"dora": True}):
        with pytest.raises(InputError, match=r"quantised.*blocks.1.ffn.net.2: Quantised"):
            inject_lora(model, LoraSettings(**settings), "high", 0)
    inject_lora(model, LoraSettings(), "high", 0)


def test_eva_does_not_work_on_a_diffusers_model(tiny_base):
    model = load_expert(tiny_base, HIGH, torch.float32)
    model.add_adapter(LoraConfig(r=4, target_modules=["attn1.to_q"], init_lora_weights="eva", eva_config=EvaConfig()))
    # PEFT reads `active_adapters` as a property, and diffusers has a method.
    with pytest.raises(TypeError, match="has no len"):
        initialize_lora_eva_weights(model, [])


@pytest.mark.parametrize("kind", ["folder", "run", "diffusers", "comfyui"])
def test_training_starts_from_an_adapter_of_any_format(tiny_base, tmp_path, kind):
    settings = LoraSettings(rank=4, alpha=7.0, **PATTERNS)
    adapter, output = train(tiny_base, LOW, settings)
    write_adapter_folder(tmp_path / "adapter", [adapter])
    name = LOW.file_name
    source = {
        "folder": tmp_path / "adapter",
        "run": tmp_path,
        "diffusers": tmp_path / "adapter" / name,
        "comfyui": tmp_path / "adapter" / "comfyui" / name,
    }[kind]
    # Another alpha: the update at the start stays what it was.
    started, _ = injected(tiny_base, LOW, LoraSettings(rank=4, alpha=14.0, start_from=source, **PATTERNS))
    assert torch.allclose(probe_output(started, tiny_base, adapter), output, atol=1e-5)


def test_a_file_that_names_no_expert_is_taken_for_the_one_asked_for(tiny_base, tmp_path):
    model, _ = injected(tiny_base, LOW, LoraSettings(rank=4, rank_pattern={"ffn.net.2": 2}))
    weights = {name: value + 0.1 for name, value in lora_weights(model).items()}
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights, weight_name="other.safetensors")
    back = read_file(tmp_path / "other.safetensors", "low")
    # diffusers takes alpha for the rank where a file has none.
    assert {back.scale(module) for module in back.modules} == {1.0} and back.expert == "low"
    assert back.ranks == {f"blocks.{block}.ffn.net.2": 2 for block in (0, 1)}
    with pytest.raises(InputError, match="does not say of which expert it is"):
        read_file(tmp_path / "other.safetensors")


def test_an_adapter_that_does_not_fit_the_settings_is_refused_with_the_remedy(tiny_base, tmp_path):
    adapter, _ = train(tiny_base, LOW, LoraSettings(rank=4, targets=("attn1.to_q", "ffn.net.2")))
    write_adapter_folder(tmp_path, [adapter])
    fits = {"rank": 4, "targets": ("attn1.to_q", "ffn.net.2"), "start_from": tmp_path}
    injected(tiny_base, LOW, LoraSettings(**fits))
    cases = {
        "has rank 4 in blocks.0.attn1.to_q, the configuration 8; set lora.rank": {"rank": 8},
        "set lora.targets to attn1.to_q, ffn.net.2": {"targets": ("attn1.to_q",)},
        "is a plain LoRA; set lora.dora = false": {"dora": True},
        "no such adapter file or folder": {"start_from": tmp_path / "absent"},
    }
    for message, change in cases.items():
        with pytest.raises(InputError, match=message):
            injected(tiny_base, LOW, LoraSettings(**{**fits, **change}))
    narrow = {name: value[:, :12] if ".lora_A." in name else value for name, value in adapter.weights.items()}
    write_adapter_folder(tmp_path / "narrow", [replace(adapter, weights=narrow)])
    with pytest.raises(InputError, match=r"another size of base: blocks.0.attn1.to_q.lora_A.weight is \(4, 12\)"):
        injected(tiny_base, LOW, LoraSettings(**{**fits, "start_from": tmp_path / "narrow"}))
    with pytest.raises(InputError, match=r"has no high_noise.safetensors"):
        injected(tiny_base, HIGH, LoraSettings(**fits))
    with pytest.raises(InputError, match="adapter of the low-noise expert, not of the high-noise expert"):
        injected(tiny_base, HIGH, LoraSettings(**{**fits, "start_from": tmp_path / LOW.file_name}))


def test_a_run_that_goes_on_does_not_read_where_it_started(tiny_base, tmp_path):
    settings = LoraSettings(rank=4, start_from=tmp_path / "gone")
    _, taken = injected(tiny_base, LOW, settings, taken={})
    assert taken == {}


def test_an_adapter_of_the_other_kind_of_base_is_refused(tiny_base, single_base, tmp_path):
    low, _ = train(tiny_base, LOW, LoraSettings(rank=4))
    single, _ = train(single_base, SINGLE, LoraSettings(rank=4))
    write_adapter_folder(tmp_path / "pair", [low])
    write_adapter_folder(tmp_path / "single", [single])
    with pytest.raises(InputError, match="the low-noise expert does not fit this base, which has one denoiser"):
        load_pipeline(str(single_base), tmp_path / "pair", device="cpu")
    with pytest.raises(InputError, match="the only expert does not fit this base, which has a high-noise and a low"):
        load_pipeline(str(tiny_base), tmp_path / "single", device="cpu")


def test_verification_notices_another_rank_scale_and_magnitude(tiny_base, tmp_path):
    adapter, _ = train(tiny_base, HIGH, LoraSettings(rank=4, dora=True, rank_pattern={"ffn.net.2": 2}))
    write_adapter_folder(tmp_path, [adapter])
    magnitude = next(name for name in adapter.weights if name.endswith("lora_magnitude_vector"))
    for wrong in (
        replace(adapter, alphas={adapter.modules[0]: 9.0}),
        replace(adapter, rslora=True),
        replace(adapter, weights={**adapter.weights, magnitude: adapter.weights[magnitude] + 1}),
    ):
        with pytest.raises(RuntimeError, match="not what was trained"):
            verify_adapter_folder(str(tiny_base), tmp_path, [wrong])
    with pytest.raises(InputError, match="belongs to DoRA"):
        replace(adapter, dora=False).check("it")
    with pytest.raises(InputError, match="without its other half"):
        replace(adapter, weights={k: v for k, v in adapter.weights.items() if k != magnitude}).check("it")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": "{"}, "none of PEFT's"),
        ({"lora_adapter_metadata": '{"transformer.r": 4}'}, "none of PEFT's"),
        (
            {
                "lora_adapter_metadata": json.dumps(
                    {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.rank_pattern": {"(a+)+$": 4}}
                )
            },
            "none of PEFT's",
        ),
        ({"wan_finetune": "[]"}, "is no JSON object"),
        ({"wan_finetune": '{"expert": "middle"}'}, "unknown expert 'middle'"),
    ],
)
def test_metadata_from_a_stranger_is_refused_when_it_makes_no_sense(tiny_base, tmp_path, metadata, message):
    adapter, _ = train(tiny_base, HIGH, LoraSettings(rank=4, targets=("attn1.to_q",)))
    save_file({f"transformer.{k}": v for k, v in adapter.weights.items()}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(InputError, match=message):
        diffusers_format.read(tmp_path / "a.safetensors", "high")


def test_a_base_with_one_denoiser_samples_with_its_adapter(single_base, tmp_path, capsys):
    adapter, _ = train(single_base, SINGLE, LoraSettings(rank=4))
    write_adapter_folder(tmp_path / "adapter", [adapter])
    common = ["sample", "--base", str(single_base), "--prompt", "x", "--size", "64x32", "--frames", "5", "--steps", "2"]
    for name, more in {"with": ["--adapter", str(tmp_path / "adapter")], "without": []}.items():
        assert main([*common, *more, "--out", str(tmp_path / name)]) == 0
    first, second = (read_video(tmp_path / name / "00-0.mp4")[0] for name in ("with", "without"))
    assert first.shape == (5, 32, 64, 3) and (first != second).any()
    assert main(["inspect", str(tmp_path / "adapter" / SINGLE.file_name)]) == 0
    assert "single" in capsys.readouterr().out
