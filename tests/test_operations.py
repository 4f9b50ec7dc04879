"""Scaling and resizing adapters, and what every operation refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.lora_material import delta, deltas, error_in, make_adapter, relative, write, write_pair
from tests.test_adapters import changed_output
from wan_finetune.cli import main
from wan_finetune.errors import InputError
from wan_finetune.experts import HIGH, LOW
from wan_finetune.export import probe_output
from wan_finetune.formats import diffusers as diffusers_format
from wan_finetune.formats.reading import read_expert
from wan_finetune.operations.resizing import resize
from wan_finetune.operations.scaling import scale
from wan_finetune.pipeline import load_pipeline

MODULES = [f"blocks.{block}.{name}" for block in range(2) for name in ("attn1.to_q", "ffn.net.0.proj")]


def refusals(tmp_path: Path) -> dict[str, list[str]]:
    """Message -> the command that ends with it."""
    pair = str(write_pair(tmp_path / "pair", 1))
    other = str(write_pair(tmp_path / "other", 2, rank=3, about={}))
    high = str(write(tmp_path / "high", make_adapter("high", 3)))
    low = str(write(tmp_path / "low", make_adapter("low", 4)))
    dora = str(write_pair(tmp_path / "dora", 5, dora=True))
    foreign = str(write_pair(tmp_path / "foreign", 6, about={"base": "wide"}))
    single = str(write(tmp_path / "single", make_adapter("single", 7)))
    small = make_adapter("high", 8, about={}, targets=("attn1.to_q",))
    small = replace(small, weights={k: v[:, :12] if ".lora_A." in k else v for k, v in small.weights.items()})
    narrow = str(write(tmp_path / "narrow", small))
    wide = str(write_pair(tmp_path / "wide", 9, rank=600, targets=("attn1.to_q",), about={}))
    empty = str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    pruning = ["--method", "ties"]
    return {
        "merge takes two adapters or more": ["merge", pair],
        "--weights: 1 for 2 adapters; give one for each": ["merge", pair, other, "--weights", "1"],
        "a weight of 0 merges nothing": ["merge", pair, other, "--weights", "1", "0"],
        "a weight of nan merges nothing": ["merge", pair, other, "--weights", "1", "nan"],
        "no adapters in common": ["merge", high, low],
        "is a DoRA, whose magnitudes do not add": ["merge", pair, dora],
        "of different bases, 'tiny' and 'wide'": ["merge", pair, foreign],
        "base with one denoiser and some for a base with two": ["merge", pair, single, single],
        "is 12 to 24 and in another adapter 24 to 24": ["merge", pair, narrow],
        f"{empty}: has no high_noise.safetensors or low_noise.safetensors or ": ["merge", pair, empty],
        "absent: no such adapter file or folder": ["merge", pair, str(tmp_path / "absent")],
        "cancel each other out in blocks.0": ["merge", pair, pair, "--weights", "1", "-1"],
        "the result has rank 1200 and 1024 is the most": ["merge", wide, wide],
        'method "ties" prunes; say with density': ["merge", pair, pair, *pruning],
        "--density: Input should be less than 1": ["merge", pair, pair, *pruning, "--density", "1"],
        'method "linear" keeps everything': ["merge", pair, other, "--density", "0.5"],
        'method "linear" has the rank that comes out': ["merge", pair, other, "--rank", "4"],
        "--rank: Input should be less than or equal to 1024": [
            "merge",
            pair,
            pair,
            "--method",
            "svd",
            "--rank",
            "2000",
        ],
        'adds factors of one rank, and blocks.0.attn1.to_k has 3 and 4; use "ties_svd"': [
            *["merge", pair, other, *pruning, "--density", "0.5"]
        ],
        "--rank: 4 is out of range; the adapter has rank 4, so 1 to 3": ["resize", pair, "--rank", "4"],
        "--rank: 0 is out of range": ["resize", pair, "--rank", "0"],
        "--energy: 1 is out of range": ["resize", pair, "--energy", "1"],
        "--strength: 0 must be above 0": ["scale", pair, "--strength", "0", "1"],
        "--strength: -1 must be above 0": ["scale", pair, "--strength", "-1"],
        "--strength takes one number, or two": ["scale", pair, "--strength", "1", "2", "3"],
    }


def test_bad_input_ends_with_one_message_and_exit_2_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    for message, command in refusals(tmp_path).items():
        assert main([*command, "--out", str(out)]) == 2, message
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err, said.err
        assert not said.out and not out.exists() and not list(tmp_path.glob(".*")), message
    taken = tmp_path / "pair"
    before = (taken / HIGH.file_name).read_bytes()
    for command in (["scale", str(taken), "--strength", "2"], ["resize", str(taken), "--rank", "1"]):
        assert main([*command, "--out", str(taken)]) == 2
        assert f"{taken}: already holds high_noise.safetensors; give another folder" in capsys.readouterr().err
    assert (taken / HIGH.file_name).read_bytes() == before


def test_a_write_that_fails_leaves_nothing_and_other_files_of_the_folder_stay(tmp_path, monkeypatch):
    source = write_pair(tmp_path / "pair", 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")

    def fail(*arguments) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("wan_finetune.export.comfyui.write", fail)
        with pytest.raises(InputError, match=r"out: cannot be written \(disk full\); give another folder"):
            scale(source, out, (0.5, 0.5))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_relative_to(out)) == ["notes.txt", "out"]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(InputError, match=r"notes\.txt/in: cannot be written"):
        scale(source, out / "notes.txt" / "in", (0.5, 0.5))
    scale(source, out, (0.5, 0.5))
    assert (out / "notes.txt").read_text() == "mine" and (out / "comfyui" / LOW.file_name).is_file()


def test_a_file_that_is_read_back_as_another_adapter_is_not_published(tmp_path, monkeypatch):
    source = write_pair(tmp_path / "pair", 1)
    save = diffusers_format.write
    monkeypatch.setattr(diffusers_format, "write", lambda path, adapter: save(path, replace(adapter, alpha=1.0)))
    with pytest.raises(RuntimeError, match="what was read back is not what was trained"):
        scale(source, tmp_path / "out", (0.5, 0.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair"]


# Scaling.


@pytest.mark.parametrize("fields", [{}, {"rslora": True, "alphas": {MODULES[0]: 3.0}}, {"dora": True}], ids=str)
def test_a_baked_strength_is_the_strength_and_no_tensor_changes(tiny_base, tmp_path, fields):
    source = write_pair(tmp_path / "pair", 1, **fields)
    assert main(["scale", str(source), "--strength", "0.8", "0.5", "--out", str(tmp_path / "out")]) == 0
    live = load_pipeline(str(tiny_base), source, strength=(0.8, 0.5), device="cpu")
    baked = load_pipeline(str(tiny_base), tmp_path / "out", device="cpu")
    for expert, strength in ((HIGH, 0.8), (LOW, 0.5)):
        before, after = read_expert(source, expert.name), read_expert(tmp_path / "out", expert.name)
        assert all(torch.equal(value, after.weights[name]) for name, value in before.weights.items())
        assert all(after.scale(m) == pytest.approx(strength * before.scale(m), rel=1e-15) for m in before.modules)
        assert after.about["operation"] == f"scale {strength:g}" and after.about["trigger"] == "look 1"
        outputs = [probe_output(getattr(pipe, expert.component), tiny_base, before) for pipe in (live, baked)]
        assert torch.allclose(*outputs, atol=1e-6)


# Other ranks.


def truncated(matrix: torch.Tensor, keep: Callable[[torch.Tensor], int]) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    rank = keep(s)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def test_a_resized_adapter_is_the_best_of_its_rank_and_its_error_is_told(tmp_path):
    source = write_pair(tmp_path / "pair", 1, rank=6, rslora=True, ranks={MODULES[0]: 2})
    lines = resize(source, tmp_path / "out", rank=3)
    for expert in (HIGH, LOW):
        before, after = read_expert(source, expert.name), read_expert(tmp_path / "out", expert.name)
        assert after.rank == 3 and after.ranks == {MODULES[0]: 2}
        wanted = torch.cat([truncated(delta(before, m), lambda s: 3).flatten() for m in before.modules])
        assert relative(deltas(after), wanted) < 1e-6
        told = error_in(lines, expert.title)
        assert told == pytest.approx(relative(deltas(after), deltas(before)), rel=0.06)
        assert f"{1 - relative(deltas(after), deltas(before)) ** 2:.2%} of the energy kept" in "\n".join(lines)


def test_energy_gives_each_module_the_lowest_rank_that_holds_it(tmp_path):
    adapter = make_adapter("high", 1, rank=8)
    for number, module in enumerate(adapter.modules):
        # Some modules need few directions.
        adapter.weights[f"{module}.lora_B.weight"][:, 1 + number % 8 :] *= 0.01
    source = write(tmp_path / "pair", adapter)
    resize(source, tmp_path / "out", energy=0.95)
    after = read_expert(tmp_path / "out", "high")
    assert len({after.rank, *after.ranks.values()}) > 2
    for module in adapter.modules:
        s = torch.linalg.svdvals(delta(adapter, module)) ** 2
        rank = after.ranks.get(module, after.rank)
        assert float(s[:rank].sum() / s.sum()) >= 0.95 > float(s[: rank - 1].sum() / s.sum())


def test_a_resized_dora_keeps_its_magnitudes_and_without_loss_its_output(tiny_base, tmp_path):
    adapter = make_adapter("low", 1, rank=8, dora=True)
    for module in adapter.modules:
        adapter.weights[f"{module}.lora_B.weight"][:, 4:] = 0
    resize(write(tmp_path / "pair", adapter), tmp_path / "out", rank=4)
    outputs = []
    for folder in (tmp_path / "pair", tmp_path / "out"):
        pipe = load_pipeline(str(tiny_base), folder, device="cpu")
        outputs.append(probe_output(pipe.transformer_2, tiny_base, adapter))
    assert torch.allclose(*outputs, atol=1e-5)
    plain = replace(adapter, dora=False, weights={k: v for k, v in adapter.weights.items() if ".lora_m" not in k})
    assert not torch.allclose(outputs[1], changed_output(tiny_base, LOW, plain), atol=1e-3)
