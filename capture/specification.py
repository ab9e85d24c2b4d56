"""What to keep: the site grammar ``{stack}.{layers}.{site}{heads}[tokens]:dtype``, as frozen values.

>>> SiteSpec.parse("text.8-20.resid_post[last+subject]").layer_numbers(24)[:3]
(8, 9, 10)

========  =====================================  ==============================================
part      written                                means
========  =====================================  ==============================================
stack     ``text``, ``vision``                   the decoder, the vision encoder
          ``vision_global``, ``qformer``         Mllama's second encoder, BLIP-2's query former
layers    ``*``, ``5``, ``8-20``, ``0+3+8-10``   output of which layers, counted from 0
site      see `SITES`                            which tensor of the layer
heads     ``{0+3}``, ``{4-7}``, absent: all      heads of what has heads (kv heads for k and v)
tokens    ``[text]``, ``[last+subject]``         which rows (of attention: queries), absent: all
dtype     ``:float16``, absent: the model's      how the values are stored
========  =====================================  ==============================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mechanistic.store.errors import SpecificationError

STACKS = ("text", "vision", "vision_global", "qformer")
# Between the two halves of a layer, and what each half adds.
INNER_SITES = ("resid_mid", "attn_out", "mlp_out")
RESIDUAL_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
ATTENTION_SITES = ("q", "k", "v", "z")
# Cross-attention: queries of the stack itself, keys and values of the tokens that it reads.
CROSS_SITES = ("xq", "xk", "xv", "xz", "xattn_stats", "xpattern")
# Made of whole attention rows; their tokens are the queries.
ROW_SITES = ("attn_stats", "pattern", "xattn_stats", "xpattern")
SITES = (*RESIDUAL_SITES, *ATTENTION_SITES, "attn_stats", "pattern", *CROSS_SITES)
KV_SITES = ("k", "v", "xk", "xv")
ROLES = ("subject", "object", "relation", "option", "last")
TOKENS = ("all", "text", "image", "answer", *ROLES)
VISION_TOKENS = ("all", "image")
# A query former answers nothing, so that no token of it is an answer or the last of a prompt.
QFORMER_TOKENS = ("all", "text", "image", "subject", "object", "relation", "option")
DTYPES = ("float16", "float32")

# The modest default of the format: what most questions about attention and readability need.
DEFAULT_SITES = ("text.*.attn_stats[text]", "text.*.resid_post[text]", "text.*.q[text]", "text.*.k[all]")

_NUMBERS = r"\d+(?:-\d+)?(?:\+\d+(?:-\d+)?)*"
_SITE = re.compile(
    rf"(?P<stack>\w+)\.(?P<layers>\*|{_NUMBERS})\.(?P<site>\w+?)"
    rf"(?:\{{(?P<heads>{_NUMBERS})\}})?(?:\[(?P<tokens>[\w+]+)\])?(?::(?P<dtype>\w+))?"
)


@dataclass(frozen=True)
class Numbers:
    """A set of layer or head numbers as written: inclusive ranges, or everything."""

    ranges: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Numbers:
        """Read ``*`` or ``0+3+8-10``; the grammar's regular expression has already vetted the characters."""
        if text == "*":
            return cls()
        bounds = [part.split("-") for part in text.split("+")]
        return cls(tuple((int(pair[0]), int(pair[-1])) for pair in bounds))

    def to_string(self) -> str:
        """The text that `parse` reads back to an equal value."""
        if self.ranges is None:
            return "*"
        return "+".join(str(low) if low == high else f"{low}-{high}" for low, high in self.ranges)

    def resolve(self, count: int, what: str) -> tuple[int, ...]:
        """The numbers, sorted and without repeats.

        Raises
        ------
        SpecificationError  a number is not below `count`, or a range runs backwards.
        """
        if self.ranges is None:
            return tuple(range(count))
        chosen: set[int] = set()
        for low, high in self.ranges:
            if low > high:
                raise SpecificationError(
                    f"The {what} range {low}-{high} runs backwards.", f"Write it as {high}-{low}."
                )
            if high >= count:
                raise SpecificationError(
                    f"There is no {what} {high} in '{self.to_string()}': this model has {count}.",
                    f"Choose from 0-{count - 1}, or * for all.",
                )
            chosen.update(range(low, high + 1))
        return tuple(sorted(chosen))


