"""Heads of a tensor-parallel engine, simulated: arrays are split as its ranks hold them, and put together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mechanistic.capture.vllm_folders import Lent
from mechanistic.capture.vllm_heads import owned_heads
from mechanistic.capture.vllm_recorder import Recorder
from mechanistic.capture.vllm_spool import Spool, join_heads
from mechanistic.store.errors import CaptureError


@pytest.mark.parametrize(
    ("total", "ranks", "expected"),
    [
        (8, 1, [range(8)]),
        (8, 2, [range(4), range(4, 8)]),
        (8, 4, [range(2), range(2, 4), range(4, 6), range(6, 8)]),
        (2, 4, [range(1), range(1), range(1, 2), range(1, 2)]),
        (1, 2, [range(1), range(1)]),
    ],
)
def test_owned_heads__are_slices_or_one_head_of_several_ranks(
    total: int, ranks: int, expected: list[range]
) -> None:
    assert [owned_heads(total, rank, ranks) for rank in range(ranks)] == expected


@pytest.mark.parametrize(("total", "ranks"), [(6, 4), (3, 2), (4, 6)])
def test_owned_heads__that_do_not_divide_are_an_error(total: int, ranks: int) -> None:
    with pytest.raises(CaptureError, match=rf"{total} heads cannot .*\n.*tensor_parallel_size"):
        owned_heads(total, 0, ranks)


def test_owned_heads__there_is_no_such_rank() -> None:
    with pytest.raises(CaptureError, match="no rank 2 of 2"):
        owned_heads(4, 2, 2)


@pytest.mark.parametrize(("total", "ranks"), [(8, 1), (8, 2), (8, 8), (2, 4), (1, 4)])
def test_join_heads__undoes_the_split(total: int, ranks: int) -> None:
    whole = torch.randn(5, total, 3)
    parts = [whole[:, list(owned_heads(total, rank, ranks))] for rank in range(ranks)]
    torch.testing.assert_close(join_heads(parts, total), whole, rtol=0, atol=0)


def test_join_heads__another_split_is_an_error() -> None:
    with pytest.raises(CaptureError, match="Process 1 of 2 holds 3 heads, not 2 of 4"):
        join_heads([torch.zeros(1, 2, 3), torch.zeros(1, 3, 3)], 4)


def leave(folder: Path, rank: int, tensors: dict[str, torch.Tensor], labels: list[list[int]]) -> None:
    """What one rank of an engine leaves of layer 0, whose rows are these [sample, position]."""
    recorder = Recorder({name: {"layers": [0], "selection": "text/all"} for name in tensors})
    for name, values in tensors.items():
        # In two steps of the engine.
        recorder._kept[name, 0] += [values[:1], values[1:]]
    recorder._labels["text/all"].append(np.array(labels))
    recorder.write(folder / f"rank{rank}", {})


def write(folder: Path, ranks: int, *, queries: torch.Tensor, keys: torch.Tensor, order: list[int]) -> None:
    """What the ranks of an engine would leave of one sample, whose tokens came in this order."""
    for rank in range(ranks):
        own_queries, own_keys = (
            each[order][:, list(owned_heads(each.shape[1], rank, ranks))] for each in (queries, keys)
        )
        residual = queries[order].flatten(1)
        tensors = {"text/q": own_queries, "text/k": own_keys, "text/resid_post": residual}
        leave(folder, rank, tensors, [[0, position] for position in order])


def test_spool__gathers_the_heads_of_all_ranks_under_their_numbers(tmp_path: Path) -> None:
    queries, keys = torch.randn(6, 8, 4), torch.randn(6, 2, 4)
    write(tmp_path, 4, queries=queries, keys=keys, order=[3, 4, 5, 0, 1, 2])
    wanted = [np.array([0, 2, 5])]
    with Spool(Lent(tmp_path), 4, 1e-5) as spool:
        torch.testing.assert_close(spool.rows("text/q", 0, "text/all", wanted, 8), queries[[0, 2, 5]])
        torch.testing.assert_close(spool.rows("text/k", 0, "text/all", wanted, 2), keys[[0, 2, 5]])
        residual = spool.rows("text/resid_post", 0, "text/all", wanted, None)
        torch.testing.assert_close(residual, queries[[0, 2, 5]].flatten(1))
    assert not list(tmp_path.glob("*.safetensors"))


def test_spool__a_token_computed_twice_must_agree_with_itself(tmp_path: Path) -> None:
    queries = torch.randn(6, 2, 4)
    labels = [[0, 0], [0, 1], [0, 0], [0, 1], [0, 2]]
    rows = [0, 1, 0, 1, 2]
    again = queries[rows].clone()
    again[2:] *= 1 + 1e-7
    for name, values in (("same", again), ("other", queries[[0, 1, 3, 1, 2]])):
        (tmp_path / name).mkdir()
        leave(tmp_path / name, 0, {"text/q": values}, labels)
    wanted = [np.array([0, 1, 2])]
    with Spool(Lent(tmp_path / "same"), 1, 1e-5) as spool:
        torch.testing.assert_close(spool.rows("text/q", 0, "text/all", wanted, 2), again[2:], rtol=0, atol=0)
    with (
        Spool(Lent(tmp_path / "other"), 1, 1e-5) as spool,
        pytest.raises(CaptureError, match=r"text\.0\.q: a token that the engine computed twice differs"),
    ):
        spool.rows("text/q", 0, "text/all", wanted, 2)


def test_spool__ranks_that_kept_other_tokens_are_an_error(tmp_path: Path) -> None:
    values = torch.randn(3, 2, 4)
    write(tmp_path, 2, queries=values, keys=values, order=[0, 1, 2])
    leave(tmp_path, 1, {"text/q": values[:, :1]}, [[0, 0], [0, 2], [0, 1]])
    with Spool(Lent(tmp_path), 2, 1e-5) as spool, pytest.raises(CaptureError, match="kept different tokens"):
        spool.rows("text/q", 0, "text/all", [np.array([0])], 2)


def test_spool_whole__is_the_file_itself_where_all_of_it_is_wanted_in_its_order(tmp_path: Path) -> None:
    values = torch.randn(4, 2, 3, dtype=torch.bfloat16)
    labels = [[0, 0], [0, 1], [1, 0], [1, 1]]
    leave(tmp_path, 0, {"text/q": values}, labels)
    with Spool(Lent(tmp_path), 1, 1e-5) as spool:
        both = [np.arange(2), np.arange(2)]
        whole = spool.whole("text/q", (0,), "text/all", both)
        assert spool.whole("text/q", (0, 1), "text/all", both) is None
        assert spool.whole("text/q", (0,), "text/all", [np.arange(2), np.array([1])]) is None
    assert not list(tmp_path.glob("*.safetensors"))
    assert whole is not None
    # Mapped, it outlives its file.
    torch.testing.assert_close(whole, values[None], rtol=0, atol=0)
