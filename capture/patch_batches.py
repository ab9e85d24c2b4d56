"""How patched forwards are put into batches, where each computes as many tokens as its batch's longest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def patch_batches(tokens: Sequence[int], limit: int, cost: int) -> list[list[int]]:
    """Batches of at most `limit` forwards, by number, that cost least together.

    Parameters
    ----------
    tokens
        How many each forward computes. A batch computes as many of each as of its longest, and `cost` more.
    """
    order = np.argsort(-np.asarray(tokens), kind="stable").tolist()
    least, begins = [0.0], [0]
    for end in range(1, len(order) + 1):
        # Batches are stretches of the order: swapping two forwards between batches never saves a token.
        found = min(
            (least[begin] + cost + tokens[order[begin]] * (end - begin), begin)
            for begin in range(max(0, end - limit), end)
        )
        least.append(found[0])
        begins.append(found[1])
    batches = []
    end = len(order)
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]
