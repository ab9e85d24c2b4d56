"""What the vLLM backend refuses before an engine starts, and what it would tell it."""

from __future__ import annotations

import multiprocessing
import re
import sys
from types import ModuleType
from typing import Any

import pytest
from tiny_models import llava
from zoo import ZOO

from mechanistic.capture.loading_options import parse_options
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.sites import resolve_sites
from mechanistic.capture.specification import parse_sites
from mechanistic.capture.token_table import no_words
from mechanistic.capture.vllm_encoder import check_encoder
from mechanistic.capture.vllm_engine import FIXED, Engine, check_options, check_version, is_supported
from mechanistic.capture.vllm_plan import Plan, check_sites
from mechanistic.store.errors import ModelError, SpecificationError, UsageError


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


def test_engine__says_how_a_dask_worker_may_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Any = ModuleType("vllm")
    ours.__version__ = "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", ours)
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(ModelError, match=r"daemonic.*\n.*--no-nanny.*in_process=true"):
        Engine("model")


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


def test_parse_options__are_words_of_python_or_text() -> None:
    given = ["max_model_len=4096", "model_impl=transformers", "quiet=True", 'limit={"image": 2}', "a=b=c"]
    given += ["in_process=false", "cap=none"]
    assert parse_options("--engine-option", given) == {
        "in_process": False,
        "cap": None,
        "max_model_len": 4096,
        "model_impl": "transformers",
        "quiet": True,
        "limit": {"image": 2},
        "a": "b=c",
    }


@pytest.mark.parametrize("texts", [["max_model_len"], ["=3"], ["a-b=3"], ["a=1", "a=2"]])
def test_parse_options__must_be_key_and_value(texts: list[str]) -> None:
    with pytest.raises(UsageError, match=r"is not KEY=VALUE, or is given twice\.\n.*--engine-option"):
        parse_options("--engine-option", texts)


@pytest.mark.parametrize("site", ["text.*.xq", "vision_global.*.resid_post"])
def test_check_sites__what_no_engine_shows_is_refused_with_the_reason(site: str) -> None:
    anatomy = ZOO["mllama"].build().anatomy
    sites = resolve_sites(parse_sites(["text.*.resid_post", site]), anatomy, "float32")
    with pytest.raises(SpecificationError, match=rf"{re.escape(site)}.* on vLLM: .*\n.*--backend transf"):
        check_sites(sites)
    check_sites(sites[:1])


def told(layers: int, *, kind: str = "CLIPEncoderLayer", problem: str | None = None) -> dict[str, Any]:
    """What a worker says of an image encoder."""
    return {"layers": [{"number": at, "class": kind} for at in range(layers)], "problem": problem}


@pytest.mark.parametrize(
    ("family", "encoder", "says"),
    [
        ("llava", told(2, problem="it is two stacks."), "it is two stacks"),
        ("llava", told(2, kind="PixtralLayer"), "in which order PixtralLayer sees the patches of a 'llava'"),
        ("pixtral", told(2), "sees the patches of a 'pixtral' was never compared"),
        ("llava", told(0), "was never compared"),
        ("llava", told(1), r"vision\.1 is not there .* runs 1 of the 2 layers.*\n.*vision\.0-0"),
    ],
)
def test_check_encoder__what_is_not_certain_is_refused_with_the_reason(
    loaded: LoadedModel, family: str, encoder: dict[str, Any], says: str
) -> None:
    sites = resolve_sites(parse_sites(["vision.*.resid_post"]), loaded.anatomy, "float32")
    stack = loaded.anatomy.stack("vision")
    check_encoder(told(2), stack, "llava", sites)
    with pytest.raises(SpecificationError, match=f"(?s){says}"):
        check_encoder(encoder, stack, family, sites)


def test_plan__is_the_union_of_what_sites_need(loaded: LoadedModel) -> None:
    asked = [
        "text.0.attn_stats[text]",
        "text.2.q[last]",
        "text.1-2.resid_post[last+image]",
        "text.*.k{1}",
        "vision.0.resid_post",
    ]
    plan = Plan.of(resolve_sites(parse_sites(asked), loaded.anatomy, "float32"))
    assert plan.layers == {
        "text/q": (0, 2),
        "text/k": (0, 1, 2),
        "text/resid_post": (1, 2),
        "vision/resid_post": (0,),
    }
    assert plan.tokens == {
        "text/q": ("all", "last"),
        "text/k": ("all",),
        "text/resid_post": ("image", "last"),
        "vision/resid_post": ("all",),
    }
    assert plan.to_dict()["text/resid_post"] == {"layers": [1, 2], "selection": "text/image+last"}
    labels = {"text": no_words(0), "vision": no_words(0)}
    assert set(plan.wanted(labels)) == {"text/all+last", "text/all", "text/image+last", "vision/all"}
