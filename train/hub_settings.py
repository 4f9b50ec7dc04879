"""The table [hub]: whether, when and where a run is pushed."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from wan_finetune.errors import InputError
from wan_finetune.settings import Settings


class HubSettings(Settings):
    """Pushing to the Hub beside the training. The token is this machine's login (`hf auth login`) or HF_TOKEN."""

    push: Literal["none", "end", "best", "rounds"] = "none"
    """`end`: the finished run with card, samples and figures. `best`: also the adapters as they stand whenever an
    expert's held-out loss has a new minimum. `rounds`: also after every round."""
    repo: str = ""
    """`user/repo`; made where there is none."""
    private: bool = True
    """Whether nobody else may see it. A repository that is public already takes nothing unless this is false."""
    base: str = ""
    """The base model's repository as the card names it; left out: `model.base`, of a local folder its last name."""
    language: Literal["en", "zh"] = "en"
    """Of the card."""
    license: str = Field("apache-2.0", pattern=r"[a-z0-9][a-z0-9.-]*")
    """Of the adapter, as the Hub names licences; its files and the card say it, pushed or not."""
    wait_seconds: float = Field(1800.0, ge=1, le=7200)
    """How long the finished run waits for its push; then the push is ended and the command is told. A Hub that fails
    holds it up for two minutes at the most; the rest is for bytes that move, of A14B at rank 32 2.3 GiB."""

    @field_validator("repo")
    @classmethod
    def can_be_a_repository(cls, value: str) -> str:
        if value:
            from wan_finetune.hub import require_repo_name

            try:
                require_repo_name(value)
            except InputError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def has_a_place_to_push_to(self) -> "HubSettings":
        if self.push != "none" and not self.repo:
            raise ValueError(f'push = "{self.push}" needs repo = "user/repo"')
        return self
