"""Gradient x attention relevancy: which tokens reached the answer through attention that mattered for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from mechanistic.store.errors import SpecificationError, UsageError

from .attribution_table import SampleAttribution, attribute_each, attribution_table, model_attributes
from .sweep import named_sweep

_ATTRS = {
    "attention_relevancy": {"units": "logit", "long_name": "gradient x attention relevancy"},
    "score": {"units": "logit", "long_name": "target of the sample"},
}


def attention_relevancy(
    model: Any,
    samples: Any,
    *,
    rows: Literal["last", "words"] = "last",
    target: str | int | tuple[str | int, str | int] | None = None,
    layer: Sequence[int] | None = None,
    processor: Any = None,
    name: str | Path | None = None,
    quiet: bool = False,
) -> xr.Dataset:
    """Relevancy of every token for the last prompt token, or for each word: R = (I + A_L) ... (I + A_1).

    A_l = mean over heads of max(0, dF / dA_lh * A_lh), with the weights A_lh of layer l and head h, and F a
    logit at the last prompt token or the difference of two. Image tokens are among the decoder's tokens, so
    that their part of a row is the cross-modal one; where the decoder reads them by cross-attention instead
    (Mllama), they stand behind its own tokens. Weights and gradients are exact whatever kernel the model
    attends with; only the rows that are asked for are multiplied.

    Parameters
    ----------
    model, samples, target, processor
        As in `integrated_gradients`.
    rows
        ``"last"``, or ``"words"``: the mean over the tokens of each word of the question, of one sample.
    layer
        True numbers of the layers to multiply; None means all.
    name
        Where to keep the result, see `integrated_gradients`.

    Returns
    -------
    attention_relevancy (token) or (word, token), float32, logit, 0 or more; the decoder's tokens of all
        samples end to end, labelled as in a run: sample_index, kind, token_text, in_word, image_index, tile,
        patch_row, patch_col, box_x0 to box_y1. A token's relevancy for itself holds the 1 of I.
    score (sample), float64, logit.

    Raises
    ------
    SpecificationError  no such layer or rows, or a target that the tokenizer splits or cannot tell apart.
    UsageError          rows="words" of several samples or without words; no processor; training mode.
    CaptureError        the model writes no text, or a layer attends by code of its own.
    ModelError          the model gives no logits.

    References
    ----------
    Chefer, Gur and Wolf (2021), Generic Attention-model Explainability for Interpreting Bi-Modal and
    Encoder-Decoder Transformers.
    """
    asked = dict(locals())
    from mechanistic.capture.libraries import require_model_libraries

    require_model_libraries()
    from mechanistic.capture.given import given_model, given_samples
    from mechanistic.capture.relevancy import relevancy_labels, relevancy_rows
    from mechanistic.capture.targeted_sample import target_sample

    if rows not in ("last", "words"):
        raise SpecificationError(f"There are no rows {rows!r}.", "Choose rows='last' or rows='words'.")
    loaded = given_model(model, processor, "attention_relevancy(model, samples, processor=processor)")
    given = given_samples(samples)
    if rows == "words" and len(given) > 1:
        raise UsageError(
            f"The words of {len(given)} samples are not the same rows.", "Give one: samples=dataset[0]."
        )
    sweep = named_sweep("attention_relevancy", asked, loaded, given)
    if sweep.held is not None:
        return sweep.held

    def attribute(sample: Any, place: int) -> SampleAttribution:
        question = target_sample(loaded, sample, place, target)
        last = [np.asarray(question.batch.last_prompt)]
        found, score = relevancy_rows(
            question, list(question.words.values()) if rows == "words" else last, layer
        )
        return SampleAttribution(
            {"attention_relevancy": found[0]},
            relevancy_labels(question),
            {"sample_id": sample.sample_id, "target": question.target.name, "score": score},
            {"rows": found, "words": np.array(list(question.words), object)} if rows == "words" else {},
        )

    each = attribute_each(sweep, given, attribute, quiet=quiet)
    table = attribution_table(each, dim="token", attrs=_ATTRS)
    if rows == "words":
        relevancy = (("word", "token"), each[0].beside["rows"], _ATTRS["attention_relevancy"])
        table = table.assign(attention_relevancy=relevancy).assign_coords(word=each[0].beside["words"])
    table = table.assign_attrs(analysis="attention_relevancy", rows=rows, **model_attributes(loaded))
    return sweep.keep(table)
