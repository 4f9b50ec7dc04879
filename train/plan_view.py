"""A plan as a person reads it in a terminal, with or without colour."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from wan_finetune.costs import lora_parameters, num_parameters

from .hardware import GIB, Hardware
from .planning import BucketPlan
from .provisions import Provisions, RunNumbers, lora_precision

MOST_ROWS = 16
"""Buckets in the table; automatic ones may be dozens, of which the largest decide."""


LEGEND = (
    "LoRA: weights, optimizer states, gradients. inputs: of blocks, kept by checkpointing. work: what the backward "
    "pass keeps, and passing tensors. margin: context and fragmentation, stated."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole plan."""

    run: RunNumbers
    hardware: Hardware
    rows: list[BucketPlan]
    provisions: Provisions
    seconds: tuple[float, float]
    """Of all steps, in the quickest and in the slowest bucket."""
    host_memory_bytes: int | None
    """Of this machine; None where another one is planned for."""
    free_disk_bytes: int | None
    exact: dict[str, "Exact"]
    """Traced peaks and operations, by expert and bucket."""

    @property
    def faults(self) -> list[str]:
        """What does not fit, in words."""
        faults = [title(group) for group in grouped(self.rows) if group[0].fits is False]
        faults += [stage.name for stage in self.provisions.stages if stage.fits is False]
        if self.host_memory_bytes is not None:
            over = [n for n, b in self.provisions.host_bytes.items() if b > self.host_memory_bytes]
            faults += [f"host memory while {name}" for name in over]
        if self.free_disk_bytes is not None and self.wanted_disk_bytes > self.free_disk_bytes:
            faults.append("disk")
        return faults

    @property
    def wanted_disk_bytes(self) -> float:
        """Space that must be free: a base that is local takes none."""
        there = self.run.base.disk_bytes if self.run.base.is_local else 0
        return sum(self.provisions.disk_bytes.values()) - there


@dataclass(frozen=True, kw_only=True, slots=True)
class Exact:
    """A traced step beside the calculated one."""

    peak_bytes: int
    flops: int


def gib(size: float) -> str:
    """Bytes as GiB, with as many digits as say something."""
    value = size / GIB
    return f"{value:.0f}" if value >= 999.5 else f"{value:.1f}" if value >= 0.05 or value == 0 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """`0.45 s`, `38 s`, `12 min`, `7.5 h`, `3.1 days`."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h"), (float("inf"), 86400, "days")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.2g} {name}" if value < 10 else f"{value:.0f} {name}"
    raise AssertionError("the last limit is infinite")


def word(fits: bool | None) -> str:
    return {True: "[green]yes[/]", False: "[bold red]NO[/]", None: ""}[fits]


def show(plan: Plan, console: Console) -> None:
    """Print all of it."""
    show_head(plan, console)
    show_steps(plan, console)
    if plan.exact:
        heading("Traced: the real step on tensors without bytes. Context and margin are not in it, GiB", console)
        console.print(exact_table(plan))
    if over := [group for group in grouped(plan.rows) if group[0].levers]:
        show_levers(over[0], plan.hardware, console)
        if len(over) > 1:
            console.print("Of the others that do not fit, each needs less than this one.", highlight=False)
    if plan.provisions.stages:
        heading("GPU memory of other stages, GiB", console)
        console.print(stages_table(plan))
    show_amounts("Host memory, GiB", plan.provisions.host_bytes, plan.host_memory_bytes, console)
    show_amounts("Disk, GiB", plan.provisions.disk_bytes, plan.free_disk_bytes, console)
    show_time(plan, console)
    show_verdict(plan, console)


def heading(text: str, console: Console) -> None:
    console.print(f"\n[bold]{text}[/]", highlight=False)


def show_head(plan: Plan, console: Console) -> None:
    training, base = plan.run.training, plan.run.base
    denoisers = "one denoiser" if base.num_denoisers == 1 else f"{base.num_denoisers} denoisers"
    console.print(f"[bold]Plan of the run {plan.run.name}[/], calculated; nothing has been loaded", highlight=False)
    parameters = num_parameters(training.dims)
    console.print(
        f"  base    {base.title}, {denoisers} of {count(parameters)} parameters", highlight=False, markup=False
    )
    for expert in training.experts:
        carried = [
            r for n in range(training.dims.num_layers) for r in expert.lora.ranks(n, training.dims).values() if r
        ]
        ranks = ", ".join(map(str, sorted(set(carried))))
        weights = count(lora_parameters(training.dims, expert.lora))
        text = f"LoRA of rank {ranks} on {len(carried)} linears: {weights} weights, {expert.steps} steps"
        console.print(f"  {expert.name:<6}  {text}", highlight=False, markup=False)
    console.print(f"  dtypes  {lora_precision(training.precision)}", highlight=False, markup=False)
    hardware = plan.hardware
    number = f"{hardware.count} x " if hardware.count > 1 else ""
    memory = "" if hardware.memory_bytes is None else f", {gib(hardware.memory_bytes)} GiB"
    memory += " each" if hardware.count > 1 else ""
    for note in plan.run.notes:
        console.print(f"  note    {note}", highlight=False, markup=False)
    console.print(f"  on      {number}{hardware.title}{memory}", highlight=False, markup=False)


def count(number: float) -> str:
    """`14.29 B`, `153.4 M`, `660 k`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return str(int(number))


