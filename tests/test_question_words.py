"""Tokens laid along a question."""

from __future__ import annotations

import pytest

from mechanistic.analysis.question_words import lay_along
from mechanistic.store.errors import DataError


def spell(question: str, *texts: str) -> dict[str, list[int]]:
    return lay_along(question, texts, range(10, 10 + len(texts)))


def test_question_words__by_hand() -> None:
    assert spell("Where is it?", "Where", " is", " it", "?") == {
        "Where": [10],
        "is": [11],
        "it": [12],
        "?": [13],
    }


@pytest.mark.parametrize(
    "texts",
    [("the", "armchair", "'s", "leg"), ("\u2581the", "\u2581arm", "chair's", "\u2581leg")],
    ids=["bare pieces", "marked pieces"],
)
def test_question_words__pieces_of_a_word_are_joined(texts: tuple[str, ...]) -> None:
    found = spell("the armchair's leg", *texts)
    assert list(found) == ["the", "armchair's", "leg"]
    assert found["armchair's"] == [11, 12]


def test_question_words__repeated_words_are_numbered() -> None:
    found = spell("the cup on the plate", "the", " cup", " on", " the", " plate")
    assert found["the (2)"] == [13]


def test_question_words__a_token_over_two_words_belongs_to_the_first() -> None:
    assert spell("new york .", " new york", ".") == {"new": [10], ".": [11]}


def test_question_words__case_and_spaces_do_not_matter() -> None:
    assert spell("Left  or\nright", "left", " or", " RIGHT") == {"Left": [10], "or": [11], "right": [12]}


def test_question_words__errors() -> None:
    with pytest.raises(DataError, match=r"do not spell its question: ' cat' for 'cup'\.\n  Name the tokens"):
        spell("the cup", "the", " cat")
    with pytest.raises(DataError, match=r"spell 3 of the 6 letters"):
        spell("the cup", "the")
    with pytest.raises(DataError, match=r"do not spell"):
        spell("the", "the", "\ufffd")
