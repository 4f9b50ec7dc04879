"""An adapter out of a fine-tuned model, against the update that was put in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora_material import delta, deltas, make_adapter, relative
from wan_finetune.adapters import Adapter
from wan_finetune.cli import main
from wan_finetune.experts import HIGH, LOW, load_expert
from wan_finetune.export import verify_adapter_folder
from wan_finetune.formats.merged import write_merged
from wan_finetune.formats.reading import read_expert
from wan_finetune.operations.extracting import extract
from wan_finetune.spec import LORA_TARGETS
from wan_finetune.weight_files import StoredWeights

FILE = "diffusion_pytorch_model.safetensors"
SHIFT = ("blocks.0.norm2.weight", "patch_embedding.bias", "condition_embedder.text_embedder.linear_1.weight")


def pair(seed: int = 1, **fields) -> list[Adapter]:
    return [make_adapter(name, seed, **fields) for name in ("high", "low")]


def changed(base: Path, folder: Path, change, component: str = "transformer") -> Path:
    """A copy of a base with other weights in one component."""
    shutil.copytree(base, folder)
    weights = load_file(folder / component / FILE)
    save_file(change(weights), folder / component / FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("fields", [{}, {"rslora": True, "ranks": {"blocks.0.ffn.net.2": 7}}], ids=["plain", "rslora"])
def test_a_merged_adapter_comes_back(tiny_base, tmp_path, fields):
    adapters = pair(**fields)
    write_merged(tiny_base, adapters, tmp_path / "tuned", dtype=torch.float32)
    lines = extract(str(tiny_base), str(tmp_path / "tuned"), tmp_path / "out", rank=8, trigger="look")
    for adapter in adapters:
        found = read_expert(tmp_path / "out", adapter.expert)
        assert found.modules == adapter.modules and set(found.targets) == set(LORA_TARGETS)
        assert relative(deltas(found), deltas(adapter)) < 1e-5
        assert found.about["trigger"] == "look" and found.about["base"] == "tiny"
        assert found.about["operation"] == "extract at rank 8" and str(tmp_path) not in json.dumps(found.about)
    assert sum("20 modules, 100.00% of the difference's energy kept" in line for line in lines) == 2
    assert not any("warning" in line for line in lines)


def test_a_dora_becomes_a_plain_lora_by_way_of_its_merged_weights(tiny_base, tmp_path):
    dora = make_adapter("high", 1, dora=True, targets=("attn1.to_q", "ffn.net.2"))
    write_merged(tiny_base, [dora], tmp_path / "tuned", dtype=torch.float32)
    extract(str(tiny_base), str(tmp_path / "tuned"), tmp_path / "out", rank=24)
    found = read_expert(tmp_path / "out", "high")
    assert not found.dora
    base, tuned = (load_expert(folder, HIGH, torch.float32).state_dict() for folder in (tiny_base, tmp_path / "tuned"))
    for module in dora.modules:
        assert relative(delta(found, module), tuned[f"{module}.weight"] - base[f"{module}.weight"]) < 1e-6


def test_at_a_lower_rank_it_is_the_best_of_that_rank_and_the_energy_is_told(tiny_base, tmp_path):
    adapters = pair(rank=6)
    write_merged(tiny_base, adapters, tmp_path / "tuned", dtype=torch.float32)
    lines = extract(str(tiny_base), str(tmp_path / "tuned"), tmp_path / "out", rank=2)
    for adapter in adapters:
        found = read_expert(tmp_path / "out", adapter.expert)
        assert (found.rank, found.ranks) == (2, {})
        for module in adapter.modules:
            s = torch.linalg.svdvals(delta(adapter, module))
            assert relative(delta(found, module), delta(adapter, module)) == pytest.approx(
                float(s[2:].norm() / s.norm()), rel=1e-4
            )
        kept = 1 - relative(deltas(found), deltas(adapter)) ** 2
        title = "the high-noise expert" if adapter.expert == "high" else "the low-noise expert"
        assert f"{title}: 20 modules, {kept:.2%} of the difference's energy kept" in lines


def test_what_no_lora_can_hold_is_said_with_its_size(tiny_base, tmp_path):
    write_merged(tiny_base, pair(targets=("attn1.to_q",)), tmp_path / "merged", dtype=torch.float32)
    tuned = changed(
        tmp_path / "merged", tmp_path / "tuned", lambda w: {k: v * 1.01 if k in SHIFT else v for k, v in w.items()}
    )
    lines = extract(str(tiny_base), str(tuned), tmp_path / "out", rank=4)
    base = load_expert(tiny_base, HIGH, torch.float32).state_dict()
    warnings = [line for line in lines if line.startswith("warning: the high-noise expert: ")]
    assert len(warnings) == 3 == sum("warning" in line for line in lines)
    for name in SHIFT:
        shown = name.replace("blocks.0", "blocks.*")
        assert any(
            f": {shown} differs and no LoRA can hold it: 1 tensors, {base[name].numel():,} values, changed by 1.00%"
            in w
            for w in warnings
        ), shown
    assert read_expert(tmp_path / "out", "high").targets == ("attn1.to_q",)


def test_blocks_that_did_not_change_carry_no_lora(tiny_base, tmp_path):
    low = make_adapter("low", 1, targets=("attn1.to_q", "ffn.net.2"))
    some = {n: v for n, v in low.weights.items() if not n.startswith("blocks.1.ffn")}
    adapter = Adapter(expert="low", rank=4, alpha=7.0, targets=low.targets, weights=some)
    write_merged(tiny_base, [adapter], tmp_path / "tuned", dtype=torch.float32)
    lines = extract(str(tiny_base), str(tmp_path / "tuned"), tmp_path / "out", rank=4)
    found = read_expert(tmp_path / "out", "low")
    assert found.targets == ("attn1.to_q", "blocks.0.ffn.net.2") and found.modules == adapter.modules
    assert "the high-noise expert: no Linear of a block differs; it gets no adapter" in lines
    assert not (tmp_path / "out" / HIGH.file_name).exists()
    verify_adapter_folder(str(tiny_base), tmp_path / "out", [found])


def test_a_tuned_model_in_bf16_differs_where_more_than_rounding_does(tiny_base, tmp_path):
    adapters = pair(targets=("attn1.to_q",))
    write_merged(tiny_base, adapters, tmp_path / "tuned")
    lines = extract(str(tiny_base), str(tmp_path / "tuned"), tmp_path / "out", rank=4)
    found = read_expert(tmp_path / "out", "high")
    assert found.modules == adapters[0].modules and not any("warning" in line for line in lines)
    base = load_expert(tiny_base, HIGH, torch.float32).state_dict()
    for module in found.modules:
        # bf16 has 8 bits: half of the last one, of the weights, is what rounding may change.
        noise = 2**-9 * float((base[f"{module}.weight"].double() + delta(adapters[0], module)).norm())
        assert float((delta(found, module) - delta(adapters[0], module)).norm()) < noise


def test_sharded_models_are_read_a_tensor_at_a_time(tiny_base, tmp_path, monkeypatch):
    adapters = pair()
    write_merged(tiny_base, adapters, tmp_path / "merged", dtype=torch.float32)
    for folder, source in (("base", tiny_base), ("tuned", tmp_path / "merged")):
        shutil.copytree(source, tmp_path / folder / "all")
        for expert in (HIGH, LOW):
            model = load_expert(source, expert, torch.float32)
            shutil.rmtree(tmp_path / folder / "all" / expert.component)
            # Other borders, so that a tensor lies in another file of each model.
            size = 24_000 if folder == "base" else 31_000
            model.save_pretrained(tmp_path / folder / "all" / expert.component, max_shard_size=size)
    reads = []
    read = StoredWeights.read
    monkeypatch.setattr(StoredWeights, "read", lambda self, name: reads.append(name) or read(self, name))
    extract(str(tmp_path / "base" / "all"), str(tmp_path / "tuned" / "all"), tmp_path / "out", rank=4)
    assert relative(deltas(read_expert(tmp_path / "out", "low")), deltas(adapters[1])) < 1e-5
    names = load_expert(tiny_base, HIGH, torch.float32).state_dict()
    assert len(reads) == 4 * len(names), "each tensor of each model and expert once"


def test_bad_input_ends_with_one_message_and_exit_2_and_writes_nothing(tiny_base, tmp_path, capsys):
    base, name = str(tiny_base), "blocks.0.attn1.to_q.weight"
    narrow = changed(tiny_base, tmp_path / "narrow", lambda w: {**w, name: w[name][:, :12].contiguous()})
    fewer = changed(tiny_base, tmp_path / "fewer", lambda w: {k: v for k, v in w.items() if k != name})
    packed = changed(tiny_base, tmp_path / "packed", lambda w: {**w, name: w[name].to(torch.float8_e4m3fn)})
    norms = changed(tiny_base, tmp_path / "norms", lambda w: {k: v * 2 if k == SHIFT[0] else v for k, v in w.items()})
    broken = changed(tiny_base, tmp_path / "broken", lambda w: {**w, name: w[name] * float("nan")})
    halved = shutil.copytree(tiny_base, tmp_path / "halved")
    shutil.rmtree(halved / "transformer_2")
    cases = {
        "--rank: 0 is out of range; 1 to 1024": [base, base, "--rank", "0"],
        "--rank: 2000 is out of range": [base, base, "--rank", "2000"],
        "differs from": [base, base, "--rank", "4"],
        "only in what a LoRA cannot hold; there is nothing to extract": [base, str(norms), "--rank", "4"],
        f"is a base of another size: {name} is (24, 12)": [base, str(narrow), "--rank", "4"],
        f"has {name} (1 tensors differ); the models are of different kinds": [base, str(fewer), "--rank", "4"],
        "is F8_E4M3: the weights are quantised": [base, str(packed), "--rank", "4"],
        f"{name} has values that are not finite": [base, str(broken), "--rank", "4"],
        "has no transformer_2/": [base, str(halved), "--rank", "4"],
        "the base has no 'single' expert": [base, str(narrow), "--rank", "4", "--expert", "single"],
        "is neither a folder nor a Hub repository": [base, "./absent", "--rank", "4"],
    }
    for message, arguments in cases.items():
        assert main(["extract", *arguments, "--out", str(tmp_path / "out")]) == 2, message
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err, said.err
        assert not said.out and not (tmp_path / "out").exists() and not list(tmp_path.glob(".*")), message
    arguments = ["extract", base, str(halved), "--rank", "4", "--expert", "high", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2 and "nowhere; there is nothing to extract" in capsys.readouterr().err
