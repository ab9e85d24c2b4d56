"""A batch whose embeddings are spoiled and whose states are restored, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .embedding_statistics import EmbeddingStatistics, embeddings_of, entering
from .experiment import Experiment, layer_window, trial_masks

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric, Trial


@dataclass(frozen=True)
class Tracing:
    """What is spoiled, what is restored, and where."""

    stack: str
    corrupt: str
    corruption: str
    scale: float
    embeddings: EmbeddingStatistics
    copies: int
    seed: int
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    places: tuple[str | int, ...]
    window: int
    metric: Metric


@dataclass(frozen=True)
class TracedBatch:
    """Some samples, prepared when something is measured that no killed sweep has left."""

    experiment: Experiment
    sweep: Tracing
    prepared: Callable[[], Trial]

    @cached_property
    def known(self) -> tuple[Trial, NDArray[np.bool_], dict[tuple[int, str], Any], Any]:
        """The trial, its tokens at each place, its states and its logits."""
        trial, sweep = self.prepared(), self.sweep
        masks = trial_masks(trial, [sweep.corrupt, *sweep.places], sweep.stack)
        depth = self.experiment.depth(sweep.stack)
        sites = [(layer, site) for site in sweep.sites for layer in range(depth)]
        return trial, masks, *trial.read(sites, stack=sweep.stack)

    @cached_property
    def spoiled(self) -> tuple[Trial, Any]:
        """Copies of the trial whose embeddings are spoiled, and their logits."""
        trial, masks, _, _ = self.known
        return trial.known(_spoiling(trial, masks[0], self.sweep), self.sweep.copies)

    def clean(self) -> Mapping[str, Any]:
        """The metric as it is."""
        trial, _, _, logits = self.known
        return _mean_of(trial.metric_of(logits, self.sweep.metric))

    def corrupted(self) -> Mapping[str, Any]:
        """The metric of the spoiled copies."""
        trial, logits = self.spoiled
        return _mean_of(trial.metric_of(logits, self.sweep.metric))

    def restored(self, index: tuple[int, ...]) -> Mapping[str, Any]:
        """The metric of the spoiled copies, a state restored: (site, layer, place) by their places."""
        import torch

        from mechanistic.capture.trial import put_back

        sweep = self.sweep
        _, masks, states, _ = self.known
        site, layer = sweep.sites[index[0]], sweep.layers[index[1]]
        where = torch.from_numpy(masks[1 + index[2]])
        wide = sweep.window if site in ("attn_out", "mlp_out") else 1
        trial, _ = self.spoiled
        edits = [
            trial.edit(sweep.stack, number, site, put_back(states[number, site], where, sweep.copies))
            for number in layer_window(layer, wide, self.experiment.depth(sweep.stack))
        ]
        return _mean_of(trial.measure(sweep.metric, edits, sweep.copies))


def _mean_of(values: Any) -> Mapping[str, Any]:
    """Mean over copies (copy, sample)."""
    return {"value": values.double().mean(0).cpu().numpy()}


def _spoiling(trial: Trial, mask: NDArray[np.bool_], sweep: Tracing) -> list[Any]:
    """The edits that spoil the chosen embeddings, in every copy with other noise."""
    import torch

    from mechanistic.capture.corruptions import embedding_noise
    from mechanistic.capture.interventions import Add

    levels = embeddings_of(trial, sweep.stack)
    # Each sample has noise of its own, whatever else is in the batch.
    own_rows = [(0, slice(None))] if sweep.stack == "text" else list(enumerate(trial.crops))
    edits = []
    for level, (own, where) in enumerate(zip(levels, entering(trial, mask, len(levels)), strict=True)):
        if not where.any():
            continue
        if sweep.corruption == "mean":
            mean = torch.from_numpy(sweep.embeddings.means[level]).to(own.device, own.dtype)
            spoiling = (mean - own) * torch.from_numpy(where)[..., None].to(own.device)
        else:
            parts = [
                embedding_noise(
                    where[:, tokens],
                    own.shape[-1],
                    scale=sweep.scale * sweep.embeddings.deviations[level],
                    copies=sweep.copies,
                    seed=sweep.seed,
                    start=trial.batch.start + row,
                    level=level,
                )
                for row, tokens in own_rows
            ]
            spoiling = torch.cat(parts, dim=1)
        edits.append(trial.edit(sweep.stack, level, "resid_pre", Add(spoiling)))
    return edits
