"""Adapter files that no one should load: one message with file, fault and remedy, exit code 2, soon and in little room.

All run in one fresh process, which measures each by its time and the memory that it leaves itself needing.
"""

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.adapter_material import make_adapter
from wan_finetune.errors import InputError
from wan_finetune.formats.inspection import as_json, inspect
from wan_finetune.formats.reading import FORMATS

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS, MOST_BYTES = 2.0, 200 << 20

PROBE = """
import contextlib, io, json, resource, sys, time
from pathlib import Path
from wan_finetune.cli import main
import wan_finetune.formats.inspection  # what takes its time once, and is no part of a case

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for path in json.loads(sys.argv[1]):
    said, began, before = io.StringIO(), time.perf_counter(), peak()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["inspect", path, *([] if "no-expert" in path else ["--expert", "high"])])
    print(json.dumps([code, said.getvalue(), time.perf_counter() - began, peak() - before]), flush=True)
print(json.dumps(sorted({"diffusers", "peft"} & set(sys.modules))))
"""

B = "blocks.0.attn1.to_q.lora_B.weight"
A = "blocks.0.attn1.to_q.lora_A.weight"


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def raw(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(shape: list[int], end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def changed(**changes) -> dict[str, torch.Tensor]:
    """A sound file's tensors with some of them another, `None` for left out."""
    tensors, _ = FORMATS["diffusers"].encode(make_adapter("high"))
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def zip_of_pickle(mark: Path) -> bytes:
    """As torch.save makes them."""
    path = mark.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(mark)))
    return path.read_bytes()


