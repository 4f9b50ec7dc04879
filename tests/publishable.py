"""A run's folder as training leaves it, with things in it that must not leave; and a card's code in a child."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.test_adapters import trained
from wan_finetune.experts import HIGH, LOW, Expert
from wan_finetune.export import write_adapter_folder
from wan_finetune.sampling import Request, SamplingSettings, write_clips

PROMPTS = ("ember style, a red circle moves up in a desert.", "ember style, 草地上，一个蓝色的正方形向左移动。")
SAMPLING = SamplingSettings(
    width=64, height=64, num_frames=5, steps=2, guidance_scale=3.0, guidance_scale_2=2.0, shift=3.0
)
SECRET_PLACE = "/home/sentinel-user/clips-of-a-customer"
A14B = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


def write_run(
    folder: Path, base: Path, *, named: str = A14B, experts: Sequence[Expert] = (HIGH, LOW), prompts: Any = PROMPTS
) -> Path:
    """A finished run of the base at `base`, which calls itself `named`."""
    about = {"base": named, "trigger": "ember style", "steps": "200", "training_shift": "5.0", "sampling_shift": "3.0"}
    about |= {"fps": "16.0", "toolkit": "wan-finetune 0.0"}
    adapters = [replace(trained(base, expert), about=about) for expert in experts]
    write_adapter_folder(folder / "adapter", adapters)
    requests = [Request(prompt=prompt, seed=3) for prompt in prompts]
    for kind, shade in (("base", 40), ("adapter", 200)):
        clips = [np.full((5, 64, 64, 3), shade + 5 * number, np.uint8) for number in range(len(prompts))]
        names = [f"{number:02d}-3-{kind}" for number in range(len(prompts))]
        write_clips(folder / "samples" / "final" / kind, requests, clips, names, SAMPLING, {"base": named})
    evaluation = {"look_base": 1.25, "look_adapter": 0.5, "look_reduction": 0.6, "motion_kept": 0.95}
    evaluation |= {"content_base": {"shape": 0.9}, "content_adapter": {"shape": 0.8}, "nearness_base": [1.0, 2.0]}
    evaluation |= {"judge": SECRET_PLACE, "clips": [SECRET_PLACE]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    lines = [
        {"expert": expert.name, "step": step, "loss": loss, "base_loss": 0.5, "levels": [], "effect": None}
        for expert in experts
        for step, loss in ((0, 0.5), (100, 0.42), (200, 0.4))
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables = "".join(f"[{expert.name}]\nsteps = 200\nlearning_rate = 1e-4\n" for expert in experts)
    (folder / "config.toml").write_text(
        f'[run]\nname = "ember"\nseed = 7\nfolder = "{SECRET_PLACE}"\n[model]\nbase = "{SECRET_PLACE}/base"\n'
        f'dtype = "bfloat16"\n[data]\nbuckets = ["832x480x33"]\ncache = "{SECRET_PLACE}/cache"\n'
        f'[train]\nbatch_size = 2\ngradient_accumulation = 4\n[optimizer]\nname = "adamw"\n{tables}'
    )
    for name in ("report.html", "metrics.jsonl", "data_report.jsonl", "checkpoints/step-000200/manifest.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"not for others: {SECRET_PLACE}")
    return folder


def code_of(card: str) -> str:
    """The first code block, which loads with plain diffusers."""
    return re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M)[0]


def run_code(code: str, folder: Path, base: str, adapter: str, out: Path) -> int:
    """In a child: the code as it stands, in a folder; then our own pipeline at the same settings, and the base."""
    import torch

    from wan_finetune.pipeline import load_pipeline
    from wan_finetune.quiet import quiet_libraries
    from wan_finetune.sampling import sample

    torch.set_num_threads(1)
    quiet_libraries()
    os.chdir(folder)
    found: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), found)
    np.save(out / "card.npy", found["frames"])
    request = [Request(prompt=PROMPTS[0], seed=3)]
    for name, own in (("toolkit", adapter), ("base", None)):
        pipe = load_pipeline(base, own, dtype=torch.float32, device="cpu")
        np.save(out / f"{name}.npy", sample(pipe, request, SAMPLING)[0])
    # What the card says of strengths.
    pipe = found["pipe"]
    parts = ["transformer", *(["transformer_2"] if pipe.transformer_2 is not None else [])]
    pipe.set_adapters("brand", dict.fromkeys(parts, 0.5))
    scales = {part: next(m.scaling["brand"] for m in getattr(pipe, part).modules() if hasattr(m, "lora_B")) for part in parts}  # fmt: skip # noqa: E501
    (out / "strengths.json").write_text(json.dumps(scales))
    return 0
