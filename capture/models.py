"""Names of models, and loading one: from the registry, a local folder, or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from mechanistic.store.errors import ModelError

from .anatomy import Anatomy, find_anatomy
from .processors import load_processor
from .prompts import template_of, tokenizer_of

BUNDLED = "spatial-tiny"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ModelEntry:
    """What a short name stands for."""

    repository: str
    revision: str | None = None
    backend: str = "transformers"
    dtype: str | None = None


REGISTRY: Mapping[str, ModelEntry] = {
    # Stored as bfloat16 to be small; computed in float32, which a CPU does faster.
    BUNDLED: ModelEntry("bundled", dtype="float32"),
    "llava1.5": ModelEntry("llava-hf/llava-1.5-7b-hf"),
    "llava1.5-13b": ModelEntry("llava-hf/llava-1.5-13b-hf"),
    "llava1.6": ModelEntry("llava-hf/llava-v1.6-vicuna-7b-hf"),
    "llava1.6-mistral": ModelEntry("llava-hf/llava-v1.6-mistral-7b-hf"),
    "llava-onevision": ModelEntry("llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    "qwen2vl": ModelEntry("Qwen/Qwen2-VL-7B-Instruct"),
    "qwen2vl-2b": ModelEntry("Qwen/Qwen2-VL-2B-Instruct"),
    "qwen2vl-vllm": ModelEntry("Qwen/Qwen2-VL-7B-Instruct", backend="vllm"),
    "qwen2.5vl": ModelEntry("Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen2.5vl-3b": ModelEntry("Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen2.5vl-vllm": ModelEntry("Qwen/Qwen2.5-VL-7B-Instruct", backend="vllm"),
    "qwen3vl": ModelEntry("Qwen/Qwen3-VL-8B-Instruct"),
    "qwen3vl-vllm": ModelEntry("Qwen/Qwen3-VL-8B-Instruct", backend="vllm"),
    "gemma3": ModelEntry("google/gemma-3-4b-it"),
    "gemma3-12b": ModelEntry("google/gemma-3-12b-it"),
    "paligemma": ModelEntry("google/paligemma-3b-mix-224"),
    "paligemma2": ModelEntry("google/paligemma2-3b-mix-224"),
    "internvl": ModelEntry("OpenGVLab/InternVL3-8B-hf"),
    "smolvlm": ModelEntry("HuggingFaceTB/SmolVLM-Instruct"),
    "idefics3": ModelEntry("HuggingFaceM4/Idefics3-8B-Llama3"),
    "clip": ModelEntry("openai/clip-vit-large-patch14-336"),
    "siglip": ModelEntry("google/siglip-so400m-patch14-384"),
    "vit": ModelEntry("google/vit-base-patch16-224"),
    "dinov2": ModelEntry("facebook/dinov2-base"),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be captured, with its processor and what identifies it.

    Make one with `load_model`, or from objects that you have: ``LoadedModel(model, processor, "mine")``.
    """

    model: Any
    processor: Any
    name: str
    repository: str = ""
    revision: str = ""
    folder: Path | None = None
    backend: str = "transformers"
    options: Mapping[str, str] = field(default_factory=dict)

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
        return str(self.model.dtype).removeprefix("torch.")

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weight file, or of the list of several; without files, of the parameters."""
        return hash_weights(self.folder) if self.folder is not None else hash_parameters(self.model)

    def attributes(self) -> dict[str, Any]:
        """The run's attribute `model`."""
        import transformers

        return {
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
        }

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
    **options: Any,
) -> LoadedModel:
    """Load a model by registry name, folder or hub id, ready for inference.

    Parameters
    ----------
    dtype
        float32, float16 or bfloat16; absent, what the weights are stored as (spatial-tiny: float32).
    attention
        sdpa or eager; absent, sdpa where the architecture has it.
    options
        Anything else that `from_pretrained` takes, such as quantization_config.

    Raises
    ------
    ModelError    the name is unknown, files are missing, or the weights cannot be loaded.
    """
    entry = REGISTRY.get(name)
    if entry is not None and entry.backend != "transformers":
        raise ModelError(
            f"'{name}' runs on {entry.backend}, which is not available yet.",
            f"Take '{name.removesuffix(f'-{entry.backend}')}', the same model through transformers.",
        )
    source, folder = _source(name, entry)
    revision = revision or (entry.revision if entry is not None else None)
    dtype = dtype or (entry.dtype if entry is not None else None)
    settings = {
        "dtype": _torch_dtype(dtype, name),
        "attn_implementation": attention,
        "device_map": device_map,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        **options,
    }
    model, processor = _load(name, source, settings)
    if device is not None and device_map is None:
        model = model.to(device)
    commit = getattr(model.config, "_commit_hash", None) or revision or ""
    return LoadedModel(
        model=model.eval(),
        processor=processor,
        name=name,
        repository="" if folder is not None else source,
        revision=commit,
        folder=folder if folder is not None else _snapshot(source, commit),
        options={key: repr(value) for key, value in {"device_map": device_map, **options}.items() if value},
    )


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
        loader = _loader(config)
        model = loader.from_pretrained(source, **settings)
        processor = load_processor(source, config, **hub)
    # The library and its file formats report a missing, truncated or foreign file in many ways.
    except Exception as cause:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ModelError(
            f"The model '{name}' could not be loaded: {reason}",
            f"Check the folder or the connection, or choose a known name: {', '.join(REGISTRY)}.",
        ) from cause
    return model, processor


def _loader(config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

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


def hash_weights(folder: Path) -> str:
    """SHA-256 of the one weight file in a folder, or of the lines "hash  name" of several."""
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    hashes = {file.name: _hash_file(file) for file in files}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(
        "".join(f"{value}  {name}\n" for name, value in hashes.items()).encode()
    ).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_parameters(model: Any) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
