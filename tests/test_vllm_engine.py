"""What the vLLM backend refuses before an engine starts, and what it would tell it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from tiny_models import llava

from mechanistic.capture.engine_options import engine_options
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.sites import resolve_sites
from mechanistic.capture.specification import parse_sites
from mechanistic.capture.token_table import no_words
from mechanistic.capture.vllm_engine import FIXED, check_options, check_version, is_supported
from mechanistic.capture.vllm_plan import Plan, check_sites
from mechanistic.store.errors import SpecificationError, UsageError


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return llava()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.32.0", True),
        ("0.32.4+cpu", True),
        ("0.31.9", False),
        ("0.33.0", False),
        ("1.0", False),
        ("dev", False),
        ("0.32", True),
    ],
)
def test_is_supported__is_the_tested_range(version: str, expected: bool) -> None:
    assert is_supported(version) is expected


def test_check_version__another_version_is_named_with_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign: Any = ModuleType("vllm")
    foreign.__version__ = "0.19.1"
    monkeypatch.setitem(sys.modules, "vllm", foreign)
    with pytest.raises(
        UsageError, match=r"vLLM 0\.19\.1 is not one of .*0\.32 to before 0\.33.*\n.*pip install"
    ):
        check_version()
    foreign.__version__ = "0.32.1"
    assert check_version() == "0.32.1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enforce_eager", False),
        ("enable_prefix_caching", True),
        ("pipeline_parallel_size", 2),
        ("data_parallel_size", 2),
        ("speculative_config", {"method": "ngram"}),
        ("enable_lora", True),
        ("worker_extension_cls", "my.Extension"),
    ],
)
def test_check_options__refuses_what_would_lose_tokens(name: str, value: Any) -> None:
    check_options({name: FIXED[name][0], "tensor_parallel_size": 2})
    with pytest.raises(UsageError, match=rf"{name}=.* cannot be captured with: .*\n.*Leave it out"):
        check_options({name: value})


def test_engine_options__are_words_of_python_or_text() -> None:
    given = ["max_model_len=4096", "model_impl=transformers", "quiet=True", 'limit={"image": 2}', "a=b=c"]
    assert engine_options(given) == {
        "max_model_len": 4096,
        "model_impl": "transformers",
        "quiet": True,
        "limit": {"image": 2},
        "a": "b=c",
    }


@pytest.mark.parametrize("texts", [["max_model_len"], ["=3"], ["a-b=3"], ["a=1", "a=2"]])
def test_engine_options__must_be_key_and_value(texts: list[str]) -> None:
    with pytest.raises(UsageError, match=r"is not KEY=VALUE, or is given twice\.\n.*--engine-option"):
        engine_options(texts)


def test_check_sites__the_image_encoder_is_refused_with_the_reason(loaded: LoadedModel) -> None:
    sites = resolve_sites(parse_sites(["text.*.q", "vision.*.resid_post"]), loaded.anatomy, "float32")
    with pytest.raises(SpecificationError, match=r"vision\.\*\.resid_post.* on vLLM: .*\n.*--backend transf"):
        check_sites(sites)


def test_plan__is_the_union_of_what_sites_need(loaded: LoadedModel) -> None:
    asked = ["text.0.attn_stats[text]", "text.2.q[last]", "text.1-2.resid_post[last+image]", "text.*.k{1}"]
    plan = Plan.of(resolve_sites(parse_sites(asked), loaded.anatomy, "float32"))
    assert plan.layers == {"q": (0, 2), "k": (0, 1, 2), "resid_post": (1, 2)}
    assert plan.tokens == {"q": ("all", "last"), "k": ("all",), "resid_post": ("image", "last")}
    assert plan.to_dict()["resid_post"] == {"layers": [1, 2], "selection": "image+last"}
    assert set(plan.wanted(no_words(0))) == {"all+last", "all", "image+last"}
