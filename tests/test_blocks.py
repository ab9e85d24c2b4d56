"""The walk: blocks never cut a sample, stay within their bytes, and change no number."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import synthetic_run, with_groups

from mechanistic.analysis.attention_entropy import attention_entropy
from mechanistic.analysis.blocks import align_blocks, map_blocks, sample_spans
from mechanistic.store import site
from mechanistic.store.errors import DataError

RUN = synthetic_run()


def queries_and_keys(run: xr.DataTree = RUN) -> tuple[xr.DataArray, xr.DataArray]:
    return site(run, "text/q")["q"], site(run, "text/k")["k"]


def test_sample_spans__by_hand() -> None:
    spans = sample_spans(np.array([3, 3, 4, 9, 9, 9]))
    assert spans.sample.tolist() == [3, 4, 9]
    assert spans.start.tolist() == [0, 2, 3]
    assert spans.stop.tolist() == [2, 3, 6]
    assert sample_spans(np.array([], np.int32)).sample.tolist() == []


def test_sample_spans__refuses_rows_that_are_not_together() -> None:
    with pytest.raises(DataError, match="not in dataset order"):
        sample_spans(np.array([0, 1, 0]))


def test_align_blocks__pairs_whole_samples() -> None:
    query, key = queries_and_keys()
    assert len(query.chunksizes["token"]) > 5, "the fixture must cut samples"
    blocks = align_blocks(query, key, max_bytes=12_000)
    starts = [np.cumsum((0, *array.chunksizes["token"])) for array in (blocks.query, blocks.key)]
    assert len(blocks.samples) == len(starts[0]) - 1 == len(starts[1]) - 1 > 2
    for number, samples in enumerate(blocks.samples):
        held = [
            set(array["sample_index"].values[start[number] : start[number + 1]].tolist())
            for array, start in zip((blocks.query, blocks.key), starts, strict=True)
        ]
        assert held[0] == held[1]
        assert len(held[0]) == samples
    assert sum(blocks.samples) == 12


def test_align_blocks__is_lazy_and_bounded() -> None:
    query, key = queries_and_keys()
    blocks = align_blocks(query, key, max_bytes=12_000)
    assert isinstance(blocks.query.data, da.Array)
    assert isinstance(blocks.key.data, da.Array)
    largest = [
        max(np.prod(chunk) for chunk in np.broadcast(*np.ix_(*array.chunks)))
        for array in (blocks.query.data, blocks.key.data)
    ]
    assert 4 * sum(largest) < 12_000


def test_align_blocks__leaves_out_keys_that_nobody_reads() -> None:
    query, key = queries_and_keys()
    rows = np.flatnonzero(np.isin(query["sample_index"].values, [2, 7]))
    blocks = align_blocks(query.isel(token=rows), key)
    assert set(blocks.key["sample_index"].values.tolist()) == {2, 7}
    complete = np.isin(key["sample_index"].values, [2, 7]).sum()
    assert blocks.key.sizes["token"] == complete


def test_align_blocks__a_sample_that_does_not_fit_says_so() -> None:
    query, key = queries_and_keys()
    with pytest.raises(DataError, match=r"sample 0 needs .* a layer, not") as raised:
        align_blocks(query, key, max_bytes=100)
    assert "max_bytes=" in str(raised.value)


def test_align_blocks__refuses_queries_without_keys() -> None:
    query, key = queries_and_keys()
    with pytest.raises(DataError, match="sample 0 has queries but no keys"):
        align_blocks(query, key.isel(token=np.flatnonzero(key["sample_index"].values > 0)))


def _rows_and_keys(layer: int, query: Any, key: Any, of_query: Any, of_key: Any) -> np.ndarray[Any, Any]:
    """For each sample: the layer, and how many query rows and keys it has."""
    samples = np.unique(of_query["sample_index"])
    return np.array(
        [
            [layer, (of_query["sample_index"] == s).sum(), (of_key["sample_index"] == s).sum()]
            for s in samples
        ],
        np.float32,
    )


@pytest.mark.parametrize("max_bytes", [9_000, 30_000, 1 << 30])
def test_map_blocks__one_row_a_sample(max_bytes: int) -> None:
    query, key = queries_and_keys()
    blocks = align_blocks(query, key, max_bytes=max_bytes)
    result = map_blocks(_rows_and_keys, blocks, shape=(3,), per="sample")
    assert isinstance(result, da.Array)
    values = result.compute()
    assert values.shape == (4, 12, 3)
    assert values[:, 0, 0].tolist() == [0, 1, 2, 3]
    for place, array in ((1, query), (2, key)):
        counts = np.bincount(array["sample_index"].values)
        assert (values[..., place] == counts).all()


@settings(max_examples=20, deadline=None)
@given(
    query_chunk=st.integers(2, 40),
    key_chunk=st.integers(2, 60),
    max_bytes=st.sampled_from([12_000, 20_000, 80_000, 1 << 27]),
)
def test_walk__does_not_depend_on_chunks(query_chunk: int, key_chunk: int, max_bytes: int) -> None:
    changed = with_groups(
        RUN,
        text_q=site(RUN, "text/q").chunk(token=query_chunk),
        text_k=site(RUN, "text/k").chunk(token=key_chunk),
    )
    expected = attention_entropy(RUN, layer=[1])["attention_entropy"].values
    lazy = attention_entropy(changed, layer=[1], max_bytes=max_bytes)
    np.testing.assert_array_equal(lazy["attention_entropy"].values, expected)


def test_walk__reads_only_the_layers_and_samples_asked_for() -> None:
    seen: list[tuple[int, ...]] = []

    def record(block: np.ndarray[Any, Any], block_info: Any = None) -> np.ndarray[Any, Any]:
        seen.append(tuple(block_info[0]["chunk-location"]))
        return block

    groups = {}
    for name in ("q", "k"):
        group = site(RUN, f"text/{name}")
        data = group[name].data.map_blocks(record, dtype=group[name].dtype)
        groups[f"text_{name}"] = group.assign({name: (group[name].dims, data)})
    watched = with_groups(RUN, **groups)
    lazy = attention_entropy(watched, layer=2, sample=5, tokens="last")
    assert isinstance(lazy["attention_entropy"].data, da.Array)
    assert seen == []
    with dask.config.set(scheduler="synchronous"):
        lazy.compute()
    assert {place[0] for place in seen} == {2}
    assert len(seen) <= 2 + 3, "one chunk of q and those of k that hold sample 5"


def test_walk__runs_under_a_distributed_client() -> None:
    import distributed

    expected = attention_entropy(RUN, tokens="last").compute()
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster),
    ):
        actual = attention_entropy(RUN, tokens="last", max_bytes=9_000).compute()
    np.testing.assert_array_equal(actual["attention_entropy"], expected["attention_entropy"])
