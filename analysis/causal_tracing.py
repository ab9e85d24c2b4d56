"""Causal tracing: spoil the subject or the image, restore one state, see how much of the answer returns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import SpecificationError

from .embedding_statistics import embedding_statistics
from .experiment import (
    UNITS,
    Experiment,
    begin,
    chosen_layers,
    place_names,
    places_of,
    require_stack,
    with_mean,
)
from .sweep import Sweep, named_sweep
from .traced_batch import TracedBatch, Tracing

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric

SITES = ("resid_post", "attn_out", "mlp_out")
CORRUPTIONS = ("noise", "mean")


def causal_tracing(
    samples: Any,
    model: Any,
    *,
    stack: Literal["text", "vision"] = "text",
    corrupt: str = "subject",
    corruption: str = "noise",
    noise_scale: float = 3.0,
    noise_samples: int = 10,
    sites: Sequence[str] = SITES,
    places: Sequence[str | int] | None = None,
    layers: int | Sequence[int] | None = None,
    window: int = 1,
    metric: Metric = "prob",
    batch_size: int = 32,
    name: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> xr.Dataset:
    """Average total and indirect effects of states on the answer, as ROME defines them.

    With p of the clean run, p* of the run whose chosen embeddings have noise added, and p*(h) of that run
    with the state h as it is in the clean one: TE = p - p*, IE(h) = p*(h) - p*, both averaged over noise
    samples and then over samples. Noise has `noise_scale` times one standard deviation, taken over all
    numbers of all chosen embeddings of all samples; embeddings are what enters the decoder's first layer
    (resid_pre). Image features that a model adds at higher layers too (Qwen3-VL) are spoiled there likewise,
    each scaled to their own deviation.

    Parameters
    ----------
    samples
        A dataset such as Shapes(32), a list of samples, or one Sample.
    model
        What `load_model` returned, or a name for it.
    stack
        ``"text"``: the decoder; ``"vision"``: the image encoder, where the patches that enter its first layer
        are spoiled and its own states restored. Its places are ``"image"``, boxes, and positions.
    corrupt
        The tokens that are spoiled: ``"subject"``, ``"image"``, ``"subject+object"``, see `select_tokens`.
    corruption
        ``"noise"``; or ``"mean"``, which puts the mean of all chosen embeddings there, once.
    sites
        The states that are restored: resid_post, attn_out, mlp_out (also resid_pre, resid_mid).
    places
        Tokens whose states are restored together: roles, boxes (``"subject_box"``), positions (3 or
        ``"@3"``); by default every role that all samples have. See `place_masks`.
    window
        Layers restored together at attn_out and mlp_out, around the one named: l - window // 2 to
        l - (-window // 2) - 1. The residual stream is restored at one layer.
    metric
        ``"prob"`` of the right answer's first token (ROME's), ``"log_prob"``, or
        ``"logit_diff"``: its logit less the mean of the other options'.

    batch_size
        Rows of a forward: samples times noise samples.
    name
        Keep the result: as derived/NAME of the run that `samples` is, else in the folder of this path. A
        sweep that was killed goes on where it was, and one that is finished is returned as it is.

    Returns
    -------
    clean, corrupted, total_effect (sample), float64, units of the metric.
    restored, indirect_effect (sample, site, layer, place), float64.
    average_total_effect (), average_indirect_effect (site, layer, place), each with _low and _high: bootstrap
        interval over samples, minimal-pair sets together.
    recovered (site, layer, place), float64: average indirect over average total effect; NaN where that is 0.

    Raises
    ------
    SpecificationError  a site, layer, place, metric or corruption that does not exist.
    DataError           a sample without such tokens, without an answer, or whose answer is not told apart by
                        one token.
    ModelError          the model does not have the site, or where its images enter could not be established.
    OutputExistsError   `name` is something else, or under way with other arguments or another model.

    References
    ----------
    Meng, Bau, Andonian and Belinkov (2022), Locating and editing factual associations in GPT, section 2.1,
    arXiv:2202.05262.
    """
    asked = dict(locals())
    experiment = begin(model, samples)
    kept = named_sweep("causal_tracing", asked, experiment.loaded, experiment.samples)
    if kept.held is not None:
        return kept.held
    require_stack(stack)
    _check(sites, corruption, noise_scale, noise_samples, window)
    numbers, named = chosen_layers(experiment, layers, stack), places_of(experiment, places, stack)
    embeddings = embedding_statistics(experiment, corrupt, batch_size, metric, stack)
    sweep = Tracing(
        stack=stack,
        corrupt=corrupt,
        corruption=corruption,
        scale=noise_scale,
        embeddings=embeddings,
        copies=noise_samples if corruption == "noise" else 1,
        seed=seed,
        sites=tuple(sites),
        layers=tuple(numbers),
        places=tuple(named),
        window=window,
        metric=metric,
    )
    result = _effects(experiment, sweep, batch_size, kept, quiet)
    for effect in ("total_effect", "indirect_effect"):
        result = with_mean(result, effect, f"average_{effect}", experiment.clusters, level=level, seed=seed)
    total = result["average_total_effect"]
    result["recovered"] = (result["average_indirect_effect"] / total.where(total != 0)).assign_attrs(
        units="1", long_name="share of the total effect recovered"
    )
    result.attrs = experiment.attrs | {
        "analysis": "causal_tracing",
        "stack": stack,
        "corrupt": corrupt,
        "corruption": corruption,
        "noise_standard_deviation": noise_scale * embeddings.deviations[0] if corruption == "noise" else 0.0,
        "noise_scale": noise_scale,
        "noise_samples": sweep.copies,
        "window": window,
        "metric": metric,
        "level": level,
        "seed": seed,
    }
    return kept.keep(result)


def _check(sites: Sequence[str], corruption: str, scale: float, copies: int, window: int) -> None:
    known = ("resid_pre", "resid_mid", *SITES)
    if unknown := [site for site in sites if site not in known]:
        raise SpecificationError(
            f"No state '{unknown[0]}' can be restored.", f"Choose of {', '.join(known)}."
        )
    if corruption not in CORRUPTIONS:
        raise SpecificationError(
            f"There is no corruption '{corruption}' of embeddings.", f"There are {', '.join(CORRUPTIONS)}."
        )
    if scale <= 0 or copies < 1 or window < 1 or not sites:
        raise SpecificationError(
            f"noise_scale={scale}, noise_samples={copies}, window={window}, {len(sites)} sites.",
            "The scale is above 0, the others are 1 or more: noise_scale=3.0, noise_samples=10, window=1.",
        )


def _effects(experiment: Experiment, sweep: Tracing, batch_size: int, kept: Sweep, quiet: bool) -> xr.Dataset:
    """Clean, corrupted and restored metric of every sample."""
    import torch

    size = len(experiment.samples)
    # Rows of a forward are the noise samples of each sample.
    per_batch = max(1, batch_size // sweep.copies)
    shape = (size, len(sweep.sites), len(sweep.layers), len(sweep.places))
    clean, corrupted, restored = np.empty(size), np.empty(size), np.empty(shape)
    batches = list(experiment.batches(per_batch, sweep.metric))
    with torch.no_grad(), kept.steps(len(batches) * (2 + int(np.prod(shape[1:]))), quiet=quiet) as step:
        for where, prepared in batches:
            batch = TracedBatch(experiment, sweep, prepared)
            clean[where] = step(batch.clean)["value"]
            corrupted[where] = step(batch.corrupted)["value"]
            for index in np.ndindex(*shape[1:]):
                restored[(where, *index)] = step(partial(batch.restored, index))["value"]
    return _labelled(experiment, sweep, clean, corrupted, restored)


def _labelled(
    experiment: Experiment,
    sweep: Tracing,
    clean: NDArray[np.float64],
    corrupted: NDArray[np.float64],
    restored: NDArray[np.float64],
) -> xr.Dataset:
    units = {"units": UNITS[sweep.metric]}
    grid = ("sample", "site", "layer", "place")
    what = sweep.metric.replace("_", " ")
    result = xr.Dataset(
        {
            "clean": ("sample", clean, {**units, "long_name": f"{what} in the clean run"}),
            "corrupted": ("sample", corrupted, {**units, "long_name": f"{what} in the corrupted run"}),
            "total_effect": ("sample", clean - corrupted, {**units, "long_name": "total effect"}),
            "restored": (grid, restored, {**units, "long_name": f"{what} with the state restored"}),
        },
        {
            "site": list(sweep.sites),
            "layer": np.array(sweep.layers, np.int32),
            "place": place_names(sweep.places),
            **experiment.coordinates(),
        },
    )
    effect = result["restored"] - result["corrupted"]
    result["indirect_effect"] = effect.assign_attrs({**units, "long_name": "indirect effect"})
    return result
