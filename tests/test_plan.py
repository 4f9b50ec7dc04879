"""The planner against traces of the real step, and its command as a person meets it."""

import io
import json
import resource
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from data.batches import experts_of
from train.hardware import GIB, GPU_CLASSES, class_named, parse_gpu
from train.plan import main, make_parser, make_plan
from train.plan_numbers import run_numbers, sees
from train.plan_view import duration, gib, show
from train.planned_base import base_facts
from train.planning import BucketNumbers, ExpertNumbers, TrainingNumbers, plan_training
from wan_finetune.activations import Precision, block_saved
from wan_finetune.costs import (
    LoraShape,
    MicroBatch,
    base_bytes,
    block_linears,
    forward_flops,
    lora_parameters,
    num_parameters,
    step_flops,
)
from wan_finetune.encoders import encode_bytes, tile_side
from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder
from wan_finetune.spec import KNOWN_BASES, LORA_TARGETS, TransformerDims
from wan_finetune.step_memory import MemoryPolicy, step_memory, vae_encode_bytes, weight_bytes

ROOT = Path(__file__).resolve().parent.parent
A14B = TransformerDims()
TINY = TransformerDims(num_layers=3, num_heads=2, head_dim=12, ffn_dim=40, text_dim=48, freq_dim=16)
ATTENTION = tuple(target for target in LORA_TARGETS if target.startswith("attn"))
R32 = LoraShape(rank=32, targets=LORA_TARGETS)
STILL = MicroBatch(clips=1, width=512, height=512, num_frames=1)
VIDEO = MicroBatch(clips=1, width=832, height=480, num_frames=81)
SMALL = MicroBatch(clips=2, width=64, height=32, num_frames=9)
POLICIES = ("none", "selective", "full")


@pytest.fixture(scope="module")
def tracing():
    from wan_finetune import tracing

    return tracing


def layers(dims: TransformerDims, count: int) -> TransformerDims:
    return replace(dims, num_layers=count)


def test_an_expert_has_its_published_number_of_parameters():
    # 14,288,491,584: counted from the weights of Wan2.2-T2V-A14B; 1,418,996,800: of Wan2.1-T2V-1.3B.
    assert num_parameters(A14B) == 14_288_491_584
    assert num_parameters(KNOWN_BASES["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].dims) == 1_418_996_800
    assert lora_parameters(A14B, R32) == 153_354_240
    assert sum(rank > 0 for layer in range(40) for rank in R32.ranks(layer, A14B).values()) == 400


def test_parameters_are_the_models_own(tracing):
    lora = LoraShape(rank=4, targets=("to_q", "blocks.1.ffn.net.2"))
    model = tracing.build(TINY, lora, tracing.TraceSettings())
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad is trained) for trained in (False, True)]
    assert counts == [num_parameters(TINY), lora_parameters(TINY, lora)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("dims", "batch", "lora"),
    [
        (layers(A14B, 2), VIDEO, R32),
        (layers(A14B, 2), STILL, LoraShape(rank=128, targets=ATTENTION)),
        pytest.param(TINY, SMALL, LoraShape(rank=8, targets=LORA_TARGETS), marks=pytest.mark.slow),
        pytest.param(
            TINY, replace(SMALL, num_frames=1), LoraShape(rank=5, targets=("ffn.net.2",)), marks=pytest.mark.slow
        ),
    ],
    ids=["video-r32", "still-attention-r128", "tiny-two-videos-r8", "tiny-stills-one-target"],
)
def test_operations_are_those_of_the_flop_counter(tracing, policy, dims, batch, lora):
    counted = tracing.trace_flops(dims, lora, batch, tracing.TraceSettings(checkpointing=policy))
    assert step_flops(batch, dims, lora, policy).total / counted == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [2, 3])
