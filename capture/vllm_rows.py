"""Which row of vLLM's flat tensors is which token, by the scheduler's word and checked against the kernel's.

vLLM puts the tokens of all requests of a step end to end, in an order that changes as requests come and go,
pads behind them, cuts prompts into chunks, and begins preempted requests again. The scheduler says how many
tokens each request gets and how many it had; the attention metadata of the same step say where each request
begins and how long it has become. Both must agree, or the capture fails. Nothing here needs torch or vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """The rows [start, stop) of a step, which are the tokens of one request from position `first` on."""

    request: str
    start: int
    stop: int
    first: int

    @property
    def positions(self) -> range:
        """The positions within the request, row by row."""
        return range(self.first, self.first + self.stop - self.start)


@dataclass(frozen=True)
class Wanted:
    """Which positions of a request are kept: ranges of its prompt, and whether all that follow."""

    prompt_length: int
    ranges: tuple[tuple[int, int], ...]
    answer: bool

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Wanted:
        """Read what `to_dict` made."""
        ranges = tuple((int(first), int(stop)) for first, stop in plain["ranges"])
        return cls(int(plain["prompt_length"]), ranges, bool(plain["answer"]))

    @classmethod
    def of(cls, chosen: NDArray[np.bool_], *, answer: bool) -> Wanted:
        """The positions where `chosen`, one entry a prompt token, is true."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
        pairs = edges.reshape(-1, 2).tolist()
        return cls(len(chosen), tuple((first, stop) for first, stop in pairs), answer)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-like values, which is all that goes over to a worker."""
        return {
            "prompt_length": self.prompt_length,
            "ranges": [list(each) for each in self.ranges],
            "answer": self.answer,
        }

    def within(self, positions: range) -> Integers:
        """Those of consecutive positions that are wanted."""
        ranges = [*self.ranges]
        if self.answer:
            ranges.append((self.prompt_length, positions.stop))
        pieces = [np.arange(max(first, positions.start), min(stop, positions.stop)) for first, stop in ranges]
        return np.concatenate([np.zeros(0, np.int64), *pieces])


def computed_before(scheduled: Any) -> dict[str, int]:
    """How many tokens of each request were computed before a step, from the scheduler's output."""
    computed = {new.req_id: int(new.num_computed_tokens) for new in scheduled.scheduled_new_reqs}
    known = scheduled.scheduled_cached_reqs
    return computed | dict(zip(known.req_ids, map(int, known.num_computed_tokens), strict=True))


def spans_of_step(order: Sequence[str], scheduled: Any) -> list[Span]:
    """The spans of a step, in the order of the rows.

    Parameters
    ----------
    order
        Request ids in the order in which the runner has put them.

    Raises
    ------
    CaptureError    the runner and the scheduler do not name the same requests or numbers of tokens.
    """
    tokens, computed = scheduled.num_scheduled_tokens, computed_before(scheduled)
    if sorted(order) != sorted(tokens) or not set(order) <= set(computed):
        raise mismatch(f"the runner has {sorted(order)}, the scheduler {sorted(tokens)}")
    spans: list[Span] = []
    start = 0
    for request in order:
        stop = start + int(tokens[request])
        spans.append(Span(request, start, stop, computed[request]))
        start = stop
    if start != scheduled.total_num_scheduled_tokens:
        raise mismatch(f"{start} rows, the scheduler says {scheduled.total_num_scheduled_tokens}")
    return spans


def spans_of_images(images: Sequence[tuple[str, int]], tokens: Mapping[str, Sequence[int]]) -> list[Span]:
    """The spans of the images that a step encodes; positions count the encoder's tokens of a request.

    Parameters
    ----------
    images
        Request id, and which image of it, in the order of the rows.
    tokens
        By request id without the engine's suffix, how many tokens the encoder makes of each of its images.

    Raises
    ------
    CaptureError    an image belongs to no request.
    """
    spans: list[Span] = []
    start = 0
    for request, image in images:
        counts = tokens.get(own_id(request), ())
        if image >= len(counts):
            raise mismatch(f"image {image} of request {request} is not one that was sent")
        stop = start + counts[image]
        spans.append(Span(request, start, stop, sum(counts[:image])))
        start = stop
    return spans


