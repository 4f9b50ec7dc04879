"""Lean blocks: what they keep is less, and nothing else changes, not a bit."""

import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from torch import nn

from tests.test_memory_models import CPU, Counting, assert_same, gradients, inputs, learn, load, with_lora, write_base
from wan_finetune.adapters import inject_lora
from wan_finetune.lora import LoraSettings
from wan_finetune.memory import checkpointing, lean
from wan_finetune.memory.fitting import Fitting
from wan_finetune.memory.settings import MemorySettings


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("lean") / "base", 2)


class Stock:
    """In the place of `Lean`: blocks stay as diffusers has them."""

    formula_holds = True

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.on = False

    def close(self) -> None: ...


def of_both(monkeypatch, make: Callable[[], WanTransformer3DModel], autocast: bool = True, **settings) -> list[dict]:
    """Gradients and the forward pass's value, of stock blocks and of lean ones."""
    found = []
    for blocks in (Stock, lean.Lean):
        monkeypatch.setattr(checkpointing, "Lean", blocks)
        model = make()
        Fitting(model, MemorySettings(**settings), CPU, autocast=autocast)
        torch.manual_seed(3)  # of dropout
        results = gradients(model, autocast)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results["value"] = model(**inputs())[0].detach()
        found.append(results)
    return found


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of an fp32 base's norms under autocast
@pytest.mark.parametrize(
    ("kind", "dtype", "autocast", "policy"),
    [
        ("none", torch.bfloat16, True, "full"),
        ("none", torch.bfloat16, True, "selective"),
        ("none", torch.bfloat16, True, "offloaded"),
        ("none", torch.float32, False, "full"),
        ("none", torch.float32, True, "full"),
        ("fp8", torch.bfloat16, True, "full"),
        ("int8", torch.bfloat16, True, "full"),
        ("nf4", torch.bfloat16, True, "full"),
    ],
)
def test_gradients_and_values_are_those_of_stock_blocks_to_the_bit(base, monkeypatch, kind, dtype, autocast, policy):
    stock, ours = of_both(
        monkeypatch, lambda: with_lora(load(base, kind, dtype)), autocast, checkpointing=policy, quantization=kind
    )
    assert_same(stock, ours)
    assert all(bool(g.any()) for g in stock.values())


