"""Where in the image each word looks."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from run_groups import is_image, stacked_attention, tokens_of, with_groups
from synthetic_run import dense_attention, synthetic_run

from mechanistic.analysis.cross_attention import cross_attention
from mechanistic.store.errors import DataError, MissingSiteError, SpecificationError
from mechanistic.store.schema import KIND


def make(**changes: Any) -> xr.DataTree:
    """A run whose samples have questions that their text tokens spell."""
    run = synthetic_run(grid=2, **changes)
    samples = run["samples"].to_dataset(inherit=False)
    asked = []
    for sample in range(samples.sizes["sample"]):
        tokens = tokens_of(run, sample)
        words = tokens["token_text"].values[tokens["kind"].values == KIND["text"]]
        asked.append(" ".join(map(str, words)))
    samples["question"] = ("sample", np.array(asked, object))
    return with_groups(run, samples=samples.chunk())


def with_cross_attention(run: xr.DataTree, layer: int = 3) -> xr.DataTree:
    """The same run of a model with one cross-attention layer whose keys are five patches a sample."""
    rng = np.random.default_rng(1)
    query = run["text/q"].to_dataset(inherit=False).sel(layer=[layer]).rename(q="xq")
    rule = {str(layer): {"mask": "cross", "window": None, "scale": 8**-0.5, "softcap": None, "sinks": False}}
    query.attrs |= {"attention": rule, "site": "xq"}
    count = 5 * run["samples"].sizes["sample"]
    place = np.tile(np.arange(5), count // 5)
    labels = {"sample_index": np.repeat(np.arange(count // 5), 5), "position": place}
    labels |= {"kind": np.full(count, KIND["image"]), "patch_col": place, "patch_row": 0 * place}
    coords: dict[str, Any] = {name: ("patch", values) for name, values in labels.items()}
    values = rng.normal(size=(1, count, 2, 8)).astype(np.float32)
    key = xr.Dataset({"xk": (("layer", "patch", "kv_head", "d_head"), values)}, coords)
    key = key.assign_coords(layer=[layer], kv_head=[0, 1])
    key.attrs = {"attention": rule, "tokens": "all"}
    return with_groups(run, text__xq=query, text__xk=key.chunk(layer=1, patch=7))


def test_cross_attention__text_to_image_block() -> None:
    run = make()
    lazy = cross_attention(run, sample=4)
    assert isinstance(lazy["cross_attention"].data, da.Array)
    assert lazy.attrs["computed_from"] == "q and k"
    weights, image = stacked_attention(run, 4), is_image(run, 4)
    tokens = tokens_of(run, 4)
    rows = np.flatnonzero(tokens["kind"].values == KIND["text"])
    expected = weights[:, :, rows][..., image]
    np.testing.assert_allclose(lazy["cross_attention"], expected, atol=1e-6)
    texts = [str(text) for text in tokens["token_text"].values[rows]]
    # The token "$x$" spans three words, and belongs to the one it begins in.
    assert lazy["word"].values.tolist() == ["$" if text == "$x$" else text for text in texts]
    assert lazy["patch_row"].values.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("join", "reduce"), [("mean", np.mean), ("sum", np.sum), ("max", np.max)])
def test_cross_attention__joins_the_tokens_of_a_word(join: Any, reduce: Any) -> None:
    run = make()
    found = cross_attention(run, sample=4, words={"pair": [5, 7], "one": [6]}, join=join, layer=1, head=2)
    rows = stacked_attention(run, 4)[1, 2][:, is_image(run, 4)]
    np.testing.assert_allclose(found["cross_attention"][0], reduce(rows[[5, 7]], axis=0), atol=1e-6)
    np.testing.assert_allclose(found["cross_attention"][1], rows[6], atol=1e-6)
    assert found["n_token"].values.tolist() == [2, 1]


def test_cross_attention__true_cross_attention_is_used_where_there_is_one() -> None:
    run = with_cross_attention(make())
    found = cross_attention(run, sample=4).compute()
    assert found.attrs["computed_from"] == "xq and xk"
    assert found["layer"].values.tolist() == [3]
    np.testing.assert_allclose(found["cross_attention"].sum("key"), 1, atol=1e-5)
    query = run["text/xq"].to_dataset(inherit=False).compute()
    text = (query["sample_index"].values == 4) & (query["kind"].values == KIND["text"])
    keys = run["text/xk"].to_dataset(inherit=False).compute()["xk"].values[0, 20:25].repeat(2, axis=1)
    logits = np.einsum("qhd,khd->hqk", query["xq"].values[0, text], keys) * 8**-0.5
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found["cross_attention"].values[0], expected, atol=1e-6)


def test_cross_attention__planted_patch() -> None:
    found = cross_attention(make(hub=3), sample=0)["cross_attention"]
    assert (found.argmax("key").values == 2).mean() > 0.95
    assert dense_attention(make(hub=3), 0, 0).shape[0] == 4


def test_cross_attention__errors() -> None:
    run = make()
    with pytest.raises(SpecificationError, match=r"cannot be joined by 'median'\.\n  Use mean, sum, max"):
        cross_attention(run, sample=0, join="median")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"'cup' has the positions \[1, 90\]; q of sample 0 lacks 1, 90"):
        cross_attention(run, sample=0, words={"cup": [1, 90]})
    with pytest.raises(MissingSiteError, match="text/k"):
        cross_attention(xr.DataTree.from_dict({"text/q": run["text/q"].to_dataset()}), sample=0)
