"""Names of models, and loading one: from the registry, a local folder, or the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mechanistic.store.errors import ModelError

from .adapters import adapter_of
from .anatomy import Anatomy, find_anatomy
from .model_names import BUNDLED, REGISTRY, ModelEntry, backend_named
from .processors import load_processor
from .prompts import template_of, tokenizer_of
from .weights_hash import WEIGHTS, hash_parameters, hash_weights

if TYPE_CHECKING:
    from .backend import Backend

DTYPES = ("float32", "float16", "bfloat16")
# Told by other attributes of a run, or deciding nothing about what is computed.
_TOLD = ("dtype", "attn_implementation", "revision", "trust_remote_code", "device_map")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be captured, with its processor and what identifies it.

    Make one with `load_model`, or from objects that you have: ``LoadedModel(model, processor, "mine")``.
    Where another `engine` runs it, `model` has the configuration and the shapes, and no weights.
    """

    model: Any
    processor: Any
    name: str
    repository: str = ""
    revision: str = ""
    folder: Path | None = None
    backend: str = "transformers"
    options: Mapping[str, str] = field(default_factory=dict)
    engine: Backend | None = None

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return tokenizer_of(self.processor)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The model's stacks (ModelError if they cannot be established)."""
        return find_anatomy(self.model)

    @property
    def dtype(self) -> str:
        """Name of the dtype that the model computes in."""
        part = adapter_of(self.model).computes
        model = self.model if part is None else self.model.get_submodule(part)
        return str(model.dtype).removeprefix("torch.")

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weight file, or of the list of several; without files, of the parameters."""
        return hash_weights(self.folder) if self.folder is not None else hash_parameters(self.model)

    def attributes(self) -> dict[str, Any]:
        """The run's attribute `model`."""
        import transformers

        described = {
            "name": self.name,
            "repository": self.repository,
            "revision": self.revision,
            "architecture": type(self.model).__name__,
            "weights_sha256": self.weights_sha256,
            "dtype": self.dtype,
            "attention": str(self.model.config._attn_implementation),
            "backend": self.backend,
            "backend_version": transformers.__version__,
            "options": dict(self.options),
            **quantization_of(self.model.config),
        }
        return described if self.engine is None else {**described, **self.engine.attributes()}

    def processor_attributes(self) -> dict[str, Any]:
        """The run's attribute `processor`."""
        template = template_of(self.processor)
        images = getattr(self.processor, "image_processor", None)
        # A model that reads images alone has an image processor and nothing else.
        words = self.tokenizer if "text" in self.anatomy.stacks else None
        return {
            "class": type(self.processor).__name__,
            "tokenizer": "" if words is None else type(words).__name__,
            "image_processor": type(self.processor if words is None else images).__name__,
            "chat_template": template or "",
        }


def load_model(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    device_map: Any = None,
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    backend: str | None = None,
    engine: Mapping[str, Any] | None = None,
    **options: Any,
) -> LoadedModel:
    """Load a model by registry name, folder or hub id, ready for inference.

    Parameters
    ----------
    dtype
        float32, float16 or bfloat16; absent, what the weights are stored as (spatial-tiny: float32).
    attention
        sdpa or eager; absent, sdpa where the architecture has it.
    backend
        transformers or vllm; absent, what the name stands for, else transformers.
    engine
        Options of vLLM, such as tensor_parallel_size.
    options
        Anything else that `from_pretrained` takes, such as quantization_config.

    Raises
    ------
    ModelError    the name is unknown, files are missing, the weights cannot be loaded, or both `device` and
                  `device_map` are given.
    """
    entry = REGISTRY.get(name)
    source, folder = _source(name, entry)
    revision = revision or (entry.revision if entry is not None else None)
    dtype = dtype or (entry.dtype if entry is not None else None)
    chosen = _torch_dtype(dtype, name)
    if backend_named(name, backend) == "vllm":
        from .vllm_model import load_engine

        return load_engine(
            name,
            source,
            folder,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            options={**(entry.engine if entry is not None else {}), **(engine or {})},
            refused={"device": device, "device_map": device_map, "attention": attention, **options},
        )
    if engine:
        raise ModelError("Engine options are for vLLM alone.", "Add backend='vllm', or --backend vllm.")
    if device is not None and device_map is not None:
        raise ModelError(
            f"A model is put on one device or spread by a map, not both: {device!r}, {device_map!r}.",
            "Leave one of device and device_map out.",
        )
    settings = {
        "dtype": chosen,
        "attn_implementation": attention,
        "device_map": device_map,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        **options,
    }
    return _loaded(name, source, folder, settings, device)


