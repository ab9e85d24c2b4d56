"""The site grammar: what parses, what it means, and what is refused with the names of what exists."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechanistic.capture.specification import (
    ATTENTION_SITES,
    DTYPES,
    SITES,
    STACKS,
    Numbers,
    SiteSpec,
    known_tokens,
    parse_sites,
)
from mechanistic.capture.token_table import select
from mechanistic.store.errors import SpecificationError


def test_parse__reads_every_part() -> None:
    spec = SiteSpec.parse("text.0+3+8-10.q{1+4-5}[last+subject]:float16")
    assert (spec.stack, spec.site, spec.dtype) == ("text", "q", "float16")
    assert spec.layer_numbers(12) == (0, 3, 8, 9, 10)
    assert spec.head_numbers(8) == (1, 4, 5)
    # In the order of the grammar's table, whatever the order asked.
    assert spec.tokens == ("subject", "last")
    assert spec.to_string() == "text.0+3+8-10.q{1+4-5}[subject+last]:float16"


@pytest.mark.parametrize(
    ("text", "canonical", "group"),
    [
        ("text.*.resid_post", "text.*.resid_post[all]", "text/resid_post"),
        ("text.*.resid_post[last]", "text.*.resid_post[last]", "text/resid_post_last"),
        ("text.5.resid_post[last+all]", "text.5.resid_post[all]", "text/resid_post"),
        ("text.5.q[last]", "text.5.q[last]", "text/q"),
        (" vision.*.k[image] ", "vision.*.k[image]", "vision/k"),
        ("text.3.xq[text]", "text.3.xq[text]", "text/xq"),
        ("qformer.*.xk", "qformer.*.xk[all]", "qformer/xk"),
    ],
)
def test_parse__has_one_spelling_and_one_group(text: str, canonical: str, group: str) -> None:
    spec = SiteSpec.parse(text)
    assert (spec.to_string(), spec.group) == (canonical, group)


@st.composite
def specs(draw: st.DrawFn) -> SiteSpec:
    number = st.integers(0, 99)
    ranges = st.lists(
        st.tuples(number, number).map(lambda pair: (min(pair), max(pair))), min_size=1, max_size=4
    )
    numbers = st.none() | ranges.map(tuple)
    stack, site = draw(st.sampled_from(STACKS)), draw(st.sampled_from(SITES))
    known = known_tokens(stack, site)
    chosen = draw(st.sets(st.sampled_from(known), min_size=1))
    return SiteSpec(
        stack,
        Numbers(draw(numbers)),
        site,
        Numbers(draw(numbers)) if site in ATTENTION_SITES else Numbers(),
        ("all",) if "all" in chosen else tuple(name for name in known if name in chosen),
        draw(st.none() | st.sampled_from(["float32"] if site.endswith("attn_stats") else DTYPES)),
    )


@given(specs())
def test_to_string__is_read_back_to_the_same_value(spec: SiteSpec) -> None:
    assert SiteSpec.parse(spec.to_string()) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resid_post", "does not parse as stack.layers.site"),
        ("text.five.resid_post", "does not parse"),
        ("text.*.resid_post[]", "does not parse"),
        ("audio.*.q", "no stack 'audio'.*\n.*text, vision"),
        ("text.*.residual", "no site 'residual'.*\n.*resid_post"),
        ("text.*.q[words]", "no token selection of text 'words'.*\n.*subject"),
        ("text.*.xk[subject]", "no token selection of text.xk 'subject'.*\n.*all, image"),
        ("qformer.*.q[last]", "no token selection of qformer 'last'.*\n.*all, text, image"),
        ("vision.*.q[subject]", "no token selection of vision 'subject'.*\n.*all, image"),
        ("text.*.q:bfloat16", "no dtype 'bfloat16'.*\n.*float16, float32"),
        ("text.*.resid_post{0}", "has no heads"),
    ],
)
def test_parse__refuses_and_says_what_there_is(text: str, says: str) -> None:
    with pytest.raises(SpecificationError, match=says):
        SiteSpec.parse(text)


def test_layer_numbers__names_the_layers_that_exist() -> None:
    with pytest.raises(SpecificationError, match=r"no layer 32 .* has 32\.\n.*0-31"):
        SiteSpec.parse("text.30-32.q").layer_numbers(32)
    with pytest.raises(SpecificationError, match="runs backwards"):
        SiteSpec.parse("text.5-3.q").layer_numbers(32)


def test_parse_sites__takes_each_group_once() -> None:
    groups = ["text/attn_stats", "text/resid_post", "text/q", "text/k"]
    assert [spec.group for spec in parse_sites(None)] == groups
    side_by_side = parse_sites(["text.5.resid_post[subject]", "text.*.resid_post[last]"])
    assert [spec.group for spec in side_by_side] == ["text/resid_post", "text/resid_post_last"]
    with pytest.raises(SpecificationError, match="would both be stored as text/q"):
        parse_sites(["text.0.q", "text.1.q"])
    with pytest.raises(SpecificationError, match="No site"):
        parse_sites([])


def test_select__takes_the_union() -> None:
    columns = {
        "kind": np.array([2, 1, 1, 0, 0, 2, 3], np.int8),
        "is_subject": np.arange(7) == 3,
        "is_last_prompt": np.arange(7) == 5,
    }
    assert np.flatnonzero(select(columns, ("all",))).tolist() == list(range(7))
    assert np.flatnonzero(select(columns, ("text",))).tolist() == [0, 3, 4, 5, 6]
    assert np.flatnonzero(select(columns, ("image",))).tolist() == [1, 2]
    assert np.flatnonzero(select(columns, ("answer",))).tolist() == [6]
    assert np.flatnonzero(select(columns, ("subject", "last"))).tolist() == [3, 5]


def test_specification__and_the_command_line_load_no_torch() -> None:
    modules = "mechanistic.capture.specification, mechanistic.capture.cli"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
