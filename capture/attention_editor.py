"""What may change attention while it is computed: the tap calls it around every attention of the model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Editor(Protocol):
    """What may replace the tensors of an attention call; it returns what it leaves alone as it came."""

    def before(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask to compute with, shaped as in `AttentionCall`."""
        ...

    def edits_weights(self, module: nn.Module) -> bool:
        """Whether `scores` and `pattern` are wanted here; the formula then takes the kernel's place."""
        ...

    def scores(self, module: nn.Module, scores: Tensor) -> Tensor:
        """Scores (batch, head, query, key), float32, to which the mask is still to come."""
        ...

    def pattern(self, module: nn.Module, pattern: Tensor) -> Tensor:
        """Weights (batch, head, query, key), float32."""
        ...

    def after(self, module: nn.Module, output: Tensor) -> Tensor:
        """Each head's output, (batch, query, head, d_head)."""
        ...
