"""Which rows of two runs are the same token of the same question."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store import group
from mechanistic.store.errors import DataError
from mechanistic.store.schema import KIND, STATUS

from .blocks import sample_spans

Ints = NDArray[np.int64]
# Weights of attention whose places are held at once.
ENTRIES = 1 << 22


@dataclass(frozen=True)
class MatchedSamples:
    """Pairs of rows of samples/, in the order of the first run; `excluded` failed in a run.

    `agreed[stack]` says up to which position the tokens of a pair are the same ones in both runs: all of the
    prompt, and the answer as far as it is the same.
    """

    first: Ints
    second: Ints
    names: NDArray[Any]
    excluded: int
    agreed: dict[str, Ints]

    @property
    def numbers(self) -> tuple[Ints, Ints]:
        """The rows of samples/ in the one run and in the other."""
        return self.first, self.second


def match_samples(first: xr.DataTree, second: xr.DataTree) -> MatchedSamples:
    """Pair the samples of two runs by sample_id, and compare their prompts token by token.

    Raises
    ------
    DataError  a sample is in one run only, twice in one, or has another prompt or another image grid in the
               other; the first one is named. No sample is whole in both.
    """
    tables = [group(run, "samples") for run in (first, second)]
    places = [_whole_samples(table) for table in tables]
    every = [set(map(str, table["sample_id"].values)) for table in tables]
    for place, which in enumerate(("first", "second")):
        if lacking := every[place] - every[1 - place]:
            named = next(name for name in _ids(tables[place]) if name in lacking)
            raise DataError(
                f"sample {named!r} is in the {which} run only, as are {len(lacking) - 1} others.",
                "Compare runs of the same samples: the same --dataset, --num-samples and --seed.",
            )
    names = [name for name in places[0] if name in places[1]]
    if not names:
        raise DataError("no sample is whole in both runs.", "Capture those that failed: --retry-failed.")
    here, there = (np.array([place[name] for name in names], np.int64) for place in places)
    matched = MatchedSamples(here, there, np.array(names, object), len(every[0]) - len(names), {})
    for stack in sorted(_stacks(first) & _stacks(second)):
        matched.agreed[stack] = _agreement(first, second, stack, matched)
    return matched


def match_rows(
    first: xr.Dataset, second: xr.Dataset, stack: str, matched: MatchedSamples
) -> tuple[Ints, Ints]:
    """The rows of a site that are the same token in both runs, in the order of the first."""
    keys: list[Ints] = []
    rows: list[Ints] = []
    for dataset, numbers in zip((first, second), matched.numbers, strict=True):
        owner = np.asarray(dataset["sample_index"].values).astype(np.int64)
        position = np.asarray(dataset["position"].values).astype(np.int64)
        pair_of = np.full(max(owner.max(initial=-1), numbers.max(initial=-1)) + 1, -1)
        pair_of[numbers] = np.arange(len(numbers))
        pair = pair_of[owner]
        held = pair >= 0
        if stack in matched.agreed:
            held &= position < matched.agreed[stack][pair]
        rows.append(np.flatnonzero(held))
        keys.append((pair << 32 | position)[held])
    _, here, there = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    order = np.argsort(here)
    return rows[0][here[order]], rows[1][there[order]]


def match_entries(
    first: xr.Dataset, second: xr.Dataset, rows: tuple[Ints, Ints]
) -> Iterator[tuple[tuple[Ints, Ints], Ints]]:
    """The stored weights of matched attention rows, a bounded number at a time, and the row of each.

    Raises
    ------
    DataError  a row has weights on other keys in the second run.
    """
    starts, lengths, keys = (
        [np.asarray(dataset[name].values)[own] for dataset, own in zip((first, second), rows, strict=True)]
        for name in ("start", "length", "key_start")
    )
    if (lengths[0] != lengths[1]).any() or (keys[0] != keys[1]).any():
        raise DataError("rows of attention have other keys in the second run.", "Compare q and k instead.")
    batch = np.cumsum(lengths[0]) // ENTRIES
    for number in np.unique(batch):
        own = np.flatnonzero(batch == number)
        size = lengths[0][own]
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        first_entries, second_entries = (np.repeat(start[own], size) + within for start in starts)
        yield (first_entries, second_entries), np.repeat(own, size)


def _ids(table: xr.Dataset) -> list[str]:
    return [str(name) for name in table["sample_id"].values]


def _whole_samples(table: xr.Dataset) -> dict[str, int]:
    """The row of each sample that did not fail."""
    good = np.ones(table.sizes["sample"], bool)
    if "status" in table.variables:
        good = np.asarray(table["status"].values) == STATUS["ok"]
    places: dict[str, int] = {}
    for place, name in enumerate(_ids(table)):
        if good[place] and places.setdefault(name, place) != place:
            raise DataError(
                f"sample {name!r} is twice in one run.", "Give each question a sample_id of its own."
            )
    return {name: place for name, place in places.items() if good[place]}


def _stacks(run: xr.DataTree) -> set[str]:
    return {
        node.path.removeprefix("/tokens/")
        for node in run.subtree
        if node.path.startswith("/tokens/") and "sample_index" in node.variables
    }


def _agreement(first: xr.DataTree, second: xr.DataTree, stack: str, matched: MatchedSamples) -> Ints:
    """Up to which position each pair agrees; for an encoder, all of its patches or an error."""
    words = stack == "text"
    columns = ("token_id",) if words else ("tile", "patch_row", "patch_col")
    tables = [group(run, f"tokens/{stack}") for run in (first, second)]
    values = [np.stack([table[name].values for name in columns], axis=-1) for table in tables]
    spans = [_spans(table, numbers) for table, numbers in zip(tables, matched.numbers, strict=True)]
    prompt = [np.asarray(table["kind"].values) != KIND["answer"] for table in tables]
    agreed = np.zeros(len(matched.names), np.int64)
    for pair, ((a, b), (c, d)) in enumerate(zip(*(span.tolist() for span in spans), strict=True)):
        shared = min(b - a, d - c)
        same = (values[0][a : a + shared] == values[1][c : c + shared]).all(axis=-1)
        agreed[pair] = shared if same.all() else int(np.argmin(same))
        lengths = int(prompt[0][a:b].sum()), int(prompt[1][c:d].sum())
        if agreed[pair] < max(lengths):
            raise _differs(matched.names[pair], tables, (a, c), lengths, int(agreed[pair]), stack)
    return agreed


def _spans(table: xr.Dataset, numbers: Ints) -> NDArray[np.int64]:
    """Where the tokens of each wanted sample lie: (pair, 2)."""
    spans = sample_spans(np.asarray(table["sample_index"].values))
    edges = np.zeros((int(max(numbers.max(initial=-1), spans.sample.max(initial=-1))) + 1, 2), np.int64)
    edges[spans.sample] = np.stack([spans.start, spans.stop], axis=-1)
    return edges[numbers]


def _differs(
    name: str,
    tables: list[xr.Dataset],
    starts: tuple[int, int],
    lengths: tuple[int, int],
    at: int,
    stack: str,
) -> DataError:
    said = []
    for table, start, length in zip(tables, starts, lengths, strict=True):
        if at >= length:
            said.append(f"ends after {length} tokens")
        elif stack == "text":
            said.append(f"has {str(table['token_text'].values[start + at])!r}")
        else:
            cell = [int(table[column].values[start + at]) for column in ("patch_row", "patch_col")]
            said.append(f"has row {cell[0]}, column {cell[1]} of an image")
    what = "prompt" if stack == "text" else f"{stack} encoder"
    return DataError(
        f"sample {name!r} differs at position {at} of its {what}: the first run {said[0]}, "
        f"the second {said[1]}.",
        "Compare runs with one prompt template and one image processor.",
    )