def files_of(folder: Path) -> dict[str, tuple[bytes | dict[str, torch.Tensor], str]]:
    """Name -> content, and what the message must say of fault and remedy."""
    sound = changed()
    q, up = f"transformer.{A}", f"transformer.{B}"
    many = {f"transformer.blocks.0.attn1.to_q.x{number}": tensor([1], 4) for number in range(900_000)}
    some = {f"k{number}": tensor([1], 4) for number in range(20_001)}
    nest = b"[" * 2_000_000
    # Two hundred bytes that claim a rank of 2^24, which PEFT would make room for.
    huge = {name: tensor(shape, 0) for name, shape in ((q, [2**24, 0]), (up, [0, 2**24]))}
    claim = raw(json.dumps(huge, separators=(",", ":")).encode())
    assert len(claim) < 230
    zeros = {name: torch.zeros_like(value) for name, value in sound.items() if "lora_B" in name}
    config = {"transformer.r": 2**24, "transformer.lora_alpha": 4, "transformer.target_modules": ["attn1.to_q"]}
    stripped = {name.removeprefix("transformer."): value for name, value in sound.items()}
    return {
        "missing.safetensors": (b"", "header is missing, cut or oversized); copy or download it again"),
        "text.safetensors": (b"<html>404 not found</html>", "header is missing, cut or oversized"),
        "header-bomb.safetensors": (struct.pack("<Q", 2**62) + b"{}", "oversized"),
        "long-header.safetensors": (raw(b" " * (5 << 20)), "oversized"),
        "not-json.safetensors": (raw(b"{]  "), "its header is not JSON"),
        "deep.safetensors": (raw(nest), "its header is not JSON"),
        "list.safetensors": (raw([1, 2]), "its header is no table"),
        "number.safetensors": (raw(b"12  "), "its header is no table"),
        "900k-keys.safetensors": (raw(many), "oversized"),
        "20k-keys.safetensors": (raw(some, b"1234"), "has 20001 tensors, more than any adapter"),
        "twice.safetensors": (
            raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}'),
            "names one thing twice",
        ),
        "past-the-end.safetensors": (raw({q: tensor([4, 24], 384)}, b"12"), "damaged safetensors file"),
        "overlap.safetensors": (raw({q: tensor([1], 4), up: tensor([1], 4)}, b"1234"), "damaged safetensors file"),
        "rank-2-24.safetensors": (claim, "has rank 16777216, the adapter says 16777216; 1024 is the most"),
        "rank-in-metadata.safetensors": ({**sound, "": config}, "has rank 4, the adapter says 16777216"),
        "rank-1025.safetensors": ({q: torch.ones(1025, 24), up: torch.ones(24, 1025)}, "1024 is the most"),
        "empty-side.safetensors": ({q: torch.ones(4, 0), up: torch.ones(24, 4)}, "is empty, (4, 0)"),
        "scalar.safetensors": ({q: torch.tensor(1.0), up: torch.ones(24, 4)}, "not a matrix of floats"),
        "a-without-b.safetensors": (changed(**{up: None}), "stands without its other half; save the adapter again"),
        "b-without-a.safetensors": (changed(**{q: None}), "stands without its other half"),
        "only-b.safetensors": ({up: sound[up]}, "holds no LoRA weights"),
        "ranks-apart.safetensors": (changed(**{up: torch.ones(24, 5)}), "has rank 5, the adapter says 4"),
        "all-zero.safetensors": ({**sound, **zeros}, "does nothing in 20 modules"),
        "one-zero.safetensors": (changed(**{up: zeros[up]}), "does nothing in 1 modules, blocks.0.attn1.to_q"),
        "nan.safetensors": (
            changed(**{q: torch.full((4, 24), float("nan"))}),
            "not finite; take an earlier checkpoint",
        ),
        "infinite.safetensors": (changed(**{up: sound[up].clone().fill_(float("-inf"))}), "not finite"),
        "int32.safetensors": (
            changed(**{q: sound[q].int()}),
            "is torch.int32 (4, 24), not a matrix of floats; save it",
        ),
        "pickle.pt": (pickle.dumps(Payload(folder / "ran-pt")), "a pickle (torch.save), which is not opened"),
        "archive.bin": (
            zip_of_pickle(folder / "ran-bin"),
            "convert it where you trust it: safetensors.torch.save_file",
        ),
        "disguised.safetensors": (zip_of_pickle(folder / "ran-zip"), "a pickle (torch.save), which is not opened"),
        "bare-pickle.safetensors": (pickle.dumps(Payload(folder / "ran-pkl")), "a pickle (torch.save)"),
        "traversal.safetensors": (
            {"transformer.blocks.0.../../../etc/passwd.lora_A.weight": torch.ones(4, 24)},
            "cannot be matched: it is no weight of Wan's blocks",
        ),
        "control.safetensors": (
            {"transformer.\x1b[2J\n.lora_A.weight": torch.ones(4, 24)},
            "transformer.\N{REPLACEMENT CHARACTER}[2J",
        ),
        "duplicate.safetensors": (
            {**sound, "transformer._orig_mod.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 24)},
            "are both blocks.0.attn1.to_q.lora_A.weight; the file holds two adapters",
        ),
        "two-names.safetensors": (
            changed(**{"transformer.blocks.0.self_attn.q.lora_down.weight": torch.ones(4, 24)}),
            "are both blocks.0.attn1.to_q.lora_A.weight",
        ),
        "unmatched.safetensors": (
            changed(**{"transformer.proj_out.lora_A.weight": torch.ones(4, 24)}),
            "transformer.proj_out.lora_A.weight cannot be matched",
        ),
        "no-lora.safetensors": (
            {"patch_embedding.weight": torch.ones(4, 24)},
            "no adapter of a format that is read here",
        ),
        "nothing.safetensors": ({}, "it is empty"),
        "image-to-video.safetensors": (
            changed(**{"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.ones(4, 24)}),
            "it is of an image-to-video model",
        ),
        "lokr.safetensors": (
            {"diffusion_model.blocks.0.self_attn.q.lokr_w1": torch.ones(4, 24)},
            "belongs to a LoKr or LoHa",
        ),
        "difference.safetensors": (
            {"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(24, 24)},
            "a whole difference of weights",
        ),
        "dora-scale.safetensors": (
            {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(24, 1)},
            "another tool's DoRA",
        ),
        "bias.safetensors": (
            changed(**{"transformer.blocks.0.attn1.to_q.lora_B.bias": torch.ones(24)}),
            "LoRA biases are not read",
        ),
        "hunyuan.safetensors": (
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 24)},
            "another kind of model",
        ),
        "alpha-nan.safetensors": (
            changed(**{"transformer.blocks.0.attn1.to_q.alpha": torch.tensor(float("nan"))}),
            "alpha is nan",
        ),
        "alpha-zero.safetensors": (
            changed(**{"transformer.blocks.0.attn1.to_q.alpha": torch.tensor(0.0)}),
            "programs differ in what they make of that",
        ),
        "alpha-matrix.safetensors": (
            changed(**{"transformer.blocks.0.attn1.to_q.alpha": torch.ones(2, 2)}),
            "not one number",
        ),
        "alpha-alone.safetensors": (
            changed(**{"transformer.blocks.9.attn1.to_q.alpha": torch.tensor(1.0)}),
            "an alpha for blocks.9.attn1.to_q and no LoRA",
        ),
        "no-expert.safetensors": (stripped, "does not say of which expert it is; say it with --expert"),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[int, str, float, int, str]]:
    """Of each file: exit code, message, seconds, bytes of growth, and what must be said."""
    folder = tmp_path_factory.mktemp("faults")
    wanted = files_of(folder)
    for name, (content, _) in wanted.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            config = content.pop("", None)
            metadata = {"lora_adapter_metadata": json.dumps(config)} if config else {}
            save_file(content, folder / name, metadata or None)
    paths = json.dumps([str(folder / name) for name in wanted])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, paths], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    *lines, heavy = (json.loads(line) for line in done.stdout.splitlines())
    assert heavy == [], "looking at a file needs neither diffusers nor peft"
    assert not [path for path in folder.glob("ran-*") if path.is_dir()], "a payload ran"
    return {name: (*line, said) for (name, (_, said)), line in zip(wanted.items(), lines, strict=True)}