def grouped(rows: Sequence[BucketPlan]) -> list[list[BucketPlan]]:
    """Rows that differ in the expert's name or in the bucket's orientation only, together; the largest peak first."""
    groups: dict[tuple, list[BucketPlan]] = {}
    for row in rows:
        batch = row.bucket.batch
        key = (row.memory, row.seconds, batch.clip_tokens, batch.clips, batch.num_frames, row.bucket.checkpointing)
        groups.setdefault(key, []).append(row)
    return sorted(groups.values(), key=lambda group: -group[0].peak_bytes)


def experts(group: Sequence[BucketPlan]) -> str:
    return ", ".join(dict.fromkeys(row.expert for row in group))


def buckets(group: Sequence[BucketPlan]) -> list[str]:
    """Names of a group's buckets; of many that cost the same, the first and how many more."""
    names = list(dict.fromkeys(row.bucket.name for row in group))
    clips = group[0].bucket.batch.clips
    names[0] = f"{clips} x {names[0]}" if clips > 1 else names[0]
    return names if len(names) <= 2 else [names[0], f"and {len(names) - 1} alike"]


def title(group: Sequence[BucketPlan]) -> str:
    return f"{', '.join(buckets(group))} ({experts(group)})"


def show_steps(plan: Plan, console: Console) -> None:
    """Peak by part and pace of every bucket."""
    groups = grouped(plan.rows)
    policies = list(dict.fromkeys(group[0].bucket.checkpointing for group in groups))
    kind = "GPU memory" if plan.hardware.has_gpu else "Memory"
    kept = policies[0] if len(policies) == 1 else "below each bucket"
    heading(f"{kind} of a step, GiB (checkpointing: {kept})", console)
    table = plain_table()
    table.add_column("expert", no_wrap=True)
    table.add_column("bucket", no_wrap=True)
    for name in ("tokens", "base", "LoRA", "inputs", "work", "margin", "peak", "fits", "s/step"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups[:MOST_ROWS]:
        row, memory = group[0], group[0].memory
        parts = (memory.base + memory.compute_weights, memory.lora, memory.inputs, memory.working, row.margin_bytes)
        names = [*buckets(group), *([f"  {row.bucket.checkpointing}"] if len(policies) > 1 else [])]
        cells = [experts(group), "\n".join(names), f"{row.bucket.batch.tokens:,}", *map(gib, parts)]
        table.add_row(*cells, f"[bold]{gib(row.peak_bytes)}[/]", word(row.fits), pace(row.seconds))
    console.print(table)
    if len(groups) > MOST_ROWS:
        console.print(f"and {len(groups) - MOST_ROWS} kinds of smaller ones", highlight=False)
    console.print(f"[dim]{LEGEND}[/]", highlight=False)


def pace(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 9.95 else f"{seconds:.2g}"


def plain_table() -> Table:
    """No lines to get in the way of narrow terminals or logs."""
    return Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)


def show_levers(group: Sequence[BucketPlan], hardware: Hardware, console: Console) -> None:
    """What would make a bucket fit."""
    row = group[0]
    assert hardware.memory_bytes is not None
    over = gib(row.peak_bytes - hardware.memory_bytes)
    heading(f"{title(group)}: {over} GiB too large. What would help, GiB", console)
    table = plain_table()
    table.add_column("change", overflow="fold")
    for name in ("gives", "peak", "fits", "s/step"):
        table.add_column(name, justify="right", no_wrap=True)
    for lever in row.levers:
        change = lever.change.replace("[", r"\[")
        table.add_row(change, gib(lever.gives_bytes), gib(lever.peak_bytes), word(lever.fits), pace(lever.seconds))
    console.print(table)
    if not any(lever.fits for lever in row.levers):
        console.print("Nothing here makes it fit: take a smaller bucket or a larger GPU", highlight=False)


def stages_table(plan: Plan) -> Table:
    """GPU memory of what is not training."""
    table = plain_table()
    table.add_column("stage")
    table.add_column("needs", justify="right")
    table.add_column("fits", justify="right")
    for stage in plan.provisions.stages:
        table.add_row(stage.name, gib(stage.gpu_bytes), word(stage.fits))
    return table


def show_amounts(kind: str, needs: dict[str, float], there: int | None, console: Console) -> None:
    """Needs of one kind, and what there is of it on this machine."""
    heading(kind + ("" if there is None else f" (there are {gib(there)})"), console)
    table = plain_table()
    table.show_header = False
    table.add_column()
    table.add_column(justify="right")
    for name, size in needs.items():
        table.add_row(name, gib(size))
    console.print(table)


def exact_table(plan: Plan) -> Table:
    """Calculated beside traced."""
    table = plain_table()
    for name in ("expert", "bucket"):
        table.add_column(name, no_wrap=True)
    for name in ("peak", "traced", "ratio", "PFLOP", "traced", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in grouped(plan.rows):
        row = group[0]
        traced = plan.exact[f"{row.expert} {row.bucket.name}"]
        table.add_row(
            experts(group),
            "\n".join(buckets(group)),
            f"{row.memory.total / GIB:.3f}",
            f"{traced.peak_bytes / GIB:.3f}",
            f"{row.memory.total / traced.peak_bytes:.4f}",
            f"{row.flops.total / 1e15:.4g}",
            f"{traced.flops / 1e15:.4g}",
            f"{row.flops.total / traced.flops:.5f}",
        )
    return table


def show_time(plan: Plan, console: Console) -> None:
    """How long it takes, and by which rates."""
    heading("Time", console)
    low, high = (duration(seconds) for seconds in plan.seconds)
    steps = sum(expert.steps for expert in plan.run.training.experts)
    spread = high if low == high else f"{low} to {high}, by how many clips take which bucket"
    table = plain_table()
    table.show_header = False
    table.add_row(f"{steps} steps", spread)
    sampling = plan.run.sampling
    if sampling.clips:
        table.add_row(f"{sampling.clips} clips of previews and evaluation", duration(plan.provisions.sampling_seconds))
    console.print(table)
    rates = plan.hardware.rates
    console.print(
        f"[dim]Calculated from {rates.linear_tflops:g} TFLOP/s in linears and {rates.attention_tflops:g} in attention, "
        f"stated for {rates.name}, not measured; encoding clips is not counted.[/]",
        highlight=False,
    )


def show_verdict(plan: Plan, console: Console) -> None:
    """The last line."""
    if plan.faults:
        named = "; ".join(plan.faults[:4]) + (f"; and {len(plan.faults) - 4} more" if len(plan.faults) > 4 else "")
        console.print(f"\n[bold red]Does not fit[/]: {named}", highlight=False)
    elif plan.hardware.has_gpu:
        console.print("\n[bold green]Fits[/]", highlight=False)
    else:
        console.print("\n[bold green]Fits[/] this machine; --gpu 24GiB says whether it fits a GPU", highlight=False)
