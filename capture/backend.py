"""What computes: the one thing in which capture backends differ; labels, tables and runs are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .batch import Batch, prepare_batch
from .dataset import Sample
from .forward import capture_forward
from .proof import Proof, prove
from .readout import build_readout
from .room import Room
from .similarity import option_similarities
from .sites import ResolvedSite, attended
from .tables import Rows
from .token_table import TokenTexts

if TYPE_CHECKING:
    from .models import LoadedModel


@dataclass(frozen=True)
class Captured:
    """A batch and what was kept of it.

    `arrays` by group and name, (layer, row, ...) or of each layer (row, ...); `logits` at each sample's last
    prompt token, (sample, vocabulary), None for a model without any; `similarities` is what
    `option_similarities` returns.
    """

    batch: Batch
    arrays: Rows
    logits: NDArray[np.float32] | None
    similarities: list[list[float]] | None = None


class Backend(Protocol):
    """A model that answers, can be proven, and shows what it computes."""

    def prepare(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        texts: TokenTexts,
        generate: bool = True,
    ) -> Batch:
        """Prompt, answer and label samples, keeping nothing. Raises like `prepare_batch`."""

    def check(self, sites: Sequence[ResolvedSite]) -> None:
        """SpecificationError for a site that this backend cannot give, with the reason."""

    def prove(self, batch: Batch, sites: Sequence[ResolvedSite]) -> Proof:
        """Check on one sample that what will be kept is what the model does. Raises like `prove`."""

    def capture(
        self,
        samples: Sequence[Sample],
        sites: Sequence[ResolvedSite],
        proof: Proof,
        *,
        max_new_tokens: int,
        texts: TokenTexts,
    ) -> Captured:
        """Answer samples and keep the sites. Raises like `prepare_batch` and `capture_forward`."""

    def readout(self, words: Mapping[int, str]) -> tuple[xr.Dataset, dict[str, Any]] | None:
        """What `build_readout` returns."""

    def attributes(self) -> dict[str, Any]:
        """What the run's attribute `model` says of this backend instead."""

    def close(self) -> None:
        """Let go of processes and memory that outlive the object; nothing can be captured afterwards."""


class Transformers:
    """The model itself, in this process: answers first, then one forward over prompts and answers."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._room = Room()

    def prepare(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        texts: TokenTexts,
        generate: bool = True,
    ) -> Batch:
        """See `Backend`."""
        return prepare_batch(
            self.loaded, samples, 0, max_new_tokens=max_new_tokens, generate=generate, texts=texts
        )

    def check(self, sites: Sequence[ResolvedSite]) -> None:
        """Every site of the grammar can be had."""

    def prove(self, batch: Batch, sites: Sequence[ResolvedSite]) -> Proof:
        """See `Backend`."""
        return prove(self.loaded, batch, attended(sites))

    def capture(
        self,
        samples: Sequence[Sample],
        sites: Sequence[ResolvedSite],
        proof: Proof,
        *,
        max_new_tokens: int,
        texts: TokenTexts,
    ) -> Captured:
        """See `Backend`."""
        batch = self.prepare(samples, max_new_tokens=max_new_tokens, texts=texts)
        arrays, logits = capture_forward(self.loaded, batch, sites, proof.halves, proof.rules, self._room)
        return Captured(batch, arrays, logits, option_similarities(self.loaded, batch))

    def readout(self, words: Mapping[int, str]) -> tuple[xr.Dataset, dict[str, Any]] | None:
        """See `Backend`."""
        return build_readout(self.loaded.anatomy, self.loaded.model, words)

    def attributes(self) -> dict[str, Any]:
        """The model says it all by itself."""
        return {}

    def close(self) -> None:
        """Python frees the model with its last reference."""


def backend_of(loaded: LoadedModel) -> Backend:
    """The backend that runs a loaded model."""
    return Transformers(loaded) if loaded.engine is None else loaded.engine
