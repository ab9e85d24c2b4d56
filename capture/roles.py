"""Which characters of a question name its subject, object, relation and options, and which tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .dataset import Sample

Span = tuple[int, int]


def role_spans(sample: Sample) -> dict[str, list[Span]]:
    """Character spans in the question by role: every whole-word mention, in any case.

    A mention inside a longer one of another role ("cup" in "cup holder") is not one. A role that the question
    does not mention has no spans, never a guess.
    """
    subject, other = find_phrase(sample.question, sample.subject), find_phrase(sample.question, sample.object)
    return {
        "subject": [span for span in subject if not _inside(span, other)],
        "object": [span for span in other if not _inside(span, subject)],
        "relation": find_phrase(sample.question, sample.relation),
        "option": [span for option in sample.options for span in find_phrase(sample.question, option)],
    }


def find_phrase(text: str, phrase: str) -> list[Span]:
    """Where `phrase` stands in `text` as whole words; underscores in it are read as spaces."""
    words = phrase.replace("_", " ").split()
    if not words:
        return []
    pattern = r"(?<!\w)" + r"\s+".join(re.escape(word) for word in words) + r"(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]


def tokens_in(spans: Sequence[Span], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens overlap any of the spans; `offsets` (token, 2) are the tokens' own characters.

    A token that ends where a span starts, or has no characters, is not in it.
    """
    start, end = offsets[:, 0], offsets[:, 1]
    inside = np.zeros(len(offsets), np.bool_)
    for low, high in spans:
        inside |= (start < high) & (end > low) & (end > start)
    return inside


def _inside(span: Span, others: Sequence[Span]) -> bool:
    return any(low <= span[0] and span[1] <= high and (low, high) != span for low, high in others)
