"""Which samples an intervention repairs and which it breaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mechanistic.capture.trial import Trial


class AnswerChange:
    """The chosen option of every sample, `first` as it was, `chosen` under each of a grid of interventions.

    The chosen option is the one with the highest logit; -1 where a sample has fewer than two options.
    """

    def __init__(self, samples: Sequence[Any], shape: tuple[int, ...]) -> None:
        self.answer = np.array([sample.answer_index if len(sample.options) > 1 else -1 for sample in samples])
        self.first: NDArray[np.int64] = np.full(len(samples), -1)
        self.chosen: NDArray[np.int64] = np.full((len(samples), *shape), -1)

    def choice(self, where: slice, trial: Trial, logits: Any) -> NDArray[np.int64]:
        """What is chosen by these logits of a batch."""
        options = trial.option_logits(logits)[0].cpu().numpy()
        return np.where(self.answer[where] >= 0, np.nan_to_num(options, nan=-np.inf).argmax(1), -1)

    def dataset(self, dims: tuple[str, ...]) -> xr.Dataset:
        """clean_accuracy, accuracy, repaired, broken and the chosen options."""
        scored = self.answer >= 0
        was = self.first[scored] == self.answer[scored]
        shown = self.chosen[scored]
        now = shown == self.answer[scored].reshape(-1, *[1] * len(dims))
        before = was.reshape(-1, *[1] * len(dims))
        share = {"units": "1", "long_name": "share of samples whose right option has the highest logit"}
        nothing = float("nan")
        place = {"long_name": "place of the option with the highest logit, -1: no options"}
        return xr.Dataset(
            {
                "clean_accuracy": ((), float(was.mean()) if scored.any() else nothing, share),
                "accuracy": (
                    dims,
                    now.mean(0) if scored.any() else np.full(self.chosen.shape[1:], nothing),
                    share,
                ),
                "repaired": (
                    dims,
                    (now & ~before).sum(0),
                    {"units": "sample", "long_name": "wrong before, right now"},
                ),
                "broken": (
                    dims,
                    (before & ~now).sum(0),
                    {"units": "sample", "long_name": "right before, wrong now"},
                ),
                "answer_index": (
                    "sample",
                    self.answer.astype(np.int16),
                    {"long_name": "place of the right option, -1: no options"},
                ),
                "clean_choice": ("sample", self.first.astype(np.int16), place),
                "choice": (("sample", *dims), self.chosen.astype(np.int16), place),
            }
        )