def check_spans(spans: Sequence[Span], starts: Sequence[int], lengths: Sequence[int]) -> None:
    """Compare the spans of a step with what its attention kernel was told.

    Parameters
    ----------
    starts
        query_start_loc: the first row of each request, and the end of the last.
    lengths
        seq_lens: tokens of each request, this step's included.

    Raises
    ------
    CaptureError    they disagree.
    """
    rows = [0, *(span.stop for span in spans)]
    grown = [span.positions.stop for span in spans]
    if list(starts) != rows:
        raise mismatch(f"rows begin at {rows}, query_start_loc says {list(starts)}")
    if list(lengths) != grown:
        raise mismatch(f"requests have grown to {grown}, seq_lens says {list(lengths)}")


def rows_wanted(
    spans: Sequence[Span], wanted: Mapping[str, Wanted], numbers: Mapping[str, int]
) -> tuple[Integers, Integers]:
    """The wanted rows of a step, and (row, [request number, position]) of each.

    Parameters
    ----------
    wanted, numbers
        By request id without the engine's suffix; a request that is not among them keeps nothing.
    """
    rows, labels = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    for span in spans:
        name = own_id(span.request)
        if name not in wanted:
            continue
        positions = wanted[name].within(span.positions)
        rows.append(positions - span.first + span.start)
        labels.append(np.stack([np.full(len(positions), numbers[name]), positions], axis=1))
    return np.concatenate(rows), np.concatenate(labels)


def own_id(request: str) -> str:
    """The id that a request was given, without the random characters that the engine adds."""
    return request.rpartition("-")[0] or request


@dataclass(frozen=True)
class Places:
    """Where in a spool the rows of a batch are: `rows` (sample, position) end to end.

    `again` (pair, [first row, row that replaced it]): tokens that were computed twice, after a preemption.
    """

    rows: Integers
    again: Integers


def place_rows(labels: Integers, wanted: Sequence[Integers], what: str) -> Places:
    """Find the row of every wanted token among spooled rows.

    Rows of tokens that nobody asked for, such as those of a pass behind the end of an answer, are left. Of a
    token that was computed again the last row counts: it is the one that later tokens attended to.

    Parameters
    ----------
    labels
        (row, [request number, position]) in the order in which they were computed.
    wanted
        Positions of each request, ascending.

    Raises
    ------
    CaptureError    a wanted token was never computed.
    """
    found: list[Integers] = []
    again: list[tuple[int, int]] = []
    for number, positions in enumerate(wanted):
        mine = np.flatnonzero(labels[:, 0] == number)
        last: dict[int, int] = {}
        needed = set(positions.tolist())
        for row, position in zip(mine.tolist(), labels[mine, 1].tolist(), strict=True):
            if position in last and position in needed:
                again.append((last[position], row))
            last[position] = row
        absent = [position for position in positions.tolist() if position not in last]
        if absent:
            raise CaptureError(
                f"{what}: the engine never computed position {absent[0]} of sample {number} of a batch "
                f"({len(absent)} missing in all).",
                "Prefix caching and speculative decoding skip tokens; switch them off, or report this.",
            )
        found.append(np.array([last[position] for position in positions.tolist()], np.int64))
    pairs = np.array(again, np.int64).reshape(-1, 2)
    return Places(np.concatenate([np.zeros(0, np.int64), *found]), pairs)


def mismatch(what: str) -> CaptureError:
    """The error of a step whose rows cannot be told apart with certainty."""
    return CaptureError(
        f"The tokens of an engine step cannot be told apart: {what}.",
        "Nothing of this batch was kept. Report the vLLM version and the settings of the engine.",
    )
