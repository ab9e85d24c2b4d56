"""attn_stats computed while the model runs, against the same numbers from stored q and k."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tiny_models import Listed, llava, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import attention_concentration, attention_entropy, attention_mass, attention_pattern
from mechanistic.capture.attention_rows import row_blocks
from mechanistic.capture.attention_statistics import MASSES, Keys, row_statistics
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.job import capture_run, price_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.tap import AttentionCall, tapped
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store import open_run, site
from mechanistic.store.errors import CaptureError, SpecificationError
from mechanistic.store.verify import verify_run

SITES = (
    "text.*.attn_stats",
    "text.*.q",
    "text.*.k",
    "vision.*.attn_stats",
    "vision.*.q",
    "vision.*.k",
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.fixture(scope="module")
def run(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    path = tmp_path_factory.mktemp("statistics") / "run"
    dataset = Listed(samples(5, images=(1, 2)))
    capture_run(loaded, dataset, path, sites=SITES, batch_size=3, max_new_tokens=2, quiet=True)
    assert verify_run(path) == []
    return open_run(path)


def call_of(query: Any, key: Any, **changed: Any) -> AttentionCall:
    """A call with no module behind it: (head, token, d_head) tensors of one sequence."""
    settings: dict[str, Any] = {
        "mask": None,
        "scale": 1.0,
        "softcap": None,
        "window": None,
        "sinks": None,
        "position_bias": None,
        "causal": True,
        **changed,
    }
    query, key = (torch.as_tensor(each, dtype=torch.float32)[None] for each in (query, key))
    return AttentionCall(torch.nn.Identity(), query, key, key, query.transpose(1, 2), **settings)


def assert_as_computed_from_q_and_k(run: xr.DataTree, stack: str) -> None:
    stored = site(run, f"{stack}/attn_stats")
    expected = xr.merge(
        [
            attention_entropy(run, stack=stack),
            attention_concentration(run, stack=stack),
            attention_mass(run, stack=stack),
        ],
        combine_attrs="override",
    )
    assert set(expected.data_vars) < set(stored.data_vars)
    for name in expected.data_vars:
        assert stored[name].dims == expected[name].dims
        assert stored[name].attrs["units"] == expected[name].attrs["units"]
        np.testing.assert_allclose(stored[name].values, expected[name].values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stack", ["text", "vision"])
def test_attn_stats__equal_what_analysis_computes_from_q_and_k(run: xr.DataTree, stack: str) -> None:
    assert_as_computed_from_q_and_k(run, stack)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "paligemma", "qwen2_5_vl", "llava_next"])
def test_attn_stats__equal_it_whatever_the_mask(name: str, tmp_path: Path) -> None:
    """Softcaps and sliding windows, open image blocks and prefixes, windows of an encoder, tiles."""
    family = ZOO[name]
    wanted = [f"{stack}.*.{each}" for stack in family.layers for each in ("attn_stats", "q", "k")]
    wanted += [f"{stack}.*.pattern" for stack in family.layers]
    dataset = Listed(zoo_samples(family))
    capture_run(
        family.build(), dataset, tmp_path / "run", sites=wanted, batch_size=3, max_new_tokens=1, quiet=True
    )
    run = open_run(tmp_path / "run")
    for stack in family.layers:
        assert_as_computed_from_q_and_k(run, stack)
        rows, weights = site(run, f"{stack}/pattern_rows"), site(run, f"{stack}/pattern")["pattern"].values
        rebuilt = attention_pattern(run, sample=1, stack=stack)["attention_pattern"]
        rebuilt = rebuilt.transpose("query", "layer", "key", "head").values
        mine = np.flatnonzero(rows["sample_index"].values == 1)
        for row, expected in zip(mine, rebuilt, strict=True):
            start, length, first = (int(rows[key][row]) for key in ("start", "length", "key_start"))
            whole = np.zeros_like(expected)
            whole[:, first : first + length] = weights[:, start : start + length]
            np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stack", ["text", "vision"])
def test_attn_stats__top_positions_and_maximum_are_those_of_the_pattern(run: xr.DataTree, stack: str) -> None:
    stored = site(run, f"{stack}/attn_stats")
    for number in range(5):
        pattern = attention_pattern(run, sample=number, stack=stack)
        weights = pattern["attention_pattern"].transpose("layer", "query", "head", "key").values
        mine = stored.isel({stored["sample_index"].dims[0]: stored["sample_index"].values == number})
        top = mine["top_position"].values
        np.testing.assert_allclose(mine["attention_max"].values, weights.max(-1), rtol=0, atol=1e-6)
        allowed = (weights > 0).sum(-1)
        np.testing.assert_array_equal((top >= 0).sum(-1), np.minimum(allowed, top.shape[-1]))
        chosen = np.take_along_axis(weights, np.maximum(top, 0), axis=-1) * (top >= 0)
        assert (np.diff(chosen, axis=-1) <= 1e-6).all()
        np.testing.assert_allclose(chosen.sum(-1), mine["attention_concentration"].values, rtol=0, atol=1e-5)


def test_attn_stats__keep_selected_rows_layers_and_heads(
    loaded: LoadedModel, run: xr.DataTree, tmp_path: Path
) -> None:
    dataset = Listed(samples(5, images=(1, 2)))
    spec = ["text.0+2.attn_stats{1+3}[last]"]
    capture_run(loaded, dataset, tmp_path / "run", sites=spec, batch_size=2, max_new_tokens=2, quiet=True)
    few = site(open_run(tmp_path / "run"), "text/attn_stats")
    every = site(run, "text/attn_stats").isel(layer=[0, 2], head=[1, 3])
    every = every.isel(token=np.flatnonzero(every["is_last_prompt"].values))
    assert few.sizes["token"] == 5
    assert few.attrs["attention"].keys() == {"0", "2"}
    for name in every.data_vars:
        np.testing.assert_allclose(few[name].values, every[name].values, rtol=0, atol=1e-5)


def test_attn_stats__are_priced(loaded: LoadedModel, run: xr.DataTree, tmp_path: Path) -> None:
    dataset = Listed(samples(5, images=(1, 2)))
    cost = price_run(loaded, dataset, tmp_path / "run", sites=["vision.*.attn_stats"], max_new_tokens=2)
    stored = site(run, "vision/attn_stats")
    held = sum(variable.nbytes for variable in stored.data_vars.values())
    # Probes are some of the samples, which have one image or two.
    rows = stored.sizes["patch"]
    assert (cost.sites[0].raw - 12 * cost.sites[0].rows) / cost.sites[0].rows == pytest.approx(held / rows)


def test_attn_stats__have_one_dtype() -> None:
    from mechanistic.capture.specification import SiteSpec

    with pytest.raises(SpecificationError, match="attn_stats are float32, not float16"):
        SiteSpec.parse("text.*.attn_stats:float16")


def test_row_statistics__by_hand() -> None:
    # The second query gives its keys the logits log 3 and 0: weights 3/4 and 1/4.
    query = [[[1.0], [1.0]]]
    key = [[[np.log(3.0)], [0.0]]]
    keys = Keys(np.array([1, 0], np.int8), np.array([0, 1], np.int32))
    found = row_statistics(call_of(query, key), 0, torch.tensor([0, 1]), keys, ahead=False)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(found["attention_entropy"][:, 0], [0, entropy], atol=1e-6)
    np.testing.assert_allclose(found["attention_max"][:, 0], [1, 0.75], atol=1e-6)
    np.testing.assert_allclose(found["mass_image"][:, 0], [1, 0.75], atol=1e-6)
    np.testing.assert_allclose(found["mass_text"][:, 0], [0, 0.25], atol=1e-6)
    np.testing.assert_allclose(found["mass_first"][:, 0], [1, 0.75], atol=1e-6)
    np.testing.assert_allclose(found["attention_concentration"][:, 0], [1, 1], atol=1e-6)
    assert found["top_position"][:, 0].tolist() == [[0, -1, -1, -1, -1], [0, 1, -1, -1, -1]]


def test_row_statistics__with_a_sink_the_keys_hold_less_than_all() -> None:
    call = call_of([[[1.0]]], [[[0.0], [0.0]]], sinks=torch.tensor([np.log(2.0)]), causal=False)
    keys = Keys(np.array([0, 0], np.int8), np.array([0, 1], np.int32))
    found = row_statistics(call, 0, torch.tensor([0]), keys, ahead=True)
    # exp of the logits: 1 and 1, and 2 for the sink.
    np.testing.assert_allclose(found["mass_text"], [[0.5]], atol=1e-6)
    np.testing.assert_allclose(found["attention_max"], [[0.25]], atol=1e-6)
    np.testing.assert_allclose(found["attention_entropy"], [[-0.5 * np.log(0.25)]], atol=1e-6)


def test_row_statistics__without_an_allowed_key_are_missing() -> None:
    mask = torch.tensor([[False, False], [True, True]])[None, None]
    keys = Keys(np.array([0, 0], np.int8), np.array([0, 1], np.int32))
    call = call_of([[[1.0], [1.0]]], [[[0.0], [0.0]]], mask=mask)
    found = row_statistics(call, 0, torch.tensor([0, 1]), keys, ahead=True)
    for name in ("attention_entropy", "attention_max", *MASSES):
        assert np.isnan(found[name][0]).all()
        assert np.isfinite(found[name][1]).all()
    assert (found["top_position"][0] == -1).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_row_blocks__of_any_size_are_the_pattern(loaded: LoadedModel, softcap: float | None) -> None:
    batch = prepare_batch(loaded, samples(2), 0, max_new_tokens=1, texts=TokenTexts(loaded.tokenizer))
    calls: list[AttentionCall] = []
    with torch.no_grad(), tapped(loaded.model, calls.append):
        loaded.model(**batch.inputs)
    call = replace(calls[-1], softcap=softcap)
    lengths = [len(table["position"]) for table in batch.decoder]
    for sequence, length in enumerate(lengths):
        expected = call.pattern()[sequence, :, :length, :length]
        for block_bytes in (1, 20_000, 1 << 30):
            got = torch.zeros_like(expected)
            for block in row_blocks(
                call, sequence, torch.arange(length), length, ahead=False, block_bytes=block_bytes
            ):
                # Nothing of the size of the whole pattern exists but in this test.
                assert block.scores.numel() * 4 <= max(block_bytes, 4 * 4 * length)
                got[:, block.rows, : block.scores.shape[-1]] = block.weights
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_capture_run__refuses_attention_that_is_not_finite(tmp_path: Path) -> None:
    broken = llava()
    with torch.no_grad():
        broken.model.model.language_model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(CaptureError):
        capture_run(broken, Listed(samples(2)), tmp_path / "run", sites=["text.*.attn_stats"], quiet=True)
    call = call_of([[[np.nan]]], [[[1.0]]])
    keys = Keys(np.array([0], np.int8), np.array([0], np.int32))
    from mechanistic.capture.attention_statistics import require_finite

    with pytest.raises(CaptureError, match=r"text\.1: its attention is not finite"):
        require_finite(row_statistics(call, 0, torch.tensor([0]), keys, ahead=False), "text.1")
