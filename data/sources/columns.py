"""Names under which tables hold clips, captions and masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.config import SourceConfig

from .paths import Unusable
from .text import captions_in

CLIP_COLUMNS = (
    *("file_name", "video", "video_path", "video_file_name", "file_path", "path", "media_path", "media"),
    *("filename", "file", "clip", "clip_path", "mp4", "image", "image_path", "image_file_name"),
)
"""The first that a row fills is its clip: a video before the still it may start from."""
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "prompt", "prompts", "cap", "description", "txt")
MASK_COLUMNS = ("mask", "mask_path", "mask_file_name", "mask_file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns of a table mean what, each in the order of preference, spelt as the table spells them."""

    clips: tuple[str, ...]
    captions: tuple[str, ...]
    masks: tuple[str, ...]

    @classmethod
    def among(cls, names: Sequence[str], source: SourceConfig) -> "Columns":
        """Those of `names` that are used: the ones the source sets, or those with a common name."""
        spelt = {name.strip().lower(): name for name in reversed(names)}

        def used(chosen: str | None, common: tuple[str, ...]) -> tuple[str, ...]:
            if chosen is not None:
                return (chosen,) if chosen in names else ()
            return tuple(spelt[name] for name in common if name in spelt)

        return cls(
            clips=used(source.video_column, CLIP_COLUMNS),
            captions=used(source.caption_column, CAPTION_COLUMNS),
            masks=used(None, MASK_COLUMNS),
        )

    @property
    def all(self) -> list[str]:
        return [*self.clips, *self.captions, *self.masks]

    def clip_in(self, row: dict[str, Any]) -> Any:
        """The cell with the clip: the first that is filled. Raises Unusable where the row has no such column."""
        if not self.clips:
            raise Unusable("has no clip's file name; add one under file_name, or remove the row")
        return next((row[name] for name in self.clips if row[name] not in (None, "")), None)

    def captions_in(self, row: dict[str, Any]) -> list[str]:
        """The captions of the first column that is filled. Raises Unusable for none, and as `text.captions_in`."""
        if not self.captions:
            raise Unusable("has no caption; add one under caption, or remove the row")
        for name in self.captions:
            if captions := captions_in(row[name], name):
                return captions
        raise Unusable(f"has no caption, its {' and '.join(self.captions)} is empty; describe the clip there")

    def mask_in(self, row: dict[str, Any]) -> Any:
        """The cell with the mask, or None."""
        return next((row[name] for name in self.masks if row[name] not in (None, "")), None)


def missing_column(what: str, names: Sequence[str], setting: str, common: tuple[str, ...], chosen: str | None) -> str:
    """The fault, with its remedy, of a table that has no column of one kind."""
    has = f"its columns are {', '.join(list(names)[:20])}" if names else "it has no columns"
    if chosen is not None:
        return f"has no column {chosen}; {has}: correct {setting}"
    return f"has no column with the {what}; {has}: name one {common[0]}, or set {setting}"
