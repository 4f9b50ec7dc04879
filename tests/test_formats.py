"""Every format says the same adapter: names and files there and back, and other tools' files."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.adapter_material import TOOLS, as_written_by, make_adapter, make_weights, same_update
from wan_finetune.adapters import Adapter
from wan_finetune.errors import InputError
from wan_finetune.experts import EXPERTS
from wan_finetune.formats import FORMAT_NAMES
from wan_finetune.formats.exporting import export
from wan_finetune.formats.files import Opened, open_adapter
from wan_finetune.formats.keys import Meaning, meaning
from wan_finetune.formats.names import DIFFUSERS_TO_FASTVIDEO, DIFFUSERS_TO_ORIGINAL, canonical, flattened, original
from wan_finetune.formats.reading import FORMATS, read_all, read_expert, read_file, recognised
from wan_finetune.spec import LORA_TARGETS

EACH = pytest.mark.parametrize("name", FORMAT_NAMES)
VARIANTS = {
    "plain": {},
    "alpha patterns": {"alphas": {"blocks.0.attn1.to_q": 0.1, "blocks.1.ffn.net.2": 12.5}},
    "rank patterns": {"ranks": {"blocks.0.ffn.net.0.proj": 2, "blocks.1.ffn.net.0.proj": 2}},
    "attention only": {"targets": ("attn1.to_q", "attn1.to_k", "attn2.to_out.0")},
    "one block only": {"blocks": 1},
    "one denoiser": {"expert": "single"},
    "rslora": {"rslora": True, "ranks": {"blocks.1.attn1.to_v": 3}},
    "dora": {"dora": True, "rslora": True},
}


@st.composite
def adapters(draw) -> Adapter:
    """Any adapter: some Linears of some blocks, each with its rank and alpha, of every kind."""
    modules = draw(
        st.lists(
            st.builds("blocks.{}.{}".format, st.sampled_from([0, 1, 7, 39]), st.sampled_from(LORA_TARGETS)),
            min_size=1, max_size=3, unique=True,
        )
    )  # fmt: skip
    ranks = {module: draw(st.integers(1, 3)) for module in modules}
    alphas = {module: draw(st.floats(0.01, 1000)) for module in modules if draw(st.booleans())}
    rank, dora = draw(st.integers(1, 3)), draw(st.booleans())
    return Adapter(
        expert=draw(st.sampled_from(list(EXPERTS))), rank=rank, alpha=draw(st.floats(0.01, 1000)),
        targets=tuple(sorted(modules)), weights=make_weights(ranks, dora=dora, seed=draw(st.integers(0, 99))),
        ranks={m: r for m, r in ranks.items() if r != rank}, alphas=alphas, rslora=draw(st.booleans()), dora=dora,
    )  # fmt: skip


def there_and_back(name: str, adapter: Adapter) -> Adapter:
    """Encoded and decoded in memory; PEFT's settings stand in a file, so its own test has them."""
    tensors, metadata = FORMATS[name].encode(adapter)
    return FORMATS[name].decode_own(Opened(Path("memory.safetensors"), tensors, metadata), adapter.expert, None)


@pytest.mark.parametrize("name", [name for name in FORMAT_NAMES if name != "peft"])
@settings(max_examples=250)
@given(adapter=adapters())
def test_any_adapter_is_the_same_after_a_format_or_is_refused(name, adapter):
    if FORMATS[name].refusal(adapter):
        assert adapter.dora and name != "diffusers"
        return
    back = there_and_back(name, adapter)
    assert back.expert == adapter.expert and same_update(adapter, back)
    if name == "diffusers":
        assert (back.rslora, back.rank, back.alpha) == (adapter.rslora, adapter.rank, adapter.alpha)
    if name != "original":
        assert all(torch.equal(back.weights[key], value) for key, value in adapter.weights.items())


