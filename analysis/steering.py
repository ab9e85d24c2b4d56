"""Steering: add a stored direction to the residual stream, or take it away, and score the answers again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DimensionError, SpecificationError

from .experiment import Experiment, begin, chosen_layers, require_stack, trial_masks
from .intervention_sweep import Edits, InterventionGrid, Measuring, intervention_sweep
from .sweep import named_sweep
from .token_places import place_name

if TYPE_CHECKING:
    from mechanistic.capture.trial import Metric, Trial

Mode = Literal["add", "project_out"]
Scale = Literal["own", "unit", "norm"]
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
ANSWER = "answer"


@dataclass(frozen=True)
class _Steering:
    """Vectors (layer, name, feature): what is added, or what spans the space that is taken away.

    `choice` is the vector of each sample.
    """

    vectors: NDArray[np.float64]
    choice: NDArray[np.int64]
    mode: Mode
    stack: str
    site: str
    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    together: bool
    place: str | int

    def edits(self, where: slice, trial: Trial) -> Edits:
        """Those of a batch, by (layer, strength), or by strength alone."""
        import torch

        from mechanistic.capture.trial import at_tokens

        rows = at_tokens(torch.from_numpy(trial_masks(trial, [self.place], self.stack)[0]))
        choice = torch.from_numpy(self.choice[where])
        if self.stack == "text":
            choice = choice[rows[0]]
        else:
            sizes = torch.tensor([each.stop - each.start for each in trial.crops])
            choice = choice.repeat_interleave(sizes)[rows[1]]

        def of(index: tuple[int, ...]) -> list[Any]:
            strength = self.strengths[index[-1]]
            places = range(len(self.layers)) if self.together else [index[0]]
            return [
                trial.edit(self.stack, self.layers[place], self.site, change)
                for place in places
                for change in self._changes(place, strength, rows, choice)
            ]

        return of

    def _changes(self, place: int, strength: float, rows: Any, choice: Any) -> list[Any]:
        import torch

        from mechanistic.capture.interventions import Add, ProjectOut

        if self.mode == "add":
            return [Add(torch.from_numpy(self.vectors[place])[choice], strength, rows)]
        return [ProjectOut(unit, strength, rows) for unit in _basis(self.vectors[place])]


def steer(
    samples: Any,
    model: Any,
    *,
    direction: xr.DataArray,
    towards: str | None = None,
    strengths: Sequence[float] = (-2.0, -1.0, 1.0, 2.0),
    mode: Mode = "add",
    scale: Scale = "own",
    stack: Literal["text", "vision"] = "text",
    site: str = "resid_post",
    layers: int | Sequence[int] | None = None,
    together: bool = False,
    place: str | int = "last",
    metric: Metric = "logit_diff",
    batch_size: int = 8,
    name: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> xr.Dataset:
    """Do the answers get better, or worse, when a direction is put into the model or taken out of it?

    ``"add"``: x + s d. ``"project_out"``: x - s P x, P projecting on the span of the directions; s = 1
    removes them.

    Parameters
    ----------
    samples, model
        As in `causal_tracing`.
    direction
        ([layer,] [name,] feature): `direction` or `class_mean` of `class_directions`, `coefficient` of
        `linear_probe`, or a plain vector; layers are matched by number.
    towards
        The name of the direction to add; ``"answer"`` takes for each sample the one named like its right
        answer, which shows what the best steering could do. Not needed where there is one; for project_out,
        one name instead of all.
    strengths
        Multiples s of the direction.
    scale
        Its length: ``"own"``, ``"unit"`` (1), or ``"norm"``, the mean length of what it is added to.
    stack, site, layers, place
        Where: the decoder or, with ``"vision"``, the image encoder; a residual-like site of it, the layers
        that the direction has by default, and the tokens (see `causal_tracing`).
    together
        Steer all the layers at once instead of each by itself.
    name
        Where to keep the result, see `causal_tracing`.

    Returns
    -------
    clean (sample), steered (sample[, layer], strength), effect = steered - clean, float64, units of the
        metric; mean_effect ([layer,] strength), with _low and _high: bootstrap over samples, minimal-pair
        sets together.
    clean_accuracy (), accuracy ([layer,] strength), float64: share of samples whose right option has the
        highest logit; repaired, broken ([layer,] strength), int64: samples that became right, or wrong;
        clean_choice (sample), choice (sample[, layer], strength), int16: place of the chosen option.

    Raises
    ------
    SpecificationError  a mode, scale, site, layer, metric or place that does not exist.
    DimensionError      a direction of another width, without a layer or name that is asked for.
    DataError           see `causal_tracing`.

    References
    ----------
    Turner et al. (2023), arXiv:2308.10248. Ravfogel et al. (2020), arXiv:2004.07667 (projection).
    """
    asked = dict(locals())
    experiment = begin(model, samples)
    kept = named_sweep("steer", asked, experiment.loaded, experiment.samples)
    if kept.held is not None:
        return kept.held
    require_stack(stack)
    _check(mode, scale, site, strengths)
    numbers = _layers_of(experiment, direction, layers, stack)
    vectors, names = _vectors(experiment, direction, numbers, stack)
    vectors, choice = _chosen(experiment, vectors, names, towards, mode)
    if scale != "own":
        vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    if scale == "norm":
        vectors = vectors * _lengths(experiment, stack, site, numbers, place, batch_size)[:, None, None]
    steering = _Steering(
        vectors,
        choice,
        mode,
        stack,
        site,
        tuple(numbers),
        tuple(float(strength) for strength in strengths),
        together,
        place,
    )
    grid = InterventionGrid("steered", {"strength": np.array(steering.strengths)}, steering.edits)
    if not together:
        grid = replace(grid, coords={"layer": np.array(numbers, np.int32), **grid.coords})
    result = intervention_sweep(experiment, grid, Measuring(metric, batch_size, level, seed, quiet, kept))
    result = result.assign_attrs(
        analysis="steer",
        mode=mode,
        towards=towards or "",
        scale=scale,
        stack=stack,
        site=site,
        place=place_name(place),
        layers=",".join(map(str, numbers)),
    )
    return kept.keep(result)


def _check(mode: str, scale: str, site: str, strengths: Sequence[float]) -> None:
    for name, value, known in (
        ("mode", mode, get_args(Mode)),
        ("scale", scale, get_args(Scale)),
        ("site", site, SITES),
    ):
        if value not in known:
            raise SpecificationError(
                f"There is no {name} '{value}' of steering.", f"Choose of {', '.join(known)}."
            )
    if not strengths:
        raise SpecificationError("There is no strength.", "Give one or more: strengths=[1.0, 2.0].")


def _layers_of(
    experiment: Experiment, direction: xr.DataArray, layers: int | Sequence[int] | None, stack: str
) -> list[int]:
    if "layer" not in direction.dims:
        if layers is None and "layer" in direction.coords:
            layers = int(direction["layer"])
        return chosen_layers(experiment, layers, stack)
    held = [int(number) for number in direction["layer"].values]
    wanted = chosen_layers(experiment, held if layers is None else layers, stack)
    if missing := [number for number in wanted if number not in held]:
        raise DimensionError(
            f"There is no direction for layer {', '.join(map(str, missing))}; there are {held}.",
            "Steer those, or give one direction for all: direction.sel(layer=...).",
        )
    return wanted


def _vectors(
    experiment: Experiment, direction: xr.DataArray, layers: Sequence[int], stack: str
) -> tuple[NDArray[np.float64], list[str]]:
    """(layer, name, feature), and the names; one empty name for a direction without."""
    width = experiment.loaded.anatomy.stack(stack).width
    others = [str(dim) for dim in direction.dims if dim != "layer"]
    if not 1 <= len(others) <= 2 or direction.sizes[others[-1]] != width:
        raise DimensionError(
            f"This direction is {dict(direction.sizes)}; the residual stream has {width} numbers.",
            "Pass ([layer,] [name,] feature) of this model: class_directions(...)['direction'].",
        )
    whole = direction if "layer" in direction.dims else direction.expand_dims(layer=list(layers))
    names = [""]
    if len(others) == 1:
        whole = whole.expand_dims(name=1)
        others = ["name", *others]
    elif others[0] in direction.coords:
        names = [str(name) for name in direction[others[0]].values]
    else:
        names = [str(number) for number in range(direction.sizes[others[0]])]
    values = whole.sel(layer=list(layers)).transpose("layer", *others).values
    return np.asarray(values, np.float64), names


def _chosen(
    experiment: Experiment, vectors: NDArray[np.float64], names: list[str], towards: str | None, mode: Mode
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The vectors in use, and the number of each sample's."""
    same = np.zeros(len(experiment.samples), np.int64)
    if towards is None:
        if len(names) > 1 and mode == "add":
            raise DimensionError(
                f"There are {len(names)} directions: {', '.join(names)}.",
                "Say which: towards='left', or towards='answer' for each sample's own.",
            )
        return vectors, same
    if towards == ANSWER and ANSWER not in names:
        if mode == "project_out":
            raise SpecificationError(
                "project_out takes the same away from every sample.",
                "Name the direction, or leave towards out.",
            )
        wanted = [str(sample.answer) for sample in experiment.samples]
    else:
        wanted = [towards]
    if missing := sorted({name for name in wanted if name not in names}):
        raise DimensionError(
            f"There is no direction {missing[0]!r}; there are {', '.join(names)}.",
            "Choose towards= of these.",
        )
    if len(wanted) == 1 and towards != ANSWER:
        return vectors[:, [names.index(towards)]], same
    return vectors, np.array([names.index(name) for name in wanted])


def _lengths(
    experiment: Experiment, stack: str, site: str, layers: Sequence[int], place: str | int, batch_size: int
) -> NDArray[np.float64]:
    """Mean length of the rows at a site, by layer."""
    import torch

    total, count = np.zeros(len(layers)), 0
    with torch.no_grad():
        for _, trial in experiment.trials(batch_size, "log_prob"):
            mask = torch.from_numpy(trial_masks(trial, [place], stack)[0])
            seen, _ = trial.read([(layer, site) for layer in layers], stack=stack)
            total += [float(seen[layer, site].cpu()[mask].double().norm(dim=-1).sum()) for layer in layers]
            count += int(mask.sum())
    return total / count


def _basis(vectors: NDArray[np.float64]) -> Any:
    """Orthogonal vectors of length 1 that span the same space, (rank, feature)."""
    import torch

    _, lengths, rows = np.linalg.svd(vectors, full_matrices=False)
    rank = int((lengths > lengths.max(initial=0) * 1e-6).sum())
    return torch.from_numpy(rows[:rank].copy())
