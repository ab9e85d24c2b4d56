"""Ablation: what the answer loses when a head, a half or a layer says nothing, the average, or another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, SpecificationError

from .experiment import Experiment, begin, chosen_heads, chosen_layers, require_stack, trial_masks
from .intervention_sweep import Edits, InterventionGrid, Measuring, intervention_sweep
from .sweep import named_sweep
from .token_places import place_name

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric, Trial

Method = Literal["mean", "zero", "resample"]
SITES = ("z", "attn_out", "mlp_out", "resid_post")


@dataclass(frozen=True)
class _Plan:
    stack: str
    site: str
    method: Method
    layers: tuple[int, ...]
    place: str | int
    metric: Metric
    seed: int

    @property
    def sites(self) -> list[tuple[int, str]]:
        return [(layer, self.site) for layer in self.layers]

    def mask(self, trial: Trial) -> NDArray[np.bool_]:
        """Which tokens are replaced, as `trial_masks` has them."""
        found: NDArray[np.bool_] = trial_masks(trial, [self.place], self.stack)[0]
        return found

    def counts(self, trial: Trial) -> list[int]:
        """How many of each sample's."""
        mask = self.mask(trial)
        own = mask if self.stack == "text" else [mask[0, tokens] for tokens in trial.crops]
        return [int(each.sum()) for each in own]


States = dict[tuple[int, str], Any]


