"""Proof that a converted folder is the checkpoint: the library's model on it against plain arithmetic on the source.

Both go block by block, so that one block of either is in memory: a denoiser of Wan2.2 is 57 GB.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from .parts import Part
from .reference_autoencoder import ReferenceAutoencoder
from .reference_denoiser import Get, denoiser_states
from .reference_text_encoder import text_encoder_states
from .shards import Shard
from .text_encoder import IN_BLOCK, text_encoder_names

TOLERANCE = 1e-3
"""Largest difference of two states, relative to their size; fp32 in another order of operations gives 1e-5."""
TOKENS = 12
"""Of the text encoder's input: enough for both kinds of distances."""
PROBE_T = 637.0


def verify_denoiser(folder: Path, part: Part, shards: list[Shard], dtype: torch.dtype | None) -> float:
    """Hold a converted denoiser against the original; the largest difference of a block or of the output.

    Raises:
        RuntimeError: the outputs differ, which names the block.
    """
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    generator = torch.Generator().manual_seed(0)
    config = WanTransformer3DModel.load_config(folder)
    patch = config["patch_size"]
    size = (2 * patch[0], 2 * patch[1], 3 * patch[2])
    latents = torch.randn(1, config["in_channels"], *size, generator=generator)
    text = torch.randn(1, 5, config["text_dim"], generator=generator)
    t = torch.tensor([PROBE_T])
    with torch.inference_mode():
        wanted = denoiser_states(
            originals(part, dtype),
            config["num_layers"],
            config["num_attention_heads"],
            config["eps"],
            latents,
            t,
            text,
        )
        with init_empty_weights(include_buffers=False):
            model = WanTransformer3DModel.from_config(config).eval()
        states = stream(model, list(model.blocks), "blocks", folder, shards)
        states.append(model(latents, t, text, return_dict=False)[0])
    return compare(states, wanted, blocks_and_output(config["num_layers"]), folder)