def test_the_peak_is_that_of_the_traced_step(tracing, policy, count):
    dims = layers(A14B, count)
    traced, _, _ = tracing.trace_memory(dims, R32, VIDEO, tracing.TraceSettings(checkpointing=policy))
    planned = step_memory(VIDEO, dims, R32, Precision(), MemoryPolicy(checkpointing=policy))
    assert planned.total / traced == pytest.approx(1.0, abs=0.01)
    # Weights are the same on both sides; what is left must agree as well, or a large base would hide a fault.
    assert (planned.total - planned.base) / (traced - planned.base) == pytest.approx(1.0, abs=0.01)


VARIANTS = {
    "attention": (dict(), LoraShape(rank=64, targets=ATTENTION), VIDEO, False),
    "feed-forward": (dict(), LoraShape(rank=32, targets=("ffn.net.0.proj", "ffn.net.2")), VIDEO, False),
    "still": (dict(), R32, STILL, True),
    "two-clips": (dict(), R32, replace(VIDEO, num_frames=17, clips=2), True),
    "fp32": (dict(base_bytes=4, autocast=False), R32, replace(VIDEO, num_frames=33), False),
    "fp32-base": (dict(base_bytes=4), R32, replace(VIDEO, num_frames=33), False),
}


# torch says that RMSNorm takes another kernel where bf16 meets fp32 weights, as autocast over an fp32 base does.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_peak_is_right_for_other_settings_as_well(tracing, policy, variant):
    import torch

    options, lora, batch, accumulated = VARIANTS[variant]
    precision = Precision(**options)
    settings = tracing.TraceSettings(
        checkpointing=policy,
        base_dtype=torch.bfloat16 if precision.base_bytes == 2 else torch.float32,
        autocast=precision.autocast,
        accumulated=accumulated,
    )
    dims = layers(A14B, 2)
    traced, _, _ = tracing.trace_memory(dims, lora, batch, settings)
    planned = step_memory(
        batch, dims, lora, precision, MemoryPolicy(checkpointing=policy, accumulates=accumulated)
    ).total  # fmt: skip
    assert planned / traced == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
def test_two_and_four_layers_say_what_five_take(tracing):
    dims, settings = layers(TINY, 5), tracing.TraceSettings(checkpointing="full")
    lora = LoraShape(rank=4, targets=("attn1.to_q",))
    assert tracing.trace_at_depth(dims, lora, SMALL, settings) == tracing.trace_step(dims, lora, SMALL, settings)


def test_the_tracker_counts_a_storage_once_and_until_it_is_freed(tracing):
    import torch

    with tracing.AllocationTracker() as tracker:
        first = torch.empty(1000)
        view = first.view(10, 100)
        second = first + 1
        assert tracker.live_bytes == tracker.peak_bytes == 8000
        del first
        assert tracker.live_bytes == 8000
        del view, second
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 8000)


def test_fake_tensors_allocate_what_real_ones_do(tracing, monkeypatch):
    lora, settings = LoraShape(rank=4, targets=("attn2.to_k", "ffn.net.2")), tracing.TraceSettings()
    fake, _, _ = tracing.trace_memory(TINY, lora, SMALL, settings)
    monkeypatch.setattr(tracing, "fake_tensors", nullcontext)
    real, _, _ = tracing.trace_memory(TINY, lora, SMALL, settings)
    assert fake == pytest.approx(real, rel=1e-3)


def test_what_is_kept_smaller_or_elsewhere_is_not_on_the_gpu():
    def parts(**changes):
        return step_memory(VIDEO, A14B, R32, Precision(), MemoryPolicy(**changes))

    full = parts()
    matrices = 40 * sum(wide * high for wide, high in block_linears(A14B).values())
    assert full.base - parts(quantization="fp8").base == matrices
    assert full.base - parts(quantization="nf4").base == pytest.approx(matrices * (2 - 0.5 - 1 / 64 - 1 / 4096))
    assert parts(stream_blocks=40).base < 0.5 * GIB and parts(stream_blocks=40).compute_weights < 1.5 * GIB
    assert parts(shards=4).base == full.base / 4
    assert parts(resident_denoisers=2).base == 2 * full.base
    stream = VIDEO.tokens * 5120 * 2
    assert full.inputs == 40 * stream and parts(checkpointing="offloaded").inputs == 2 * stream
    assert parts(checkpointing="selective").inputs - full.inputs == 39 * (stream + VIDEO.tokens * 40 * 4)
    # AdamW's two fp32 states and the weight; 8-bit states; gradients of all blocks with accumulation.
    assert (full.lora, parts(optimizer_bytes=2).lora) == (12 * 153_354_240, 6 * 153_354_240)
    assert parts(accumulates=True).lora == 16 * 153_354_240


