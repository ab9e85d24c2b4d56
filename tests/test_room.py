"""The room for captured arrays: memory comes back, and never while anything refers to it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mechanistic.capture.room import Room, seen_as


def empty(room: Room, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return room.lend(room.take(shape, dtype), shape, dtype)


def address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_of_an_array_that_is_gone_is_used_again() -> None:
    room = Room()
    first = empty(room, (3, 100), "float32")
    at = address(first)
    del first
    assert address(empty(room, (310,), "float32")) == at


def test_a_view_keeps_its_memory() -> None:
    room = Room()
    array = empty(room, (4, 5), "int32")
    array[...] = 7
    views = array[1:, 2].reshape(3, 1), torch.from_numpy(array[2]), memoryview(array[3])
    del array
    other = empty(room, (4, 5), "int32")
    other[...] = 0
    for view in views:
        assert (np.asarray(view) == 7).all()


def test_memory_comes_back_from_another_thread() -> None:
    room = Room()
    held = [empty(room, (1000,), "float64")]
    at = address(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert address(empty(room, (1000,), "float64")) == at


def test_room_that_is_too_small_is_not_kept() -> None:
    room = Room()
    for size in range(1000, 100_000, 1000):
        array = empty(room, (size,), "uint8")
        assert array.shape == (size,)
        del array
    assert len(room._free) == 1


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 5)), max_size=40))
def test_arrays_that_live_never_share_memory(steps: list[tuple[int, int]]) -> None:
    room, live = Room(), []
    for number, (size, drop) in enumerate(steps):
        array = empty(room, (size,), "int16")
        array[...] = number
        live.append((number, array))
        if drop < len(live) and drop:
            del live[drop]
        for wrote, kept in live:
            assert (kept == wrote).all()
        del array


def test_what_is_lent_holds_what_was_put_there_when_it_was_taken() -> None:
    room = Room()
    memory = room.take((2, 3), "float32")
    seen_as(memory, (2, 3), "float32")[...] = 5
    array = room.lend(memory, (2, 3), "float32")
    assert array.flags.c_contiguous
    assert (array == 5).all()


def test_an_array_of_nothing_takes_no_memory() -> None:
    room = Room()
    assert room.take((0, 4), "int32") is None
    assert empty(room, (0, 4), "int32").shape == (0, 4)
