"""Pairs that differ in two names of the question: symmetric token replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mechanistic.store.errors import DataError

from .minimal_pairs import OPPOSITES

_EDGES = ("x0", "y0", "x1", "y1", "x", "y")


def swapped_pairs(samples: Any) -> tuple[tuple[Any, ...], list[tuple[int, int]]]:
    """Each sample, and the same one asked with its two objects exchanged, so that the opposite is right.

    The image stays; subject and object change places in the question, in the roles and in the boxes. Unlike
    noise, this keeps the model to inputs that it knows.

    Parameters
    ----------
    samples
        A dataset such as Shapes(32), a list of samples, or one Sample.

    Returns
    -------
    The samples followed by the swapped ones, and the pairs of their numbers: pass both on, as in
    ``path_patching(both, model, pairs=pairs)``.

    Raises
    ------
    DataError    a question does not name both objects, or its answer has no opposite among the options.

    References
    ----------
    Zhang and Nanda (2023), Towards best practices of activation patching, arXiv:2309.16042.
    """
    from mechanistic.capture.given import given_samples

    chosen = given_samples(samples)
    size = len(chosen)
    both = (*chosen, *(_swapped(sample) for sample in chosen))
    return both, [(number, size + number) for number in range(size)]


def _swapped(sample: Any) -> Any:
    from mechanistic.capture.roles import role_spans

    spans = role_spans(sample)
    if not spans["subject"] or not spans["object"]:
        raise DataError(
            f"Sample {sample.sample_id!r}: its question does not name both {sample.subject!r} and "
            f"{sample.object!r}.",
            "Leave it out, or give its subject and object as the question has them.",
        )
    answer = _opposite(sample)
    columns = {
        f"{there}_{edge}": sample.extra[f"{here}_{edge}"]
        for here, there in (("subject", "object"), ("object", "subject"))
        for edge in _EDGES
        if f"{here}_{edge}" in sample.extra and f"{there}_{edge}" in sample.extra
    }
    return replace(
        sample,
        sample_id=f"{sample.sample_id}-swapped",
        question=_exchanged(sample.question, spans["subject"], spans["object"]),
        answer=answer,
        relation=answer if sample.relation == sample.answer else sample.relation,
        subject=sample.object,
        object=sample.subject,
        extra={**sample.extra, **columns},
    )


def _opposite(sample: Any) -> str:
    """The option that is right when the objects change places, as the options spell it."""
    turned = OPPOSITES.get(str(sample.answer).replace("_", " ").casefold())
    found = [option for option in sample.options if option.replace("_", " ").casefold() == turned]
    if not found:
        raise DataError(
            f"Sample {sample.sample_id!r}: no option is the opposite of its answer {sample.answer!r}.",
            "Swap samples whose answers come in opposites, such as left and right.",
        )
    return str(found[0])


def _exchanged(question: str, subjects: Sequence[tuple[int, int]], objects: Sequence[tuple[int, int]]) -> str:
    """The question with the first mention of each put at every mention of the other."""
    names = question[slice(*subjects[0])], question[slice(*objects[0])]
    marked = sorted([*((span, names[1]) for span in subjects), *((span, names[0]) for span in objects)])
    parts, end = [], 0
    for (start, stop), name in marked:
        parts += [question[end:start], name]
        end = stop
    return "".join([*parts, question[end:]])
