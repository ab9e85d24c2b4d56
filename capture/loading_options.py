"""How a model is loaded, as it is written on the command line."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Container, Sequence
from typing import Any

from mechanistic.store.errors import UsageError

_WORDS = {"true": True, "false": False, "none": None}


def add_place_options(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Where a model runs, and whose code it may run."""
    group.add_argument("--device", metavar="DEVICE", help="such as cpu, cuda, cuda:1 (default: cpu)")
    group.add_argument(
        "--device-map", metavar="MAP", help="spread the model over devices, such as auto; instead of --device"
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )


def place_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of these, what was given, as `load_model` takes it."""
    given = {name: getattr(args, name) for name in ("device", "device_map", "trust_remote_code")}
    return {name: value for name, value in given.items() if value}


def parse_options(flag: str, texts: Sequence[str], besides: Container[str] = ()) -> dict[str, Any]:
    """Options written as KEY=VALUE behind a flag; values are Python's words in any case, and else stay text.

    >>> parse_options("--engine-option", ["tensor_parallel_size=2", "model_impl=transformers"])
    {'tensor_parallel_size': 2, 'model_impl': 'transformers'}

    Raises
    ------
    UsageError    there is no = in one, or a key is given twice, or is among those that are given `besides`.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in options or key in besides:
            raise UsageError(
                f"The option '{text}' is not KEY=VALUE, or is given twice.",
                f"Write it like {flag} name=4096.",
            )
        try:
            word = value.lower()
            options[key] = _WORDS[word] if word in _WORDS else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options
