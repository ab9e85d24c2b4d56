"""Selections of tokens and layers by name."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from synthetic_run import synthetic_run

from mechanistic.analysis import select_layers, select_tokens
from mechanistic.analysis.token_selection import token_mask
from mechanistic.store import site
from mechanistic.store.errors import DataError, DimensionError, SpecificationError

RUN = synthetic_run()
ROWS = site(RUN, "text/resid_post")


def texts(tokens: str, sample: int = 0) -> list[str]:
    chosen = select_tokens(ROWS, tokens)
    return [str(t) for t in chosen["token_text"].values[chosen["sample_index"].values == sample]]


def test_select_tokens__by_hand() -> None:
    assert texts("last") == ["assistant"]
    assert texts("answer") == ["left"]
    assert texts("image") == ["<image>"] * 4
    assert texts("special") == ["<s>", "assistant"]
    assert texts("subject") == ["square"]
    assert texts("'?'") == ["?"]
    assert texts("@0") == ["<s>"]
    assert texts("@-1") == ["assistant"]
    assert texts("@-2+answer + subject") == ["square", "?", "left"]
    assert len(texts("text")) == len(texts("all")) - 4


def test_select_tokens__word_start_marks_do_not_count() -> None:
    marked = ROWS.assign_coords(
        token_text=("token", np.array([f"\u2581{t}" for t in ROWS["token_text"].values]))
    )
    assert (token_mask(marked, "'?'") == token_mask(ROWS, "'?'")).all()
    assert (token_mask(marked, "' ?'") == token_mask(ROWS, "'?'")).all()


def test_select_tokens__stays_lazy() -> None:
    assert isinstance(select_tokens(ROWS, "last")["resid_post"].data, da.Array)


@pytest.mark.parametrize("tokens", ["", "last+", "last subject", "'?", "@x", "las't'"])
def test_select_tokens__refuses_what_does_not_parse(tokens: str) -> None:
    with pytest.raises(SpecificationError, match="does not parse"):
        select_tokens(ROWS, tokens)


def test_select_tokens__errors() -> None:
    with pytest.raises(SpecificationError, match=r"no token selection 'first'.\n.*There are all, text"):
        select_tokens(ROWS, "first")
    with pytest.raises(DataError, match=r"none of the .* tokens held here is 'zebra'"):
        select_tokens(ROWS, "'zebra'")
    with pytest.raises(DataError, match="not among the tokens held here"):
        select_tokens(select_tokens(ROWS, "image"), "@-1")
    with pytest.raises(DimensionError, match="no 'token_text'"):
        select_tokens(ROWS.drop_vars("token_text"), "'?'")
    with pytest.raises(DimensionError, match="no token axis"):
        select_tokens(RUN["samples"].to_dataset(), "last")


def test_select_layers__by_true_number() -> None:
    run = synthetic_run(sets=1, layers=(2, 5, 7))
    rows = site(run, "text/resid_post")
    assert select_layers(rows, [7, 2])["layer"].values.tolist() == [7, 2]
    assert select_layers(rows, 5).sizes["layer"] == 1
    with pytest.raises(SpecificationError, match="no layer 0; there are 2, 5, 7"):
        select_layers(rows, 0)