def ablate(
    samples: Any,
    model: Any,
    *,
    stack: Literal["text", "vision"] = "text",
    site: str = "z",
    method: Method = "mean",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    place: str | int = "all",
    metric: Metric = "logit_diff",
    batch_size: int = 8,
    name: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> xr.Dataset:
    """Change of the answer when one component at a time is replaced at some tokens.

    Parameters
    ----------
    samples, model
        As in `causal_tracing`.
    stack
        ``"text"``: the decoder; ``"vision"``: the image encoder, whose places are ``"image"``, boxes such as
        ``"subject_box"``, and positions of its own tokens.
    site
        z (head by head), attn_out, mlp_out, resid_post.
    method
        ``"zero"``; ``"mean"``: the mean over samples, token by token where they correspond, that is where
        every sample has as many tokens at `place`; ``"resample"``: what another sample of the dataset has
        there, chosen by `seed`, never the sample itself.
    heads
        Of z only.
    place
        The tokens at which it is replaced, see `causal_tracing`; everywhere by default.
    metric
        ``"logit_diff"``: the right answer's logit less the mean of the other options';
        ``"log_prob"`` or ``"prob"`` of its first token.
    name
        Where to keep the result, see `causal_tracing`.

    Returns
    -------
    clean (sample), ablated (sample, layer[, head]), effect = ablated - clean, float64, units of the metric.
    mean_effect (layer[, head]), with _low and _high: bootstrap over samples, minimal-pair sets together.
    clean_accuracy (), accuracy (layer[, head]), float64: share of samples whose right option has the highest
        logit; NaN without options. repaired, broken (layer[, head]), int64: samples that became right or
        wrong.

    Raises
    ------
    SpecificationError  a site, method, metric, layer, head or place that does not exist.
    DataError           samples with different numbers of tokens there, for mean and resample; one sample
                        only; or as in `causal_tracing`.

    References
    ----------
    Chan et al. (2022), Causal scrubbing (resampling). Wang et al. (2022), arXiv:2211.00593 (mean ablation).
    """
    asked = dict(locals())
    require_stack(stack)
    experiment = begin(model, samples)
    sweep = named_sweep("ablate", asked, experiment.loaded, experiment.samples)
    if sweep.held is not None:
        return sweep.held
    if site not in SITES or method not in get_args(Method):
        raise SpecificationError(
            f"There is no ablation of '{site}' by '{method}'.",
            f"Sites are {', '.join(SITES)}; methods {', '.join(get_args(Method))}.",
        )
    if heads is not None and site != "z":
        raise SpecificationError(f"The site '{site}' has no heads.", "Choose site='z', or leave heads out.")
    if method != "zero" and len(experiment.samples) < 2:
        raise DataError(
            f"There is one sample only, and '{method}' ablation takes from others.",
            "Give more samples, or method='zero'.",
        )
    how = Measuring(metric, batch_size, level, seed, quiet, sweep)
    plan = _Plan(stack, site, method, tuple(chosen_layers(experiment, layers, stack)), place, metric, seed)
    coords: dict[str, Any] = {"layer": np.array(plan.layers, np.int32)}
    chosen = chosen_heads(experiment, heads, stack)
    if site == "z":
        coords["head"] = np.array(chosen, np.int32)
    states = _states(experiment, plan, batch_size)

    def edits(where: slice, trial: Trial) -> Edits:
        import torch

        from mechanistic.capture.trial import put_back

        mask = torch.from_numpy(plan.mask(trial))
        values = states(where, trial)

        def of(index: tuple[int, ...]) -> list[Any]:
            name = plan.sites[index[0]]
            head = chosen[index[1]] if site == "z" else None
            return [trial.edit(stack, *name, put_back(values[name], mask, head=head))]

        return of

    result = intervention_sweep(experiment, InterventionGrid("ablated", coords, edits), how)
    result = result.assign_attrs(
        analysis="ablate", stack=stack, site=site, method=method, place=place_name(place)
    )
    return sweep.keep(result)


def _states(experiment: Experiment, plan: _Plan, batch_size: int) -> Callable[[slice, Trial], States]:
    """What is put in place of each component of a batch: (sample, token, ...) by (layer, site)."""
    import torch

    if plan.method == "zero":
        return lambda _, trial: {name: _zeros(trial, plan) for name in plan.sites}
    means = _means(experiment, plan, batch_size) if plan.method == "mean" else {}
    donors = _donors(len(experiment.samples), plan.seed)

    def states(where: slice, trial: Trial) -> States:
        rows = means or _of_donors(experiment, plan, donors[where], trial)
        mask = torch.from_numpy(plan.mask(trial))
        return {name: _spread(values, mask, trial.size) for name, values in rows.items()}

    return states


def _of_donors(experiment: Experiment, plan: _Plan, donors: NDArray[np.int64], trial: Trial) -> States:
    others = replace(experiment, samples=tuple(experiment.samples[number] for number in donors))
    ((_, other),) = others.trials(len(donors), plan.metric)
    count = plan.counts(trial)[0]
    _require_count(trial, plan, count)
    return _selected(other, plan, count)


def _donors(size: int, seed: int) -> NDArray[np.int64]:
    """A number for each sample, each once, none its own."""
    order = np.random.default_rng(seed).permutation(size)
    donors = np.empty(size, np.int64)
    # Each takes from the next in a random circle.
    donors[order] = np.roll(order, -1)
    return donors


def _zeros(trial: Trial, plan: _Plan) -> Any:
    import torch

    stack = trial.loaded.anatomy.stack(plan.stack)
    shape = (stack.heads, stack.head_width) if plan.site == "z" else (stack.width,)
    return torch.zeros(*plan.mask(trial).shape, *shape)


def _means(experiment: Experiment, plan: _Plan, batch_size: int) -> States:
    """Mean over samples of each chosen token, (1, chosen token, ...)."""
    import torch

    sums: States = {}
    count: int | None = None
    with torch.no_grad():
        for _, trial in experiment.trials(batch_size, plan.metric):
            count = plan.counts(trial)[0] if count is None else count
            for name, rows in _selected(trial, plan, count).items():
                sums[name] = sums.get(name, 0) + rows.double().sum(0, keepdim=True)
    return {name: total / len(experiment.samples) for name, total in sums.items()}


def _selected(trial: Trial, plan: _Plan, count: int) -> States:
    """The chosen tokens of each site, (sample, chosen token, ...). Raises like `_require_count`."""
    import torch

    _require_count(trial, plan, count)
    where = torch.from_numpy(plan.mask(trial))
    seen, _ = trial.read(plan.sites, stack=plan.stack)
    return {name: each[where.to(each.device)].unflatten(0, (-1, count)) for name, each in seen.items()}


def _require_count(trial: Trial, plan: _Plan, count: int) -> None:
    """DataError unless every sample has `count` tokens at the place."""
    for row, found in enumerate(plan.counts(trial)):
        if found != count:
            raise DataError(
                f"Sample {trial.batch.samples[row].sample_id!r} has {found} tokens at "
                f"'{place_name(plan.place)}', others {count}: they do not correspond.",
                "Choose place='last' or another one of equal length, or method='zero'.",
            )


def _spread(rows: Any, mask: Any, samples: int) -> Any:
    """Rows (sample or 1, chosen token, ...) at the chosen tokens of `mask`, 0 elsewhere."""
    rows = rows.expand(samples, *rows.shape[1:])
    whole = rows.new_zeros(*mask.shape, *rows.shape[2:])
    whole[mask.to(rows.device)] = rows.flatten(0, 1)
    return whole
