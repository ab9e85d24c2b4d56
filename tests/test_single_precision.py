"""Half precision becomes single precision bit by bit as numpy has it."""

from __future__ import annotations

import numpy as np
import pytest

from mechanistic.analysis.single_precision import to_single

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize(
    "halves", [EVERY, EVERY[np.isfinite(EVERY)], EVERY.reshape(2, -1)[:, ::3], EVERY[:0]]
)
def test_to_single__is_numpys_cast(halves: np.ndarray) -> None:
    before = halves.copy()
    single = to_single(halves)
    assert single.dtype == np.float32
    np.testing.assert_array_equal(single.view(np.uint32), halves.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(halves.view(np.uint16), before.view(np.uint16))


def test_to_single__leaves_what_is_single() -> None:
    values = np.ones(3, np.float32)
    assert to_single(values) is values
    assert to_single(np.ones(3)).dtype == np.float32
