"""Rows of an engine's steps, told apart without an engine, by what its scheduler would say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mechanistic.capture.vllm_rows import (
    Span,
    Wanted,
    check_spans,
    own_id,
    place_rows,
    rows_wanted,
    spans_of_images,
    spans_of_step,
)
from mechanistic.store.errors import CaptureError


def step(new: dict[str, int], known: dict[str, tuple[int, int]], total: int | None = None) -> Any:
    """A scheduler's output: tokens of new requests, and (computed before, tokens) of known ones."""
    tokens = new | {name: count for name, (_, count) in known.items()}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=0) for name in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(known), num_computed_tokens=[before for before, _ in known.values()]
        ),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()) if total is None else total,
    )


def test_spans_of_step__follow_the_runner_not_the_scheduler() -> None:
    scheduled = step({"c-1": 5}, {"a-1": (7, 1), "b-1": (16, 3)})
    spans = spans_of_step(["b-1", "a-1", "c-1"], scheduled)
    assert spans == [Span("b-1", 0, 3, 16), Span("a-1", 3, 4, 7), Span("c-1", 4, 9, 0)]
    assert [list(span.positions) for span in spans] == [[16, 17, 18], [7], [0, 1, 2, 3, 4]]
    check_spans(spans, [0, 3, 4, 9], [19, 8, 5])


@pytest.mark.parametrize(
    ("order", "scheduled"),
    [
        (["a-1"], step({}, {"a-1": (0, 2), "b-1": (0, 2)})),
        (["a-1", "b-1"], step({}, {"a-1": (0, 2)})),
        (["a-1"], step({"a-1": 4}, {}, total=5)),
    ],
    ids=["runner lacks one", "runner has one more", "another total"],
)
def test_spans_of_step__refuses_what_does_not_agree(order: list[str], scheduled: Any) -> None:
    with pytest.raises(CaptureError, match=r"cannot be told apart.*\n.*Nothing of this batch was kept"):
        spans_of_step(order, scheduled)


@pytest.mark.parametrize(
    ("starts", "lengths", "says"),
    [([0, 2, 5], [2, 8], "query_start_loc"), ([0, 3, 5], [3, 9], "seq_lens")],
)
def test_check_spans__refuses_what_the_kernel_was_told_otherwise(
    starts: list[int], lengths: list[int], says: str
) -> None:
    spans = [Span("a-1", 0, 3, 0), Span("b-1", 3, 5, 6)]
    check_spans(spans, [0, 3, 5], [3, 8])
    with pytest.raises(CaptureError, match=says):
        check_spans(spans, starts, lengths)


def test_own_id__drops_what_the_engine_adds() -> None:
    assert own_id("3.12-a61e956d") == "3.12"
    assert own_id("3.12") == "3.12"


def mask(text: str) -> NDArray[np.bool_]:
    return np.array([letter == "x" for letter in text])


@pytest.mark.parametrize("text", ["", "....", "xxxx", "x..x", ".xx.x", "..xx"])
def test_wanted__is_the_chosen_positions(text: str) -> None:
    chosen = mask(text)
    wanted = Wanted.of(chosen, answer=False)
    assert Wanted.parse(wanted.to_dict()) == wanted
    assert wanted.within(range(len(text) + 3)).tolist() == np.flatnonzero(chosen).tolist()
    for cut in range(len(text) + 1):
        parts = [wanted.within(range(cut)), wanted.within(range(cut, len(text) + 3))]
        assert np.concatenate(parts).tolist() == np.flatnonzero(chosen).tolist()


def test_wanted__with_the_answer_has_everything_behind_the_prompt() -> None:
    wanted = Wanted.of(mask("x..x."), answer=True)
    assert wanted.within(range(3, 8)).tolist() == [3, 5, 6, 7]
    assert wanted.within(range(9, 10)).tolist() == [9]


