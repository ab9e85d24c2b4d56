"""The words of a question and the tokens that each is cut into."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xarray as xr

from mechanistic.store import group
from mechanistic.store.errors import DataError
from mechanistic.store.schema import KIND

# A word is letters, digits, and what joins them; any other mark stands alone.
_WORD = re.compile(r"\w+(?:['’.\-]\w+)*|[^\w\s]")


def question_words(run: xr.DataTree, sample: int, *, stack: str = "text") -> dict[str, list[int]]:
    """The words of a sample's question, in order, and the positions of their tokens.

    The texts of the question's tokens are laid along the question, so that it does not matter how a
    tokenizer marks the start of a word. A token that spans two words belongs to the one it begins in. A word
    that occurs again is told apart by its number, such as ``the (2)``.

    Raises
    ------
    DataError  the sample has no question, or its tokens do not spell it.
    """
    tokens = group(run, f"tokens/{stack}")
    mine = np.flatnonzero(np.asarray(tokens["sample_index"].values) == sample)
    own = tokens[["kind", "position", "token_text"]].isel(token=mine).compute()
    asked = own.isel(token=np.flatnonzero(own["kind"].values == KIND["text"]))
    question = str(group(run, "samples")["question"][sample].values)
    texts = [str(text) for text in asked["token_text"].values]
    return lay_along(question, texts, [int(place) for place in asked["position"].values], sample)


def lay_along(
    question: str, texts: Sequence[str], positions: Sequence[int], sample: int = 0
) -> dict[str, list[int]]:
    """Which positions spell which word of `question`; see `question_words`."""
    letters = [place for place, letter in enumerate(question) if not letter.isspace()]
    word_of_letter = {
        place: number
        for number, word in enumerate(_WORD.finditer(question))
        for place in range(word.start(), word.end())
    }
    names = _numbered([word.group() for word in _WORD.finditer(question)])
    words: dict[str, list[int]] = {name: [] for name in names}
    done = 0
    for text, position in zip(texts, positions, strict=True):
        spelled = _bare(text)
        expected = "".join(question[place] for place in letters[done : done + len(spelled)])
        if not spelled or spelled.casefold() != expected.casefold():
            raise DataError(
                f"the tokens of sample {sample} do not spell its question: {text!r} for {expected!r}.",
                "Name the tokens of each word: words={'cup': [12, 13]}.",
            )
        words[names[word_of_letter[letters[done]]]].append(position)
        done += len(spelled)
    if done < len(letters) or not words:
        raise DataError(
            f"the tokens of sample {sample} spell {done} of the {len(letters)} letters of its question.",
            "Name the tokens of each word: words={'cup': [12, 13]}.",
        )
    return {name: places for name, places in words.items() if places}


def _bare(text: str) -> str:
    """A token's text without white space and without the marks that tokenizers put for it."""
    return re.sub(r"[\s\u2581\u0120\u010a]", "", text)


def _numbered(words: list[str]) -> list[str]:
    """Each word; from its second occurrence on with its number."""
    seen: dict[str, int] = {}
    names = []
    for word in words:
        seen[word] = seen.get(word, 0) + 1
        names.append(word if seen[word] == 1 else f"{word} ({seen[word]})")
    return names
