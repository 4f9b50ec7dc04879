"""Peak of a LoRA step's activations at the real dimensions, by policy. `python -m benchmarks.activations`

Traced with fake tensors, so nothing is computed and no GPU is needed: every storage that an operator makes is counted
from its birth to its death. The base's weights are not among them. Two and four blocks are traced; what a block adds is
the same for each, so forty follow. Linears and attentions that run are counted in the same pass. `peft_default` is a
plain diffusers + PEFT loop: full checkpointing, fp32 LoRA under autocast. `stock_block` is that without PEFT's casts of
LoRA inputs: what `full` would be without lean blocks.

`rounding` is measured with real numbers: how far a matrix of Wan's spread (normal, deviation 0.02) is from its packed
form, relative to its own norm.
"""

import argparse
import weakref
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.reporting import report
from wan_finetune.memory.checkpointing import Checkpointing, keep_lora_inputs_as_they_are
from wan_finetune.memory.settings import MemorySettings

WAYS = ("peft_default", "stock_block", "none", "selective", "full", "offloaded")
SHAPES = {"832x480x33": (9, 60, 104), "832x480x81": (21, 60, 104)}
BLOCKS = 40


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are alive; the host's apart."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.calls: Counter[str] = Counter()
        self.alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self.calls[name] += 1
        # What offloading asks of the host names its device; nothing else in a step does.
        if name == "empty_like" and kwargs.get("device") is not None:
            self.known([results])
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return results

    def see(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()

        def gone(reference: Any) -> None:
            self.live -= size
            self.alive.pop(key, None)

        self.alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def known(self, values: Any) -> None:
        """Do not count these: they were there before the step, or are elsewhere."""
        for value in values:
            storage = value.untyped_storage()
            key = storage._cdata
            self.alive[key] = weakref.ref(storage, lambda reference, key=key: self.alive.pop(key, None))


def make_model(layers: int) -> nn.Module:
    """An A14B expert of a few blocks on the meta device, bf16 as diffusers loads it, LoRA of rank 32 on all Linears."""
    from diffusers import WanTransformer3DModel

    from wan_finetune.adapters import inject_lora
    from wan_finetune.lora import LoraSettings

    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=layers, text_dim=4096).requires_grad_(False)
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    inject_lora(model, LoraSettings(rank=32), "high", 0)
    return model.train()


def make_fake(model: nn.Module) -> None:
    """Give every parameter and buffer a fake place on the CPU; called under a fake mode."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            fake = torch.empty(value.shape, dtype=value.dtype)
            module.register_parameter(name, nn.Parameter(fake, requires_grad=value.requires_grad))
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(value.shape, dtype=value.dtype))


def traced(way: str, layers: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Peak bytes of one forward and backward pass, attentions and matrix products that ran."""
    model = make_model(layers)
    if way in ("peft_default", "stock_block"):
        model.enable_gradient_checkpointing()
    else:
        # All of `Fitting` but the move to the device, which fake parameters do not stand.
        Checkpointing(model, MemorySettings(checkpointing=way), torch.device("cpu"))
    if way != "peft_default":
        keep_lora_inputs_as_they_are(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model)
        latents = torch.empty(1, 16, *shape)
        text, time = torch.empty(1, 512, 4096), torch.empty(1)
        tracker = LiveBytes()
        tracker.known([*model.parameters(), *model.buffers(), latents, text, time])
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(hidden_states=latents, timestep=time, encoder_hidden_states=text, return_dict=False)[0]
            (output.float() - latents).square().mean().backward()
    attention = [n for n in tracker.calls if "scaled_dot_product" in n and "backward" not in n]
    return (
        tracker.peak,
        sum(tracker.calls[name] for name in attention),
        tracker.calls["mm"] + tracker.calls["addmm"],
    )


def rounding() -> dict[str, float]:
    """Relative error of each kind's packed weights."""
    import bitsandbytes

    from wan_finetune.memory.quantization import set_weight

    cpu, found = torch.device("cpu"), {}
    weight = torch.randn(1024, 5120, generator=torch.Generator().manual_seed(0)) * 0.02
    for kind in ("fp8", "int8", "nf4"):
        linear = nn.Linear(5120, 1024, bias=False, device="meta")
        start = weight.bfloat16()
        set_weight(linear, start.to(torch.float8_e4m3fn) if kind == "fp8" else start, kind, cpu, cpu)
        packed = linear.weight
        if kind == "int8":
            back = packed.dequantize()
        elif kind == "nf4":
            back = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        else:
            back = packed
        found[kind] = round(float((back.float() - weight).norm() / weight.norm()), 4)
    return found


def measure(shape: tuple[int, int, int]) -> dict[str, dict[str, float]]:
    """Every policy's figures at forty blocks."""
    figures = {}
    for way in WAYS:
        two, four = traced(way, 2, shape), traced(way, 4, shape)
        forty = [a + (b - a) * (BLOCKS - 2) // 2 for a, b in zip(two, four, strict=True)]
        figures[way] = {
            "peak_gib": round(forty[0] / 2**30, 3),
            "attentions": forty[1],
            "matrix_products": forty[2],
        }
    for values in figures.values():
        values["peak_over_peft_default"] = round(values["peak_gib"] / figures["peft_default"]["peak_gib"], 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    figures: dict[str, Any] = {shape: measure(SHAPES[shape]) for shape in arguments.shapes}
    report(
        "activations", {**figures, "rounding": rounding()}, ("torch", "diffusers", "peft", "torchao", "bitsandbytes")
    )


if __name__ == "__main__":
    main()
