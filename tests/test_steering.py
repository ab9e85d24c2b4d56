"""Steering with stored directions: by hand, planted, and on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hand_built import AT_LAST, LEFT, ONLY, RIGHT, WIDTH, one_head, pairs
from tiny_models import llava, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import class_directions, linear_probe, steer
from mechanistic.capture.answers import to_device
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store import open_run
from mechanistic.store.errors import DimensionError, SpecificationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def unit(place: int) -> np.ndarray[Any, Any]:
    """One coordinate of the hand-built stream."""
    vector = np.zeros(WIDTH)
    vector[place] = 1
    return vector


def answers() -> xr.DataArray:
    """Its two answers as directions."""
    return xr.DataArray(
        np.stack([unit(LEFT), unit(RIGHT)]), {"class": ["left", "right"]}, ("class", "feature")
    )


def test_steer__adds_a_direction_by_hand() -> None:
    got = steer(
        pairs(1),
        one_head(),
        direction=answers(),
        towards="right",
        strengths=[0.5, 3.0],
        layers=[2],
        quiet=True,
    )
    # The unembedding multiplies by 4; red (left) loses what green (right) gains.
    np.testing.assert_allclose(got.effect[:, 0], [[-2, -12], [2, 12]], atol=0.01)
    np.testing.assert_array_equal(got.choice[:, 0], [[0, 1], [1, 1]])
    assert got.broken.values.tolist() == [[0, 1]]
    assert float(got.clean_accuracy) == 1
    own = steer(pairs(1), one_head(), direction=answers(), towards="answer", strengths=[1.0], quiet=True)
    np.testing.assert_allclose(own.effect, 4, atol=0.01)
    assert int(own.repaired.sum()) == 0


def test_steer__repairs_what_was_wrong() -> None:
    turned = [
        type(s)(**{**vars(s), "answer": {"left": "right", "right": "left"}[s.answer or ""]}) for s in pairs(2)
    ]
    got = steer(
        turned, one_head(), direction=answers(), towards="answer", strengths=[0.5, 5.0], layers=2, quiet=True
    )
    assert float(got.clean_accuracy) == 0
    assert got.repaired.values.tolist() == [[0, 4]]
    assert got.accuracy.values.tolist() == [[0, 1]]


def test_steer__takes_a_space_out() -> None:
    difference = xr.DataArray(unit(LEFT) - unit(RIGHT), dims="feature")
    got = steer(
        pairs(1), one_head(), direction=difference, mode="project_out", strengths=[0.5, 1.0], quiet=True
    )
    layer, _ = ONLY
    expected = np.zeros((3, 2))
    # Taken out where the head has written it; before that there is nothing to take.
    expected[layer:] = [-2, -4]
    np.testing.assert_allclose(got.mean_effect, expected, atol=0.01)
    both = steer(pairs(1), one_head(), direction=answers(), mode="project_out", strengths=[1.0], quiet=True)
    np.testing.assert_allclose(both.steered[:, 2, 0], 0, atol=0.01)
    skew = xr.DataArray(np.stack([unit(LEFT), unit(LEFT) + 0.1 * unit(RIGHT)]), dims=("class", "feature"))
    same = steer(pairs(1), one_head(), direction=skew, mode="project_out", strengths=[1.0], quiet=True)
    np.testing.assert_allclose(same.steered, both.steered, atol=0.01)


def test_steer__scales_and_steers_where_it_is_told_to() -> None:
    model, given = one_head(), pairs(1)
    direction = xr.DataArray(7 * unit(LEFT), dims="feature")
    how: dict[str, Any] = {"direction": direction, "strengths": [1.0], "layers": [2], "quiet": True}
    by_scale = {scale: steer(given, model, scale=scale, **how) for scale in ("own", "unit", "norm")}
    found = {scale: float(result.effect[0, 0, 0]) for scale, result in by_scale.items()}
    assert found["own"] == pytest.approx(28, abs=0.1)
    assert found["unit"] == pytest.approx(4, abs=0.01)
    # A row's length is that of its big coordinate.
    assert found["norm"] > 1000
    elsewhere = steer(given, model, place=AT_LAST - 1, **how)
    np.testing.assert_allclose(elsewhere.effect, 0, atol=1e-3)
    layers = np.stack([unit(LEFT), 2 * unit(LEFT)])
    named = xr.DataArray(layers, {"layer": [1, 2]}, ("layer", "feature"))
    each = steer(given, model, direction=named, strengths=[1.0], quiet=True)
    np.testing.assert_allclose(each.effect[0, :, 0], [4, 8], atol=0.02)
    together = steer(given, model, direction=named, strengths=[1.0], together=True, quiet=True)
    assert together.effect.dims == ("sample", "strength")
    np.testing.assert_allclose(together.effect[0], [12], atol=0.03)


def test_steer__finds_class_means_in_use_and_a_probes_direction_not(demo_run: Path) -> None:
    run = open_run(demo_run)
    given = _first(run, 24)
    how: dict[str, Any] = {"layers": [3], "batch_size": 24, "quiet": True}
    means = class_directions(run, target="relation", layer=[3])["class_mean"]
    centred = means - means.mean("class")
    right = steer(given, "spatial-tiny", direction=centred, towards="right", strengths=[2.0], **how)
    chosen = [
        sample.options[choice] for sample, choice in zip(given, right.choice[:, 0, 0].values, strict=True)
    ]
    assert chosen == ["right"] * 24
    own = steer(given, "spatial-tiny", direction=centred, towards="answer", strengths=[1.0], **how)
    assert float(own.mean_effect_low[0, 0]) > 1
    out = {"mode": "project_out", "strengths": [1.0]}
    without = steer(given, "spatial-tiny", direction=centred, **out, **how)
    assert float(without.accuracy[0, 0]) < 0.6
    assert float(without.clean_accuracy) > 0.9
    # What reads the answer best is not what the answer is read from.
    probe = linear_probe(run, target="relation", layer=[3], repetitions=1)
    still = steer(given, "spatial-tiny", direction=probe["coefficient"], **out, **how)
    assert float(still.accuracy[0, 0]) > 0.9
    assert float(probe["accuracy"][0]) > 0.9


def _first(run: xr.DataTree, count: int) -> list[Any]:
    from mechanistic.capture.run_samples import run_samples

    return run_samples(run, range(count))


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "gemma3", "llava"])
def test_steer__works_on_every_kind_of_decoder_and_leaves_it_as_it_was(name: str) -> None:
    family = ZOO[name]
    model, data = family.build(), zoo_samples(family)[:2]
    batch = prepare_batch(model, data, 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
    with torch.no_grad():
        before = model.model(**to_device(batch.inputs, model.model)).logits
    direction = xr.DataArray(np.random.default_rng(0).standard_normal(32), dims="feature")
    got = steer(data, model, direction=direction, strengths=[0.0, 2.0], site="attn_out", quiet=True)
    np.testing.assert_allclose(got.effect.sel(strength=0.0), 0, atol=1e-5)
    assert float(np.abs(got.effect.sel(strength=2.0)).min()) > 0
    with torch.no_grad():
        assert torch.equal(model.model(**to_device(batch.inputs, model.model)).logits, before)


def test_steer__refuses_a_direction_that_does_not_fit() -> None:
    model, data = llava(), samples(1)
    two = xr.DataArray(np.ones((2, 32)), {"class": ["left", "right"]}, ("class", "feature"))
    with pytest.raises(DimensionError, match="residual stream has 32 numbers"):
        steer(data, model, direction=xr.DataArray(np.ones(31), dims="feature"), quiet=True)
    with pytest.raises(DimensionError, match="There are 2 directions: left, right"):
        steer(data, model, direction=two, quiet=True)
    with pytest.raises(DimensionError, match="no direction 'up'; there are left, right"):
        steer(data, model, direction=two, towards="up", quiet=True)
    layered = xr.DataArray(np.ones((1, 32)), {"layer": [1]}, ("layer", "feature"))
    with pytest.raises(DimensionError, match=r"no direction for layer 2; there are \[1\]"):
        steer(data, model, direction=layered, layers=2, quiet=True)
    flat = xr.DataArray(np.ones(32), dims="feature")
    for wrong, message in (
        ({"mode": "push"}, "no mode 'push' of steering"),
        ({"scale": "big"}, "no scale 'big'"),
        ({"site": "z"}, "no site 'z'"),
        ({"strengths": []}, "no strength"),
        ({"layers": 5}, "no layer 5"),
    ):
        with pytest.raises(SpecificationError, match=message):
            steer(data, model, direction=flat, quiet=True, **wrong)
