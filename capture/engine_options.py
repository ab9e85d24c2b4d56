"""Options of an engine as they are written on the command line."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from mechanistic.store.errors import UsageError


def engine_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options written as KEY=VALUE; values are read as Python's own words, and else stay text.

    >>> engine_options(["tensor_parallel_size=2", "model_impl=transformers"])
    {'tensor_parallel_size': 2, 'model_impl': 'transformers'}

    Raises
    ------
    UsageError    there is no = in one, or a key is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in options:
            raise UsageError(
                f"The engine option '{text}' is not KEY=VALUE, or is given twice.",
                "Write it like --engine-option max_model_len=4096.",
            )
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options
