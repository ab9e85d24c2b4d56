"""Attribution patching: what patching every component would do, estimated from one gradient, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import ModelError, SpecificationError

from .answer_pairs import MIN_DIFFERENCE, AnswerPairs, PairTrials, answer_pairs, pair_masks
from .experiment import begin, chosen_layers, place_names, places_of, with_mean
from .sweep import Steps, named_sweep

if TYPE_CHECKING:
    from mechanistic.capture.trial import Trial

Method = Literal["gradient", "integrated"]
Direction = Literal["denoise", "noise"]
HEADED = {"z": "head", "q": "head", "k": "kv_head", "v": "kv_head"}
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", *HEADED)


@dataclass(frozen=True)
class _Screen:
    site: str
    layers: tuple[int, ...]
    places: tuple[str | int, ...]
    heads: int
    method: Method
    steps: int
    direction: Direction

    @property
    def dims(self) -> tuple[str, ...]:
        return ("pair", "layer", "place", *([HEADED[self.site]] if self.heads else []))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), len(self.places), *([self.heads] if self.heads else []))

    @property
    def sites(self) -> list[tuple[int, str]]:
        return [(layer, self.site) for layer in self.layers]

    def directed(self, prepared: PairTrials) -> tuple[Trial, Trial]:
        """A batch of pairs, the run that is patched first."""
        clean, corrupt = prepared()
        return (corrupt, clean) if self.direction == "denoise" else (clean, corrupt)


def attribution_patching(
    samples: Any,
    model: Any,
    *,
    site: str = "z",
    pairs: Sequence[tuple[int, int]] | None = None,
    places: Sequence[str | int] | None = None,
    layers: int | Sequence[int] | None = None,
    method: Method = "gradient",
    steps: int = 10,
    direction: Direction = "denoise",
    top: int = 10,
    min_difference: float = MIN_DIFFERENCE,
    batch_size: int = 8,
    name: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> xr.Dataset:
    """Estimate of every patch's effect, (x_source - x) . dm/dx, beside the exact effect of the largest ones.

    x is the activation of the run that is patched, x_source that of the other run of the pair, m the logit
    difference of the clean and the corrupt answer. The estimate is exact where the model is linear between
    the two; how far it holds elsewhere, `exact` shows for its `top` candidates.

    Parameters
    ----------
    samples, model
        As in `causal_tracing`.
    site
        resid_pre, resid_mid, resid_post, attn_out, mlp_out; z, q, k, v, which are attributed head by head.
    pairs, min_difference
        As in `path_patching`.
    places
        Tokens that are patched together, as in `causal_tracing`: where they are in either run, the
        background in both. By default all tokens for sites with heads, and every role that all samples have
        for the others.
    method
        ``"gradient"``: at the run that is patched. ``"integrated"``: the mean of gradients at `steps` inputs
        on the straight line to the other run's decoder inputs.
    direction
        ``"denoise"`` patches clean values into the corrupt run, ``"noise"`` corrupt ones into the clean run.
    top
        How many components get their exact effect, those of the largest |mean attribution|.
    name
        Where to keep the result, see `causal_tracing`.

    Returns
    -------
    clean, corrupt (pair), float64, logits.
    attribution (pair, layer, place[, head]), float64, logits: estimated change of the logit difference.
    exact (pair, layer, place[, head]), float64, logits: the measured change; NaN but for the candidates.
    mean_attribution, mean_exact (layer, place[, head]), with _low and _high: bootstrap over pairs, sets
        together; share, exact_share: of the summed distance between the two runs.
    correlation (), float64: Pearson's, of mean attribution and mean exact effect among the candidates; NaN
        for fewer than three.
    The head dimension is `kv_head` for k and v.

    Raises
    ------
    SpecificationError  a site, layer, place, method or direction that does not exist.
    DataError           see `answer_pairs`.
    ModelError          the model does not have the site, or integrated over image features that it adds in
                        higher layers.

    References
    ----------
    Nanda (2023), Attribution patching. Syed, Rager and Conmy (2023), arXiv:2310.10348. Hanna, Pezzelle and
    Belinkov (2024), arXiv:2403.17806 (integrated: EAP-IG).
    """
    asked = dict(locals())
    experiment = begin(model, samples)
    sweep = named_sweep("attribution_patching", asked, experiment.loaded, experiment.samples)
    if sweep.held is not None:
        return sweep.held
    _check(site, method, direction, steps, top)
    stack = experiment.loaded.anatomy.stack("text")
    heads = {"head": stack.heads, "kv_head": stack.kv_heads}[HEADED[site]] if site in HEADED else 0
    named: list[str | int] = ["all"] if site in HEADED and places is None else places_of(experiment, places)
    numbers = chosen_layers(experiment, layers)
    screen = _Screen(site, tuple(numbers), tuple(named), heads, method, steps, direction)
    if method == "integrated":
        _require_reachable(experiment.loaded)
    chosen = answer_pairs(experiment, pairs, min_difference=min_difference, batch_size=batch_size)
    batches = chosen.batches(batch_size)
    exactly = min(top, int(np.prod(screen.shape)))
    with sweep.steps(len(batches) * (2 + exactly), quiet=quiet) as step:
        estimate = _estimates(chosen, screen, batches, step)
        candidates = np.argsort(-np.abs(estimate.mean(0)).ravel(), kind="stable")[:top]
        exact = _exact(chosen, screen, batches, np.sort(candidates), step)
    result = _labelled(chosen, screen, estimate, exact)
    for effect in ("attribution", "exact"):
        options: dict[str, Any] = {"level": level, "seed": seed, "dim": "pair"}
        result = with_mean(result, effect, f"mean_{effect}", chosen.clusters, **options)
    result.attrs |= {
        "analysis": "attribution_patching",
        "site": site,
        "method": method,
        "steps": steps if method == "integrated" else 0,
        "direction": direction,
        "top": exactly,
        "min_difference": min_difference,
        "metric": "logit_diff",
        "level": level,
        "seed": seed,
    }
    return sweep.keep(result)


def _check(site: str, method: str, direction: str, steps: int, top: int) -> None:
    if site not in SITES:
        raise SpecificationError(f"There is no site '{site}' to attribute.", f"There are {', '.join(SITES)}.")
    for name, value, known in (("method", method, Method), ("direction", direction, Direction)):
        if value not in get_args(known):
            raise SpecificationError(
                f"There is no {name} '{value}'.", f"Choose of {', '.join(get_args(known))}."
            )
    if steps < 1 or top < 0:
        raise SpecificationError(f"steps={steps}, top={top}.", "steps is 1 or more, top 0 or more.")


def _require_reachable(loaded: Any) -> None:
    from mechanistic.capture.decoder_inputs import DEEPSTACK
    from mechanistic.capture.forward import takes

    if takes(loaded.model.get_decoder(), DEEPSTACK):
        raise ModelError(
            f"{type(loaded.model).__name__} adds image features in higher layers too, which the path of its "
            "inputs leaves out.",
            "Choose method='gradient'.",
        )


def _estimates(
    pairs: AnswerPairs, screen: _Screen, batches: Sequence[tuple[slice, PairTrials]], step: Steps
) -> NDArray[np.float64]:
    """Attribution (pair, layer, place[, head])."""
    found = np.empty((len(pairs.numbers), *screen.shape))
    for where, prepared in batches:
        found[where] = step(partial(_estimate, screen, prepared))["attribution"]
    return found


def _estimate(screen: _Screen, prepared: PairTrials) -> Mapping[str, Any]:
    """That of one batch."""
    import torch

    from mechanistic.capture.effect_gradients import Steps as PathSteps
    from mechanistic.capture.effect_gradients import effect_gradients

    base, source = screen.directed(prepared)
    sites = screen.sites
    with torch.no_grad():
        own, _ = base.read(sites)
        other, _ = source.read([*sites, (0, "resid_pre")] if (0, "resid_pre") not in sites else sites)
    ends = PathSteps(screen.steps, other[0, "resid_pre"]) if screen.method == "integrated" else PathSteps()
    slopes = effect_gradients(base, sites, "logit_diff", ends)
    masks = torch.from_numpy(pair_masks(base, source, screen.places)).double()
    found = []
    for name in sites:
        change = (other[name].double() - own[name].double()) * slopes[name].double()
        # Sum over features, then over the tokens of each place.
        found.append(torch.einsum("pst,st...->sp...", masks.to(change.device), change.sum(-1)))
    return {"attribution": torch.stack(found, dim=1).cpu().numpy()}


def _exact(
    pairs: AnswerPairs,
    screen: _Screen,
    batches: Sequence[tuple[slice, PairTrials]],
    candidates: NDArray[np.int64],
    step: Steps,
) -> NDArray[np.float64]:
    """Measured effects of the candidates (numbers in the flattened grid), NaN elsewhere."""
    import torch

    size = len(pairs.numbers)
    found = np.full((size, int(np.prod(screen.shape))), np.nan)
    with torch.no_grad():
        for where, prepared in batches:
            patched = _Patched(screen, prepared)
            before = step(patched.before)["value"]
            for number in candidates:
                found[where, number] = step(partial(patched.after, int(number)))["value"] - before
    return found.reshape(size, *screen.shape)


@dataclass(frozen=True)
class _Patched:
    """A batch of pairs, whose first runs are patched from the others."""

    screen: _Screen
    prepared: PairTrials

    @cached_property
    def known(self) -> tuple[Trial, Any, dict[tuple[int, str], Any], Any]:
        """The runs that are patched, their logits, what is put there, and the tokens of each place."""
        import torch

        base, source = self.screen.directed(self.prepared)
        base, logits = base.known()
        states, _ = source.read(self.screen.sites)
        return base, logits, states, torch.from_numpy(pair_masks(base, source, self.screen.places))

    def before(self) -> Mapping[str, Any]:
        """The metric of the runs as they are."""
        base, logits, _, _ = self.known
        return {"value": base.metric_of(logits, "logit_diff")[0].double().cpu().numpy()}

    def after(self, number: int) -> Mapping[str, Any]:
        """The metric with one component patched, by its number in the flattened grid."""
        from mechanistic.capture.interventions import Edit
        from mechanistic.capture.trial import put_back

        base, _, states, masks = self.known
        layer, place, *head = (int(each) for each in np.unravel_index(number, self.screen.shape))
        name = self.screen.sites[layer]
        change = put_back(states[name], masks[place], head=head[0] if head else None)
        value = base.measure("logit_diff", [Edit("text", *name, change)])[0]
        return {"value": value.double().cpu().numpy()}


def _labelled(
    pairs: AnswerPairs, screen: _Screen, estimate: NDArray[np.float64], exact: NDArray[np.float64]
) -> xr.Dataset:
    result = pairs.dataset().assign_coords(
        layer=np.array(screen.layers, np.int32), place=place_names(screen.places)
    )
    if screen.heads:
        result = result.assign_coords({screen.dims[-1]: np.arange(screen.heads, dtype=np.int32)})
    units = {"units": "logit"}
    result["attribution"] = (screen.dims, estimate, {**units, "long_name": "estimated effect of the patch"})
    result["exact"] = (screen.dims, exact, {**units, "long_name": "effect of the patch"})
    whole = float((pairs.clean - pairs.corrupt).sum()) * (1 if screen.direction == "denoise" else -1)
    share = {"units": "1", "long_name": "share of the difference between the runs"}
    result["share"] = (screen.dims[1:], estimate.sum(0) / whole, share)
    result["exact_share"] = (screen.dims[1:], exact.sum(0) / whole, share)
    known = np.isfinite(exact[0])
    guesses, truth = estimate.mean(0)[known], exact.mean(0)[known]
    spread = guesses.size > 2 and guesses.std() > 0 and truth.std() > 0
    value = float(np.corrcoef(guesses, truth)[0, 1]) if spread else float("nan")
    result["correlation"] = ((), value, {"units": "1", "long_name": "of estimated and measured effects"})
    return result