def test_the_autoencoders_memory_is_the_encoders_own_figure():
    for width, height, frames in ((832, 480, 81), (1280, 720, 81), (1920, 1088, 33)):
        side = tile_side(width, height)
        assert vae_encode_bytes(width, height, frames) == pytest.approx(
            encode_bytes(side * side if side else width * height, frames), abs=1
        )


def test_sampling_costs_the_forward_pass_of_the_flop_counter(tracing):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = tracing.build(TINY, LoraShape(rank=1, targets=("to_q",)), tracing.TraceSettings(checkpointing="none"))
    model.disable_adapters()
    # On the meta device attention falls apart into its two products, which the counter knows.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        latents, text = torch.empty(2, 16, 3, 4, 8), torch.empty(2, 512, TINY.text_dim)
        model.float()(hidden_states=latents, timestep=torch.empty(2), encoder_hidden_states=text)
    assert forward_flops(SMALL, TINY).total == counter.get_total_flops()


@pytest.mark.parametrize(
    ("text", "count", "gibibytes", "rates"),
    [
        ("24GiB", 1, 24, "RTX 4090"),
        ("4x80GiB", 4, 80, "H100"),
        ("4 x 80 GiB", 4, 80, "H100"),
        ("8GiB", 1, 8, "RTX 4080"),
        ("H200", 1, 140, "H200"),
        ("2xRTX 4090", 2, 24, "RTX 4090"),
        ("24576MiB", 1, 24, "RTX 4090"),
    ],
)
def test_a_gpu_is_named_by_its_memory_or_its_kind(text, count, gibibytes, rates):
    hardware = parse_gpu(text)
    assert (hardware.count, hardware.memory_bytes, hardware.rates.name) == (count, gibibytes * GIB, rates)


@pytest.mark.parametrize("text", ["", "0x24GiB", "24", "0GiB", "-3GiB", "GTX 8800", "x"])
def test_another_gpu_is_refused_with_what_is_known(text):
    with pytest.raises(InputError, match="--gpu"):
        parse_gpu(text)


def test_the_drivers_names_are_recognised():
    names = {
        "NVIDIA L40S": "L40S",
        "NVIDIA L4": "L4",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
        "NVIDIA RTX A6000": "A6000",
        "NVIDIA A100-SXM4-80GB": "A100",
    }
    assert {name: class_named(name).name for name in names} == names
    assert class_named("Quadro K4000") is None
    assert len({gpu.name for gpu in GPU_CLASSES}) == len(GPU_CLASSES)


def numbers(batch: MicroBatch, policy: MemoryPolicy) -> TrainingNumbers:
    bucket = BucketNumbers(name="x", batch=batch, checkpointing=policy.checkpointing)
    expert = ExpertNumbers(name="high", steps=100, lora=R32, policy=policy, buckets=(bucket,))
    return TrainingNumbers(dims=A14B, precision=Precision(), gradient_accumulation=1, experts=(expert,))


