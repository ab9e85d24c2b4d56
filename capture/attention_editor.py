"""What may change attention while it is computed: the tap calls it around every attention of the model."""

from __future__ import annotations

from torch import Tensor, nn


class Editor:
    """What may replace the tensors of an attention call; this one leaves them all as they come."""

    def before(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask to compute with, shaped as in `AttentionCall`."""
        return query, key, value, mask

    def edits_weights(self, module: nn.Module) -> bool:
        """Whether `scores` and `pattern` are wanted here; the formula then takes the kernel's place."""
        return False

    def scores(self, module: nn.Module, scores: Tensor) -> Tensor:
        """Scores (batch, head, query, key), float32, to which the mask is still to come."""
        return scores

    def pattern(self, module: nn.Module, pattern: Tensor) -> Tensor:
        """Weights (batch, head, query, key), float32."""
        return pattern

    def after(self, module: nn.Module, output: Tensor) -> Tensor:
        """Each head's output, (batch, query, head, d_head)."""
        return output
