"""The layers or heads that a call asks for by number."""

from __future__ import annotations

from typing import Any

import numpy as np

from mechanistic.store.errors import SpecificationError


def chosen_numbers(wanted: Any, count: int, what: str, stack: str) -> list[int]:
    """The numbers as they are given, each once; all of 0 to count - 1 for None.

    Raises
    ------
    SpecificationError    none is given, or something that is no such number.
    """
    if wanted is None:
        return list(range(count))
    given = np.atleast_1d(np.asarray(wanted)).tolist()
    outside = [each for each in given if each not in range(count)]
    if outside or not given:
        whose = "decoder" if stack == "text" else f"{stack} stack"
        raise SpecificationError(
            f"There is no {what} {', '.join(map(str, outside)) or 'chosen'}; the {whose} has {count}.",
            f"They are numbered from 0 to {count - 1}; leave it out for all.",
        )
    return list(dict.fromkeys(map(int, given)))
