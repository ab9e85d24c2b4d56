"""Which rows of a forward are copied together."""

from __future__ import annotations

import torch

from mechanistic.capture.forward import LONG_STRETCH, stretches


def test_stretches__are_unbroken_tokens_of_one_sample() -> None:
    n = LONG_STRETCH
    sample = torch.tensor([0] * 2 * n + [1] * 2 * n)
    position = torch.cat([torch.arange(2 * n), torch.arange(n), torch.arange(n + 3, 2 * n + 3)])
    assert stretches((sample, position)) == [(0, 0, 0, 2 * n), (1, 0, 2 * n, n), (1, n + 3, 3 * n, n)]


def test_stretches__neighbours_of_two_samples_are_not_one() -> None:
    n = LONG_STRETCH
    # The second sample goes on where the first one ends.
    where = torch.tensor([0] * n + [1] * n), torch.arange(2 * n)
    assert stretches(where) == [(0, 0, 0, n), (1, n, n, n)]


def test_stretches__short_ones_and_encoders_are_gathered() -> None:
    assert stretches((torch.zeros(9, dtype=torch.int64), 2 * torch.arange(9))) is None
    assert stretches((torch.arange(99),)) is None
    assert stretches((torch.zeros(0, dtype=torch.int64),) * 2) is None
