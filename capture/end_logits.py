"""Logits of the samples of a sweep as they are, without repeating their runs where that can be helped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechanistic.store.errors import MissingSiteError

from .forward_progress import forward_progress
from .known_states import StoredStates
from .patch_sweep import PatchSweep
from .resumed_forward import check_error, joined_inputs, plain_logits

REPEATED = "a forward of each sample"


def end_logits(sweep: PatchSweep, samples: Sequence[int], *, quiet: bool) -> tuple[dict[int, Tensor], str]:
    """Logits (word,), float32, of each sample, and what they were computed from.

    From the last residual that the run keeps of each sample; else from the highest layer whose stream it has
    of every token; else by a forward of each sample.

    Raises
    ------
    CaptureError    what the run has does not lead to the first sample's logits.
    """
    found: dict[int, Tensor] = {}
    used: set[str] = set()
    with forward_progress(len(samples), quiet=quiet, unit="samples") as progress, torch.no_grad():
        for number in samples:
            inputs, last = joined_inputs(sweep.loaded, [sweep.questions[number].inputs])
            start, stream = _latest(sweep, number)
            if stream is None or not found:
                found[number] = plain_logits(sweep.loaded, inputs, last)[0]
            if stream is not None:
                got = sweep.resumed.logits(inputs, last, start, stream[None])[0]
                if not used:
                    plain = found[number]
                    error = float((got - plain).abs().max() / plain.abs().max().clamp_min(1e-30))
                    check_error(error, sweep.loaded.dtype, "a sample measured from the run's states")
                found[number] = got
            how = REPEATED if stream is None else f"the run's states at layer {start}"
            if stream is None and how not in used and isinstance(sweep.states, StoredStates):
                progress.say(
                    "The run has no text.*.resid_post[last], which tells its answers: "
                    f"{len(samples)} samples are run once."
                )
            used.add(how)
            progress.advance(1, 0, lambda: 0)
    return found, "; ".join(sorted(used))


def _latest(sweep: PatchSweep, sample: int) -> tuple[int, Tensor | None]:
    """The highest layer at which what enters it is known, and the stream (token, d_model)."""
    depth = len(sweep.loaded.anatomy.stack("text").layers)
    hidden = sweep.states.last_residual(sample)
    if hidden is not None:
        # The final norm looks at each token by itself.
        stream = hidden.new_zeros(sweep.length(sample), len(hidden))
        stream[-1] = hidden
        return depth, stream
    if isinstance(sweep.states, StoredStates):
        for start in range(depth, -1, -1):
            try:
                return start, sweep.streams(start, [sample])[sample]
            except MissingSiteError:
                continue
    return 0, None
