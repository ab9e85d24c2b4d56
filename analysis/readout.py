"""What turns a residual into the logits of the answer words: the final norm and a few unembedding rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import FormatError, MissingSiteError

from .single_precision import to_single

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding rows (word, feature) of the answer words."""

    words: tuple[str, ...]
    unembed: Floats
    unembed_bias: Floats
    weight: Floats
    bias: Floats
    kind: str
    eps: float
    softcap: float | None

    @classmethod
    def of(cls, run: xr.DataTree) -> Readout:
        """Read it from a run.

        Raises
        ------
        MissingSiteError  the run has none.
        FormatError       its norm is neither "rms" nor "layer".
        """
        if "/readout" not in run.groups:
            raise MissingSiteError(
                "this run has no readout: the model's final norm and answer words were not stored with it.",
                "Capture it again with a model that has an unembedding, and a dataset that has answers.",
            )
        stored = group(run, "readout").compute()
        kind = str(stored.attrs.get("norm_kind"))
        if kind not in ("rms", "layer"):
            raise FormatError(
                f"the readout has the norm {kind!r}; this installation knows 'rms' and 'layer'.",
                "Upgrade: pip install --upgrade mechanistic.",
            )
        unembed = _single(stored, "unembed")
        softcap = stored.attrs.get("softcap")
        return cls(
            tuple(str(word) for word in stored["word"].values),
            unembed,
            _single(stored, "unembed_bias", len(unembed)),
            _single(stored, "final_norm_weight") + np.float32(stored.attrs.get("weight_offset", 0.0)),
            _single(stored, "final_norm_bias", unembed.shape[1]),
            kind,
            float(stored.attrs["eps"]),
            None if softcap is None else float(softcap),
        )

    def logits(self, residual: NDArray[Any]) -> Floats:
        """Logits (..., word) of the answer words from residuals (..., feature)."""
        values = to_single(residual)
        if self.kind == "layer":
            values = values - values.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.vecdot(values, values) / values.shape[-1] + np.float32(self.eps))
        # The norm's weight goes into the few unembedding rows rather than onto every residual.
        logits = (values @ (self.unembed * self.weight).T) / scale[..., None] + self.unembed @ self.bias
        logits = (logits + self.unembed_bias).astype(np.float32)
        if self.softcap is not None:
            logits = np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap))
        return np.asarray(logits)


def _single(stored: xr.Dataset, name: str, absent: int | None = None) -> Floats:
    """An array of the readout; zeros where it may be absent and is."""
    if absent is not None and name not in stored:
        return np.zeros(absent, np.float32)
    return np.asarray(stored[name].values, np.float32)
