"""Base against adapter on the same prompts and seeds: what became of the look, the motion and the content."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .motion import motion_kept
from .report import Figure
from .style import describe, energy_distance, nearness

ContentJudge = Callable[[np.ndarray, str], dict[str, bool]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All figures of one evaluation."""

    look_base: float
    """Energy distance of the base's clips to the brand's, as `style.energy_distance` defines it."""
    look_adapter: float
    content_base: dict[str, float]
    """Share of clips that show what the prompt says, 0-1, for each attribute."""
    content_adapter: dict[str, float]
    motion_kept: float | None
    """Amount of motion in the adapter's clips over that in the base's."""
    nearness_base: list[float]
    """Distance of each clip to the brand."""
    nearness_adapter: list[float]

    @property
    def look_reduction(self) -> float:
        """How much of the distance to the brand is gone, 1 at the most."""
        return 1.0 - self.look_adapter / self.look_base if self.look_base > 0 else 0.0

    def figures(self) -> list[Figure]:
        """The figures as the report shows them."""
        rows = [
            Figure(
                name="Distance to the brand look",
                base=self.look_base,
                adapter=self.look_adapter,
                better="lower",
                meaning="between all samples and the brand's own clips, on prompts that training never saw",
            )
        ]
        for attribute, base in self.content_base.items():
            rows.append(
                Figure(
                    name=f"Right {attribute}",
                    base=100 * base,
                    adapter=100 * self.content_adapter[attribute],
                    unit="%",
                    better="higher",
                    meaning="clips that show what the prompt says",
                )
            )
        if self.motion_kept is not None:
            rows.append(
                Figure(
                    name="Amount of motion",
                    base=100.0,
                    adapter=100.0 * self.motion_kept,
                    unit="%",
                    better="same",
                    meaning="change over a quarter of a second, against the base's",
                )
            )
        return rows


def compare(
    base: Sequence[np.ndarray],
    adapter: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    prompts: Sequence[str],
    judge: ContentJudge | None,
) -> Comparison:
    """Compare clips, each uint8 [F, H, W, 3], made for the same prompts and seeds, with a brand's clips."""
    brand = np.stack([describe(clip) for clip in reference])
    looks = {"base": np.stack([describe(c) for c in base]), "adapter": np.stack([describe(c) for c in adapter])}
    return Comparison(
        look_base=energy_distance(looks["base"], brand),
        look_adapter=energy_distance(looks["adapter"], brand),
        content_base=content_scores(base, prompts, judge),
        content_adapter=content_scores(adapter, prompts, judge),
        motion_kept=motion_kept(list(base), list(adapter)),
        nearness_base=[nearness(look, brand) for look in looks["base"]],
        nearness_adapter=[nearness(look, brand) for look in looks["adapter"]],
    )


def content_scores(clips: Sequence[np.ndarray], prompts: Sequence[str], judge: ContentJudge | None) -> dict[str, float]:
    """Share of clips for which each attribute is judged right; empty without a judge."""
    if judge is None:
        return {}
    verdicts = [judge(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in verdicts[0]}


def load_judge(name: str) -> ContentJudge | None:
    """The content judge `module:function`, or None where the name is empty.

    Raises:
        InputError: when there is no such function.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"evaluation.content: {name!r} is no module:function that can be imported ({error})"
        ) from error
