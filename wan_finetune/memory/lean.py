"""Blocks that keep less for their backward pass: what is cheap to make again is not kept. To the bit the same.

Norms and modulation are a fifth of a percent of a block's operations, and with their fp32 copies a third of what it
keeps. Of each only the input is kept, in the precision of the stream; the backward pass makes the rest again. No
matrix product and no attention runs again for it.

Three of diffusers' hooks do it: on a block, whose formula is written out here, on the norms of queries and keys, and on
each LoRA's first matrix, whose input is such a norm's output. Modules are called as before, so that whatever else hangs
on them (streaming, sharding, casting) sees no difference. Where diffusers' block computes something else than what is
written here, it is left as it is.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "wan_finetune_lean"


class Remade:
    """A value that is made again from its inputs when the backward pass asks for it, once for all who ask."""

    def __init__(self, function: Callable[..., Tensor], device_type: str) -> None:
        self.function = function
        self.precision = functools.partial(
            torch.autocast,
            device_type,
            dtype=torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
        )
        self.made: tuple[list[Tensor], Tensor] | None = None

    def again(self, inputs: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[list[Tensor], Tensor]:
        """(the inputs as leaves, the value with its graph back to those that need a gradient)."""
        if self.made is not None:
            return self.made
        leaves = [value.detach().requires_grad_(need) for value, need in zip(inputs, needed, strict=True)]
        with torch.enable_grad(), self.precision():
            made = leaves, self.function(*leaves)
        # Whoever takes the gradient comes last and lets go of it.
        self.made = made if any(needed) else None
        return made


class Making(torch.autograd.Function):
    """`remade.function(*inputs)`, of which the inputs are kept and nothing else."""

    @staticmethod
    def forward(ctx: Any, remade: Remade, *inputs: Tensor) -> Tensor:
        ctx.remade = remade
        ctx.save_for_backward(*inputs)
        return remade.function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        leaves, value = ctx.remade.again(ctx.saved_tensors, needed)
        ctx.remade.made = None
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found = iter(torch.autograd.grad(value, wanted, gradient))
        return None, *(next(found) if need else None for need in needed)


class Down(torch.autograd.Function):
    """`x @ weight.T` where x is remade in the backward pass: LoRA's first matrix, and the frozen one keeps no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, remade: Remade, *inputs: Tensor) -> Tensor:
        ctx.remade, ctx.needed = remade, tuple(value.requires_grad for value in inputs)
        ctx.save_for_backward(weight, *inputs)
        return nn.functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = (rows @ weight).view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            x = ctx.remade.again(tuple(inputs), ctx.needed)[1].detach()
            to_weight = rows.t() @ x.flatten(0, -2)
        return to_x, to_weight, None, *(None for _ in inputs)


class Gated(torch.autograd.Function):
    """`(x.float() + y.float() * gate).type_as(x)`, gate [B, 1, d] fp32 and frozen, through one fp32 tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        assert not gate.requires_grad
        ctx.dtype = y.dtype
        ctx.save_for_backward(gate)
        return (y * gate).add_(x).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gate,) = ctx.saved_tensors
        to_y = (gradient * gate).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return gradient, to_y, None


def make(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A function's value, remade in the backward pass; LoRAs that are given it find out how."""
    remade = Remade(function, inputs[0].device.type)
    value = Making.apply(remade, *inputs)
    value.made_by = remade, inputs, value._version
    return value


