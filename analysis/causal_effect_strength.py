"""How far a patched model's answer is from the clean one's, in one number."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError, SpecificationError

from .attention_weights import plain_array

Effect = Literal["mse", "cosine", "kl", "logit_diff", "recovered"]


def causal_effect_strength(
    clean: Any,
    patched: Any,
    *,
    metric: Effect = "mse",
    answers: tuple[int, int] | None = None,
    corrupt: Any = None,
    position: int = -1,
) -> float:
    """Effect of a patch on the logits x at one position, averaged over the batch.

    mse: mean of (x_patched - x_clean)^2;
    cosine: 1 - cos(x_patched, x_clean);
    kl: sum_w p_clean(w) log(p_clean(w) / p_patched(w)), nats;
    logit_diff: d(patched) - d(clean), d = x[right] - x[wrong];
    recovered: (d(patched) - d(corrupt)) / (d(clean) - d(corrupt)).

    Parameters
    ----------
    clean, patched, corrupt
        Outputs of a model (their `logits` are read), or arrays or tensors (..., token, word) or (word,).
    answers
        Token ids (right, wrong) of logit_diff and recovered.
    position
        The token whose logits are compared; the last one.

    Raises
    ------
    SpecificationError  another metric, or one that lacks `answers` or `corrupt`.
    DimensionError      outputs without logits, or of different vocabularies or batches.
    DataError           clean and corrupt do not differ, so nothing can be recovered.
    """
    if metric not in get_args(Effect):
        raise SpecificationError(
            f"There is no metric '{metric}'.", f"There are {', '.join(get_args(Effect))}."
        )
    first, second = _logits(clean, position), _logits(patched, position)
    _require_one_shape(first, second)
    if metric == "mse":
        return float(((second - first) ** 2).mean())
    if metric == "cosine":
        norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
        return float((1 - (first * second).sum(-1) / norms).mean())
    if metric == "kl":
        logs = [_log_softmax(each) for each in (first, second)]
        return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())
    if answers is None or (metric == "recovered" and corrupt is None):
        raise SpecificationError(
            f"The metric {metric} needs {'answers' if answers is None else 'the corrupt output'}.",
            "Give answers=(right, wrong) as token ids, and for recovered also corrupt=.",
        )
    before, after = (each[:, answers[0]] - each[:, answers[1]] for each in (first, second))
    if metric == "logit_diff":
        return float((after - before).mean())
    third = _logits(corrupt, position)
    _require_one_shape(first, third)
    wrong = third[:, answers[0]] - third[:, answers[1]]
    apart = before - wrong
    if (np.abs(apart) < 1e-6 * np.maximum(1, np.abs(before))).any():
        raise DataError(
            "The clean and the corrupt output have the same logit difference.",
            "There is nothing to recover: choose inputs with different answers.",
        )
    return float(((after - wrong) / apart).mean())


def _logits(output: Any, position: int) -> NDArray[np.float64]:
    """(batch, word)."""
    found = getattr(output, "logits", output)
    if hasattr(found, "keys"):
        raise DimensionError(
            "This output has no logits.",
            "Load the model with its language head, such as AutoModelForCausalLM.",
        )
    values = np.asarray(plain_array(found), np.float64)
    if not values.ndim:
        raise DimensionError("A single number has no logits.", "Pass outputs, or arrays (..., token, word).")
    values = values[..., position, :] if values.ndim > 2 else values
    return values.reshape(-1, values.shape[-1])


def _require_one_shape(first: NDArray[Any], second: NDArray[Any]) -> None:
    if first.shape != second.shape:
        raise DimensionError(
            f"The outputs have {first.shape} and {second.shape} logits (batch, word).",
            "Compare outputs of one model on as many inputs.",
        )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