def verify_text_encoder(folder: Path, part: Part, shards: list[Shard], dtype: torch.dtype | None) -> float:
    """Hold a converted text encoder against the original; the largest difference of a block or of the output.

    Raises:
        RuntimeError: the outputs differ, which names the block.
    """
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config.from_pretrained(folder)
    table, keys = reference_keys(set(part.weights.tensors), config.num_layers)
    ids = torch.randint(config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    stored = part.weights.tensors[table]
    wanted_dtype = part.wanted_dtype(table, dtype)
    with torch.inference_mode():
        rows = [stored.rows(number, number + 1, wanted_dtype).float() for number in ids]
        get = originals(part, dtype)
        wanted = text_encoder_states(
            lambda name: get(keys[name]), config.num_layers, config.num_heads, torch.cat(rows)[None]
        )
        with init_empty_weights(include_buffers=False):
            model = UMT5EncoderModel(config).eval()
        states = stream(model, list(model.encoder.block), "encoder.block", folder, shards, skip=("shared.weight",))
        embedded = read_rows(folder, shards, "shared.weight", ids)
        states.append(model(inputs_embeds=embedded[None]).last_hidden_state)
    return compare(states, wanted, blocks_and_output(config.num_layers), folder)


def reference_keys(names: set[str], num_layers: int) -> tuple[str, dict[str, str]]:
    """Where a checkpoint holds the table, and each weight that the reference asks for by its original name.

    Under that name itself where the checkpoint has it, so that the renaming has no part in its own proof.
    """
    asked = {"norm.weight", *(f"blocks.{number}.{inner}" for number in range(num_layers) for inner in IN_BLOCK)}
    if asked <= names:
        return "token_embedding.weight", {name: name for name in asked}
    return "shared.weight", text_encoder_names(asked)


def verify_autoencoder(folder: Path, part: Part, shards: list[Shard], dtype: torch.dtype | None) -> float:
    """Hold a converted autoencoder against the original, in both directions and in time; the larger difference.

    Raises:
        RuntimeError: the outputs differ.
    """
    from diffusers import AutoencoderKLWan

    generator = torch.Generator().manual_seed(0)
    reference = ReferenceAutoencoder(originals(part, dtype), part.weights.tensors)
    model = AutoencoderKLWan.from_pretrained(folder, dtype=torch.float32).eval()
    latents = torch.randn(1, model.config.z_dim, 3, 2, 2, generator=generator)
    video = torch.rand(1, 3, 9, 16, 16, generator=generator) * 2 - 1
    with torch.inference_mode():
        states = [model.encode(video).latent_dist.parameters, model.decode(latents, return_dict=False)[0]]
        wanted = [reference.encode(video), reference.decode(latents).clamp(-1, 1)]
    return compare(states, wanted, ["the encoder", "the decoder"], folder)


def originals(part: Part, dtype: torch.dtype | None) -> Get:
    """Reads a weight of the checkpoint, rounded as it was written, in fp32."""

    def get(name: str) -> Tensor:
        return part.weights.tensors[name].read(part.wanted_dtype(name, dtype)).float()

    return get


def stream(
    model: nn.Module,
    blocks: list[nn.Module],
    prefix: str,
    folder: Path,
    shards: list[Shard],
    skip: tuple[str, ...] = (),
) -> list[Tensor]:
    """Let a model on no device read its blocks from the files when their turn comes; their outputs, as they come."""
    places = {name: folder / shard.file_name for shard in shards for name in shard.facts}
    outside = [name for name in places if not name.startswith(f"{prefix}.") and name not in skip]
    fill(model, {name: name for name in outside}, places)
    states: list[Tensor] = []
    for number, block in enumerate(blocks):
        start = f"{prefix}.{number}."
        inside = {name.removeprefix(start): name for name in places if name.startswith(start)}
        block.register_forward_pre_hook(partial(fill_before, inside, places))
        block.register_forward_hook(partial(empty_after, states))
    return states


def fill_before(names: Mapping[str, str], places: Mapping[str, Path], block: nn.Module, _inputs: object) -> None:
    """Hook: read a block."""
    fill(block, names, places)


def empty_after(states: list[Tensor], block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
    """Hook: keep what a block gave, and drop the block."""
    states.append(output if isinstance(output, Tensor) else output[0])
    block.to("meta")


def fill(module: nn.Module, names: Mapping[str, str], places: Mapping[str, Path]) -> None:
    """Put weights of files into a module in fp32, read by the safetensors library."""
    from safetensors import safe_open

    state = {}
    for inner, name in names.items():
        # Opened for each weight, because the library maps the file, and what was read counts until it is closed.
        with safe_open(places[name], "pt", device="cpu") as file:
            state[inner] = file.get_tensor(name).to(torch.float32, copy=True)
    # A block is filled whole; of a model, the weights outside its blocks.
    module.load_state_dict(state, assign=True, strict=False)


def read_rows(folder: Path, shards: list[Shard], name: str, rows: list[int]) -> Tensor:
    """Some rows of a large table, in fp32."""
    from safetensors import safe_open

    (path,) = (folder / shard.file_name for shard in shards if name in shard.facts)
    with safe_open(path, "pt", device="cpu") as file:
        table = file.get_slice(name)
        return torch.cat([table[row : row + 1] for row in rows]).float()


def blocks_and_output(number: int) -> list[str]:
    """What the states of a model of so many blocks are."""
    return [*(f"block {block}" for block in range(number)), "the output"]


def compare(states: list[Tensor], wanted: list[Tensor], places: list[str], folder: Path) -> float:
    """The largest difference relative to the size.

    Raises:
        RuntimeError: one that rounding does not explain.
    """
    largest = 0.0
    for where, state, want in zip(places, states, wanted, strict=True):
        difference = float((state - want).norm() / want.norm())
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{folder.name}: {where} differs by {difference:.2g} from the checkpoint's; the conversion is wrong. "
                "Please report it with the names of the files"
            )
        largest = max(largest, difference)
    return largest


def verify_hashes(folder: Path, done: Mapping[str, str]) -> None:
    """Read the files that were written and compare their hashes.

    Raises:
        InputError: a file that reads back otherwise, which a disk does.
    """
    from .writing import hash_file

    for name, digest in done.items():
        if hash_file(folder / name) != digest:
            raise InputError(f"{folder / name}: reads back otherwise than it was written; check the disk, then go on")
