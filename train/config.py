"""The configuration of a run: one strict TOML file, one class a section."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from data.config import DataConfig
from wan_finetune.adapters import LoraSettings
from wan_finetune.experts import EXPERTS, ExpertName
from wan_finetune.sampling import SamplingSettings
from wan_finetune.settings import Settings


class RunSettings(Settings):
    """Where results go."""

    name: str = Field(pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*")
    """Name of the run and of its folder."""
    folder: Path = Path("runs")
    """Folder that holds the runs."""
    seed: int = Field(0, ge=0)
    """Seed of everything that is drawn."""


class ModelSettings(Settings):
    """The base model."""

    base: str
    """`pocket`, a diffusers folder, or a repository of the Hub."""
    revision: str | None = None
    """Commit, tag or branch of a Hub repository."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the frozen base; LoRA, optimizer, noise levels and autoencoder are fp32 whatever it is."""
    attention: str = "native"
    """diffusers' attention backend for training, such as `native`, `flash` or `_native_math`."""

    @property
    def public_name(self) -> str:
        """The base as files and reports name it: of a local folder the last name alone, so that no path leaks."""
        return Path(self.base).name if Path(self.base).is_dir() else self.base


class FlowSettings(Settings):
    """The noise levels that training draws."""

    shift: float = Field(5.0, gt=0)
    """Warp toward high noise: sigma = s*u / (1 + (s-1)*u). 1.0 leaves u uniform."""


class ExpertSettings(Settings):
    """What differs from one expert to the other."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(gt=0, lt=1)
    """Peak learning rate."""
    rank: int | None = Field(None, ge=1, le=1024)
    """Rank of this expert's LoRA. Left out: lora.rank."""
    alpha: float | None = Field(None, gt=0)
    """Scale of this expert's LoRA. Left out: lora.alpha, or its own rank."""


class TrainSettings(Settings):
    """The loop."""

    experts: tuple[ExpertName, ...] = ("high", "low")
    """Which experts are trained."""
    order: Literal["rounds", "sequence"] = "rounds"
    """`rounds`: each expert for round_steps, then the other; `sequence`: all of one, then all of the other."""
    round_steps: int = Field(250, ge=1)
    """Steps of one expert before the other's turn."""
    batch_size: int = Field(1, ge=1)
    """Clips in a micro-batch of one process."""
    batch_tokens: int | None = Field(None, ge=1)
    """Instead of batch_size: as many clips as make up this many tokens, by bucket; at least one."""
    gradient_accumulation: int = Field(1, ge=1)
    """Micro-batches in an optimizer step."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of an expert's gradient."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more compute."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` needs the bnb extra."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay on the LoRA weights."""
    warmup_steps: int = Field(50, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the forward pass."""
    checkpoint_every_steps: int = Field(250, ge=1)
    """Steps between checkpoints; one is also written at the end of every round."""
    keep_checkpoints: int = Field(2, ge=2)
    """Checkpoints that stay; fewer than two would leave none while one is damaged."""

    @field_validator("experts")
    @classmethod
    def known_and_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError('name each expert once: ["high", "low"], ["high"] or ["low"]')
        return value


class EvaluationSettings(Settings):
    """How the look and the content are judged."""

    content: str = ""
    """`module:function` that says which attributes of a prompt a clip shows; empty where nothing can say."""
    prompts: tuple[str, ...] = ()
    """Prompts that training never saw; the figures come from these."""
    seeds: tuple[int, ...] = (0,)
    """Seeds for each prompt."""


class TrackingSettings(Settings):
    """Who else is told of the figures, beside metrics.jsonl."""

    tracker: Literal["none", "wandb", "tensorboard", "trackio"] = "none"
    """A tracker that accelerate knows; its package must be installed (wandb is an extra)."""
    project: str = "wan-finetune"
    """Project name in the tracker."""


class Config(Settings):
    """A whole run."""

    run: RunSettings
    model: ModelSettings
    data: DataConfig
    lora: LoraSettings = LoraSettings()
    flow: FlowSettings = FlowSettings()
    high: ExpertSettings
    low: ExpertSettings
    train: TrainSettings = TrainSettings()
    sampling: SamplingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def targets_are_enough(self) -> "Config":
        if not self.lora.targets:
            raise ValueError("lora.targets is empty: there would be nothing to train")
        return self

    @property
    def run_folder(self) -> Path:
        return self.run.folder / self.run.name

    def expert(self, name: ExpertName) -> ExpertSettings:
        return {"high": self.high, "low": self.low}[name]

    def lora_for(self, name: ExpertName) -> LoraSettings:
        """The LoRA settings of one expert, its own rank and alpha in place."""
        expert = self.expert(name)
        own = {key: value for key in ("rank", "alpha") if (value := getattr(expert, key)) is not None}
        return self.lora.model_copy(update=own)

    def steps(self) -> dict[ExpertName, int]:
        """Steps of each expert that is trained, in pipeline order."""
        return {name: self.expert(name).steps for name in EXPERTS if name in self.train.experts}