@pytest.mark.parametrize("gpu", ["12GiB", "24GiB", "48GiB", "4x60GiB"])
def test_levers_give_what_a_plan_with_them_shows(gpu):
    hardware = parse_gpu(gpu)
    batch = replace(VIDEO, width=1280, height=720)
    [row] = plan_training(numbers(batch, MemoryPolicy()), hardware)
    assert row.fits is False and row.levers
    changes = {
        'memory.quantization = "nf4"': dict(quantization="nf4"),
        "memory.stream_blocks = 40": dict(stream_blocks=40),
        'memory.checkpointing = "offloaded"': dict(checkpointing="offloaded"),
        f"FSDP over the {hardware.count} GPUs": dict(shards=hardware.count),
    }
    known = [lever for lever in row.levers if lever.change in changes]
    assert len(known) == (4 if hardware.count > 1 else 3)
    for lever in known:
        [changed] = plan_training(numbers(batch, MemoryPolicy(**changes[lever.change])), hardware)
        assert changed.peak_bytes == pytest.approx(row.peak_bytes - lever.gives_bytes)
        assert (changed.fits, changed.seconds) == (lever.fits, lever.seconds)


def test_where_no_single_setting_is_enough_the_quickest_set_that_fits_is_named():
    # 720p x 81 within 24 GiB: inputs alone are 28.8 GiB, the base 26.7.
    batch = replace(VIDEO, width=1280, height=720)
    [row] = plan_training(numbers(batch, MemoryPolicy()), parse_gpu("48GiB"))
    settings, last = [lever for lever in row.levers[:-1] if "memory." in lever.change], row.levers[-1]
    assert settings and not any(lever.fits for lever in settings)
    assert last.fits and " + " in last.change
    # A length that fits is the longest: one step longer would not.
    streamed, hardware = MemoryPolicy(stream_blocks=40), parse_gpu("32GiB")
    [row] = plan_training(numbers(batch, streamed), hardware)
    frames = next(int(lever.change.split()[3]) for lever in row.levers if lever.change.startswith("a bucket of"))
    for tried, fits in ((frames, True), (frames + 4, False)):
        [changed] = plan_training(numbers(replace(batch, num_frames=tried), streamed), hardware)
        assert changed.fits is fits


def test_streaming_costs_time_only_where_computing_cannot_hide_it():
    hardware = parse_gpu("24GiB")

    def seconds(batch, **policy):
        return plan_training(numbers(batch, MemoryPolicy(**policy)), hardware)[0].seconds

    assert seconds(VIDEO, stream_blocks=40) == seconds(VIDEO)
    assert seconds(STILL, stream_blocks=40) > 2 * seconds(STILL)
    assert seconds(VIDEO) > seconds(VIDEO, checkpointing="selective") > seconds(VIDEO, checkpointing="none")


def test_which_expert_sees_which_bucket_is_the_data_rooms_rule(small_config):
    config = small_config('data.sources=[{path="a"}, {path="b", experts=["high"]}]')
    for index, source in enumerate(config.data.sources):
        for still in (True, False):
            for name in ("high", "low", "single"):
                assert sees(source, name, still) == (name in experts_of(config.data, index, still))


@pytest.fixture
def small_config(tmp_path):
    from train.config import Config
    from wan_finetune.settings import load_settings

    def load(*overrides: str) -> Config:
        return load_settings(Config, ROOT / "configs" / "pocket.toml", list(overrides))

    return load


def test_stills_are_planned_for_the_low_noise_expert_alone(small_config):
    run = run_numbers(small_config('data.buckets=["64x64x9", "64x64x1"]'))
    assert {e.name: [b.name for b in e.buckets] for e in run.training.experts} == {
        "high": ["64x64x9"],
        "low": ["64x64x9", "64x64x1"],
    }
    with pytest.raises(InputError, match=r"data.buckets: none is for the high-noise expert"):
        run_numbers(small_config('data.buckets=["64x64x1"]'))
    with pytest.raises(InputError, match=r"train.experts: the base has no 'single' expert"):
        run_numbers(small_config("train.experts=['single']", "single.steps=1", "single.learning_rate=1e-4"))


