"""Clips that training never sees, so that the loss on them says whether it still learns or only remembers."""

import numpy as np
from numpy.typing import NDArray

from .config import DataConfig
from .samples import SampleTable

LARGEST_SHARE = 0.1
"""Of the clips; a small set is not made much smaller."""


def hold_out(samples: SampleTable, config: DataConfig, clips: int) -> NDArray[np.bool_]:
    """Which samples [N] are kept from training: all windows of up to `clips` clips, a tenth of the set at the most.

    Videos of the look itself, or stills where there are no videos; regularisation sets are no measure of the look. The
    choice depends on what the clips hold, not on their names, their order or the seed, and a clip that two sources
    share is kept from both.
    """
    kept = np.zeros(len(samples), dtype=bool)
    if clips == 0:
        return kept
    paths, stills = samples.column("path"), samples.column("still")
    look = np.array([not config.sources[int(source)].regularisation for source in samples.column("source")])
    eligible = look & ~stills if (look & ~stills).any() else look
    # Keys of latents are hashes, so that their order is that of lots drawn by content.
    lots = np.array([keys[0] for keys in samples.column("latent_keys")])
    order = [index for index in np.argsort(lots, kind="stable") if eligible[index]]
    distinct = list(dict.fromkeys(paths[index] for index in order))
    chosen = distinct[: min(clips, int(LARGEST_SHARE * len(distinct)))]
    return np.isin(paths.astype(str), chosen) if chosen else kept
