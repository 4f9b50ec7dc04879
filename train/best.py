"""The weights with the lowest held-out loss so far, one file an expert, beside the checkpoints."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from wan_finetune.errors import InputError
from wan_finetune.experts import ExpertName
from wan_finetune.formats.files import open_adapter, save_atomically


def keep_best(folder: Path, expert: ExpertName, step: int, weights: Mapping[str, Tensor]) -> None:
    """Write an expert's weights in place of those before."""
    save_atomically(best_file(folder, expert), dict(weights), {"step": str(step)})


def load_best(folder: Path, expert: ExpertName, step: int) -> dict[str, Tensor]:
    """The weights of `step`.

    Raises:
        InputError: the file is missing, damaged, or of another step.
    """
    _, weights, metadata = open_adapter(best_file(folder, expert))
    if metadata.get("step") != str(step):
        raise InputError(
            f"{best_file(folder, expert)}: holds step {metadata.get('step')}, not {step}, whose held-out loss is the "
            'lowest; set validation.export = "last", or train again under another run.name'
        )
    return dict(weights)


def best_file(folder: Path, expert: ExpertName) -> Path:
    return folder / f"best-{expert}.safetensors"
