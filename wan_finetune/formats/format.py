"""What a format is: two pure functions between adapters and a file's content, and how its files are known and named."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..adapters import Adapter
from ..errors import InputError
from ..experts import Expert, ExpertName
from .files import Opened, open_adapter, save_atomically
from .keys import cleaned, shown


def no_reason(adapter: Adapter) -> str | None:
    """Nothing is against it."""
    return None


def no_text(adapter: Adapter) -> dict[str, str]:
    """Nothing beside the weights."""
    return {}


def own_file_name(expert: Expert) -> str:
    """`high_noise.safetensors`, `low_noise.safetensors`, or diffusers' own name where there is one denoiser."""
    return expert.file_name


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """A format of adapter files."""

    name: str
    prefixes: tuple[str, ...]
    """How its tensors' names start."""
    encode: Callable[[Adapter], tuple[dict[str, Tensor], dict[str, str]]]
    """An adapter -> tensors and metadata."""
    decode: Callable[[Opened, ExpertName | None, float | None], Adapter]
    """An opened file, the expert it must be of, the alpha where it has none -> an adapter. Raises InputError."""
    refusal: Callable[[Adapter], str | None] = no_reason
    """Why an adapter cannot be written, or None."""
    caveat: Callable[[Adapter], str | None] = no_reason
    """What a user should know of a file that is written all the same, or None."""
    beside: Callable[[Adapter], Mapping[str, str]] = no_text
    """Names and texts of files beside the weights."""
    file_name: Callable[[Expert], str] = own_file_name
    """Where an expert's weights go within a folder."""

    def owns(self, key: str) -> bool:
        """Whether a tensor's name is of this format."""
        return cleaned(key).startswith(self.prefixes)

    def write(self, path: Path, adapter: Adapter) -> None:
        """Write an adapter's weights, and what belongs beside them.

        Raises:
            InputError: for an adapter that the format cannot say.
        """
        if reason := self.refusal(adapter):
            raise InputError(f"{path}: {reason}")
        tensors, metadata = self.encode(adapter)
        save_atomically(path, tensors, metadata)
        for name, text in self.beside(adapter).items():
            partial = path.with_name(f".{name}.{os.getpid()}.partial")
            try:
                partial.write_text(text, encoding="utf-8")
                os.replace(partial, path.with_name(name))
            finally:
                partial.unlink(missing_ok=True)

    def read(self, path: Path, expert: ExpertName | None = None, alpha: float | None = None) -> Adapter:
        """Read and check a file, ours or another tool's of the same form.

        Args:
            expert: which expert's it must be; a file that does not say is taken for this one's.
            alpha: of a file that says none.

        Raises:
            InputError: for a damaged or foreign file, or the other expert's.
        """
        return self.decode_own(open_adapter(path), expert, alpha)

    def decode_own(self, opened: Opened, expert: ExpertName | None, alpha: float | None) -> Adapter:
        """`decode`, of a file that is of this format throughout."""
        if stray := next((key for key in opened.tensors if not self.owns(key)), None):
            raise InputError(
                f"{opened.path}: {shown(stray)} does not start with {' or '.join(self.prefixes)}; "
                f"not a {self.name} LoRA"
            )
        return self.decode(opened, expert, alpha)
