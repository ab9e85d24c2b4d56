"""Loading a model into vLLM: its shapes here, from the configuration alone, and its weights in the engine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mechanistic.store.errors import ModelError, UsageError

from .models import LoadedModel, loader_of
from .processors import load_processor
from .proof import TOLERANCE


def load_engine(
    name: str,
    source: str,
    folder: Path | None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    options: dict[str, Any],
    refused: dict[str, Any],
) -> LoadedModel:
    """Describe a model as `load_model` does; its engine starts when the first prompt goes to it.

    Parameters
    ----------
    options
        What `vllm.LLM` takes; and `in_process`, to run without processes of its own.
    refused
        Arguments of `load_model` that an engine has no use for, with their values.

    Raises
    ------
    UsageError    vLLM is missing or of another version, or an option cannot be kept.
    ModelError    the configuration cannot be read.
    """
    from .vllm_engine import Engine, check_options, check_version

    check_version()
    check_options(options)
    given = [key for key, value in refused.items() if value is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)} cannot be chosen on vLLM.",
            "Its options are given as engine={...}, or --engine-option tensor_parallel_size=2, and so on.",
        )
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    # Before the engine starts: in this process it replaces parts of transformers' classes by its own.
    loaded = replace(_shapes(name, source, dtype, hub), folder=folder)
    settings = {**hub, "dtype": loaded.dtype, **options}
    from .vllm_backend import VllmBackend

    backend = VllmBackend(partial(Engine, source, **settings), loaded)
    commit = getattr(loaded.model.config, "_commit_hash", None) or revision or ""
    described = replace(
        loaded,
        repository="" if folder is not None else source,
        revision=commit,
        backend="vllm",
        # Where it runs decides nothing about what is computed.
        options={key: repr(value) for key, value in options.items() if key != "in_process"},
        engine=backend,
    )
    backend.loaded = described
    return described


def _shapes(name: str, source: str, dtype: str | None, hub: dict[str, Any]) -> LoadedModel:
    """The model without weights."""
    import transformers

    library: Any = transformers
    try:
        config = library.AutoConfig.from_pretrained(source, **hub)
        chosen = dtype or str(config.dtype or torch.float32).removeprefix("torch.")
        with torch.device("meta"):
            model = loader_of(config).from_config(config, dtype=getattr(torch, chosen))
        processor = load_processor(source, config, **hub)
        model.generation_config = _generation(library, source, hub, model)
    # As in `models.load_model`: the library reports what is wrong with a folder in many ways.
    except Exception as cause:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ModelError(
            f"The model '{name}' could not be read: {reason}", "Check the folder or the connection."
        ) from cause
    if chosen not in TOLERANCE:
        raise ModelError(
            f"'{name}' computes in {chosen}, which cannot be captured.",
            f"Load it with dtype= one of {', '.join(TOLERANCE)}.",
        )
    loaded = LoadedModel(model=model.eval(), processor=processor, name=name)
    # Found now and kept, for the same reason.
    _ = loaded.anatomy
    return loaded


def _generation(library: Any, source: str, hub: dict[str, Any], model: Any) -> Any:
    try:
        return library.GenerationConfig.from_pretrained(source, **hub)
    # A model without a file of such settings generates by its configuration.
    except OSError:
        return model.generation_config