def test_every_fault_ends_with_one_message_that_names_file_fault_and_remedy(results):
    wrong = {}
    for name, (code, message, _, _, said) in results.items():
        lines = message.strip().splitlines()
        if (
            code != 2
            or len(lines) != 1
            or not lines[0].startswith("error: ")
            or name not in message
            or said not in message
        ):
            wrong[name] = (code, message)
    assert not wrong


def test_every_fault_is_found_soon_and_in_little_room(results):
    slow = {name: seconds for name, (_, _, seconds, _, _) in results.items() if seconds > MOST_SECONDS}
    large = {name: grown >> 20 for name, (_, _, _, grown, _) in results.items() if grown > MOST_BYTES}
    assert not slow and not large


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_file_with_some_bytes_changed_is_read_or_refused_and_nothing_else(tmp_path, name):
    draw = random.Random(0)
    path = tmp_path / "adapter_model.safetensors"
    FORMATS[name].write(path, make_adapter("high", ("attn1.to_q",), blocks=1, rank=2, about={"trigger": "x"}))
    files = {each: each.read_bytes() for each in tmp_path.iterdir()}
    outcomes = set()
    for _ in range(150):
        changed_file = draw.choice(sorted(files))
        content = bytearray(files[changed_file])
        header = 8 + int.from_bytes(content[:8], "little") if changed_file == path else len(content)
        for _ in range(draw.choice([1, 1, 2, 4])):
            place = draw.randrange(min(header, len(content)))
            content[place : place + draw.randrange(3)] = draw.choice([b"", b"0", b"9", b"-", b"{", b"[", b'"', b"\xff"])
        changed_file.write_bytes(content)
        try:
            as_json(inspect(path, "high"), layers=True)
            outcomes.add("read")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
        changed_file.write_bytes(files[changed_file])
    assert outcomes == {"read", "refused"}
