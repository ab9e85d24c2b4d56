"""What is explained: one number of the model's answer, a logit or the difference of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mechanistic.store.errors import ModelError, SpecificationError

from .answers import option_tokens

# A word or the number of a token (of an image classifier: of a class); two of them are a difference.
Target = str | int | tuple[str | int, str | int] | None


@dataclass(frozen=True)
class AnswerTarget:
    """logits[plus], less logits[minus] where there is one; `name` says it in words."""

    plus: int
    minus: int | None
    name: str

    def of(self, logits: Tensor) -> Tensor:
        """(row, word) -> (row,), float32."""
        value = logits[:, self.plus].float()
        return value if self.minus is None else value - logits[:, self.minus].float()


def answer_target(
    target: Target,
    logits: Tensor,
    prompt: str,
    options: Sequence[str],
    tokenizer: Any,
    labels: dict[str, int],
) -> AnswerTarget:
    """Find the target in the logits (word,) of one sample.

    None means the option with the highest logit less the next highest; without options, the highest logit.

    Parameters
    ----------
    labels
        Of an image classifier, the numbers of its classes by name; empty where logits are of words.

    Raises
    ------
    SpecificationError    a word is several tokens, or two of them start with the same token.
    """
    if target is None and len(options) < 2:
        best = int(logits.argmax())
        return AnswerTarget(best, None, _name(best, tokenizer, labels))
    if target is None:
        numbers = _first_tokens(options, prompt, tokenizer)
        order = sorted(range(len(options)), key=lambda place: -float(logits[numbers[place]]))
        plus, minus = order[:2]
        return AnswerTarget(numbers[plus], numbers[minus], f"{options[plus]} - {options[minus]}")
    if isinstance(target, tuple):
        plus, minus = _numbers(target, logits, prompt, tokenizer, labels)
        names = [each if isinstance(each, str) else _name(each, tokenizer, labels) for each in target]
        return AnswerTarget(plus, minus, " - ".join(names))
    if isinstance(target, str):
        [number] = _numbers((target,), logits, prompt, tokenizer, labels)
        return AnswerTarget(number, None, target)
    [number] = _numbers((target,), logits, prompt, tokenizer, labels)
    return AnswerTarget(number, None, _name(number, tokenizer, labels))


def _numbers(
    wanted: Sequence[str | int], logits: Tensor, prompt: str, tokenizer: Any, labels: dict[str, int]
) -> list[int]:
    words = [each for each in wanted if isinstance(each, str)]
    if labels:
        if unknown := [word for word in words if word not in labels]:
            raise SpecificationError(
                f"This classifier has no class {', '.join(unknown)}.",
                f"It has: {', '.join(list(labels)[:8])}{', ...' if len(labels) > 8 else ''}.",
            )
        found = labels
    else:
        found = dict(zip(words, _first_tokens(words, prompt, tokenizer), strict=True))
    numbers = [each if isinstance(each, int) else found[each] for each in wanted]
    if outside := [number for number in numbers if not 0 <= number < len(logits)]:
        raise SpecificationError(
            f"There is no logit {outside[0]}; the model has {len(logits)}.",
            "Give a word, or a token id of its vocabulary.",
        )
    if len(set(numbers)) < len(numbers):
        raise SpecificationError(
            f"A difference of {' and '.join(map(repr, wanted))} is always 0.", "Give two different words."
        )
    return numbers


def _first_tokens(words: Sequence[str], prompt: str, tokenizer: Any) -> list[int]:
    """First token of each word as it would follow the prompt; a word alone must be one token.

    Of several words, which tell answers apart, the first token is enough where no two share it.
    """
    if not words:
        return []
    if tokenizer is None:
        raise ModelError("This model has no words.", "Give the number of a logit, such as target=0.")
    found = option_tokens(tokenizer, prompt, words)
    numbers = [number for number in found.ids if number is not None]
    if len(numbers) < len(words):
        raise SpecificationError(
            f"{', '.join(map(repr, words))} cannot be told apart by one token ({found.note}).",
            "Choose target=(word, other word) whose first tokens differ, or give token ids.",
        )
    if len(words) == 1 and (pieces := _pieces(words[0], prompt, tokenizer)) > 1:
        raise SpecificationError(
            f"The tokenizer splits {words[0]!r} into {pieces} tokens, so that it has no logit of its own.",
            f"Choose target=({words[0]!r}, other word), or the id of one token.",
        )
    return numbers


def _pieces(word: str, prompt: str, tokenizer: Any) -> int:
    """How many tokens the word is behind the prompt, by their characters."""
    ahead = prompt[-32:] + ("" if prompt[-1:].isspace() else " ")
    encoded = tokenizer(ahead + word, add_special_tokens=False, return_offsets_mapping=True)
    return sum(end > max(start, len(ahead)) for start, end in encoded["offset_mapping"])


def _name(number: int, tokenizer: Any, labels: dict[str, int]) -> str:
    if labels:
        return next((name for name, place in labels.items() if place == number), str(number))
    return str(number) if tokenizer is None else str(tokenizer.decode([number])).strip() or f"token {number}"