@settings(max_examples=60)
@given(adapter=adapters())
def test_any_adapter_is_the_same_after_pefts_settings(tmp_path_factory, adapter):
    path = tmp_path_factory.getbasetemp() / "peft" / "adapter_model.safetensors"
    FORMATS["peft"].write(path, adapter)
    back = FORMATS["peft"].read(path, adapter.expert)
    assert same_update(adapter, back, 0) and (back.rslora, back.alpha) == (adapter.rslora, adapter.alpha)
    assert all(torch.equal(back.weights[key], value) for key, value in adapter.weights.items())


numbers = st.integers(0, 9999)


@settings(max_examples=100)
@given(number=numbers)
def test_every_spelling_of_a_module_leads_back_to_it(number):
    for target, theirs in DIFFUSERS_TO_FASTVIDEO.items():
        module = f"blocks.{number}.{target}"
        spellings = [module, original(module), flattened(module), f"blocks.{number}.{theirs}"]
        assert [canonical(spelling) for spelling in spellings] == [module] * 4
        assert len(set(spellings)) >= 3


PREFIXES = (
    "", "transformer.", "diffusion_model.", "base_model.model.", "pipe.dit.", "transformer._orig_mod.",
    "diffusion_model.transformer_1.", "diffusion_model.transformer_2.", "transformer_2.", "module.",
)  # fmt: skip
ENDINGS = {
    ".lora_A.weight": "A.weight", ".lora_B.weight": "B.weight", ".lora_A.default.weight": "A.weight",
    ".lora_down.weight": "A.weight", ".lora_up.weight": "B.weight", ".lora_B": "B.weight", ".alpha": "alpha",
    ".lora_alpha": "alpha", ".lora_magnitude_vector": "magnitude_vector",
    ".lora_magnitude_vector.default.weight": "magnitude_vector",
}  # fmt: skip


@settings(max_examples=20)
@given(number=numbers)
def test_a_key_means_its_module_half_and_expert_whatever_tool_wrote_it(number):
    for target, prefix, ending in itertools.product(LORA_TARGETS, PREFIXES, ENDINGS):
        module = f"blocks.{number}.{target}"
        marked = "high" if "transformer_1" in prefix else "low" if "transformer_2" in prefix else None
        spelled = [f"{prefix}{module}{ending}", f"{prefix}{original(module)}{ending}"]
        if not prefix:
            spelled += [f"lora_unet_{flattened(module)}{ending}", f"lora_unet__{flattened(module)}{ending}"]
        assert {meaning(key) for key in spelled} == {Meaning(module, ENDINGS[ending], marked)}


@settings(max_examples=100)
@given(text=st.text(max_size=60))
def test_any_text_is_a_key_of_nothing_or_of_a_block(text):
    for key in (text, f"transformer.blocks.0.{text}", f"{text}.lora_A.weight"):
        found = meaning(key)
        assert found is None or found.module.startswith("blocks.")