def test_patterns_of_lora_are_planned_module_by_module(small_config, tracing):
    run = run_numbers(small_config("lora.rank_pattern={'attn2.to_k' = 16}", "lora.exclude=['blocks.4.ffn.net.2']"))
    dims, lora = run.training.dims, run.training.experts[0].lora
    assert not lora.is_uniform(dims)
    model = tracing.build(dims, lora, tracing.TraceSettings())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora_parameters(dims, lora)
    assert lora.ranks(0, dims)["attn2.to_k"] == 16 and lora.ranks(4, dims)["ffn.net.2"] == 0
    [note] = run_numbers(small_config("lora.dora=true", "train.experts=['low']")).notes
    assert "lora.dora" in note


def test_a_local_base_is_read_from_its_own_files(small_config):
    facts = base_facts("pocket", "pocket")
    config = json.loads((base_folder("pocket") / "transformer" / "config.json").read_text())
    assert (facts.dims.num_layers, facts.dims.ffn_dim) == (config["num_layers"], config["ffn_dim"])
    assert (facts.num_denoisers, facts.is_local) == (2, True)
    with pytest.raises(InputError, match="are not known before it has been downloaded"):
        base_facts("somebody/something", "somebody/something")


def run_main(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr("train.hardware.nvidia_gpus", lambda: [])


def test_without_a_gpu_the_steps_are_in_host_memory(capsys, without_gpu):
    def plan(*overrides: str) -> dict:
        return json.loads(run_main(capsys, "--config", ROOT / "configs" / "pocket.toml", "--json", *overrides)[1])

    large, small = plan("train.batch_size=64"), plan("train.batch_size=32")
    peaks = [found["steps"][0]["peak_bytes"] for found in (large, small)]
    assert large["host_bytes"]["training"] - small["host_bytes"]["training"] == peaks[0] - peaks[1] > 0
    assert large["stages"] == [] and large["steps"][0]["fits"] is None


def test_the_smallest_gpu_that_is_there_is_planned_for(capsys, monkeypatch):
    there = [("NVIDIA H100 80GB HBM3", 80 * GIB), ("NVIDIA L40S", 40 * GIB)]
    monkeypatch.setattr("train.hardware.nvidia_gpus", lambda: there)
    code, out, _ = run_main(capsys, "--config", ROOT / "configs" / "a14b.toml", "--json")
    plan = json.loads(out)
    assert (plan["gpu"]["title"], plan["gpu"]["count"], plan["rates"]["name"]) == ("NVIDIA L40S", 2, "L40S")
    assert plan["gpu"]["memory_bytes"] == 40 * GIB and {row["fits"] for row in plan["steps"]} == {False, True}
    # This machine's own memory is asked as well, which two processes and two denoisers fill.
    monkeypatch.setattr("train.hardware.host_memory_bytes", lambda: 60 * GIB)
    code, out, _ = run_main(capsys, "--config", ROOT / "configs" / "a14b.toml", "--json")
    assert code == 1 and "host memory while previews" in json.loads(out)["does_not_fit"]


def test_the_command_plans_both_configurations_that_are_shipped(capsys, without_gpu):
    code, out, _ = run_main(capsys, "--config", ROOT / "configs" / "pocket.toml")
    assert code == 0 and "Fits this machine" in out and "64x64x9" in out
    code, out, _ = run_main(capsys, "--config", ROOT / "configs" / "a14b.toml", "--gpu", "24GiB")
    assert code == 1 and "Does not fit" in out and "What would help" in out
    code, out, _ = run_main(capsys, "--config", ROOT / "configs" / "a14b.toml", "--gpu", "H200", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["fits"] and plan["does_not_fit"] == []
    assert {row["expert"] for row in plan["steps"]} == {"high", "low"}
    for row in plan["steps"]:
        assert row["peak_bytes"] == pytest.approx(sum(row["parts_bytes"].values()) + row["margin_bytes"])


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_keeps_to_the_terminal_and_needs_no_colour(width):
    arguments = make_parser().parse_args(["--config", str(ROOT / "configs" / "a14b.toml"), "--gpu", "24GiB"])
    plan = make_plan(arguments)
    # One bucket has a policy of its own.
    other = replace(plan.rows[-1], bucket=replace(plan.rows[-1].bucket, checkpointing="offloaded"))
    page = io.StringIO()
    show(replace(plan, rows=[*plan.rows[:-1], other]), Console(file=page, width=width))
    lines = page.getvalue().splitlines()
    assert any(line.split() == ["offloaded"] for line in lines)
    assert max(map(len, lines)) <= width and "\x1b" not in page.getvalue() and "…" not in page.getvalue()
    cells = next(line.split() for line in lines if line.startswith("high, low 832x480x49"))
    assert cells[-2] == "NO" and cells[3] == "20,280"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "fast"], "--gpu 'fast'"),
        (["lora.rang=8"], "did you mean rank?"),
        (["model.base=nobody/nothing"], "are not known before it has been downloaded"),
        (["lora.targets=['proj_out']"], "lora.targets: 'proj_out' matches no module"),
        (["model.base=/nowhere"], "neither a folder nor a Hub repository"),
    ],
)
def test_bad_input_ends_with_one_message_and_exit_2(capsys, arguments, message):
    code, out, err = run_main(capsys, "--config", ROOT / "configs" / "pocket.toml", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err


def test_a_trace_is_printed_beside_the_calculation(capsys):
    # Five layers, extrapolated from two and four.
    few = ["train.batch_size=1", "lora.targets=['attn1.to_q', 'ffn.net.2']"]
    code, out, _ = run_main(capsys, "--config", ROOT / "configs" / "pocket.toml", "--exact", "--json", *few)
    assert code == 0
    for row in json.loads(out)["steps"]:
        assert row["flops"] == row["exact"]["flops"]
        # A few megabytes, most of them the text's 512 rows beside 48 tokens, whose moments are reckoned roughly.
        assert row["peak_bytes"] / row["exact"]["peak_bytes"] == pytest.approx(1.0, abs=0.1)


def fresh(*arguments: str) -> tuple[float, set[str]]:
    """Processor seconds of a new process with these arguments, and the heavy packages that it imported."""
    code = (
        "import sys\nfrom train.plan import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', *sorted({'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    heavy = result.stdout.splitlines()[-1].split()
    assert heavy[0] == "HEAVY"
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, set(heavy[1:])


@pytest.mark.parametrize(
    ("arguments", "most_seconds"),
    [(["--help"], 0.3), (["--config", "configs/a14b.toml", "--gpu", "24GiB"], 0.7)],
    ids=["help", "plan"],
)
def test_the_answer_comes_at_once_and_without_torch(arguments, most_seconds):
    seconds, heavy = fresh(*arguments)
    assert heavy == set()
    # A busy machine makes a process slower, never faster.
    for _ in range(4):
        if seconds > most_seconds:
            seconds = min(seconds, fresh(*arguments)[0])
    assert seconds <= most_seconds


def test_figures_are_written_as_a_person_says_them():
    said = [duration(s) for s in (0.45, 38, 600, 3 * 3600, 4 * 86400)]
    assert said == ["0.45 s", "38 s", "10 min", "3 h", "4 days"]
    assert [gib(size * GIB) for size in (0, 0.011, 26.67, 1234)] == ["0.0", "0.011", "26.7", "1234"]


def test_a_lean_block_takes_two_thirds_of_a_stock_one():
    # 334 KB a token in diffusers' block, of which passing tensors are a part; a checkpointed block is a lean one.
    stock, lean = (
        block_saved(VIDEO, A14B, R32, R32.ranks(1, A14B), Precision(), inputs=True, lean=lean) / VIDEO.tokens
        for lean in (False, True)
    )
    assert lean < 0.65 * stock < 0.65 * 334_000
    working = step_memory(VIDEO, A14B, R32, Precision(), MemoryPolicy()).working / VIDEO.tokens
    assert lean < working < 240_000
    assert weight_bytes(A14B, R32, Precision(), MemoryPolicy())[0] == base_bytes(A14B, 2, "none")
