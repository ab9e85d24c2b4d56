"""Attention mass by kind of key."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from synthetic_run import dense_attention, synthetic_run

from mechanistic.analysis import attention_mass
from mechanistic.store import site
from mechanistic.store.errors import MissingSiteError
from mechanistic.store.schema import KIND

RUN = synthetic_run()


def test_attention_mass__equals_sums_of_the_plain_definition() -> None:
    mass = attention_mass(RUN)
    assert all(isinstance(variable.data, da.Array) for variable in mass.data_vars.values())
    computed, key = mass.compute(), site(RUN, "text/k")
    for sample in range(12):
        rows = computed["sample_index"].values == sample
        kind = key["kind"].values[key["sample_index"].values == sample]
        weights = dense_attention(RUN, sample, 3)
        for name, code in KIND.items():
            actual = computed[f"mass_{name}"].sel(layer=3).values[rows]
            np.testing.assert_allclose(actual, weights[..., kind == code].sum(-1).T, atol=1e-5)
        np.testing.assert_allclose(
            computed["mass_first"].sel(layer=3).values[rows], weights[..., 0].T, atol=1e-5
        )


def test_attention_mass__kinds_sum_to_one() -> None:
    mass = attention_mass(RUN, max_bytes=12_000)
    total = sum(mass[f"mass_{name}"] for name in KIND)
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_attention_mass__by_hand_at_the_first_token() -> None:
    first = attention_mass(RUN, tokens="@0").compute()
    for name, expected in {"special": 1, "first": 1, "image": 0, "text": 0, "answer": 0}.items():
        assert (first[f"mass_{name}"] == expected).all()


@pytest.mark.parametrize(("hub", "name"), [(0, "mass_first"), (3, "mass_image")])
def test_attention_mass__finds_a_planted_hub(hub: int, name: str) -> None:
    mass = attention_mass(synthetic_run(hub=hub), tokens="last")[name].values
    assert mass.min() > 0.9
    assert attention_mass(RUN, tokens="last")[name].values.mean() < 0.6


def test_attention_mass__needs_q_and_k() -> None:
    with pytest.raises(MissingSiteError, match="no 'vision/q'"):
        attention_mass(RUN, stack="vision")
