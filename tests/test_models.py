"""Loading models: names, folders with missing files, hashes, and what a run says about the model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llava
from zoo import ZOO, samples
from zoo_refused import REFUSED

from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.models import (
    REGISTRY,
    LoadedModel,
    check_folder,
    hash_parameters,
    hash_weights,
    load_model,
)
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import ModelError, UsageError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "saved"
    loaded = llava()
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_load_model__from_a_folder(saved: Path) -> None:
    loaded = load_model(str(saved))
    assert not loaded.model.training
    assert loaded.weights_sha256 == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    attributes = loaded.attributes()
    assert attributes["name"] == str(saved)
    assert (attributes["dtype"], attributes["attention"]) == ("float32", "sdpa")
    assert json.loads(json.dumps(attributes)) == attributes
    for name, value in llava().model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value, rtol=0, atol=0)


def test_load_model__bundled_computes_in_float32_unless_asked() -> None:
    assert load_model("spatial-tiny").dtype == "float32"
    assert load_model("spatial-tiny", dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("name", ["qwen99", "./nothing", "/nothing/here", "~/nothing/at all"])
def test_load_model__unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(ModelError, match=r"no model .*\n.*spatial-tiny"):
        load_model(name)


def test_load_model__unknown_dtype(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"'float8'\.\n.*float32, float16, bfloat16"):
        load_model(str(saved), dtype="float8")


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", r"lacks config\.json"),
        ("model.safetensors", r"lacks the weights \(model\.safetensors\)"),
        ("tokenizer*", r"lacks the tokenizer"),
    ],
)
def test_load_model__missing_files_are_named(folder: Path, missing: str, says: str) -> None:
    for file in folder.glob(missing):
        file.unlink()
    with pytest.raises(ModelError, match=says):
        load_model(str(folder))


def test_check_folder__missing_shards_are_named(folder: Path) -> None:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors\."):
        check_folder(folder)


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "tokenizer.json"])
def test_load_model__damaged_files_are_two_lines(folder: Path, damage: str) -> None:
    (folder / damage).write_bytes((folder / damage).read_bytes()[:100])
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load_model(str(folder))
    assert len(str(caught.value).splitlines()) == 2


def test_load_model__weights_that_are_not_there_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = sorted(name for name in weights if "layers.1." in name)[0]
    save_file(
        {name: values for name, values in weights.items() if name != lost}, folder / "model.safetensors"
    )
    with pytest.raises(ModelError, match=r"lack 1 weights of Llava\w+, such as .*layers\.1\.") as error:
        load_model(str(folder))
    assert lost.split("layers.1.")[1] in str(error.value)


def test_load_model__a_pooler_that_nothing_reads_may_be_absent(tmp_path: Path) -> None:
    loaded = ZOO["vit"].build()
    loaded.processor.save_pretrained(tmp_path)
    weights = {name: v for name, v in loaded.model.state_dict().items() if "pooler" not in name}
    assert len(weights) < len(loaded.model.state_dict())
    loaded.model.save_pretrained(tmp_path, state_dict=weights)
    kept = load_model(str(tmp_path)).model.state_dict()
    for name, values in weights.items():
        torch.testing.assert_close(kept[name], values, rtol=0, atol=0)


def test_load_model__a_model_saved_without_a_head_gets_none(tmp_path: Path) -> None:
    loaded = ZOO["bert"].build()
    loaded.model.bert.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    model = load_model(str(tmp_path)).model
    assert type(model).__name__ == "BertModel"
    for name, values in loaded.model.bert.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], values, rtol=0, atol=0)


def test_hash_weights__of_several_files_covers_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1")
    (tmp_path / "b.safetensors").write_bytes(b"2")
    one, two = (hashlib.sha256(data).hexdigest() for data in (b"1", b"2"))
    listed = f"{one}  a.safetensors\n{two}  b.safetensors\n".encode()
    assert hash_weights(tmp_path) == hashlib.sha256(listed).hexdigest()


def test_hash_parameters__tells_models_apart() -> None:
    assert hash_parameters(llava().model) == hash_parameters(llava().model)
    assert hash_parameters(llava().model) != hash_parameters(llava(seed=1).model)


def test_registry__leads_somewhere() -> None:
    expected = {
        "spatial-tiny",
        "llava1.5",
        "llava1.6",
        "qwen2vl",
        "qwen2.5vl",
        "qwen3vl",
        "gemma3",
        "paligemma",
        "mllama",
        "blip2",
        "instructblip",
    }
    assert expected <= REGISTRY.keys()
    assert all(entry.repository.count("/") == (name != "spatial-tiny") for name, entry in REGISTRY.items())
    for name, entry in REGISTRY.items():
        assert entry.backend == ("vllm" if name.endswith("-vllm") else "transformers")


def test_load_model__vllm_where_it_is_not_installed_says_how() -> None:
    with pytest.raises(UsageError, match=r"needs vLLM; vllm is not installed\.\n.*vllm>=0\.32,<0\.33"):
        load_model("qwen2vl-vllm")


def test_load_model__unknown_backend() -> None:
    with pytest.raises(ModelError, match=r"no backend 'jax'\.\n.*transformers, vllm"):
        load_model("spatial-tiny", backend="jax")


def test_load_model__engine_options_are_for_vllm() -> None:
    with pytest.raises(ModelError, match=r"for vLLM alone\.\n.*--backend vllm"):
        load_model("spatial-tiny", engine={"max_model_len": 64})


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_vl",
        "llava_onevision",
        "internvl",
        "smolvlm",
        "gemma2",
        "paligemma",
        "qwen3_vl",
        "blip",
        "blip_matching",
        "vit",
        "clip",
    ],
)
def test_load_model__takes_every_family_back_from_a_folder(name: str, tmp_path: Path) -> None:
    loaded = ZOO[name].build()
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert type(again.model) is type(loaded.model)
    assert type(again.processor).__name__ == type(loaded.processor).__name__
    assert again.model.config._attn_implementation == loaded.model.config._attn_implementation
    for sample in samples(ZOO[name])[:2]:
        batches = [
            prepare_batch(each, [sample], 0, max_new_tokens=0, texts=TokenTexts(each.tokenizer))
            for each in (loaded, again)
        ]
        assert batches[0].inputs.keys() == batches[1].inputs.keys()
        for key, value in batches[0].inputs.items():
            torch.testing.assert_close(batches[1].inputs[key], value, rtol=0, atol=0)


def test_load_model__a_blip_that_answers_is_not_taken_for_one_that_captions(tmp_path: Path) -> None:
    REFUSED["blip_that_answers"][0]().save_pretrained(tmp_path)
    ZOO["blip"].build().processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BlipForQuestionAnswering: could not establish"):
        _ = load_model(str(tmp_path)).anatomy


def test_loaded_model__without_files_is_identified_by_its_parameters() -> None:
    loaded = llava()
    assert isinstance(loaded, LoadedModel)
    assert loaded.weights_sha256 == hash_parameters(loaded.model)
