"""Questions with their objects exchanged: everything that names them turns round, the image stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mechanistic.analysis import path_patching, swapped_pairs
from mechanistic.capture import Sample, Shapes, load_model
from mechanistic.store.errors import DataError


def asked(**changes: object) -> Sample:
    """A question about a cup and a table."""
    whole = Sample(
        sample_id="a",
        images=(),
        question="Is the cup on the table? The Cup holder is not the cup.",
        options=("on", "under"),
        answer="on",
        relation="on",
        subject="cup",
        object="table",
        extra={"subject_x0": 1.0, "object_x0": 5.0, "index": 3},
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_swapped_pairs__exchanges_every_mention_and_label() -> None:
    (first, second), pairs = swapped_pairs(asked())
    assert pairs == [(0, 1)]
    assert first == asked()
    assert second.question == "Is the table on the cup? The table holder is not the table."
    assert (second.answer, second.relation) == ("under", "under")
    assert (second.subject, second.object) == ("table", "cup")
    assert second.extra == {"subject_x0": 5.0, "object_x0": 1.0, "index": 3}
    (back,) = swapped_pairs(second)[0][1:]
    assert back.question.startswith("Is the cup on the table?")
    assert (back.answer, back.extra) == (first.answer, first.extra)


def test_swapped_pairs__are_pairs_that_a_model_answers_the_other_way_round() -> None:
    both, pairs = swapped_pairs(Shapes(4, distractor=0.0))
    assert both[4].images == both[0].images
    got = path_patching(
        both, load_model("spatial-tiny"), pairs=pairs, senders=[(3, 1)], receivers=["logits"], quiet=True
    )
    assert got.sizes["pair"] == 4
    assert (got.clean > 3).all()
    assert (got.corrupt < -3).all()
    assert float(got.share[0, 0]) > 0.2


def test_swapped_pairs__refuses_what_has_no_other_side() -> None:
    with pytest.raises(DataError, match="does not name both 'cup' and 'shelf'"):
        swapped_pairs(asked(object="shelf"))
    with pytest.raises(DataError, match="no option is the opposite of its answer 'blue'"):
        swapped_pairs(asked(options=("blue", "red"), answer="blue"))