def test_rows_wanted__are_rows_of_the_step_with_their_labels() -> None:
    spans = [Span("b-9", 0, 3, 2), Span("warmup-9", 3, 5, 0), Span("a-9", 5, 9, 0)]
    wanted = {"a": Wanted.of(mask(".x.x"), answer=False), "b": Wanted.of(mask("xx.x"), answer=True)}
    rows, labels = rows_wanted(spans, wanted, {"a": 0, "b": 1})
    assert rows.tolist() == [1, 2, 6, 8]
    assert labels.tolist() == [[1, 3], [1, 4], [0, 1], [0, 3]]


def places(labels: list[list[int]], wanted: list[list[int]]) -> Any:
    return place_rows(
        np.array(labels, np.int64).reshape(-1, 2), [np.array(each, np.int64) for each in wanted], "text.0.q"
    )


def test_place_rows__puts_samples_end_to_end_and_leaves_the_pass_behind_the_end() -> None:
    # Sample 1 first, then sample 0 in two chunks; position 3 of sample 0 is a pass behind its answer.
    found = places([[1, 0], [1, 1], [0, 0], [0, 1], [0, 2], [0, 3]], [[0, 1, 2], [0, 1]])
    assert found.rows.tolist() == [2, 3, 4, 0, 1]
    assert found.again.tolist() == []


def test_place_rows__of_a_token_computed_again_the_last_counts() -> None:
    found = places([[0, 0], [0, 1], [0, 0], [0, 1], [0, 2]], [[0, 1, 2]])
    assert found.rows.tolist() == [2, 3, 4]
    assert found.again.tolist() == [[0, 2], [1, 3]]


def test_place_rows__a_token_that_was_never_computed_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"text\.0\.q: .*never computed position 1 of sample 0 .*\(2 miss"):
        places([[0, 0], [0, 3]], [[0, 1, 2, 3]])


def test_place_rows__of_samples_without_wanted_tokens_are_none() -> None:
    assert places([], [[], []]).rows.tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_place_rows__any_schedule_gives_the_same(seed: int) -> None:
    """Requests of unequal lengths, chunked at random, preempted at random: every token is found once."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, 5).tolist()
    done = dict.fromkeys(range(5), 0)
    order, values, labels = [], [], []
    wanted = [np.flatnonzero(random.random(length) < 0.6) for length in lengths]
    keep = {str(n): Wanted.of(np.isin(np.arange(lengths[n]), wanted[n]), answer=False) for n in range(5)}
    while any(done[n] < lengths[n] for n in done):
        order = [n for n in random.permutation(5).tolist() if done[n] < lengths[n]][: random.integers(1, 6)]
        known = {f"{n}-x": (done[n], int(random.integers(1, lengths[n] - done[n] + 1))) for n in order}
        spans = spans_of_step([f"{n}-x" for n in order], step({}, known))
        rows, own = rows_wanted(spans, keep, {str(n): n for n in range(5)})
        flat = np.concatenate([[100 * int(own_id(s.request)) + p for p in s.positions] for s in spans])
        values.append(flat[rows])
        labels.append(own)
        for n in order:
            done[n] += known[f"{n}-x"][1]
            if random.random() < 0.1:
                done[n] = 0
    found = place_rows(np.concatenate(labels), wanted, "text.0.q")
    expected = [100 * n + position for n in range(5) for position in wanted[n].tolist()]
    assert np.concatenate(values)[found.rows].tolist() == expected


def test_spans_of_images__count_the_tokens_of_all_images_of_a_request() -> None:
    tokens = {"0": [4, 6], "1": [5]}
    spans = spans_of_images([("1-ab", 0), ("0-cd", 1), ("0-cd", 0)], tokens)
    assert spans == [Span("1-ab", 0, 5, 0), Span("0-cd", 5, 11, 4), Span("0-cd", 11, 15, 0)]
    assert [each.positions for each in spans] == [range(5), range(4, 10), range(4)]


@pytest.mark.parametrize("image", [("0-cd", 2), ("9-ef", 0)])
def test_spans_of_images__of_nobody_are_an_error(image: tuple[str, int]) -> None:
    with pytest.raises(CaptureError, match=f"image {image[1]} of request {image[0]} is not one"):
        spans_of_images([image], {"0": [4, 6]})
