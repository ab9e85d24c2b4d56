"""How far the embeddings of some tokens scatter: what noise on them is scaled to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import ModelError
from mechanistic.store.schema import KIND

from .experiment import Experiment, trial_masks

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric, Trial


def embedding_statistics(
    experiment: Experiment, corrupt: str, batch_size: int, metric: Metric
) -> tuple[float, NDArray[np.float32]]:
    """Standard deviation over all numbers, and mean (d_model), of the chosen tokens' embeddings.

    Raises
    ------
    ModelError    image tokens are among them, and the model adds image features in higher layers too.
    """
    import torch

    rows = []
    for _, trial in experiment.trials(batch_size, metric):
        _require_reachable(experiment.loaded, trial, corrupt)
        mask = torch.from_numpy(trial_masks(trial, [corrupt])[0])
        with torch.no_grad():
            seen, _ = trial.read([(0, "resid_pre")])
        rows.append(seen[0, "resid_pre"].float().cpu()[mask].numpy())
    every = np.concatenate(rows)
    # Over n - 1, as the authors' torch.std counts.
    return float(every.std(dtype=np.float64, ddof=1)), every.mean(0)


def _require_reachable(loaded: Any, trial: Trial, corrupt: str) -> None:
    images = [table["kind"] == KIND["image"] for table in trial.batch.decoder]
    chosen = trial_masks(trial, [corrupt])[0]
    spoiled = any(chosen[row, : len(image)][image].any() for row, image in enumerate(images))
    if spoiled and has_deep_images(loaded):
        raise ModelError(
            f"{type(loaded.model).__name__} adds image features in higher layers too, which noise on its "
            "embeddings leaves clean.",
            "Corrupt the pixels instead, with corrupt_images, and patch between the pairs.",
        )


def has_deep_images(loaded: Any) -> bool:
    """Whether image features enter the decoder in higher layers too (Qwen3-VL's deep-stack)."""
    from mechanistic.capture.decoder_inputs import DEEPSTACK
    from mechanistic.capture.forward import takes

    return takes(loaded.model.get_decoder(), DEEPSTACK)