def _loaded(
    name: str, source: str, folder: Path | None, settings: dict[str, Any], device: str | None
) -> LoadedModel:
    """The model as transformers loads it with these `settings`."""
    model, processor = _load(name, source, settings)
    if device is not None:
        model = model.to(device)
    commit = getattr(model.config, "_commit_hash", None) or settings["revision"] or ""
    return LoadedModel(
        model=model.eval(),
        processor=processor,
        name=name,
        repository="" if folder is not None else source,
        revision=commit,
        folder=folder if folder is not None else _snapshot(source, commit),
        options={
            key: repr(_as_dict(value))
            for key, value in settings.items()
            if value is not None and key not in _TOLD
        },
    )


def _as_dict(option: Any) -> Any:
    """Configurations as what they can be made of again."""
    return option.to_dict() if hasattr(option, "to_dict") else option


def quantization_of(config: Any) -> dict[str, str]:
    """What quantised a model's weights, for the run's attribute `model`; nothing where they are not."""
    held = getattr(config, "quantization_config", None)
    if held is None:
        return {}
    method = _as_dict(held)["quant_method"]
    return {"quantization": str(getattr(method, "value", method))}


def _source(name: str, entry: ModelEntry | None) -> tuple[str, Path | None]:
    if name == BUNDLED:
        folder = Path(str(resources.files("mechanistic.capture") / "spatial_tiny"))
    elif entry is not None:
        return entry.repository, None
    else:
        folder = Path(name).expanduser()
        if not folder.exists():
            if name.count("/") == 1 and not name.startswith((".", "/", "~")):
                return name, None
            raise ModelError(
                f"There is no model '{name}': it is neither a known name nor a folder.",
                f"Known names: {', '.join(REGISTRY)}. Or give a folder, or a hub id such as owner/model.",
            )
    check_folder(folder)
    return str(folder), folder


def check_folder(folder: Path) -> None:
    """ModelError naming every file that a model folder lacks."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            missing.append(f"a readable {index.name}")
            continue
        missing += sorted(shard for shard in shards if not (folder / shard).is_file())
    if not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        missing.append("the weights (model.safetensors)")
    if _reads_words(folder) and not any(
        (folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        missing.append("the tokenizer (tokenizer.json)")
    if missing:
        raise ModelError(
            f"The model folder {folder} lacks {', '.join(missing)}.",
            "Copy the whole folder again, or save model and processor into it with save_pretrained.",
        )


def _reads_words(folder: Path) -> bool:
    """Whether the configuration has a vocabulary; one that cannot be read is not excused."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return True
    return "vocab_size" in config or "text_config" in config or "image_size" not in config


def _torch_dtype(dtype: str | None, name: str) -> Any:
    if dtype is None:
        return "auto"
    if dtype not in DTYPES:
        raise ModelError(
            f"'{name}' cannot be loaded as dtype '{dtype}'.", f"The dtypes are {', '.join(DTYPES)}."
        )
    return getattr(torch, dtype)


def _load(name: str, source: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    library: Any = transformers
    hub = {key: settings[key] for key in ("revision", "trust_remote_code")}
    try:
        config = library.AutoConfig.from_pretrained(source, **hub)
        loader = loader_of(config)
        model, loading = loader.from_pretrained(source, output_loading_info=True, **settings)
        processor = load_processor(source, config, **hub)
    # The library and its file formats report a missing, truncated or foreign file in many ways.
    except Exception as cause:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ModelError(
            f"The model '{name}' could not be loaded: {reason}",
            f"Check the folder or the connection, or choose a known name: {', '.join(REGISTRY)}.",
        ) from cause
    # The library makes up what the files lack. Behind all layers nothing reads what a pooler makes of them.
    lacking = sorted(key for key in loading["missing_keys"] if "pooler" not in key.split("."))
    if lacking:
        raise ModelError(
            f"The files of '{name}' lack {len(lacking)} weights of {type(model).__name__}, "
            f"such as {lacking[0]}; they would be random.",
            "Copy the whole folder again; or its config.json names another architecture than was saved.",
        )
    return model, processor


def loader_of(config: Any) -> Any:
    """The class of transformers that loads a model with this configuration."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    saved = (config.architectures or [""])[0]
    # The library takes every BLIP for one that captions, and makes up the decoder of one that matches.
    if config.model_type == "blip" and hasattr(transformers, saved):
        return getattr(transformers, saved)
    # Likewise it would make up the head of a model that was saved without one.
    if saved and saved == auto.MODEL_MAPPING_NAMES.get(config.model_type):
        return transformers.AutoModel
    if config.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _snapshot(repository: str, commit: str) -> Path | None:
    """The folder of the local cache that a hub model was loaded from."""
    from transformers.utils.hub import cached_file

    config = cached_file(repository, "config.json", revision=commit or None, local_files_only=True)
    return Path(config).parent if config is not None else None
