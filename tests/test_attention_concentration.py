"""Top-k mass of attention rows."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from synthetic_run import dense_attention, synthetic_run

from mechanistic.analysis import attention_concentration, attention_pattern
from mechanistic.store.errors import DataError, SpecificationError

RUN = synthetic_run()


def test_attention_concentration__by_hand() -> None:
    rows = [[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]
    np.testing.assert_allclose(attention_concentration(rows, k=2), [0.7, 0.5], atol=1e-7)
    np.testing.assert_allclose(attention_concentration(rows, k=1), [0.4, 0.25], atol=1e-7)
    np.testing.assert_allclose(attention_concentration(rows, k=9), [1, 1], atol=1e-7)


def test_attention_concentration__equals_a_sort() -> None:
    concentration = attention_concentration(RUN, k=3)
    assert isinstance(concentration["attention_concentration"].data, da.Array)
    assert concentration["attention_concentration"].attrs["k"] == 3
    values = concentration.compute()["attention_concentration"]
    for sample in range(12):
        expected = np.sort(dense_attention(RUN, sample, 1), axis=-1)[..., -3:].sum(-1)
        rows = values["sample_index"].values == sample
        np.testing.assert_allclose(values.sel(layer=1).values[rows], expected.T, atol=1e-5)


def test_attention_concentration__equals_torch_topk() -> None:
    import torch

    weights = torch.softmax(torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0)), -1)
    expected = weights.topk(5, -1).values.sum(-1).numpy()
    np.testing.assert_allclose(attention_concentration(weights, k=5), expected, atol=1e-6)


def test_attention_concentration__of_patterns_equals_that_of_the_run() -> None:
    pattern = attention_pattern(RUN, sample=8)
    expected = attention_concentration(RUN, sample=8, k=2)["attention_concentration"].values
    actual = attention_concentration(pattern, k=2)["attention_concentration"]
    assert isinstance(actual.data, da.Array)
    np.testing.assert_allclose(actual.values, expected.transpose(0, 2, 1), atol=1e-5)


def test_attention_concentration__finds_a_hub() -> None:
    hub = synthetic_run(hub=2)
    flat = attention_concentration(RUN, k=1, tokens="last")["attention_concentration"].values
    peaked = attention_concentration(hub, k=1, tokens="last")["attention_concentration"].values
    assert (peaked > 0.9).all()
    assert flat.mean() < 0.6


def test_attention_concentration__errors() -> None:
    with pytest.raises(SpecificationError, match="k is 0"):
        attention_concentration([[1.0]], k=0)
    with pytest.raises(DataError, match="sum to 1"):
        attention_concentration([[2.0, 2.0]])
