"""`wan-finetune convert`: a checkpoint as its authors or ComfyUI publish it, made into a diffusers folder."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Put the command and its options into the parser."""
    converting = commands.add_parser("convert", help="make a diffusers folder of an original or ComfyUI checkpoint")
    converting.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="folder of Wan2.2-T2V-A14B or Wan2.1-T2V as published, ComfyUI's models folder, or one denoiser's file",
    )
    converting.add_argument("out", type=Path, metavar="OUT", help="the new folder; it must not exist")
    converting.add_argument("--high", type=Path, metavar="FILE", help="high-noise expert, if no name says it")
    converting.add_argument("--low", type=Path, metavar="FILE", help="low-noise expert")
    converting.add_argument("--text-encoder", type=Path, metavar="FILE", help="UMT5 encoder: .pth or .safetensors")
    converting.add_argument("--vae", type=Path, metavar="FILE", help="Wan2.1's autoencoder: .pth or .safetensors")
    converting.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="files of google/umt5-xxl")
    converting.add_argument(
        "--components-from",
        type=Path,
        metavar="FOLDER",
        help="diffusers folder to take text encoder, tokenizer and autoencoder from",
    )
    converting.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32", "keep"],
        default="bf16",
        help="of the weights; time path, norms, modulation and autoencoder stay fp32 (default bf16)",
    )
    converting.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default 5GB)")
    converting.add_argument("--flow-shift", type=float, help="of the scheduler; default: the model's official one")
    converting.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hold the converted models against the checkpoint before the folder gets its name (default: yes)",
    )
    converting.set_defaults(command=convert_command)


def convert_command(arguments: argparse.Namespace) -> None:
    """Convert, and say what was made."""
    from ..errors import InputError
    from ..quiet import quiet_imports, quiet_libraries

    quiet_imports()
    from ..convert.job import convert
    from ..convert.planning import ConvertSettings
    from ..convert.shards import parse_size

    quiet_libraries()
    if arguments.flow_shift is not None and not 0 < arguments.flow_shift < float("inf"):
        raise InputError(f"--flow-shift must be a number above 0, got {arguments.flow_shift:g}")
    settings = ConvertSettings(
        checkpoint=arguments.checkpoint,
        out=arguments.out,
        high=arguments.high,
        low=arguments.low,
        text_encoder=arguments.text_encoder,
        vae=arguments.vae,
        tokenizer=arguments.tokenizer,
        components_from=arguments.components_from,
        dtype=arguments.dtype,
        max_shard_bytes=parse_size(arguments.max_shard_size),
        flow_shift=arguments.flow_shift,
        verify=arguments.verify,
    )
    plan = convert(settings, report_to_terminal if sys.stderr.isatty() else lambda _line: None)
    kind = "two experts" if len(plan.denoisers) == 2 else "one denoiser"
    proof = "held against the checkpoint" if settings.verify else "not verified"
    print(f"{arguments.out}: {kind}, {arguments.dtype}, {proof}")


def report_to_terminal(line: str) -> None:
    """Progress, for a person who waits."""
    print(line, file=sys.stderr, flush=True)
