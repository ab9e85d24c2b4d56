"""Attention knocked out or scaled: which look of which token at which others the answer needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from mechanistic.store.errors import DimensionError, SpecificationError

from .experiment import begin, chosen_heads, chosen_layers, layer_window, require_stack, trial_masks
from .intervention_sweep import Edits, InterventionGrid, Measuring, intervention_sweep
from .sweep import named_sweep
from .token_places import place_name

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric, Trial

# Where attention goes from, and to.
Edge = tuple[str | int, str | int]


def attention_knockout(
    samples: Any,
    model: Any,
    *,
    stack: Literal["text", "vision"] = "text",
    edges: Sequence[Edge] = (("last", "image"),),
    window: int = 1,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    per_head: bool = False,
    metric: Metric = "logit_diff",
    batch_size: int = 8,
    name: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> xr.Dataset:
    """Change of the answer when some queries no longer see some keys, in a window of layers at a time.

    The keys are closed before the softmax, so what is left of a row still sums to 1; a head whose query is
    left without any key says nothing there.

    Parameters
    ----------
    samples, model
        As in `causal_tracing`.
    stack
        ``"text"``: the decoder; ``"vision"``: the image encoder, whose places are ``"image"``, boxes such as
        ``"subject_box"``, and positions of its own tokens.
    edges
        (query, key) places, see `causal_tracing`; every token of one no longer sees any of the other.
    window
        Layers closed together around the one named, as in `causal_tracing`; twice the number of layers
        closes all of them.
    heads, per_head
        The heads that are closed, all by default: together, or with `per_head` one at a time.
    name
        Where to keep the result, see `causal_tracing`.

    Returns
    -------
    clean (sample), knocked_out (sample, edge, layer[, head]), effect = knocked_out - clean, float64, units of
        the metric; mean_effect (edge, layer[, head]), with _low and _high: bootstrap over samples,
        minimal-pair sets together.
    clean_accuracy (), accuracy, repaired, broken (edge, layer[, head]), choice: as in `ablate`.
    edge is named "query -> key".

    Raises
    ------
    SpecificationError  a layer, head, metric or place that does not exist.
    DataError           a sample without such tokens, or as in `causal_tracing`.

    References
    ----------
    Geva, Bastings, Filippova and Globerson (2023), arXiv:2304.14767.
    """
    asked = dict(locals())
    experiment = begin(model, samples)
    kept = named_sweep("attention_knockout", asked, experiment.loaded, experiment.samples)
    if kept.held is not None:
        return kept.held
    require_stack(stack)
    if window < 1 or not edges:
        raise SpecificationError(
            f"window={window}, {len(edges)} edges.",
            "Give a window of 1 or more, and edges=[('last', 'image')].",
        )
    numbers, chosen = chosen_layers(experiment, layers, stack), chosen_heads(experiment, heads, stack)
    groups = [[head] for head in chosen] if per_head else [chosen]

    def edits(_: slice, trial: Trial) -> Edits:
        from mechanistic.capture.interventions import CloseKeys, Edit

        def of(index: tuple[int, ...]) -> list[Any]:
            closed = _between(trial, stack, edges[index[0]], groups[index[2] if per_head else 0], CloseKeys)
            around = layer_window(numbers[index[1]], window, experiment.depth(stack))
            return [Edit(stack, layer, "scores", closed) for layer in around]

        return of

    names = [f"{place_name(query)} -> {place_name(key)}" for query, key in edges]
    coords: dict[str, Any] = {"edge": names, "layer": np.array(numbers, np.int32)}
    if per_head:
        coords["head"] = np.array(chosen, np.int32)
    how = Measuring(metric, batch_size, level, seed, quiet, kept)
    result = intervention_sweep(experiment, InterventionGrid("knocked_out", coords, edits), how)
    result = result.assign_attrs(
        analysis="attention_knockout",
        stack=stack,
        window=window,
        heads="each" if per_head else ",".join(map(str, chosen)),
    )
    return kept.keep(result)


def scale_attention(
    samples: Any,
    model: Any,
    *,
    stack: Literal["text", "vision"] = "text",
    factors: Sequence[float] = (0.5, 0.8, 1.2, 1.5, 2.0),
    edge: Edge = ("last", "image"),
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    metric: Metric = "logit_diff",
    batch_size: int = 8,
    name: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> xr.Dataset:
    """Multiply the attention scores (before the softmax) of an edge by a factor, and score the answers again.

    Above 1 it sharpens where the query looks within the image, below 1 it spreads it out. `adapt_scale` then
    chooses between two factors by the model's confidence, which is AdaptVis.

    Parameters
    ----------
    stack
        As in `attention_knockout`.
    layers, heads
        Those that are scaled, together; all by default.
    name
        Where to keep the result, see `causal_tracing`.

    Returns
    -------
    clean (sample), scaled (sample, factor), effect, mean_effect, clean_accuracy, accuracy, repaired, broken,
        choice: as in `attention_knockout`, by factor.
    confidence (sample), float64: probability of the word that the unchanged model is most sure of.

    Raises
    ------
    SpecificationError, DataError
                    as in `attention_knockout`; a factor below 0.

    References
    ----------
    Chen et al. (2025), Why is spatial reasoning hard for VLMs?, arXiv:2503.01773 (ScalingVis, AdaptVis).
    """
    asked = dict(locals())
    experiment = begin(model, samples)
    kept = named_sweep("scale_attention", asked, experiment.loaded, experiment.samples)
    if kept.held is not None:
        return kept.held
    require_stack(stack)
    if not factors or min(factors) < 0:
        raise SpecificationError(
            f"The factors are {list(factors)}.", "Give some of 0 or more: factors=[0.5, 2.0]."
        )
    numbers, chosen = chosen_layers(experiment, layers, stack), chosen_heads(experiment, heads, stack)

    def edits(_: slice, trial: Trial) -> Edits:
        from mechanistic.capture.interventions import Edit, ScaleScores

        def of(index: tuple[int, ...]) -> list[Any]:
            factor = partial(ScaleScores, factor=float(factors[index[0]]))
            scaled = _between(trial, stack, edge, chosen, factor)
            return [Edit(stack, layer, "scores", scaled) for layer in numbers]

        return of

    how = Measuring(metric, batch_size, level, seed, quiet, kept)
    grid = InterventionGrid("scaled", {"factor": np.array(factors, np.float64)}, edits)
    result = intervention_sweep(experiment, grid, how).assign_attrs(
        analysis="scale_attention",
        stack=stack,
        edge=" -> ".join(place_name(place) for place in edge),
        layers=",".join(map(str, numbers)),
        heads=",".join(map(str, chosen)),
    )
    return kept.keep(result)


def adapt_scale(result: xr.Dataset, *, unsure: float, sure: float, threshold: float) -> xr.Dataset:
    """AdaptVis: one factor where the model's confidence is below a threshold, another where it is not.

    Parameters
    ----------
    result
        What `scale_attention` returned, for both factors.

    Returns
    -------
    factor (sample), float64: what each sample was given; choice (sample), int16.
    accuracy, clean_accuracy (), float64; repaired, broken (), int64.

    Raises
    ------
    DimensionError  a factor that was not measured.
    """
    held = np.asarray(result["factor"].values)
    if missing := [factor for factor in (unsure, sure) if factor not in held]:
        raise DimensionError(
            f"The factor {missing[0]} was not measured; there are {', '.join(map(str, held))}.",
            f"Measure it: scale_attention(..., factors=[{unsure}, {sure}]).",
        )
    given = np.where(result["confidence"].values < threshold, unsure, sure)
    rows = np.arange(len(given))
    places = (given[:, None] == held).argmax(1)
    choice = result["choice"].transpose("sample", "factor").values[rows, places]
    answer = result["answer_index"].values
    scored = answer >= 0
    was, now = (each[scored] == answer[scored] for each in (result["clean_choice"].values, choice))
    share = {"units": "1", "long_name": "share of samples whose right option has the highest logit"}
    return xr.Dataset(
        {
            "factor": ("sample", given, {"units": "1", "long_name": "factor of the attention scores"}),
            "choice": ("sample", choice, result["choice"].attrs),
            "clean_accuracy": ((), float(was.mean()), share),
            "accuracy": ((), float(now.mean()), share),
            "repaired": ((), int((now & ~was).sum()), {"units": "sample"}),
            "broken": ((), int((was & ~now).sum()), {"units": "sample"}),
        },
        {"sample_id": result["sample_id"]},
        {**result.attrs, "analysis": "adapt_scale", "unsure": unsure, "sure": sure, "threshold": threshold},
    )


def _between(trial: Trial, stack: str, edge: Edge, heads: Sequence[int], change: Callable[[Any], Any]) -> Any:
    """The change of scores that is made from the queries and keys of an edge, (sample, head, query, key)."""
    import torch

    from mechanistic.capture.encoder_edits import Between

    query, key = torch.from_numpy(trial_masks(trial, list(edge), stack))
    chosen = torch.zeros(trial.loaded.anatomy.stack(stack).heads, dtype=torch.bool)
    chosen[list(heads)] = True
    if stack == "vision":
        return Between(query[0], key[0], chosen, change)
    return change(query[:, None, :, None] & key[:, None, None, :] & chosen[:, None, None])
