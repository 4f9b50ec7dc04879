"""LoRA toolkit for Wan2.2-T2V-A14B: train, sample, evaluate and publish adapters for both experts."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load_pipeline"]

if TYPE_CHECKING:
    from .pipeline import load_pipeline


def __getattr__(name: str) -> Any:
    # diffusers and peft take ten seconds and more to import; `wan-finetune --help` must not.
    if name == "load_pipeline":
        from .pipeline import load_pipeline

        return load_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