@dataclass(frozen=True)
class SiteSpec:
    """One site to keep: which tensor, of which layers and heads, for which tokens, stored as what."""

    stack: str
    layers: Numbers
    site: str
    heads: Numbers = Numbers()
    tokens: tuple[str, ...] = ("all",)
    dtype: str | None = None

    @classmethod
    def parse(cls, text: str) -> SiteSpec:
        """Read one site.

        Raises
        ------
        SpecificationError  a part does not parse, or names something that does not exist.
        """
        match = _SITE.fullmatch(text.strip())
        if match is None:
            raise SpecificationError(
                f"The site '{text}' does not parse as stack.layers.site[tokens].",
                "Write it like text.*.resid_post[text], text.8-20.q{0+3}[last], text.5.k[all]:float16.",
            )
        stack, site, dtype = match["stack"], match["site"], match["dtype"]
        _require(stack, STACKS, "stack", text)
        _require(site, SITES, "site", text)
        tokens = _canonical_tokens((match["tokens"] or "all").split("+"), stack, site, text)
        if dtype is not None:
            _require(dtype, DTYPES, "dtype", text)
        if site.endswith("attn_stats") and dtype not in (None, "float32"):
            raise SpecificationError(
                f"{site} are float32, not {dtype} (in '{text}').", "Drop the dtype of this site."
            )
        if match["heads"] is not None and site in RESIDUAL_SITES:
            raise SpecificationError(
                f"The site '{site}' in '{text}' has no heads.",
                f"Select heads of {', '.join(SITES[len(RESIDUAL_SITES) :])} only; drop {{{match['heads']}}}.",
            )
        return cls(
            stack, Numbers.parse(match["layers"]), site, Numbers.parse(match["heads"] or "*"), tokens, dtype
        )

    def to_string(self) -> str:
        """The canonical text of this site, which `parse` reads back to an equal value."""
        heads = "" if self.heads.ranges is None else f"{{{self.heads.to_string()}}}"
        dtype = "" if self.dtype is None else f":{self.dtype}"
        return f"{self.stack}.{self.layers.to_string()}.{self.site}{heads}[{'+'.join(self.tokens)}]{dtype}"

    @property
    def table(self) -> str:
        """Whose tokens the rows are: a stack's, those that cross over (xq), or those read there (xk)."""
        if self.site in CROSS_SITES:
            return "xk" if self.site in KV_SITES else "xq"
        return "vision" if self.stack.startswith("vision") else self.stack

    @property
    def kind(self) -> str:
        """The site's name without the mark of cross-attention: ``xq`` is of kind ``q``."""
        return self.site.removeprefix("x")

    def layer_numbers(self, count: int) -> tuple[int, ...]:
        """The layers meant, in a stack of `count` layers (SpecificationError if one does not exist)."""
        return self.layers.resolve(count, "layer")

    def head_numbers(self, count: int) -> tuple[int, ...]:
        """The heads meant, of `count` (SpecificationError if one does not exist)."""
        return self.heads.resolve(count, "head")

    @property
    def only_last(self) -> bool:
        """Whether this is a residual site of the last prompt token alone, kept along `sample`."""
        return self.tokens == ("last",) and self.site in RESIDUAL_SITES

    @property
    def includes_last(self) -> bool:
        """Whether the last prompt token of a decoder is certainly among the tokens."""
        return self.stack == "text" and bool({"all", "text", "last"} & set(self.tokens))

    @property
    def group(self) -> str:
        """The group of the run that holds this site."""
        return f"{self.stack}/{self.site}_last" if self.only_last else f"{self.stack}/{self.site}"


def parse_sites(texts: Iterable[str] | None) -> tuple[SiteSpec, ...]:
    """Read a whole specification; None means `DEFAULT_SITES`.

    Raises
    ------
    SpecificationError  a site does not parse, or two of them would be stored in one group.
    """
    specs = tuple(SiteSpec.parse(text) for text in (DEFAULT_SITES if texts is None else texts))
    if not specs:
        raise SpecificationError(
            "No site was asked for.", f"Ask for at least one, such as {DEFAULT_SITES[0]}."
        )
    seen: dict[str, SiteSpec] = {}
    for spec in specs:
        if spec.group in seen:
            first, second = seen[spec.group].to_string(), spec.to_string()
            raise SpecificationError(
                f"'{first}' and '{second}' would both be stored as {spec.group}.",
                "Ask for each site once, with layers and tokens joined: text.0+5.resid_post[last+subject].",
            )
        seen[spec.group] = spec
    return specs


def _require(name: str, known: Sequence[str], what: str, text: str) -> None:
    if name not in known:
        raise SpecificationError(
            f"There is no {what} '{name}' (in '{text}').", f"There is: {', '.join(known)}."
        )


def known_tokens(stack: str, site: str) -> tuple[str, ...]:
    """The token selections that a site may have."""
    if stack.startswith("vision") or site in ("xk", "xv"):
        return VISION_TOKENS
    return QFORMER_TOKENS if stack == "qformer" else TOKENS


def _canonical_tokens(tokens: Sequence[str], stack: str, site: str, text: str) -> tuple[str, ...]:
    known = known_tokens(stack, site)
    where = f"{stack}.{site}" if site in ("xk", "xv") else stack
    for name in tokens:
        _require(name, known, f"token selection of {where}", text)
    # Sorted by the order of the table, so that one selection has one spelling in the run's attributes.
    return ("all",) if "all" in tokens else tuple(name for name in known if name in tokens)
