"""Activation patching: which tensors of a clean run, put into a corrupt one, bring its answer back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group, open_run
from mechanistic.store.errors import SpecificationError

from .experiment import with_mean
from .patch_ends import PairEnds
from .patch_grid import PatchGrid
from .patch_pairs import SamplePairs, Samples, sample_pairs
from .patch_places import Place, Tokens
from .patch_plan import Heads, PatchPlan, patch_plan, stack_and_site
from .pattern_source import pattern_source
from .sweep import Sweep, run_folder

if TYPE_CHECKING:
    from mechanistic.capture.pair_metrics import PairAnswers
    from mechanistic.capture.patch_sweep import PatchSweep

Floats = NDArray[np.float64]


def patch(
    run: xr.DataTree | str | Path,
    model: Any,
    *,
    base: Samples = None,
    source: Samples = None,
    sites: str | Sequence[str] = "resid_pre",
    layers: int | Sequence[int] | None = None,
    positions: Place | Sequence[Place] | None = None,
    heads: Heads = None,
    direction: str = "denoise",
    metric: str = "logit_diff",
    min_difference: float | None = None,
    max_pairs: int | None = None,
    recompute: bool = False,
    batch_size: int = 32,
    name: str | None = None,
    level: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> xr.Dataset:
    """Run one sample of each pair with a tensor of the other put in its place, for a grid of places.

    Patched tensors, and the residual stream below them, are read from the run: a forward starts at the
    patched layer, and computes the tokens that the patch can reach under the model's mask; keys and values
    of the earlier ones are seen once for each sample that is patched. Neither run is repeated: the metric of
    the clean and of the corrupt one is that of ``text.*.resid_post[last]``, or of the highest layer that the
    run has of all tokens; where it has neither (encoder sites alone), each sample is run once, and a line
    says so. That all this gives the model's own logits is checked on the first pair before the sweep.

        recovered = (patched - corrupt) / (clean - corrupt), of direction "noise": one less that.

    Parameters
    ----------
    model
        A `LoadedModel`, or a name for `load_model`: the very weights of the run.
    base, source
        Samples that are run, and those that they are patched from, one to one: rows or ids of samples/.
        Absent: the run's minimal pairs, of which the first is the clean one.
    sites
        resid_pre, resid_mid, resid_post, attn_out, mlp_out, q, k, v, z, or pattern, rows of attention at the
        positions of their queries; of the encoder ``vision.SITE``; or ``projector``, what enters the decoder
        in place of the image.
    positions
        Roles (subject, object, relation, last, image, subject_box, ..., see `place_masks`) or positions;
        ``every`` position by itself; absent, the roles that all samples have. Roles match samples of
        different lengths, see `matched_rows`.
    heads
        Of q, k, v, z and pattern: each by itself; their numbers; or ``all`` together.
    direction
        "denoise": the corrupt sample is run and patched from the clean one. "noise": the other way round.
    metric
        logit_diff: first token of the clean answer less that of the corrupt one; prob, log_prob: of the clean
        answer; kl: divergence from the clean run's words.
    min_difference
        Pairs whose clean and corrupt metric differ by less are dropped. Absent: 0.5 logits or nats, 0.05 of a
        probability or of kl.
    recompute
        Run every sample once instead of reading its tensors from the run.
    name
        Store the result as derived/NAME of the run. A sweep that was killed goes on where it was, and one
        that is finished is returned as it is.

    Returns
    -------
    clean, corrupt (pair), float64: the metric of both runs.
    patched, effect, recovered (pair, [site], layer, role | position, [head | kv_head]), float64: the metric
        of the patched run; what patching changed; its share as above, 1 where the patch does all, 0 where
        nothing. NaN at a position that a pair does not have.
    recovered_mean, recovered_mean_low, recovered_mean_high (the same without pair): mean over pairs, and its
        bootstrap interval of `level` by groups of samples.
    clean_id, corrupt_id, sample_index (pair): the samples, and the row of the one that was run. The attribute
        n_dropped counts pairs without a difference; `ends` says what `clean` and `corrupt` were computed
        from; `proof`, how exact resumed forwards are, and those of later tokens alone (null: every token is
        computed, since the model's mask or layers ask for it).

    Raises
    ------
    MissingSiteError    the run lacks a site, layer or token that is needed; says how to capture it.
    ModelError          the run was captured from other weights (unless `recompute`).
    DataError           no pair has a difference; lengths differ and positions or a pattern are asked for; the
                        first tokens of the answers do not tell them apart.
    SpecificationError  an unknown site, layer, head, direction or metric.
    OutputExistsError   derived/NAME, or an unfinished sweep of that name, has other parameters.

    References
    ----------
    Heimersheim and Nanda (2024), How to use and interpret activation patching, arXiv 2404.15255; Zhang and
    Nanda (2024), Towards best practices of activation patching, ICLR.
    """
    tree = run if isinstance(run, xr.DataTree) else open_run(run)
    kept = Sweep({}, name, run_folder(tree))
    pairs = sample_pairs(tree, base, source, direction, max_pairs)
    sweep, answers = _prepare(tree, model, pairs, metric, recompute, batch_size)
    tokens = {number: _tokens(batch, sites) for number, batch in sweep.questions.items()}
    matched = [(tokens[int(a)], tokens[int(b)]) for a, b in zip(pairs.base, pairs.source, strict=True)]
    plan = patch_plan(sweep.loaded.anatomy, sites, layers, positions, heads, matched)
    ends = PairEnds.of(sweep, pairs, answers, metric, min_difference, quiet)
    pairs, matched = pairs.kept(ends.keep), [matched[place] for place in np.flatnonzero(ends.keep)]
    proof = _prove(sweep, plan, pairs, recompute)
    decisive = _parameters(tree, sweep, plan, pairs, metric, recompute)
    kept = replace(kept, parameters={**decisive, "batch_size": batch_size, "level": level, "seed": seed})
    if kept.held is not None:
        return kept.held
    attrs: dict[str, Any] = {
        "model": sweep.loaded.name,
        "weights_sha256": sweep.loaded.weights_sha256,
        "stack": plan.stack,
        "sites": list(plan.sites) if isinstance(sites, Sequence) and not isinstance(sites, str) else sites,
        "direction": direction,
        "metric": metric,
        "answers": "" if answers is None else answers.note,
        "n_pair": len(pairs),
        "n_dropped": int((~ends.keep).sum()),
        "min_difference": ends.least,
        "ends": ends.origin,
        "proof": proof,
    }
    patched = PatchGrid(sweep, plan, pairs, matched, ends, metric).measured(kept, quiet)
    return kept.keep(_result(patched, plan, pairs, ends, group(tree, "samples"), metric, attrs, level, seed))


def _prepare(
    run: xr.DataTree, model: Any, pairs: SamplePairs, metric: str, recompute: bool, batch_size: int
) -> tuple[PatchSweep, PairAnswers | None]:
    """Load the model, encode the samples, find how forwards are resumed and where states come from."""
    from mechanistic.capture.libraries import require_model_libraries

    require_model_libraries()
    from mechanistic.capture.given import given_model
    from mechanistic.capture.known_states import RecordedStates, StoredStates, require_same_model
    from mechanistic.capture.later_tokens import find_later_tokens
    from mechanistic.capture.pair_metrics import PAIR_METRICS, pair_answers
    from mechanistic.capture.patch_sweep import PatchSweep
    from mechanistic.capture.proof import prove
    from mechanistic.capture.resumed_forward import joined_inputs, prove_resumed_forward
    from mechanistic.capture.run_samples import asked_again

    if metric not in PAIR_METRICS:
        raise SpecificationError(f"There is no metric '{metric}'.", f"There are {', '.join(PAIR_METRICS)}.")
    if batch_size < 1:
        raise SpecificationError(f"batch_size is {batch_size}.", "Give 1 or more.")
    loaded = given_model(model, None, "LoadedModel(model, processor, 'mine')")
    if not recompute:
        require_same_model(run, loaded)
    questions = asked_again(loaded, run, pairs.samples)
    first = questions[int(pairs.base[0])]
    halves = prove(loaded, first, ()).halves
    resumed = prove_resumed_forward(loaded, *joined_inputs(loaded, [first.inputs]))
    depth = len(loaded.anatomy.stack("text").layers)
    states: Any = RecordedStates(loaded, questions, halves)
    if not recompute:
        states = StoredStates(run, depth, resumed.image_layers, partial(pattern_source, run))
    found = [(questions[int(a)], questions[int(b)]) for a, b in zip(pairs.clean, pairs.corrupt, strict=True)]
    answers = None if metric == "kl" else pair_answers(loaded, found)
    later = find_later_tokens(resumed, first.inputs)
    return PatchSweep(loaded, resumed, states, questions, halves, batch_size, later), answers


def _tokens(batch: Any, sites: str | Sequence[str]) -> Tokens:
    names = [sites] if isinstance(sites, str) else list(sites)
    tables = batch.encoder if names and stack_and_site(names[0])[0] == "vision" else batch.decoder
    return Tokens(tables[0], batch.samples[0].extra, batch.samples[0].sample_id)


def _prove(sweep: PatchSweep, plan: PatchPlan, pairs: SamplePairs, recompute: bool) -> dict[str, Any]:
    """Check everything that the sweep will read, and that it leads to the model's own logits."""
    for site in plan.sites:
        for layer in plan.layers:
            sweep.require(plan.stack, site, layer)
    starts = [sweep.start(plan.stack, site, layer) for site in plan.sites for layer in plan.layers]
    proof: dict[str, Any] = {
        "resumed_forward_error": max(sweep.resumed.error),
        "later_tokens_error": sweep.later,
    }
    known = sorted({start for start in starts if start is not None})
    if known and not recompute:
        proof["stored_states_error"] = sweep.prove_states(known, int(pairs.base[0]))
    return proof


def _parameters(
    run: xr.DataTree, sweep: PatchSweep, plan: PatchPlan, pairs: SamplePairs, metric: str, recompute: bool
) -> dict[str, Any]:
    return {
        **plan.parameters(),
        "clean": pairs.clean.tolist(),
        "corrupt": pairs.corrupt.tolist(),
        "direction": pairs.direction,
        "metric": metric,
        "recompute": recompute,
        "weights_sha256": sweep.loaded.weights_sha256,
        # Not the content's hash, which merging changes.
        "run": run.attrs.get("run_id"),
    }


def _result(
    patched: Floats,
    plan: PatchPlan,
    pairs: SamplePairs,
    ends: PairEnds,
    samples: xr.Dataset,
    metric: str,
    attrs: dict[str, Any],
    level: float,
    seed: int,
) -> xr.Dataset:
    """The labelled result of values (pair, layer, site, cell)."""
    from mechanistic.capture.pair_metrics import PAIR_METRICS

    units = {"units": PAIR_METRICS[metric][0]}
    coordinates = plan.coordinates()
    values = patched.swapaxes(1, 2).reshape(len(pairs), *map(len, coordinates.values()))
    wide = (slice(None), *[None] * (values.ndim - 1))
    clean, corrupt = ends.clean[wide], ends.corrupt[wide]
    begun, aim = (corrupt, clean) if pairs.direction == "denoise" else (clean, corrupt)
    dims = ("pair", *plan.dims())
    table = samples[["sample_id", "group"]].compute()
    names, groups = table["sample_id"].values, table["group"].values
    result = xr.Dataset(
        {
            "clean": ("pair", ends.clean, {**units, "long_name": f"{metric} of the clean run"}),
            "corrupt": ("pair", ends.corrupt, {**units, "long_name": f"{metric} of the corrupt run"}),
            "patched": (dims, values, {**units, "long_name": f"{metric} of the patched run"}),
            "effect": (dims, values - begun, {**units, "long_name": "what patching changed"}),
            "recovered": (
                dims,
                (values - begun) / (aim - begun),
                {"units": "1", "long_name": "share of the difference between the runs that the patch makes"},
            ),
        },
        {
            **coordinates,
            "clean_id": ("pair", [str(names[number]) for number in pairs.clean]),
            "corrupt_id": ("pair", [str(names[number]) for number in pairs.corrupt]),
            "sample_index": ("pair", pairs.base.astype(np.int32)),
        },
        attrs,
    )
    clusters = np.array([str(groups[number]) or f"\0{number}" for number in pairs.base])
    return with_mean(result, "recovered", "recovered_mean", clusters, level=level, seed=seed, dim="pair")