@EACH
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_written_and_read_back_or_refused_with_the_reason(tmp_path, name, variant):
    adapter = make_adapter(**VARIANTS[variant])
    if adapter.dora and name not in ("diffusers", "peft"):
        with pytest.raises(InputError, match=f"{name}: the adapter of the high-noise expert is not written: a DoRA"):
            export([adapter], FORMATS[name], tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    (path,) = export([adapter], FORMATS[name], tmp_path)
    assert recognised(open_adapter(path)).name == name
    back = read_file(path)
    assert back.expert == adapter.expert and same_update(adapter, back) and not back.assumed
    assert set(back.targets) == set(adapter.targets)
    first = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    export([adapter], FORMATS[name], tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == first, "equal adapters, equal files"


def test_a_header_whose_length_starts_as_a_pickle_does_is_a_header(tmp_path):
    for letters in range(200, 800):
        path = tmp_path / "a.safetensors"
        save_file({"transformer.blocks.0.attn1.to_q.alpha": torch.ones(1)}, path, {"x": "x" * letters})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    with pytest.raises(InputError, match="holds no LoRA weights"):
        read_file(path, "high")


def test_a_scale_of_one_is_bare_original_names_to_the_bit(tmp_path):
    adapter = make_adapter(alpha=4.0)
    (path,) = export([adapter], FORMATS["original"], tmp_path)
    back = read_file(path)
    assert all(torch.equal(back.weights[key], value) for key, value in adapter.weights.items())
    with pytest.raises(InputError, match="says its alpha itself; leave --alpha out"):
        read_file(path, "high", 8.0)


@EACH
def test_alphas_are_read_back_exactly_though_files_hold_them_in_fp32(name):
    adapter = make_adapter(alpha=0.1, alphas={"blocks.0.attn1.to_q": 1 / 3})
    if name in ("comfyui", "kohya"):
        back = there_and_back(name, adapter)
        assert back.alpha == 0.1 and back.alphas["blocks.0.attn1.to_q"] == pytest.approx(1 / 3, rel=1e-7)


@EACH
def test_one_experts_file_is_refused_by_the_other(tmp_path, name):
    (path,) = export([make_adapter("high")], FORMATS[name], tmp_path)
    for read in (lambda: read_file(path, "low"), lambda: FORMATS[name].read(path, "low")):
        with pytest.raises(InputError, match="adapter of the high-noise expert, not of the low-noise expert"):
            read()


@EACH
def test_a_folder_of_a_format_is_read_as_a_pair_and_by_expert(tmp_path, name):
    pair = [make_adapter("high"), make_adapter("low", rank=2)]
    export(pair, FORMATS[name], tmp_path / "run" / "adapter")
    for source in (tmp_path / "run", tmp_path / "run" / "adapter"):
        assert [each.expert for each in read_all(source)] == ["high", "low"]
        assert same_update(read_expert(source, "low"), pair[1])


def test_formats_lead_from_one_to_the_next_and_back(tmp_path):
    adapter, source = make_adapter(alphas={"blocks.0.attn1.to_q": 3.0}), tmp_path / "0"
    export([adapter], FORMATS["diffusers"], source)
    for step, name in enumerate(["comfyui", "kohya", "peft", "original", "comfyui", "diffusers"], 1):
        export(read_all(source), FORMATS[name], source := tmp_path / str(step))
    assert same_update(adapter, read_all(source)[0])


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tools_keys_are_read(tmp_path, tool):
    adapter = make_adapter("low", alpha=4.0)
    path = tmp_path / "theirs.safetensors"
    save_file(as_written_by(tool, adapter), path)
    with pytest.raises(InputError, match=r"does not say of which expert it is; say it with --expert high, low or sin"):
        read_file(path)
    back = read_file(path, "low")
    assert same_update(adapter, back) and back.assumed == ("alpha not in the file: taken as rank",)
    assert same_update(replace(adapter, alpha=10.0), read_file(path, "low", 10.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_up_as_it_is(tmp_path, dtype):
    adapter = make_adapter("low", alpha=4.0)
    tensors = {name: value.to(dtype) for name, value in as_written_by("ai-toolkit", adapter).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    back = read_file(tmp_path / "a.safetensors", "low")
    rounded = {name: value.to(dtype).float() for name, value in adapter.weights.items()}
    assert all(torch.equal(back.weights[name], value) for name, value in rounded.items())


@pytest.mark.parametrize(
    "alpha", [torch.tensor(8), torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8, dtype=torch.bfloat16)]
)
@pytest.mark.parametrize("key", ["alpha", "lora_alpha"])
def test_an_alpha_in_the_file_counts_however_it_is_written(tmp_path, alpha, key):
    adapter = make_adapter("low", alpha=8.0)
    tensors = as_written_by("VideoX-Fun", adapter)
    tensors |= {name.replace("lora_up.weight", key): alpha.clone() for name in tensors if "lora_up" in name}
    save_file(tensors, tmp_path / "a.safetensors")
    back = read_file(tmp_path / "a.safetensors", "low")
    assert same_update(adapter, back) and not back.assumed
    with pytest.raises(InputError, match="says its alpha itself; leave --alpha out"):
        read_file(tmp_path / "a.safetensors", "low", 4.0)


def test_finetrainers_alpha_is_in_its_own_metadata(tmp_path):
    adapter = make_adapter("low", alpha=64.0)
    config = {"r": 4, "lora_alpha": 64, "init_lora_weights": True, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}  # fmt: skip # noqa: E501
    partly = make_adapter("low", LORA_TARGETS[:8], alpha=64.0)
    save_file(as_written_by("finetrainers", partly), tmp_path / "a.safetensors", {"lora_config": json.dumps(config)})
    back = read_file(tmp_path / "a.safetensors", "low")
    assert same_update(partly, back) and back.alpha == adapter.alpha and not back.assumed


def test_an_alpha_that_was_lost_on_the_way_is_asked_for(tmp_path):
    adapter = make_adapter("low")
    tensors, metadata = FORMATS["diffusers"].encode(adapter)
    del metadata["lora_adapter_metadata"]
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(InputError, match="was written with alpha 7 and has lost it; say it by --alpha"):
        read_file(tmp_path / "a.safetensors")
    assert same_update(adapter, read_file(tmp_path / "a.safetensors", None, 7.0))


def test_kohyas_metadata_does_not_count_as_alpha_because_its_converter_keeps_it_after_folding(tmp_path):
    adapter = make_adapter("low", alpha=4.0)
    save_file(as_written_by("musubi-tuner, converted", adapter), tmp_path / "a.safetensors", {"ss_network_alpha": "1"})
    assert same_update(adapter, read_file(tmp_path / "a.safetensors", "low"))


@pytest.mark.parametrize("marks", [("transformer_1.", "transformer_2."), ("", "transformer_2.")])
def test_a_file_for_both_experts_is_read_by_halves(tmp_path, marks):
    high = make_adapter("high", alpha=4.0)
    pair = [high, replace(high, expert="low", weights=make_weights(dict.fromkeys(high.modules, 4), seed=9))]
    tensors = {}
    for mark, adapter in zip(marks, pair, strict=True):
        theirs = as_written_by("ai-toolkit", adapter)
        tensors |= {
            name.replace("diffusion_model.", f"diffusion_model.{mark}"): value for name, value in theirs.items()
        }
    path = tmp_path / "both.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match="holds both experts' adapters; say which with --expert high or --expert low"):
        read_file(path)
    for adapter in pair:
        assert same_update(adapter, read_file(path, adapter.expert))
    if marks[0]:
        assert [same_update(a, b) for a, b in zip(pair, read_all(path), strict=True)] == [True, True]


def test_one_experts_marks_say_whose_a_file_is(tmp_path):
    theirs = as_written_by("ai-toolkit", make_adapter("low"))
    save_file({k.replace("model.", "model.transformer_2."): v for k, v in theirs.items()}, tmp_path / "a.safetensors")
    assert read_file(tmp_path / "a.safetensors").expert == "low"
    with pytest.raises(InputError, match="not of the high-noise expert"):
        read_file(tmp_path / "a.safetensors", "high")


def test_a_name_that_says_the_expert_is_repeated_and_not_believed(tmp_path):
    save_file(as_written_by("ai-toolkit", make_adapter("low")), tmp_path / "look_high_noise.safetensors")
    with pytest.raises(InputError, match="does not say of which expert it is; its name means --expert high"):
        read_file(tmp_path / "look_high_noise.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "is of PEFT's method 'LOHA'; only LORA is read here"),
        ({"init_lora_weights": "pissa_niter_4"}, "was started by pissa_niter_4, which changed the base"),
        ({"rank_pattern": {"(a+)+$": 4}}, "its adapter_config.json are none of PEFT's"),
        ({"alpha_pattern": {"attn1.to_q\\": 4}}, "its adapter_config.json are none of PEFT's"),
        ({"r": 5}, "has rank 4, the adapter says 5"),
        ({"r": 2**24}, "has rank 4, the adapter says 16777216"),
        ({"lora_alpha": -1}, "its adapter_config.json are none of PEFT's"),
        ({"lora_alpha": None}, "its adapter_config.json are none of PEFT's"),
        ("[" * 100_000, "no settings of PEFT's"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_pefts_that_make_no_sense_are_refused(tmp_path, config, message):
    (path,) = export([make_adapter()], FORMATS["peft"], tmp_path)
    settings_file = path.with_name("adapter_config.json")
    if isinstance(config, dict):
        config = json.dumps({**json.loads(settings_file.read_text()), **config})
    settings_file.write_text(config)
    with pytest.raises(InputError, match=message):
        read_file(path)


def test_settings_of_pefts_in_the_original_names_count_as_they_did_in_training(tmp_path):
    ranks = {f"blocks.{block}.ffn.net.0.proj": 2 for block in (0, 1)}
    adapter = make_adapter("low", ("attn1.to_q", "ffn.net.0.proj"), ranks=ranks, alphas=dict.fromkeys(ranks, 3.0))
    tensors = {f"base_model.model.{k}": v for k, v in as_written_by("VideoX-Fun, PEFT", adapter).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 7, "target_modules": ["q", "ffn.0"]}
    config |= {"rank_pattern": {"ffn.0": 2}, "alpha_pattern": {"blocks.0.ffn.0": 3, "blocks.1.ffn.0": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    back = read_file(tmp_path / "adapter_model.safetensors", "low")
    assert same_update(adapter, back, 0) and set(back.targets) == set(adapter.modules)


def test_targets_that_peft_narrows_are_named_one_by_one(tmp_path):
    adapter = replace(make_adapter(targets=("attn1.to_q",), blocks=1), targets=("attn1.to_q",))
    (path,) = export([adapter], FORMATS["peft"], tmp_path)
    settings_file = path.with_name("adapter_config.json")
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "layers_to_transform": [0]}))
    assert read_file(path).targets == ("blocks.0.attn1.to_q",)


def test_an_export_that_fails_in_its_second_file_leaves_nothing(tmp_path):
    pair = [make_adapter("high"), make_adapter("low", dora=True)]
    with pytest.raises(InputError, match="kohya: the adapter of the low-noise expert is not written: a DoRA"):
        export(pair, FORMATS["kohya"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(pair[:1], FORMATS["kohya"], tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*")}
    with pytest.raises(InputError, match="kohya"):
        export(pair, FORMATS["kohya"], tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*")} == before


@EACH
def test_an_export_writes_over_no_other_adapter(tmp_path, name):
    export([make_adapter("high", seed=1)], FORMATS[name], tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=r"already holds another high_noise\S*; give another folder"):
        export([make_adapter("high"), make_adapter("low")], FORMATS[name], tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_folder_that_cannot_be_written_to_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file: cannot be written \(.*\); give another folder, or free some room"):
        export([make_adapter()], FORMATS["peft"], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wan_finetune.formats.files.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        export([make_adapter()], FORMATS["comfyui"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_export_whose_file_reads_otherwise_is_not_put_in_place(tmp_path):
    forgetful = replace(FORMATS["comfyui"], encode=lambda a: FORMATS["comfyui"].encode(replace(a, alpha=1.0)))
    with pytest.raises(RuntimeError, match="what was read back is not what was written"):
        export([make_adapter()], forgetful, tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_formats_are_known_before_anything_is_imported():
    assert tuple(FORMATS) == FORMAT_NAMES
    assert len({target for target in DIFFUSERS_TO_ORIGINAL.values()}) == len(LORA_TARGETS) == 10
