"""Single samples through an engine: the proof on the first one, and on the first of each other kind."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mechanistic.store.errors import CaptureError, ModelError

from .batch import Batch
from .coordinates_square import vision_config
from .mask_rules import SequenceLayout
from .proof import TOLERANCE, Proof, StackProof
from .sites import ResolvedSite, attended
from .token_table import Columns, sequence_layout
from .vllm_encoder import check_encoder
from .vllm_encoder_proof import prove_encoder
from .vllm_engine import Answer, Request
from .vllm_plan import Plan, image_tokens
from .vllm_projection import EngineProjections
from .vllm_proof import (
    ATTENDED,
    PROBED,
    check_attention,
    join_halves,
    kind_of,
    largest_change,
    prove_attention,
    prove_residual,
    report,
    warning_of,
)
from .vllm_sampling import sampling
from .vllm_spool import Spool

if TYPE_CHECKING:
    from .vllm_backend import VllmBackend


@dataclass(frozen=True)
class Single:
    """One sample with what the engine shall read of it at once, and the labels of its tokens by stack."""

    sample_id: str
    tokens: list[int]
    images: list[Image.Image]
    labels: Mapping[str, Columns]

    @property
    def layout(self) -> SequenceLayout:
        """What the decoder's mask may depend on."""
        return sequence_layout(self.labels["text"])


class Prover:
    """Runs single samples through the engine of a backend, and remembers which kinds of them it has seen."""

    def __init__(self, backend: VllmBackend) -> None:
        self.backend = backend
        self._kinds: set[tuple[int | bool, ...]] = set()

    def prove(self, batch: Batch, sites: Sequence[ResolvedSite]) -> Proof:
        """See `Backend`. Attention is looked at in any case: its mask may not be the model's own."""
        backend, loaded, engine = self.backend, self.backend.loaded, self.backend.engine
        if loaded.dtype not in TOLERANCE:
            raise ModelError(
                f"This model computes in {loaded.dtype}, which cannot be captured.",
                f"Load it with dtype= one of {', '.join(TOLERANCE)}.",
            )
        begun, tolerance = time.monotonic(), backend.tolerance
        layers: dict[str, Sequence[int]] = {"text": range(len(backend.stack.layers))}
        seeing = [site for site in sites if site.stack.is_encoder]
        if seeing:
            told = engine.workers[0]["encoder"]
            check_encoder(told, seeing[0].stack, loaded.model.config.model_type, seeing)
            layers["vision"] = range(len(told["layers"]))
        single = Single(
            batch.samples[0].sample_id,
            [*backend.tokens(batch.prompts[0].text), *batch.answers[0]],
            [image.pixels for image in batch.images[0]],
            {"text": batch.decoder[0], "vision": batch.encoder[0]},
        )
        before = self._logits(single)
        spool, found = self._pass(single, Plan.everything(PROBED, layers), tolerance)
        with spool:
            observed = spool.logits(1)[0]
            proofs, warnings = self._proofs(spool, single, layers, found, attended(sites))
        after = self._logits(single)
        change = max(largest_change(before, observed), largest_change(before, after))
        if change > tolerance:
            raise CaptureError(
                f"Observing this engine changes its logits by {change:.2g}.",
                "Report the vLLM version and the model.",
            )
        self._kinds = {kind_of(single.layout, engine.layers)}
        return report(
            loaded.anatomy, proofs, begun=begun, change=change, tolerance=tolerance, warnings=warnings
        )

    def _proofs(
        self,
        spool: Spool,
        single: Single,
        layers: Mapping[str, Sequence[int]],
        found: Mapping[str, Any],
        attention: set[str],
    ) -> tuple[dict[str, StackProof], list[str]]:
        """What is proven of each stack, and what a reader must know."""
        backend, tolerance, engine = self.backend, self.backend.tolerance, self.backend.engine
        anatomy, model = backend.loaded.anatomy, backend.loaded.model
        warnings: list[str] = []
        proofs: dict[str, StackProof] = {}
        for name, numbers in layers.items():
            rows = len(single.labels[name]["position"])
            proofs[name] = proof = prove_residual(spool, anatomy.stack(name), len(numbers), rows)
            join_halves(proof, found["halves"][name])
            try:
                if name == "text":
                    prove_attention(spool, backend.stack, single.layout, engine.layers, proof, tolerance)
                else:
                    encoder = vision_config(model), found["encoder"], single.labels[name]
                    prove_encoder(spool, anatomy.stack(name), *encoder, proof, tolerance)
            except CaptureError as error:
                if name in attention:
                    raise
                proof.rules.clear()
                proof.attention.clear()
                warnings.append(f"how this engine masks {name} was not established: {error.what}")
        proof = proofs["text"]
        proof.projection_problem = found["projection_problem"]
        proof.projections = EngineProjections(engine)
        said = warning_of(model.config.model_type, proof, engine.layers[0]["kernel"])
        return proofs, [*warnings, *([said] if said else [])]

    def check(self, single: Single, proof: Proof, attention: set[str]) -> None:
        """Hold a sample of a kind that was not seen yet against the proven rules, if attention is kept.

        Raises
        ------
        CaptureError    the engine masks it otherwise.
        """
        backend, engine = self.backend, self.backend.engine
        kind = kind_of(single.layout, engine.layers)
        if "text" not in attention or kind in self._kinds:
            return
        plan = Plan.everything(ATTENDED, {"text": range(len(backend.stack.layers))})
        with self._pass(single, plan, 0.0)[0] as spool:
            rules = proof.rules["text"]
            check_attention(spool, backend.stack, single.layout, engine.layers, rules, backend.tolerance)
        self._kinds.add(kind)

    def _logits(self, single: Single) -> NDArray[np.float32]:
        """Logits behind all of a sample, with nothing else kept."""
        with self._pass(single, Plan({}, {}), 0.0)[0] as spool:
            logits: NDArray[np.float32] = spool.logits(1)[0]
        return logits

    def _pass(self, single: Single, plan: Plan, probe: float) -> tuple[Spool, Mapping[str, Any]]:
        """Have the engine read a sample at once; what was kept of it, and what probes found."""
        engine = self.backend.engine
        (name,) = engine.names(1)
        self.backend.watch(plan, {}, probe)
        engine.call("mechanistic_begin", {name: request_of(0, single.labels, plan)})
        request = Request(single.tokens, single.images)
        (answer,) = engine.run([name], [request], sampling(self.backend.loaded, 0))
        check_prompt(single.sample_id, answer, single.labels["text"]["token_id"].tolist())
        return self.backend.written()


def request_of(number: int, labels: Mapping[str, Columns], plan: Plan) -> dict[str, Any]:
    """What a worker is told of one request: JSON-like."""
    return {
        "number": number,
        "prompt_length": len(labels["text"]["position"]),
        "images": image_tokens(labels["vision"]),
        "wanted": plan.wanted(labels),
    }


def check_prompt(sample_id: str, answer: Answer, expected: list[int]) -> None:
    """CaptureError unless the engine made of a prompt what the model's own processor makes."""
    if answer.prompt != expected:
        raise CaptureError(
            f"Sample {sample_id!r}: vLLM makes {len(answer.prompt)} tokens of its prompt, not those "
            "that the model's own processor makes.",
            "Its labels would be wrong. Capture this model with --backend transformers, and report it.",
        )
