"""Question texts taken apart: subject, object, options; and put together with the options in another order.

>>> parsed = parse_question("Where is the beer bottle in relation to the chair? Answer with left or on.")
>>> parsed.subject, parsed.object, parsed.options
('beer bottle', 'chair', ('left', 'on'))
>>> parsed.text(("on", "left"))
'Where is the beer bottle in relation to the chair? Answer with on or left.'
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]

_MARKUP = re.compile(r"\s*(?:<image>\s*)*(?:USER:)?(?P<body>.*?)(?:ASSISTANT:)?\s*", re.DOTALL)
_ARTICLE = r"(?:(?:the|an?) )?"
_WHERE = re.compile(
    rf"Where (?:is|are) {_ARTICLE}(?P<subject>\S.*?) "
    rf"in (?:relation to {_ARTICLE}(?P<object>\S.*?)|the (?:photo|image|picture)) ?\?",
    re.IGNORECASE,
)
_REQUEST = re.compile(r" ?(?P<request>Answer with (?P<list>[^.?!]*?)) ?\.+", re.IGNORECASE)
_BETWEEN = re.compile(r"\s*,\s*(?:or\s+)?|\s+or\s+")
_FREE = re.compile(r"(?:an?|one)\b", re.IGNORECASE)


@dataclass(frozen=True)
class ParsedQuestion:
    """The parts of "Where is the S in relation to the O? Answer with a, b or c.".

    `sentence` is the question alone, in single spaces; the spans are characters [start, end) of it, and
    `object_span` is None where the question names one thing only. `request` is what follows the sentence up
    to its full stop; `surplus` is the rest, which no question should have.
    """

    sentence: str
    subject_span: Span
    object_span: Span | None
    request: str
    options: tuple[str, ...]
    surplus: str

    @property
    def subject(self) -> str:
        return self.sentence[slice(*self.subject_span)]

    @property
    def object(self) -> str:
        return self.sentence[slice(*self.object_span)] if self.object_span else ""

    def text(self, options: Sequence[str] = ()) -> str:
        """The question with these options in this order; without options, with its own request."""
        request = f"Answer with {listed(options)}" if options else self.request
        return f"{self.sentence} {request}." if request else self.sentence


def parse_question(published: str) -> ParsedQuestion | None:
    """Take a published question apart, whatever its white space and chat markup; None for another wording.

    "Answer with one word or phrase" offers no options.
    """
    body = strip_markup(published)
    where = _WHERE.match(body)
    if where is None:
        return None
    sentence = where[0].replace(" ?", "?")
    rest = body[where.end() :]
    asked = _REQUEST.match(rest)
    offered = asked["list"] if asked else ""
    options = () if not offered or _FREE.match(offered) else tuple(_BETWEEN.split(offered))
    return ParsedQuestion(
        sentence,
        where.span("subject"),
        where.span("object") if where["object"] else None,
        asked["request"] if asked else "",
        options,
        rest[asked.end() :].strip() if asked else rest.strip(),
    )


def strip_markup(published: str) -> str:
    """The text without chat markup around it, in single spaces.

    Every model gets its own chat template when it is asked; another model's is in the way.
    """
    return " ".join(without_markup(published).split())


def without_markup(published: str) -> str:
    """The text without `<image>`, `USER:` and `ASSISTANT:` around it, its inner white space as it is."""
    found = _MARKUP.fullmatch(published)
    return (found["body"] if found else published).strip()


def listed(options: Sequence[str], last: str = "or") -> str:
    """Join as in "a, b or c"."""
    return f" {last} ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)


def shuffled(options: Sequence[str], *, seed: int, key: str) -> tuple[str, ...]:
    """The options in an order that depends on the seed, the key and the options alone, not on how they came.

    They are sorted by SHA-256, so that the order is the same for ever, whatever the version of any library.
    """
    return tuple(
        sorted(options, key=lambda option: hashlib.sha256(f"{seed}/{key}/{option}".encode()).digest())
    )


def show_options(text: str, options: Sequence[str]) -> str | None:
    """The text with these options, which it lists in any order, listed in this order; None if it lists none.

    A list is every option once, with commas, slashes, "or" or "and" between them. What stands between them
    stays; the last list of the text counts.
    """
    spans = _listing(text, options)
    if spans is None:
        return None
    pieces, end = [], 0
    for (start, stop), option in zip(spans, options, strict=True):
        pieces += [text[end:start], option]
        end = stop
    return "".join([*pieces, text[end:]])


def order_of_mention(text: str, options: Sequence[str]) -> tuple[str, ...] | None:
    """The options in the order in which the text first mentions them as whole words; None unless all are."""
    places = {}
    for option in options:
        found = re.search(_whole(re.escape(option)), text, re.IGNORECASE)
        if found is None:
            return None
        places[option] = found.start()
    return tuple(sorted(options, key=lambda option: places[option]))


def mentions(text: str, name: str) -> bool:
    """Whether the text names it as whole words, in any case, singular or plural, hyphens read as spaces."""
    words = [_singular_or_plural(word) for word in name.replace("-", " ").split()]
    flat = text.replace("-", " ")
    return bool(words) and re.search(_whole(r"\s+".join(words)), flat, re.IGNORECASE) is not None


def same_name(one: str, other: str) -> bool:
    """Whether two names are one but for case, spaces, hyphens and a plural, as in "beer-bottle"."""
    first, second = (re.sub(r"[\W_]+", "", name).casefold() for name in (one, other))
    return bool(first) and re.fullmatch(_singular_or_plural(first), second) is not None


def _listing(text: str, options: Sequence[str]) -> list[Span] | None:
    if len(options) < 2:
        return None
    by_length = sorted(map(re.escape, options), key=len, reverse=True)
    item = f"[\"'“‘]?(?:{'|'.join(by_length)})[\"'”’]?"
    between = r"(?:\s*,\s*(?:(?:or|and)\s+)?|\s*/\s*|\s+(?:or|and)\s+)"
    whole = _whole(rf"{item}(?:{between}{item}){{{len(options) - 1}}}")
    one = re.compile(_whole("|".join(by_length)), re.IGNORECASE)
    for found in reversed(list(re.finditer(whole, text, re.IGNORECASE))):
        spans = [match.span() for match in one.finditer(text, *found.span())]
        names = {text[slice(*span)].casefold() for span in spans}
        if len(spans) == len(names) == len(options):
            return spans
    return None


def _whole(pattern: str) -> str:
    return rf"(?<!\w)(?:{pattern})(?!\w)"


def _singular_or_plural(word: str) -> str:
    """A pattern of the word, of it with -s or -es, and of what it may be the plural of."""
    singulars = [
        word.removesuffix(ending) for ending in ("s", "es") if len(word) > 3 and word.endswith(ending)
    ]
    return f"(?:{'|'.join([rf'{re.escape(word)}(?:e?s)?', *map(re.escape, singulars)])})"
