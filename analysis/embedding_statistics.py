"""How far the embeddings of some tokens scatter: what noise on them is scaled to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import ModelError
from mechanistic.store.schema import KIND

from .experiment import Experiment, trial_masks

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric, Trial


@dataclass(frozen=True)
class EmbeddingStatistics:
    """Standard deviation over all numbers, and mean (d_model), of the chosen tokens' embeddings.

    The first is of what enters the first layer; in a model that adds image features at higher layers too
    (Qwen3-VL), one more follows for each of those.
    """

    deviations: tuple[float, ...]
    means: tuple[NDArray[np.float32], ...]


def embedding_statistics(
    experiment: Experiment, corrupt: str, batch_size: int, metric: Metric, stack: str = "text"
) -> EmbeddingStatistics:
    """The statistics of the tokens `corrupt` of all samples. Raises like `place_masks`."""
    import torch

    rows: list[list[NDArray[np.float32]]] = []
    for _, trial in experiment.trials(batch_size, metric):
        mask = trial_masks(trial, [corrupt], stack)[0]
        with torch.no_grad():
            levels = embeddings_of(trial, stack)
        masks = entering(trial, mask, len(levels))
        rows.append([level.float().cpu().numpy()[own] for level, own in zip(levels, masks, strict=True)])
    joined = [np.concatenate(level) for level in zip(*rows, strict=True)]
    # Over n - 1, as the authors' torch.std counts; words alone leave nothing in higher layers.
    return EmbeddingStatistics(
        tuple(float(level.std(dtype=np.float64, ddof=1)) if level.size else 0.0 for level in joined),
        tuple(level.mean(0) if level.size else np.zeros(level.shape[1], np.float32) for level in joined),
    )


def embeddings_of(trial: Trial, stack: str = "text") -> list[Any]:
    """What enters the first layer, and what images add between higher ones: (sample, token, d_model).

    Of an encoder (1, token of all samples, d_model), which nothing is added to.
    """
    if stack == "vision":
        return list(trial.read([(0, "resid_pre")], stack=stack)[0].values())
    deep = image_levels(trial)
    sites = [(0, "resid_pre")]
    for level in range(1, deep + 1):
        sites += [(level, "resid_pre"), (level - 1, "resid_post")]
    seen, _ = trial.read(sites)
    added = [seen[level, "resid_pre"] - seen[level - 1, "resid_post"] for level in range(1, deep + 1)]
    return [seen[0, "resid_pre"], *added]


def entering(trial: Trial, mask: NDArray[np.bool_], levels: int) -> list[NDArray[np.bool_]]:
    """Which of the tokens `mask` (sample, token) have embeddings at each level: at higher ones, of images."""
    if levels == 1:
        return [mask]
    image = np.zeros_like(mask)
    for row, table in enumerate(trial.batch.decoder):
        image[row, : len(table["kind"])] = table["kind"] == KIND["image"]
    return [mask, *[mask & image] * (levels - 1)]


def image_levels(trial: Trial) -> int:
    """Up to which layer image features enter the decoder again, 0 for most models.

    ModelError where they may, and it could not be established.
    """
    from mechanistic.capture.decoder_inputs import DEEPSTACK
    from mechanistic.capture.forward import takes

    if trial.resumed is not None:
        return trial.resumed.image_layers
    if takes(trial.loaded.model.get_decoder(), DEEPSTACK):
        raise ModelError(
            f"{type(trial.loaded.model).__name__} adds image features in higher layers too, which could not "
            "be told apart.",
            "Load it in float32, or corrupt the pixels instead: corrupt_images.",
        )
    return 0
