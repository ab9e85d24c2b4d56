"""Choose tokens by what they are: roles, kinds, their text, or their place in the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import DataError, DimensionError, SpecificationError
from mechanistic.store.schema import KIND

from .take_rows import take_rows

_KINDS = ("image", "special", "answer")
_ROLES = ("subject", "object", "relation", "option")
_TERM = re.compile(r"\s*(?:'(?P<text>[^']*)'|@(?P<place>-?\d+)|(?P<name>\w+))\s*(?:\+|$)")
_WORD_MARKS = " \u2581\u0120"


def token_axis(dataset: xr.Dataset) -> str:
    """The dimension of a group's own tokens: the one its `sample_index` lies on.

    Raises
    ------
    DimensionError  there is no `sample_index`, or it is not one-dimensional.
    """
    if "sample_index" in dataset.variables and dataset["sample_index"].ndim == 1:
        return str(dataset["sample_index"].dims[0])
    raise DimensionError(
        f"these data have no token axis: no 'sample_index' among {', '.join(map(str, dataset.variables))}.",
        "Pass a group of a run, such as site(run, 'text/q'), or one of its selections.",
    )


def select_tokens(dataset: xr.Dataset, tokens: str | None) -> xr.Dataset:
    """The rows of a group that `tokens` names; arrays stay lazy, only the columns asked about are read.

    Parameters
    ----------
    tokens
        Terms joined by ``+``, any of which may hold: ``all``; ``text`` (whatever is not an image token);
        ``image``, ``special``, ``answer``; ``last`` (the last prompt token); ``subject``, ``object``,
        ``relation``, ``option``; ``'?'`` (the token with this text, quoted; a tokenizer's own word-start
        marks do not count); ``@0`` and ``@-2`` (the first, and the prompt's last but one). None keeps all.

    Raises
    ------
    SpecificationError  a term does not parse.
    DataError           no token qualifies.
    """
    if tokens is None or tokens.strip() == "all":
        return dataset
    axis = token_axis(dataset)
    rows = np.flatnonzero(token_mask(dataset, tokens))
    if not rows.size:
        raise DataError(
            f"none of the {dataset.sizes[axis]} tokens held here is {tokens}.",
            "Choose tokens that this site was captured for; its 'kind', 'is_*' and 'token_text' show them.",
        )
    return take_rows(dataset, axis, rows)


def token_mask(dataset: xr.Dataset, tokens: str) -> NDArray[np.bool_]:
    """Which rows of a group `tokens` names; see `select_tokens`."""
    mask = np.zeros(dataset.sizes[token_axis(dataset)], bool)
    position, more = 0, True
    while more:
        term = _TERM.match(tokens, position)
        if term is None:
            raise SpecificationError(
                f"The token selection {tokens!r} does not parse at {tokens[position:]!r}.",
                "Write names joined with +, a quoted text or a place: last, subject+object, '?', @-2.",
            )
        mask |= _one_term(dataset, term)
        position, more = term.end(), term.group(0).endswith("+")
    return mask


def _one_term(dataset: xr.Dataset, term: re.Match[str]) -> NDArray[np.bool_]:
    if term["text"] is not None:
        wanted = term["text"].strip(_WORD_MARKS)
        texts = column(dataset, "token_text")
        return np.fromiter((str(text).strip(_WORD_MARKS) == wanted for text in texts), bool, len(texts))
    if term["place"] is not None:
        return _at_place(dataset, int(term["place"]))
    name = term["name"]
    if name == "all":
        return np.ones(dataset.sizes[token_axis(dataset)], bool)
    if name == "text":
        return np.asarray(column(dataset, "kind") != KIND["image"])
    if name in _KINDS:
        return np.asarray(column(dataset, "kind") == KIND[name])
    if name in _ROLES:
        return column(dataset, f"is_{name}").astype(bool)
    if name == "last":
        return column(dataset, "is_last_prompt").astype(bool)
    raise SpecificationError(
        f"There is no token selection '{name}'.",
        f"There are all, text, {', '.join(_KINDS)}, last, {', '.join(_ROLES)}, a quoted text and @place.",
    )


def _at_place(dataset: xr.Dataset, place: int) -> NDArray[np.bool_]:
    """Places from the end count back from the last prompt token, whatever was answered after it."""
    position = column(dataset, "position")
    if place >= 0:
        return np.asarray(position == place)
    sample = column(dataset, "sample_index")
    last = column(dataset, "is_last_prompt").astype(bool)
    end = np.full(int(sample.max(initial=-1)) + 1, -1)
    end[sample[last]] = position[last]
    if (end[sample] < 0).any():
        raise DataError(
            f"@{place} counts back from the last prompt token, which is not among the tokens held here.",
            "Use a place from the start (@0), or a site captured with [text], [last] or [all].",
        )
    return np.asarray(position == end[sample] + place + 1)


def column(dataset: xr.Dataset, name: str) -> NDArray[Any]:
    """One label column, read.

    Raises
    ------
    DimensionError  these data do not have it.
    """
    if name not in dataset.variables:
        raise DimensionError(
            f"these tokens have no '{name}'; their labels are {', '.join(map(str, dataset.coords))}.",
            "Select by a label that they have; only decoder tokens have texts and roles.",
        )
    return np.asarray(dataset[name].values)


def select_layers(dataset: xr.Dataset, layer: int | Sequence[int] | None) -> xr.Dataset:
    """The layers with these true numbers, in the order given; the dimension stays.

    Raises
    ------
    SpecificationError  a layer is not held.
    """
    if layer is None:
        return dataset
    held = [int(number) for number in np.asarray(dataset["layer"].values)]
    wanted = [int(number) for number in np.atleast_1d(layer)]
    missing = [number for number in wanted if number not in held]
    if missing:
        raise SpecificationError(
            f"There is no layer {', '.join(map(str, missing))}; there are {', '.join(map(str, held))}.",
            "Layers are named by their number in the model, counted from 0.",
        )
    return dataset.isel(layer=[held.index(number) for number in wanted])


def head_places(heads: xr.DataArray, wanted: int | Sequence[int]) -> list[int]:
    """Where the heads of these true numbers stand among those held.

    Raises
    ------
    SpecificationError  a head that is not held.
    """
    held = np.asarray(heads.values).tolist()
    numbers = [int(number) for number in np.atleast_1d(wanted)]
    if missing := [number for number in numbers if number not in held]:
        raise SpecificationError(
            f"There is no head {', '.join(map(str, missing))}; there are {', '.join(map(str, held))}.",
            "Heads are named by their number in the model, counted from 0.",
        )
    return [held.index(number) for number in numbers]