@pytest.mark.parametrize(
    "lora",
    [
        dict(dropout=0.3),
        dict(dora=True),
        dict(targets=("attn1.to_v", "ffn.net.2")),
        dict(targets=("attn2.to_k",)),
        dict(exclude=("re:blocks\\.0\\..*",)),
    ],
    ids=str,
)
def test_every_kind_of_lora_learns_the_same_to_the_bit(base, monkeypatch, lora):
    def make() -> WanTransformer3DModel:
        model = load(base)
        inject_lora(model, LoraSettings(rank=2, **lora), "high", 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        return model.train()

    stock, ours = of_both(monkeypatch, make)
    assert_same(stock, ours)


def test_a_block_without_a_norm_before_its_text_is_the_same_as_well(monkeypatch):
    def make() -> WanTransformer3DModel:
        torch.manual_seed(0)
        sizes = dict(num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=40, num_layers=2)
        return with_lora(WanTransformer3DModel(**sizes, cross_attn_norm=False).requires_grad_(False))

    assert_same(*of_both(monkeypatch, make, autocast=False))


def test_an_input_that_is_changed_in_place_is_not_taken_for_what_would_be_made_again(base, monkeypatch):
    def double(_: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        arguments[0].mul_(2.0)

    def make() -> WanTransformer3DModel:
        model = with_lora(load(base), targets=("attn1.to_k", "attn1.to_v"))
        model.blocks[1].attn1.to_k.register_forward_pre_hook(double)
        return model

    assert_same(*of_both(monkeypatch, make))


def test_without_gradients_or_without_lora_blocks_compute_what_stock_ones_do(base, monkeypatch):
    found = []
    for blocks in (Stock, lean.Lean):
        monkeypatch.setattr(checkpointing, "Lean", blocks)
        model = with_lora(load(base))
        Fitting(model, MemorySettings(), CPU, autocast=True)
        before = gradients(model)  # hooks have been on
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                values = {"validated": model(**inputs())[0]}
            model.disable_lora()
            values["off"] = model(**inputs())[0].detach()
            with torch.no_grad():
                values["validated, off"] = model(**inputs())[0]
            model.enable_lora()
        assert_same(before, gradients(model))
        assert not torch.equal(values["validated"], values["off"])
        found.append(values)
    assert_same(*found)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_that_fails_midway_leaves_nothing_that_the_next_one_meets(base, where):
    model = with_lora(load(base))
    Fitting(model, MemorySettings(), CPU, autocast=True)
    expected = gradients(model)
    model.zero_grad()
    calls = []

    def fail(*_: object) -> None:
        calls.append(torch.is_grad_enabled())
        # A norm is called twice, and a third time with a graph, in the middle of the block's backward pass.
        if len(calls) == (1 if where == "forward" else 3):
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.blocks[1].norm3.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(model)
    assert len(calls) == (1 if where == "forward" else 3)
    hook.remove()
    model.zero_grad()
    assert_same(expected, gradients(model))


def test_no_matrix_product_and_no_attention_runs_again_for_it(base, monkeypatch):
    counted = []
    for blocks in (Stock, lean.Lean):
        monkeypatch.setattr(checkpointing, "Lean", blocks)
        model = with_lora(load(base))
        Fitting(model, MemorySettings(), CPU, autocast=True)
        with Counting() as counting:
            gradients(model)
        counted.append({n: c for n, c in counting.calls.items() if "mm" in n or "attention" in n})
    assert counted[0] == counted[1] and counted[0]["mm"] > 100


def test_a_norm_is_made_again_once_for_all_that_ask(base):
    model = with_lora(load(base))
    Fitting(model, MemorySettings(), CPU, autocast=True)
    calls = []
    model.blocks[1].norm1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gradients(model)
    # Forward, the checkpoint's evaluation, and once with a graph for the three LoRAs and the gradient.
    assert calls == [False, False, True]


def test_a_closed_fitting_leaves_the_modules_as_they_were_and_can_be_made_again(base):
    model = with_lora(load(base))
    gone = weakref.ref(model.blocks[0])
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    for _ in range(2):
        fitting = Fitting(model, MemorySettings(), CPU, autocast=True)
        assert vars(model.blocks[0]).get("forward")
        learn(model, steps=1)
        fitting.close()
        after = {name: set(vars(module)) for name, module in model.named_modules()}
        for module in ("blocks.0", "blocks.0.attn1.norm_q", "blocks.0.attn1.to_q.lora_A.default"):
            assert after[module] == before[module]
    # Without a circle of references memory is free at once, not when garbage is next collected.
    gc.collect()
    gc.disable()
    try:
        del model, fitting
        assert gone() is None
    finally:
        gc.enable()


def test_a_block_of_another_formula_is_left_as_it_is_and_said_so(base, monkeypatch):
    stock = transformer_wan.WanTransformerBlock.forward

    def other(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
        return stock(self, hidden_states, encoder_hidden_states, temb, rotary_emb) * 1.125

    monkeypatch.setattr(transformer_wan.WanTransformerBlock, "forward", other)
    lean.formula_holds.cache_clear()
    try:
        fitting = Fitting(with_lora(load(base)), MemorySettings(), CPU, autocast=True)
        assert "not the one that was checked" in fitting.note
        kept = Fitting(with_lora(load(base)), MemorySettings(checkpointing="none"), CPU, autocast=True)
        assert not kept.note  # stock blocks were asked for
        assert_same(*of_both(monkeypatch, lambda: with_lora(load(base))))

        def longer(self, hidden_states, encoder_hidden_states, temb, rotary_emb, more=None): ...

        monkeypatch.setattr(transformer_wan.WanTransformerBlock, "forward", longer)
        lean.formula_holds.cache_clear()
        assert not lean.formula_holds()
    finally:
        lean.formula_holds.cache_clear()
