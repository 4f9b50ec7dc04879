"""The configuration of a run: one strict TOML file, one class a section."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data.config import DataConfig
from wan_finetune.experts import EXPERTS, ExpertName
from wan_finetune.lora import LoraSettings
from wan_finetune.memory.settings import MemorySettings
from wan_finetune.sampling import SamplingSettings
from wan_finetune.settings import Settings

from .expert_settings import SHARED_TABLES, ExpertSettings, FlowSettings, OptimizerSettings
from .hub_settings import HubSettings


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


class TrainSettings(Settings):
    """The loop."""

    experts: tuple[ExpertName, ...] = ("high", "low")
    """Which experts are trained; `["single"]` for a model with one denoiser, such as Wan2.1."""
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
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the forward pass."""
    previews: Literal["none", "midway", "rounds"] = "midway"
    """Samples on the way: none, once half of all steps are done, or after every round."""
    preview_share: float = Field(0.1, gt=0, le=1)
    """Most of the time so far that previews after rounds may take; a round that would go beyond it has none."""
    checkpoint_every_steps: int = Field(250, ge=1)
    """Steps between checkpoints; one is also written at the end of every round."""
    keep_checkpoints: int = Field(2, ge=2)
    """Checkpoints that stay; fewer than two would leave none while one is damaged."""

    @field_validator("experts")
    @classmethod
    def known_and_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value) or ("single" in value and len(value) > 1):
            raise ValueError('name each expert once: ["high", "low"], ["high"], ["low"], or ["single"]')
        return value


class ValidationSettings(Settings):
    """The loss on clips that training never sees, at fixed noise."""

    every_steps: int = Field(250, ge=0)
    """Steps of an expert between validations, besides those before its first and after its last; 0 for none at all."""
    clips: int = Field(2, ge=1)
    """Clips that are kept from training for it; a tenth of the set at the most."""
    levels: int = Field(4, ge=1, le=64)
    """Noise levels in the expert's interval, spread as those of its training are."""
    patience: int = Field(0, ge=0)
    """Validations without a new lowest loss after which an expert's training ends, unless its own table says
    otherwise; 0 for never."""
    export: Literal["last", "best"] = "last"
    """Which of an expert's states becomes the adapter: the last, or the one with the lowest loss."""


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
    optimizer: OptimizerSettings = OptimizerSettings()
    memory: MemorySettings = MemorySettings()
    high: ExpertSettings | None = None
    low: ExpertSettings | None = None
    single: ExpertSettings | None = None
    train: TrainSettings = TrainSettings()
    sampling: SamplingSettings
    validation: ValidationSettings = ValidationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()
    hub: HubSettings = HubSettings()

    @model_validator(mode="before")
    @classmethod
    def experts_take_over_the_shared_tables(cls, tables: Any) -> Any:
        if not isinstance(tables, dict):
            return tables
        filled = dict(tables)
        for expert in EXPERTS:
            if isinstance(own := tables.get(expert), dict):
                shared = {name: tables[name] for name in SHARED_TABLES if name in tables}
                filled[expert] = {**own, **{name: merge(table, own.get(name)) for name, table in shared.items()}}
        return filled

    @model_validator(mode="after")
    def every_trained_expert_has_its_table(self) -> "Config":
        for name in self.train.experts:
            if getattr(self, name) is None:
                raise ValueError(f"train.experts names {name!r}, and there is no table [{name}] with its steps")
        return self

    @model_validator(mode="after")
    def what_the_held_out_loss_decides_has_one(self) -> "Config":
        if self.validation.every_steps:
            return self
        going_by_it = {
            'validation.export = "best"': self.validation.export == "best",
            'hub.push = "best"': self.hub.push == "best",
            "patience": any(self.patience(name) for name in self.train.experts),
        }
        if key := next((key for key, is_set in going_by_it.items() if is_set), None):
            raise ValueError(
                f"{key} goes by the held-out loss, and validation.every_steps = 0 measures none; give it a number"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return self.run.folder / self.run.name

    def expert(self, name: ExpertName) -> ExpertSettings:
        """The settings of an expert that is trained."""
        settings = {"high": self.high, "low": self.low, "single": self.single}[name]
        assert settings is not None, "a validator sees to it"
        return settings

    def patience(self, name: ExpertName) -> int:
        """Validations without a new lowest loss after which an expert's training ends; 0 for never."""
        own = self.expert(name).patience
        return self.validation.patience if own is None else own

    def steps(self) -> dict[ExpertName, int]:
        """Steps of each expert that is trained, in pipeline order."""
        return {name: self.expert(name).steps for name in EXPERTS if name in self.train.experts}

    def resolved(self) -> dict[str, Any]:
        """All tables with their defaults, as they would be written: experts name only what differs from the shared."""
        tables = self.model_dump(mode="json", exclude_none=True)
        for expert in EXPERTS:
            for name in SHARED_TABLES if expert in tables else ():
                own = tables[expert].pop(name)
                if changed := {key: value for key, value in own.items() if tables[name].get(key) != value}:
                    tables[expert][name] = changed
        return tables


def merge(shared: Any, own: Any) -> Any:
    """A table with an expert's changes; what is no table is left for the validation to name."""
    if isinstance(shared, dict) and isinstance(own, dict):
        return {**shared, **own}
    return shared if own is None else own
