"""Path patching: how much of what a head or an MLP does reaches the answer through which head's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .answer_pairs import MIN_DIFFERENCE, AnswerPairs, PairTrials, answer_pairs, pair_masks
from .experiment import begin, with_mean
from .path_ends import INPUTS, LOGITS, MLP, Receiver, Sender, chosen_receivers, chosen_senders
from .sweep import Sweep, named_sweep
from .token_places import place_name

if TYPE_CHECKING:
    from mechanistic.capture.trial import Trial


@dataclass(frozen=True)
class _Paths:
    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]
    place: str | int
    freeze_mlps: bool
    layers: int
    rows: int

    def reached(self, senders: Sequence[Sender]) -> dict[int, NDArray[np.int64]]:
        """By number of a receiver, the places of the senders that come before it; without those of none."""
        below = np.array([layer for layer, _ in senders])
        rows = [np.flatnonzero(below < layer) for layer, _, _ in self.receivers]
        return {number: each for number, each in enumerate(rows) if each.size}


def path_patching(
    samples: Any,
    model: Any,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    senders: Sequence[Sender] | None = None,
    receivers: Sequence[tuple[int, int] | str] | None = None,
    inputs: Sequence[str] = INPUTS,
    place: str | int = "all",
    freeze_mlps: bool = True,
    min_difference: float = MIN_DIFFERENCE,
    batch_size: int = 32,
    name: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
    quiet: bool = False,
) -> xr.Dataset:
    """Effect on the answer of each path sender -> receiver -> anything later, all else frozen.

    For a clean and a corrupt prompt: (1) run the clean one with every head and MLP frozen at its clean value
    but the sender, which has its corrupt one, and keep what the receiver then gets as its query, key or
    value; (2) run the clean one again, unfrozen, with this input in its place. The logits receive in step 1
    directly: that is the sender's direct effect. Senders share forwards, as copies of the batch.

    Parameters
    ----------
    samples, model
        As in `causal_tracing`.
    pairs
        (clean, corrupt) by number; by default the minimal pairs of the samples.
    senders
        (layer, head), or (layer, "mlp"); by default all.
    receivers
        (layer, head), each of whose `inputs` receives, or ``"logits"``; by default all. For k and v, heads
        that share keys are one receiver, the key head; a receiver named by its query head is translated.
    place
        The tokens at which the sender's value is corrupt, see `causal_tracing`; everywhere by default.
    freeze_mlps
        False lets MLPs answer to the sender (as the paper on indirect object identification does), so that
        paths through them count as direct.
    min_difference
        Pairs whose clean and corrupt logit differences are nearer than this many logits are dropped.
    name
        Where to keep the result, see `causal_tracing`.

    Returns
    -------
    clean, corrupt (pair), float64, logits: clean answer less corrupt answer.
    effect (pair, sender, receiver), float64, logits: change of that difference; NaN where the sender does not
        come before the receiver.
    total_effect, direct_effect, indirect_effect (pair, sender): of the sender's corrupt value with nothing
        frozen; on the logits alone (absent where they are no receiver); and what is between the two.
    share (sender, receiver), total_share (sender), float64: sums over pairs of effect and of corrupt - clean,
        divided; 1 carries the whole answer over.
    mean_effect (sender, receiver), with _low and _high: bootstrap over pairs, sets together.

    Raises
    ------
    SpecificationError  a sender, receiver, input or place that does not exist.
    DataError           see `answer_pairs`: no pairs, unequal lengths, all pairs nearly alike.

    References
    ----------
    Wang et al. (2022), arXiv:2211.00593, section 3.1. Goldowsky-Dill et al. (2023), arXiv:2304.05969.
    """
    asked = dict(locals())
    experiment = begin(model, samples)
    sweep = named_sweep("path_patching", asked, experiment.loaded, experiment.samples)
    if sweep.held is not None:
        return sweep.held
    stack = experiment.loaded.anatomy.stack("text")
    shape = (experiment.layers, stack.heads, stack.kv_heads)
    paths = _Paths(
        chosen_senders(senders, shape),
        chosen_receivers(receivers, inputs, shape),
        place,
        freeze_mlps,
        experiment.layers,
        batch_size,
    )
    chosen = answer_pairs(experiment, pairs, min_difference=min_difference, batch_size=batch_size)
    effect, total = _effects(chosen, paths, sweep, quiet)
    result = _labelled(chosen, paths, effect, total)
    result = with_mean(result, "effect", "mean_effect", chosen.clusters, level=level, seed=seed, dim="pair")
    result.attrs |= {
        "analysis": "path_patching",
        "heads_per_key_head": stack.heads // stack.kv_heads,
        "place": place_name(place),
        "freeze_mlps": int(freeze_mlps),
        "min_difference": min_difference,
        "metric": "logit_diff",
        "level": level,
        "seed": seed,
    }
    return sweep.keep(result)


def _effects(
    pairs: AnswerPairs, paths: _Paths, sweep: Sweep, quiet: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Effects (pair, sender, receiver) and total effects (pair, sender)."""
    import torch

    size = len(pairs.numbers)
    # Pairs and senders share a forward; some of each keeps both the padding and the copies small.
    per_batch = min(size, max(1, round(paths.rows**0.5)))
    copies = max(1, paths.rows // per_batch)
    chunks = [
        slice(start, min(start + copies, len(paths.senders)))
        for start in range(0, len(paths.senders), copies)
    ]
    reached = [paths.reached(paths.senders[chunk]) for chunk in chunks]
    effect = np.full((size, len(paths.senders), len(paths.receivers)), np.nan)
    total = np.empty(effect.shape[:2])
    batches = pairs.batches(per_batch)
    forwards = len(batches) * sum(1 + len(receivers) for receivers in reached)
    with torch.no_grad(), sweep.steps(forwards, quiet=quiet) as step:
        for where, prepared in batches:
            sending = cache(partial(_Sending.of, prepared, paths))
            for chunk, receivers in zip(chunks, reached, strict=True):
                sent = _Senders(sending, paths.senders[chunk])
                total[where, chunk] = step(sent.unfrozen)["change"].T
                for number, rows in receivers.items():
                    found = step(partial(sent.to, paths.receivers[number], rows))
                    effect[where, chunk.start + rows, number] = found["change"].T
    return effect, total


@dataclass(frozen=True)
class _Sending:
    """One batch of pairs: every sender's clean and corrupt value."""

    trial: Trial
    paths: _Paths
    clean_states: dict[tuple[int, str], Any]
    corrupt_states: dict[tuple[int, str], Any]
    where: Any
    clean: NDArray[np.float64]

    @classmethod
    def of(cls, prepared: PairTrials, paths: _Paths) -> _Sending:
        import torch

        base, source = prepared()
        sites = [(layer, site) for layer in range(paths.layers) for site in ("z", "mlp_out")]
        base, _ = base.known()
        clean, logits = base.read(sites)
        corrupt, _ = source.read(sites)
        where = torch.from_numpy(pair_masks(base, source, [paths.place])[0])
        value = base.metric_of(logits, "logit_diff")[0].double().cpu().numpy()
        return cls(base, paths, clean, corrupt, where, value)

    def measured(self, edits: Sequence[Any], copies: int) -> NDArray[np.float64]:
        """The metric (copy, sample)."""
        return np.asarray(self.trial.measure("logit_diff", edits, copies).double().cpu().numpy())

    def sent(self, senders: Sequence[Sender], *, frozen_heads: bool, frozen_mlps: bool) -> list[Any]:
        """The edits that make the senders corrupt, each in its copy, and freeze what is to be frozen."""
        from mechanistic.capture.interventions import Edit
        from mechanistic.capture.path_edits import Sent

        edits = []
        # Below the lowest sender everything is as it was anyway.
        for layer in range(min(layer for layer, _ in senders), self.paths.layers):
            for site, frozen in (("z", frozen_heads), ("mlp_out", frozen_mlps)):
                own = tuple(
                    (copy, None if name == MLP else int(name))
                    for copy, (number, name) in enumerate(senders)
                    if number == layer and (name == MLP) == (site == "mlp_out")
                )
                if own or frozen:
                    clean = self.clean_states[layer, site] if frozen else None
                    change = Sent(self.corrupt_states[layer, site], self.where, own, clean)
                    edits.append(Edit("text", layer, site, change))
        return edits


@dataclass(frozen=True)
class _Senders:
    """Some senders, each corrupt in its copy of a batch of pairs."""

    sending: Callable[[], _Sending]
    senders: Sequence[Sender]

    def unfrozen(self) -> Mapping[str, Any]:
        """What the senders change (copy, pair) with everything else free."""
        sending = self.sending()
        edits = sending.sent(self.senders, frozen_heads=False, frozen_mlps=False)
        return {"change": sending.measured(edits, len(self.senders)) - sending.clean}

    @cached_property
    def frozen(self) -> tuple[dict[tuple[int, str], Any], NDArray[np.float64]]:
        """What receivers get, and the metric (copy, pair), with everything else frozen."""
        sending = self.sending()
        paths = sending.paths
        lowest = min(layer for layer, _ in self.senders)
        heads = [receiver for receiver in paths.receivers if receiver[2] != LOGITS]
        sites = list(dict.fromkeys((layer, name) for layer, _, name in heads if layer > lowest))
        edits = sending.sent(self.senders, frozen_heads=True, frozen_mlps=paths.freeze_mlps)
        inputs, logits = sending.trial.read(sites, edits, len(self.senders))
        return inputs, sending.trial.metric_of(logits, "logit_diff").double().cpu().numpy()

    def to(self, receiver: Receiver, copies: NDArray[np.int64]) -> Mapping[str, Any]:
        """What these copies change (copy, pair) through one receiver."""
        from mechanistic.capture.interventions import Edit
        from mechanistic.capture.path_edits import Received

        sending = self.sending()
        inputs, direct = self.frozen
        layer, head, name = receiver
        if name == LOGITS:
            return {"change": direct[copies] - sending.clean}
        got = inputs[layer, name].unflatten(0, (len(self.senders), -1))[copies].flatten(0, 1)
        edit = Edit("text", layer, name, Received(got, head))
        return {"change": sending.measured([edit], len(copies)) - sending.clean}


def _labelled(
    pairs: AnswerPairs, paths: _Paths, effect: NDArray[np.float64], total: NDArray[np.float64]
) -> xr.Dataset:
    units = {"units": "logit"}
    heads = [-1 if name == MLP else name for _, name in paths.senders]
    names = [LOGITS if name == LOGITS else f"{layer}.{head}.{name}" for layer, head, name in paths.receivers]
    result = pairs.dataset().assign_coords(
        sender=[f"{layer}.{name}" for layer, name in paths.senders],
        sender_layer=("sender", np.array([layer for layer, _ in paths.senders], np.int32)),
        sender_head=("sender", np.array(heads, np.int32)),
        receiver=names,
        receiver_layer=("receiver", np.array([layer for layer, _, _ in paths.receivers], np.int32)),
        receiver_head=("receiver", np.array([head for _, head, _ in paths.receivers], np.int32)),
        receiver_input=("receiver", [name for _, _, name in paths.receivers]),
    )
    result["effect"] = (("pair", "sender", "receiver"), effect, {**units, "long_name": "effect of the path"})
    result["total_effect"] = (("pair", "sender"), total, {**units, "long_name": "effect of the sender"})
    logits = [place for place, (_, _, name) in enumerate(paths.receivers) if name == LOGITS]
    if logits:
        direct = effect[:, :, logits[0]]
        result["direct_effect"] = (("pair", "sender"), direct, {**units, "long_name": "direct effect"})
        result["indirect_effect"] = (
            ("pair", "sender"),
            total - direct,
            {**units, "long_name": "effect through later heads and MLPs"},
        )
    whole = float((pairs.corrupt - pairs.clean).sum())
    share = {"units": "1", "long_name": "share of the difference between clean and corrupt"}
    result["share"] = (("sender", "receiver"), effect.sum(0) / whole, share)
    result["total_share"] = (("sender",), total.sum(0) / whole, share)
    return result
