"""Last token to image, directly and through text."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from run_groups import is_image, stacked_attention, tokens_of, with_groups
from scipy.stats import pearsonr
from synthetic_run import synthetic_run

from mechanistic.analysis.hub_tokens import hub_tokens
from mechanistic.analysis.splits import summarize, with_samples
from mechanistic.analysis.text_hops import text_hops
from mechanistic.analysis.two_hop import two_hop
from mechanistic.store.errors import DataError, MissingSiteError, SpecificationError


def reference(run: xr.DataTree, sample: int, first_hop: str = "same") -> dict[str, np.ndarray[Any, Any]]:
    """The definition in loops, (layer, head); text tokens after the image and before the last."""
    weights, image = stacked_attention(run, sample), np.flatnonzero(is_image(run, sample))
    last = int(np.flatnonzero(tokens_of(run, sample)["is_last_prompt"])[0])
    text = [t for t in range(last) if t > image.max()]
    layers, heads = weights.shape[:2]
    found = {
        name: np.full((layers, heads), np.nan)
        for name in ("direct", "indirect", "correlation", "hub", "hub_share")
    }
    on_image = weights[..., image].sum(-1).mean(1)
    for layer in range(layers):
        first = on_image[layer] if first_hop == "same" else on_image[:layer].mean(0) if layer else None
        for head in range(heads):
            row = weights[layer, head, last]
            found["direct"][layer, head] = row[image].sum()
            if first is None:
                continue
            paths = {t: row[t] * first[t] for t in text}
            found["indirect"][layer, head] = sum(paths.values())
            found["correlation"][layer, head] = pearsonr([row[t] for t in text], [first[t] for t in text])[0]
            found["hub"][layer, head] = max(paths, key=paths.__getitem__)
            found["hub_share"][layer, head] = max(paths.values()) / sum(paths.values())
    return found


def by_hand() -> xr.DataTree:
    """One sample, one layer, one head: <image> a b last, with attention rows that are chosen."""
    run = synthetic_run(sets=1, layers=(0,), heads=1, kv_heads=1, d_head=4, grid=1, query_tokens="all")
    rows = np.array([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.2, 0.3, 0.5, 0], [0.3, 0.4, 0.2, 0.1]])
    labels = {"sample_index": [0] * 4, "position": range(4), "kind": [1, 0, 0, 2]}
    labels |= {"image_index": [0, -1, -1, -1], "tile": [0, -1, -1, -1]}
    coords: dict[str, Any] = {name: ("token", np.array(list(values))) for name, values in labels.items()}
    coords["is_last_prompt"] = ("token", np.array([False, False, False, True]))
    coords["token_text"] = ("token", np.array(["<image>", "a", "b", "last"], object))
    coords["layer"] = [0]
    attrs = run["text/q"].attrs
    # Keys are unit vectors, so that queries of log weights / scale give exactly these rows.
    query = np.log(np.maximum(rows, 1e-30)) / attrs["attention"]["0"]["scale"]
    q = xr.Dataset({"q": (("layer", "token", "head", "d_head"), query[None, :, None])}, coords, attrs)
    k = xr.Dataset({"k": (("layer", "token", "kv_head", "d_head"), np.eye(4)[None, :, None])}, coords, attrs)
    k.attrs["tokens"] = "all"
    q, k = q.assign_coords(head=[0]).chunk(), k.assign_coords(kv_head=[0]).chunk()
    return with_groups(run, text__q=q, text__k=k)


def test_two_hop__by_hand() -> None:
    found = two_hop(by_hand()).compute().isel(layer=0, sample=0, head=0)
    assert float(found["direct"]) == pytest.approx(0.3)
    assert float(found["indirect"]) == pytest.approx(0.4 * 0.6 + 0.2 * 0.2)
    assert float(found["ratio"]) == pytest.approx(0.28 / 0.3)
    assert float(found["share"]) == pytest.approx(0.28 / 0.58)
    assert float(found["hub_position"]) == 1
    assert float(found["hub_share"]) == pytest.approx(0.24 / 0.28)
    # Two text tokens have no correlation worth the name.
    assert np.isnan(found["correlation"])


@pytest.mark.parametrize("first_hop", ["same", "earlier"])
def test_two_hop__plain_definition(first_hop: Any) -> None:
    run = synthetic_run(grid=2)
    lazy = two_hop(run, first_hop=first_hop)
    assert all(isinstance(variable.data, da.Array) for variable in lazy.data_vars.values())
    found = lazy.compute()
    assert found["sample_index"].values.tolist() == list(range(12))
    for sample in (0, 7, 11):
        mine, expected = found.isel(sample=sample), reference(run, sample, first_hop)
        for name in ("direct", "indirect", "correlation", "hub_share"):
            np.testing.assert_allclose(mine[name], expected[name], atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(mine["hub_position"], expected["hub"])
        np.testing.assert_allclose(mine["ratio"], expected["indirect"] / expected["direct"], rtol=1e-4)


def test_two_hop__mean_over_heads_is_that_of_mean_attention() -> None:
    run = synthetic_run(grid=2)
    found = two_hop(run, sample=4).mean("head")
    weights, image = stacked_attention(run, 4).mean(1), is_image(run, 4)
    last = int(np.flatnonzero(tokens_of(run, 4)["is_last_prompt"])[0])
    between = slice(1 + image.sum(), last)
    indirect = np.einsum("lt,lti->l", weights[:, last, between], weights[:, between][..., image])
    np.testing.assert_allclose(found["indirect"].values[:, 0], indirect, atol=1e-6)


def test_two_hop__planted_hub() -> None:
    found = two_hop(synthetic_run(hub=6)).compute()
    assert (found["hub_position"].values == 6).mean() > 0.85
    assert float(found["hub_share"].mean()) > 0.7
    hops = text_hops(synthetic_run(hub=6)).compute()
    heavy = hops["weight_from_source"].mean(("layer", "head")).groupby("position").mean()
    assert int(heavy["position"][int(heavy.values.argmax())]) == 6


def test_two_hop__chunks_do_not_matter() -> None:
    whole = two_hop(synthetic_run(chunk=500), first_hop="earlier")
    cut = two_hop(synthetic_run(chunk=3), first_hop="earlier", max_bytes=12_000)
    assert len(cut.chunks["sample"]) > 1
    for name in whole.data_vars:
        np.testing.assert_allclose(cut[name], whole[name], atol=1e-6, rtol=1e-4, err_msg=str(name))


def test_two_hop__splits_by_correct() -> None:
    run = synthetic_run()
    table = summarize(with_samples(two_hop(run), run, "correct"), by="correct").compute()
    counts = [(run["samples"]["correct"].values == value).sum() for value in (0, 1)]
    assert table["n_sample"].values.tolist() == counts
    assert table["indirect"].dims == ("correct", "layer", "head")
    assert (table["indirect_low"] < table["indirect"]).all()


def test_two_hop__tokens_before_the_image_carry_nothing() -> None:
    hops = text_hops(synthetic_run()).compute()
    first = hops["position"].values == 0
    assert np.isnan(hops["mass_on_target"].values[:, first]).all()
    assert not np.isnan(hops["mass_on_target"].values[:, ~first]).any()


def test_two_hop__without_an_image_everything_is_unknown() -> None:
    found = two_hop(synthetic_run(), target="'never'").compute()
    assert all(np.isnan(variable.values).all() for variable in found.data_vars.values())


def test_two_hop__errors() -> None:
    run = synthetic_run()
    with pytest.raises(SpecificationError, match=r"no first hop 'both'\.\n  Take it from the 'same' layer"):
        two_hop(run, first_hop="both")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"sample 0 has 0 tokens that are '!'; a path starts at one"):
        two_hop(run, source="'!'")
    with pytest.raises(DataError, match=r"is object: nothing to pass through\.\n  Capture their queries"):
        two_hop(run, via="object")
    with pytest.raises(MissingSiteError, match="text/q"):
        two_hop(xr.DataTree())


def test_hub_tokens__by_hand() -> None:
    found = hub_tokens(by_hand()).compute()
    assert found["word"].values.tolist() == ["a", "b"]
    np.testing.assert_allclose(found["hub_share"].values[0, 0], [0.24 / 0.28, 0.04 / 0.28], rtol=1e-5)
    assert found["n_sample"].values.tolist() == [1, 1]


def test_hub_tokens__plain_loop() -> None:
    run = synthetic_run(grid=2, chunk=5)
    lazy = hub_tokens(run, max_bytes=12_000)
    assert isinstance(lazy["hub_share"].data, da.Array)
    shares: dict[str, list[np.ndarray[Any, Any]]] = {}
    for sample in range(12):
        weights, image = stacked_attention(run, sample), is_image(run, sample)
        texts = [str(text) for text in tokens_of(run, sample)["token_text"].values]
        last = int(np.flatnonzero(tokens_of(run, sample)["is_last_prompt"])[0])
        first = weights[..., image].sum(-1).mean(1)
        paths = weights[:, :, last] * first[:, None]
        text = [t for t in range(last) if not image[t]]
        total = paths[..., text].sum(-1)
        for word in {texts[t] for t in text}:
            mine = [t for t in text if texts[t] == word]
            shares.setdefault(word, []).append(paths[..., mine].sum(-1) / total)
    found = lazy.compute()
    assert found["word"].values.tolist() == sorted(shares)
    for place, word in enumerate(found["word"].values):
        np.testing.assert_allclose(found["hub_share"].values[..., place], np.mean(shares[word], 0), atol=1e-5)
        assert int(found["n_sample"][place]) == len(shares[word])
    np.testing.assert_allclose((found["hub_share"] * found["n_sample"]).sum("word").values / 12, 1, atol=1e-5)
