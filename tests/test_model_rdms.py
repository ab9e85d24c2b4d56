"""Dissimilarities that labels predict: by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dissimilarities import random_matrices, rdms

from mechanistic.analysis.model_rdms import model_dissimilarity
from mechanistic.store.errors import DataError, DimensionError


def test_model_rdms__by_hand() -> None:
    data = rdms(
        random_matrices(1, 4), relation=["left", "right", "left", "left"], x=[0, 3, 0, 0], y=[0.0, 4, 0, 1]
    )
    models = model_dissimilarity(data, same=["relation"], distance={"place": ["x", "y"], "height": ["y"]})
    assert models["model"].values.tolist() == ["relation", "place", "height"]
    np.testing.assert_array_equal(models["dissimilarity"].sel(model="relation")[0], [0, 1, 0, 0])
    np.testing.assert_allclose(models["dissimilarity"].sel(model="place")[1], [5, 0, 5, np.sqrt(18)])
    np.testing.assert_allclose(models["dissimilarity"].sel(model="height")[3], [1, 3, 1, 0])
    assert models["relation"].values.tolist() == ["left", "right", "left", "left"]
    lazy = model_dissimilarity(data.chunk(), same=["relation"])
    assert isinstance(lazy["dissimilarity"].data, da.Array)
    xr.testing.assert_equal(lazy.compute()["dissimilarity"], models["dissimilarity"].sel(model=["relation"]))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, DimensionError, "no model is asked for"),
        ({"same": ["colour"]}, DimensionError, "no label 'colour'; they have condition, word"),
        ({"same": ["word"]}, DataError, "1 conditions have no 'word', the first is number 2"),
        ({"distance": {"d": ["other_word"]}}, DataError, "'other_word' holds words"),
    ],
)
def test_model_rdms__refuses(options: Any, error: type[Exception], text: str) -> None:
    data = rdms(random_matrices(1, 3), word=["a", "b", ""], other_word=["a", "b", "c"])
    with pytest.raises(error, match=text):
        model_dissimilarity(data, **options)