class Lean:
    """The hooks of some blocks, from construction to `close`."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.on = False
        self.hooked: list[nn.Module] = []
        self.formula_holds = formula_holds()
        for block in blocks:
            self.hook_block(block)

    def hook_block(self, block: nn.Module) -> None:
        for name, module in block.named_modules():
            if name.endswith(("norm_q", "norm_k")):
                self.hook(module, NormHook(self.is_on))
            elif ".lora_A." in name and isinstance(module, nn.Linear):
                self.hook(module, DownHook())
        if self.formula_holds:
            self.hook(block, BlockHook(self.is_on))

    def is_on(self) -> bool:
        return self.on and torch.is_grad_enabled()

    def hook(self, module: nn.Module, hook: ModelHook) -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
        self.hooked.append(module)

    def close(self) -> None:
        """Leave the modules as they were, and no circle of references that would keep them alive."""
        for module in self.hooked:
            registry: Any = module._diffusers_hook
            registry.remove_hook(NAME, recurse=False)
            if not registry.hooks:
                del module._diffusers_hook, module.forward
        self.hooked = []


class NormHook(ModelHook):
    """A norm that keeps its input as it came, not the fp32 copy that autocast makes of it."""

    def __init__(self, on: Callable[[], bool]) -> None:
        super().__init__()
        self.on = on

    def new_forward(self, norm: nn.Module, x: Tensor) -> Tensor:
        if not self.on():
            return self.fn_ref.original_forward(x)
        return Making.apply(Remade(self.fn_ref.original_forward, x.device.type), x)


class DownHook(ModelHook):
    """LoRA's first matrix, which does not keep what can be made again."""

    def new_forward(self, linear: nn.Linear, x: Tensor) -> Tensor:
        made_by = getattr(x, "made_by", None)
        # What was changed in place since then is not what would be made again.
        if made_by is None or x._version != made_by[2]:
            return self.fn_ref.original_forward(x)
        remade, inputs, _ = made_by
        # As autocast would, which has done it for x.
        return Down.apply(x, linear.weight.to(x.dtype), remade, *inputs)


class BlockHook(ModelHook):
    """diffusers' `WanTransformerBlock.forward`, its norms and modulations made by `make`."""

    def __init__(self, on: Callable[[], bool]) -> None:
        super().__init__()
        self.on = on

    def new_forward(
        self, block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> Tensor:
        if not self.on() or temb.ndim != 3:
            return self.fn_ref.original_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + temb.float()).chunk(6, dim=1)

        normed = make(functools.partial(modulated, block.norm1), hidden_states, scale, shift)
        output = block.attn1(normed, None, None, rotary_emb)
        hidden_states = Gated.apply(hidden_states, output, gate)

        # Where diffusers has no norm here, there is nothing to make.
        normalise = functools.partial(normalised, block.norm2)
        has_norm = not isinstance(block.norm2, nn.Identity)
        normed = make(normalise, hidden_states) if has_norm else normalise(hidden_states)
        output = block.attn2(normed, encoder_hidden_states, None, None)
        hidden_states = hidden_states + output

        normed = make(functools.partial(modulated, block.norm3), hidden_states, ffn_scale, ffn_shift)
        del output
        output = block.ffn(normed)
        del normed
        return Gated.apply(hidden_states, output, ffn_gate)


def modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """[B, S, d] in fp32 within, scale and shift [B, 1, d]."""
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.float()).type_as(x)


@functools.cache
def formula_holds() -> bool:
    """Whether the installed diffusers' block is the one that is written out here: a tiny one is tried, to the bit."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    arguments = ["self", "hidden_states", "encoder_hidden_states", "temb", "rotary_emb"]
    if list(inspect.signature(WanTransformerBlock.forward).parameters) != arguments:
        return False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        block = WanTransformerBlock(24, 48, 2, cross_attn_norm=True).requires_grad_(False).bfloat16()
        x, text, time = (torch.randn(1, rows, 24).bfloat16() for rows in (5, 3, 6))
        rotary = torch.randn(1, 5, 1, 12), torch.randn(1, 5, 1, 12)
    theirs = value_and_gradient(block, x, text, time, rotary)
    HookRegistry.check_if_exists_or_initialize(block).register_hook(BlockHook(on=lambda: True), NAME)
    ours = value_and_gradient(block, x, text, time, rotary)
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def value_and_gradient(block: nn.Module, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        value = block(x, *others)
    return value, torch.autograd.grad(value.float().square().sum(), x)[0]
