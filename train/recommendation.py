"""Which state of an expert to use, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

MOTION_KEPT = 0.85
"""Share of the base's motion below which a nearer look is bought too dearly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A state of an expert and what is known of it."""

    step: int
    held_out_loss: float
    look_distance: float | None = None
    """To the brand, on unseen prompts, where clips of this state were evaluated."""
    motion_kept: float | None = None
    """Motion of those clips over the base's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    step: int
    reason: str
    """One sentence with the figures that decided."""


def recommend(candidates: Sequence[Candidate], base_loss: float) -> Recommendation:
    """The best of at least one candidate.

    The nearest look decides among states that keep the motion, where every state has been evaluated; the lowest
    held-out loss decides where not.
    """
    looks = [each for each in candidates if each.look_distance is not None and each.motion_kept is not None]
    if len(looks) == len(candidates):
        return by_look(candidates)
    best, last = min(candidates, key=lambda each: each.held_out_loss), candidates[-1]
    if best.held_out_loss >= base_loss:
        reason = (
            f"no state has a lower held-out loss than the base ({best.held_out_loss:.4f} against {base_loss:.4f}): "
            "the look may not carry over to new clips; more of them, or a lower rank, may help"
        )
    elif best.step == last.step:
        reason = (
            f"the held-out loss was still falling, {base_loss:.4f} -> {last.held_out_loss:.4f}; more steps may help"
        )
    else:
        reason = (
            f"the held-out loss is lowest there, {best.held_out_loss:.4f} (base {base_loss:.4f}, "
            f"last step {last.held_out_loss:.4f}); what came after was learnt by heart"
        )
    return Recommendation(step=best.step, reason=reason)


def by_look(candidates: Sequence[Candidate]) -> Recommendation:
    """The nearest look that keeps the motion; where none does, the one that keeps most of it."""
    keeping = [each for each in candidates if (each.motion_kept or 0.0) >= MOTION_KEPT]
    if not keeping:
        best = max(candidates, key=lambda each: each.motion_kept or 0.0)
        return Recommendation(
            step=best.step, reason=f"no state keeps the motion; this one keeps {best.motion_kept:.0%}"
        )
    best = min(keeping, key=lambda each: (each.look_distance or 0.0, each.held_out_loss))
    return Recommendation(
        step=best.step,
        reason=f"the look is nearest there ({best.look_distance:.2f}) with {best.motion_kept:.0%} of the motion kept",
    )
