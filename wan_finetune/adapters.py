"""LoRA adapters of one expert: injecting them, taking their weights out, and saying whether they did anything."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError
from .experts import ExpertName
from .lora import EXPRESSION, MAX_RANK, LoraSettings, layout, targeted

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

WEIGHT_NAME = re.compile(r"(blocks\.\d+\.[\w.]+)\.lora_(A\.weight|B\.weight|magnitude_vector)")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One expert's trained LoRA, apart from any model: W = W0 + scale B A, or with `dora` that at learnt magnitudes."""

    expert: ExpertName
    rank: int
    """Rank of the modules that `ranks` does not name."""
    alpha: float
    """Alpha of the modules that `alphas` does not name."""
    targets: tuple[str, ...]
    """The modules that carry LoRA, by the end of their names."""
    weights: Mapping[str, Tensor]
    """`blocks.N.MODULE.lora_{A,B}.weight` -> fp32, [rank, in] and [out, rank]; with DoRA also
    `blocks.N.MODULE.lora_magnitude_vector`, [out]."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Module -> its rank, where it is not `rank`."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Module -> its alpha, where it is not `alpha`."""
    rslora: bool = False
    """The scale is alpha / sqrt(rank) instead of alpha / rank."""
    dora: bool = False
    about: Mapping[str, str] = field(default_factory=dict)
    """Facts of `facts.FACTS`: trigger, base, shift, ..."""
    assumed: tuple[str, ...] = ()
    """What the file that this was read from did not say, and how it was taken."""

    @property
    def modules(self) -> list[str]:
        """Names of the modules that carry LoRA."""
        return sorted({name.rpartition(".lora_")[0] for name in self.weights})

    @property
    def ranks_used(self) -> list[int]:
        """Every rank that a module has, ascending."""
        return sorted({self.ranks.get(module, self.rank) for module in self.modules})

    @property
    def alphas_used(self) -> list[float]:
        """Every alpha that a module has, ascending."""
        return sorted({self.alphas.get(module, self.alpha) for module in self.modules})

    def scale(self, module: str) -> float:
        """What a module's B A is multiplied with."""
        rank, alpha = self.ranks.get(module, self.rank), self.alphas.get(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def peft_config(self) -> dict[str, Any]:
        """The fewest arguments of PEFT's `LoraConfig` that say all of this; older versions of it know no others."""
        config: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": sorted(self.targets)}
        if self.ranks:
            config["rank_pattern"] = shortest(self.ranks, self.modules)
        if self.alphas:
            config["alpha_pattern"] = shortest(self.alphas, self.modules)
        if self.rslora:
            config["use_rslora"] = True
        if self.dora:
            config["use_dora"] = True
        return config

    def check(self, source: str) -> None:
        """Whether the weights are complete and sane.

        Raises:
            InputError: naming `source`, the fault and the key.
        """
        if not self.weights:
            raise InputError(f"{source}: holds no LoRA weights")
        # Of a negative one diffusers' conversion of ComfyUI's format never ends; the format has it in fp32.
        if odd := [alpha for alpha in self.alphas_used if not 0 < torch.tensor(alpha, dtype=torch.float32) < math.inf]:
            raise InputError(
                f"{source}: alpha is {odd[0]:g}, and only a number above 0 that fp32 can hold is loaded everywhere"
            )
        parts = ["A.weight", "B.weight", "magnitude_vector"] if self.dora else ["A.weight", "B.weight"]
        for name, value in self.weights.items():
            match = WEIGHT_NAME.fullmatch(name)
            if match is None:
                raise InputError(f"{source}: {name} is no weight of a Wan LoRA")
            module, part = match[1], match[2]
            if part not in parts:
                raise InputError(f"{source}: {name} belongs to DoRA, and the adapter says that it is none")
            if not value.is_floating_point() or value.ndim != (1 if part == "magnitude_vector" else 2):
                raise InputError(f"{source}: {name} is {value.dtype} {tuple(value.shape)}, not a matrix of floats")
            if any(f"{module}.lora_{other}" not in self.weights for other in parts):
                raise InputError(f"{source}: {name} stands without its other half; save the adapter again")
            rank = value.shape[0] if part == "A.weight" else value.shape[-1]
            if part != "magnitude_vector" and (rank != self.ranks.get(module, self.rank) or rank > MAX_RANK):
                said = self.ranks.get(module, self.rank)
                raise InputError(f"{source}: {name} has rank {rank}, the adapter says {said}; {MAX_RANK} is the most")
            if not value.numel():
                raise InputError(f"{source}: {name} is empty, {tuple(value.shape)}; save the adapter again")
        check_values(self.weights, source)


def check_values(weights: Mapping[str, Tensor], source: str) -> None:
    """Whether every value is finite and no lora_B is all zero.

    A sum of squares reads a tensor once, at the speed of memory, and shows both. It also overflows and underflows, so
    where it shows a fault the values themselves are looked at.

    Raises:
        InputError: naming `source`, the fault and the key.
    """
    energies = torch.stack([torch.dot(flat, flat) for flat in map(torch.flatten, weights.values())])
    odd = torch.nonzero(~torch.isfinite(energies) | (energies == 0)).flatten().tolist()
    names = list(weights)
    suspects = {names[index]: weights[names[index]] for index in odd}
    for name, value in suspects.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{source}: {name} has values that are not finite; take an earlier checkpoint")
    if dead := dead_modules(suspects):
        raise InputError(
            f"{source}: the LoRA does nothing in {len(dead)} modules, {dead[0]} the first; it was not trained there, "
            "or lost its weights when it was saved"
        )


def shortest(said: Mapping[str, float], modules: Sequence[str]) -> dict[str, float]:
    """`module -> value` in PEFT's patterns: by the end of the name where all blocks say the same."""
    patterns = {}
    for end in sorted({module.split(".", 2)[2] for module in modules}):
        alike = [module for module in modules if module.split(".", 2)[2] == end]
        values = {said.get(module) for module in alike}
        if len(values) == 1 and None not in values:
            patterns[end] = said[alike[0]]
        else:
            patterns.update({module: said[module] for module in alike if module in said})
    return patterns


def as_adapter(
    expert: ExpertName,
    settings: LoraSettings,
    weights: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
    about: Mapping[str, str],
) -> Adapter:
    """Trained weights as an adapter of the base as it was.

    Args:
        taken: what was taken out of the base at the start (`inject_lora`). Training had W0 - s B0 A0 + s B A, so
            relative to W0 the update is s [B, -B0] [A; A0], a plain LoRA of twice the rank, as PEFT's
            `subtract_mutated_init` has it.
    """
    plan = layout(sorted({name.rpartition(".lora_")[0] for name in weights}), settings)
    weights, rslora = dict(weights), settings.rslora
    rank, alpha = settings.rank, settings.scale_alpha
    for name, start in taken.items():
        half = [weights[name], start] if ".lora_A." in name else [weights[name], -start]
        weights[name] = torch.cat(half, 0 if ".lora_A." in name else 1)
    if taken:
        # The scale stays: with the doubled rank alpha doubles, and a root of the rank goes into it for good.
        plan = {m: (2 * r, 2 * a * (math.sqrt(r) if rslora else 1.0)) for m, (r, a) in plan.items()}
        rank, alpha, rslora = 2 * rank, 2 * alpha * (math.sqrt(rank) if rslora else 1.0), False
    complete = not settings.exclude and not any(target.startswith(EXPRESSION) for target in settings.targets)
    return Adapter(
        expert=expert,
        rank=rank,
        alpha=alpha,
        targets=settings.targets if complete else tuple(plan),
        weights=weights,
        ranks={m: r for m, (r, _) in plan.items() if r != rank},
        alphas={m: a for m, (_, a) in plan.items() if a != alpha},
        rslora=rslora,
        dora=settings.dora,
        about=about,
    )


def inject_lora(
    model: "WanTransformer3DModel",
    settings: LoraSettings,
    expert: ExpertName,
    seed: int,
    taken: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Add fp32 LoRA weights to a frozen expert; their start is a function of (seed, expert, module) and the settings.

    Args:
        taken: what an earlier call returned, when training goes on: nothing is started anew, and the same is taken out
            of the base.

    Returns:
        The start that was taken out of the base, by the names of the weights; empty unless `settings.initialisation`
        does so.

    Raises:
        InputError: when a target or a pattern matches no module, or the start does not suit the base.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    from . import lora_start

    modules = targeted([name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)], settings)
    plan = layout(modules, settings)
    lora_start.require_base(model, modules, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_alpha,
        # Dots of a name are any letter to PEFT, and a name must not be the end of another.
        rank_pattern={f"^{re.escape(m)}": rank for m, (rank, _) in plan.items() if rank != settings.rank},
        alpha_pattern={f"^{re.escape(m)}": alpha for m, (_, alpha) in plan.items() if alpha != settings.scale_alpha},
        lora_dropout=settings.dropout,
        target_modules=modules,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(config)
    cast_training_params(model, torch.float32)
    if taken is not None:
        lora_start.take_out(model, taken)
        return dict(taken)
    if settings.start_from is not None:
        set_lora_weights(model, lora_start.weights_of(settings.start_from, settings, plan, expert))
        return {}
    return lora_start.draw(model, modules, settings.initialisation, expert, seed)


def lora_weights(model: "WanTransformer3DModel") -> dict[str, Tensor]:
    """A copy of the injected weights on the CPU, fp32, by their PEFT names."""
    from peft import get_peft_model_state_dict

    return {
        name: value.detach().to("cpu", torch.float32, copy=True)
        for name, value in get_peft_model_state_dict(model, adapter_name="default").items()
    }


def set_lora_weights(model: "WanTransformer3DModel", weights: Mapping[str, Tensor]) -> None:
    """Put weights back that `lora_weights` took out; every key must find its place.

    Raises:
        InputError: when a key or a size is not the model's.
    """
    from peft import set_peft_model_state_dict

    expected = lora_weights(model)
    if expected.keys() != weights.keys():
        odd = sorted(expected.keys() ^ weights.keys())
        raise InputError(f"the adapter's keys are not the model's: {len(odd)} differ, {odd[0]} the first")
    if odd := [name for name, value in weights.items() if value.shape != expected[name].shape]:
        given, wanted = tuple(weights[odd[0]].shape), tuple(expected[odd[0]].shape)
        raise InputError(f"the adapter is of another size of base: {odd[0]} is {given}, the model has {wanted}")
    set_peft_model_state_dict(model, dict(weights), adapter_name="default")


def dead_modules(weights: Mapping[str, Tensor]) -> list[str]:
    """Modules whose lora_B is still zero, so that the adapter does nothing there."""
    # `any` of floats takes seven times as long as both ends.
    return [n for n, value in weights.items() if ".lora_B." in n and not torch.stack(torch.aminmax(value)).any()]


def lora_b(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose movement shows that training reaches a module: lora_A has no gradient while lora_B is zero."""
    return {name: value for name, value in weights.items() if ".lora_B." in name}


def update_norms(adapter: Adapter) -> dict[str, float]:
    """Frobenius norm of each module's weight update, scale B A; of DoRA that is the change before its magnitudes.

    |B A|^2 = sum of (B' B) * (A A'), [rank, rank] each, in float64 because a doubled adapter's halves nearly cancel.
    """
    norms = {}
    for module in adapter.modules:
        a, b = (adapter.weights[f"{module}.lora_{half}.weight"].double() for half in "AB")
        norms[module] = adapter.scale(module) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
    return norms
