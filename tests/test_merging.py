"""Merging adapters, against dense arithmetic and against PEFT's own merges."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn

from tests.adapter_material import sizes
from tests.lora_material import as_expert, delta, deltas, error_in, make_adapter, relative, write, write_pair
from wan_finetune.adapters import Adapter
from wan_finetune.experts import HIGH, LOW
from wan_finetune.export import probe_output, verify_adapter_folder
from wan_finetune.formats import comfyui
from wan_finetune.formats.reading import read_expert
from wan_finetune.operations import facts
from wan_finetune.operations.dense import best_of_rank
from wan_finetune.operations.factors import Factors, first_of, norm, spectrum
from wan_finetune.operations.merging import MergeSettings, merge
from wan_finetune.operations.pruning import merge_module
from wan_finetune.pipeline import load_pipeline

MODULES = [f"blocks.{block}.{name}" for block in range(2) for name in ("attn1.to_q", "ffn.net.0.proj")]


# Low rank.


def test_a_products_norm_and_best_lower_rank_are_those_of_the_matrix():
    torch.manual_seed(0)
    product = Factors(torch.randn(30, 8).double(), torch.randn(8, 50).double())
    u, s, vh = torch.linalg.svd(product.b @ product.a)
    assert norm(product) == pytest.approx(float(s.norm()), rel=1e-12)
    best = first_of(spectrum(product), 3)
    assert torch.allclose(best.b @ best.a, u[:, :3] * s[:3] @ vh[:3], atol=1e-10)


def test_the_norm_of_a_difference_that_nearly_cancels_is_exact():
    torch.manual_seed(0)
    b, a = torch.randn(30, 4).double(), torch.randn(4, 50).double()
    small = 1e-10 * torch.randn(30, 4).double()
    found = norm(Factors(torch.cat([b + small, -b], 1), torch.cat([a, a])))
    # A sum of squares would leave 1e-8 of the parts.
    assert found == pytest.approx(float((small @ a).norm()), rel=1e-4)


def test_a_large_matrix_of_low_rank_is_found_exactly_and_of_a_slow_decay_nearly_so():
    torch.manual_seed(0)
    # Of a shape that is searched at random, its singular values known.
    q, p = (torch.linalg.qr(torch.randn(side, 1030))[0] for side in (1100, 1030))
    low = q[:, :8] @ p[:, :8].T
    found = best_of_rank(low, 16, seed=1)
    assert found.a.shape[0] == 8, "directions of rounding are left out"
    assert relative(found.b @ found.a, low) < 2e-6
    torch.manual_seed(7)
    again = best_of_rank(low, 16, seed=1)
    assert torch.equal(found.a, again.a) and torch.equal(found.b, again.b)
    values = torch.arange(1, 1031) ** -0.25
    slow = q * values @ p.T
    found = best_of_rank(slow, 32, seed=1)
    best = float(values[32:].norm() / values.norm())
    assert best * 0.999 < relative(found.b @ found.a, slow) < best * 1.001


# Merging.


def test_a_linear_merge_is_the_exact_sum_whatever_ranks_alphas_and_targets(tmp_path):
    first = make_adapter("high", 1, rank=4, ranks={"blocks.0.attn1.to_q": 6}, alphas={"blocks.1.ffn.net.2": 3.0})
    second = make_adapter("high", 2, rank=3, targets=("attn1.to_q", "ffn.net.2"), rslora=True, alpha=2.0)
    paths = [write(tmp_path / "1", first), write(tmp_path / "2", second)]
    lines = merge(paths, tmp_path / "out", MergeSettings(weights=(0.7, -0.5)))
    found = read_expert(tmp_path / "out", "high")
    for module in first.modules:
        assert relative(delta(found, module), 0.7 * delta(first, module) - 0.5 * delta(second, module)) < 1e-6
    assert found.rank == 4 and found.ranks == {
        "blocks.0.attn1.to_q": 9, "blocks.1.attn1.to_q": 7, "blocks.0.ffn.net.2": 7, "blocks.1.ffn.net.2": 7,
    }  # fmt: skip
    assert set(found.targets) == set(first.targets), "short names where they reach the same modules"
    assert error_in(lines, "the high-noise expert") < 1e-6
    assert "warning: look 2 has 4 of the 20 modules of the high-noise expert" in lines
    assert torch.equal(
        read_expert(tmp_path / "out" / "comfyui", "high").weights["blocks.0.ffn.net.2.lora_A.weight"],
        found.weights["blocks.0.ffn.net.2.lora_A.weight"],
    )


# PEFT warns of a second adapter, which is what is wanted.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_diffusers_gives_a_linear_merge_and_both_adapters_at_once_the_same_output(tiny_base, tmp_path):
    paths = [write_pair(tmp_path / "1", 1, rank=4), write_pair(tmp_path / "2", 2, rank=3)]
    merge(paths, tmp_path / "out", MergeSettings(weights=(0.7, 0.5)))
    verify_adapter_folder(str(tiny_base), tmp_path / "out", [read_expert(tmp_path / "out", e) for e in ("high", "low")])
    pipe = load_pipeline(str(tiny_base), device="cpu")
    for number, path in enumerate(paths):
        pipe.load_lora_weights(path, weight_name=HIGH.file_name, adapter_name=f"{number}")
        pipe.load_lora_weights(path, weight_name=LOW.file_name, adapter_name=f"{number}", load_into_transformer_2=True)
    pipe.set_adapters(["0", "1"], [0.7, 0.5])
    merged = load_pipeline(str(tiny_base), tmp_path / "out", device="cpu")
    for expert in (HIGH, LOW):
        probe = make_adapter(expert.name)
        wanted = probe_output(getattr(pipe, expert.component), tiny_base, probe)
        assert torch.allclose(probe_output(getattr(merged, expert.component), tiny_base, probe), wanted, atol=1e-5)


def peft_merge(adapters: list[Adapter], weights: list[float], **options) -> dict[str, torch.Tensor]:
    """What PEFT's `add_weighted_adapter` makes of adapters, each module's update."""
    model = nn.Module()
    for module in adapters[0].modules:
        parent = model
        for part in module.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(module.rpartition(".")[2], nn.Linear(*sizes(module.split(".", 2)[2]), bias=False))
    names = [f"part{number}" for number in range(len(adapters))]
    wrapped = None
    for name, adapter in zip(names, adapters, strict=True):
        config = LoraConfig(**adapter.peft_config())
        if wrapped is None:
            wrapped = get_peft_model(model, config, name)
        else:
            wrapped.add_adapter(name, config)
        state = {f"base_model.model.{key}": value for key, value in adapter.weights.items()}
        set_peft_model_state_dict(wrapped, state, adapter_name=name)
    wrapped.add_weighted_adapter(names, weights, "merged", **options)
    layers = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    return {name: layer.get_delta_weight("merged").detach() for name, layer in layers.items() if name in MODULES}


@pytest.mark.parametrize("method", ["svd", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
def test_a_merge_is_what_pefts_own_makes_of_the_same_adapters(tmp_path, method):
    adapters = [make_adapter("low", seed, targets=("attn1.to_q", "ffn.net.0.proj"), alpha=2.0 + seed) for seed in (1, 2, 3)]  # fmt: skip # noqa: E501
    weights = [0.9, -0.4, 0.6]
    options = {} if method == "svd" else {"density": 0.6}
    ranks = {"rank": 5} if method.endswith("svd") else {}
    paths = [write(tmp_path / f"{number}", adapter) for number, adapter in enumerate(adapters)]
    lines = merge(paths, tmp_path / "out", MergeSettings(weights=tuple(weights), method=method, **options, **ranks))
    found = read_expert(tmp_path / "out", "low")
    assert (found.rank, found.alpha) == (5 if ranks else 4, 5.0 if ranks else 4.0)
    oracle = peft_merge(adapters, weights, combination_type=method, svd_rank=ranks.get("rank"), **options)
    assert sorted(oracle) == MODULES == found.modules
    for module, wanted in oracle.items():
        assert relative(delta(found, module), wanted) < 1e-5
    wanted = sum(weight * deltas(adapter) for weight, adapter in zip(weights, adapters, strict=True))
    assert error_in(lines, "the low-noise expert") == pytest.approx(relative(deltas(found), wanted), rel=0.06)


def test_what_dare_drops_is_a_function_of_seed_expert_and_module(tmp_path):
    paths = [write_pair(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    few = [write(tmp_path / f"few{seed}", make_adapter("high", seed, targets=("ffn.net.2",))) for seed in (1, 2)]
    # The other expert's weights are the same, so that only its name tells its draws apart.
    twins = [
        write(tmp_path / f"twin{seed}", as_expert(make_adapter("high", seed, targets=("ffn.net.2",)), "low"))
        for seed in (1, 2)
    ]

    def merged(name: str, sources: list[Path], seed: int, expert: str) -> Adapter:
        settings = MergeSettings(weights=(1.0, 1.0), method="dare_ties", density=0.5, seed=seed)
        merge(sources, tmp_path / name, settings)
        return read_expert(tmp_path / name, expert)

    torch.manual_seed(5)
    first = merged("a", paths, 3, "high")
    assert first.about["operation"] == "merge dare_ties of look 1 x 1 + look 2 x 1"
    torch.manual_seed(6)
    assert (tmp_path / "a" / HIGH.file_name).read_bytes() != b""
    again = merged("b", paths, 3, "high")
    assert (tmp_path / "a" / HIGH.file_name).read_bytes() == (tmp_path / "b" / HIGH.file_name).read_bytes()
    assert all(torch.equal(value, again.weights[name]) for name, value in first.weights.items())
    alone = merged("c", few, 3, "high")
    assert all(torch.equal(value, first.weights[name]) for name, value in alone.weights.items())
    name = "blocks.0.ffn.net.2.lora_A.weight"
    assert not torch.equal(first.weights[name], merged("d", paths, 4, "high").weights[name])
    assert not torch.equal(alone.weights[name], merged("e", twins, 3, "low").weights[name])


def test_dare_drops_other_values_in_a_module_of_the_same_weights():
    first = make_adapter("high", 1)
    twins = ("blocks.0.attn1.to_q", "blocks.1.attn1.to_q")
    for half in "AB":
        first.weights[f"{twins[1]}.lora_{half}.weight"].copy_(first.weights[f"{twins[0]}.lora_{half}.weight"])
    products = [
        merge_module("dare_linear", twin, [first, first], [1.0, 1.0], density=0.5, rank=4, seed=0, expert="high")
        for twin in twins
    ]
    assert not torch.equal(products[0].a, products[1].a)


def test_dare_of_updates_is_the_sum_on_the_average():
    adapters, module = [make_adapter("high", seed) for seed in (1, 2)], "blocks.0.attn1.to_q"
    total = torch.zeros(24, 24)
    for seed in range(200):
        product = merge_module(
            "dare_linear_svd", module, adapters, [0.7, 0.4], density=0.5, rank=24, seed=seed, expert="high"
        )
        total += product.b @ product.a / 200
    wanted = 0.7 * delta(adapters[0], module) + 0.4 * delta(adapters[1], module)
    # Each value's spread is its own size; of 200 draws it is 1 / 14 of that.
    assert relative(total, wanted) < 0.1


def test_a_merge_speaks_of_its_parts_without_paths_and_warns_where_they_differ(tmp_path):
    about = {"base": "tiny", "trigger": "ember style", "sampling_shift": "5.0", "training_shift": "5.0", "steps": "300"}
    first = write_pair(tmp_path / "secret-1", 1, about=about)
    other = {**about, "trigger": "frost style", "sampling_shift": "7.0"}
    low = write(tmp_path / "secret-2", make_adapter("low", 2, about=other)) / LOW.file_name
    comfyui.write(tmp_path / "secret-3.safetensors", make_adapter("low", 3, about={}))
    sources = [first, low, tmp_path / "secret-3.safetensors"]
    lines = merge(sources, tmp_path / "out", MergeSettings(weights=(0.5, 0.8, 1.0)))
    said = "\n".join(lines)
    assert f"warning: {low} has no adapter of the high-noise expert" in said
    assert "previewed with sampling_shift 5.0 and 7.0; 7.0, which the largest weight has, is recorded" in said
    assert "their triggers differ; a prompt now says 'ember style, frost style', or one of them" in said
    found = read_expert(tmp_path / "out", "low").about
    assert found["operation"] == "merge linear of ember style x 0.5 + frost style x 0.8 + adapter 3 x 1"
    assert (found["base"], found["trigger"], found["sampling_shift"], found["training_shift"]) == (
        "tiny", "ember style, frost style", "7.0", "5.0",
    )  # fmt: skip
    assert "steps" not in found, "no number of steps made the sum"
    high = read_expert(tmp_path / "out", "high")
    assert high.about["trigger"] == "ember style" and "secret" not in json.dumps([found, high.about])
    assert relative(deltas(high), 0.5 * deltas(read_expert(first, "high"))) < 1e-6


def test_what_a_merged_file_records_can_be_written_and_says_no_more_than_is_known():
    chinese = make_adapter("low", 1, about={"trigger": "水墨风格", "licence": "mit", "resolution": "832x480"})
    long = make_adapter("low", 2, about={"trigger": "x" * 190, "licence": "apache-2.0", "resolution": "832x480"})
    titles = [facts.title_of(adapter, number) for number, adapter in enumerate((chinese, long), 1)]
    assert titles == ["adapter 1", "adapter 2"]
    about, warnings = facts.merged([chinese, long], titles, [0.4, -0.9], "linear")
    assert about["operation"] == "merge linear of adapter 1 x 0.4 + adapter 2 x -0.9"
    assert about["resolution"] == "832x480" and "licence" not in about
    assert warnings[1] == "their licences differ (mit, apache-2.0); none is recorded, and all of them hold"
    short = replace(long, about={"trigger": ""})
    assert facts.merged([chinese, short], titles, [1, 1], "svd")[0]["trigger"] == "水墨风格"
    assert about["trigger"] == "水墨风格, " + "x" * 190 and not facts.joined_trigger([short], [short])[1]
    longer = replace(long, about={"trigger": "y" * 200})
    trigger, said = facts.joined_trigger([chinese, longer], [longer, chinese])
    assert trigger == "y" * 200 and "too long to be joined" in said[0]


def test_a_history_keeps_its_latest_operations():
    about: dict[str, str] = {}
    for number in range(40):
        about = facts.after(about, f"scale {number}")
    assert about["operation"].endswith("scale 38; scale 39") and 280 < len(about["operation"]) <= 300
    assert all(part.startswith("scale ") for part in about["operation"].split("; "))


def test_peft_is_of_the_version_that_the_merges_were_read_from():
    # Its merge functions are no part of PEFT's documented API.
    assert tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21)
