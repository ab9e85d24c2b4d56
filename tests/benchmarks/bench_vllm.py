"""What capturing costs on vLLM: residuals of all layers into a run on disk, against plain generation.

`make bench-vllm` also installs the peer, beside the environment and not into it. CPU seconds are those of one
process that holds the engine, the capture and the writer; the rounds of a ratio take turns. A second process
does the same with vllm-lens, which returns the same residuals in memory, against plain rounds of its own.

python tests/benchmarks/bench_vllm.py [--peer FOLDER] [--rounds 3] [--num-samples 256]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "vllm_backend")]
LAYERS, WIDTH, WORDS = 8, 512, 120
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "OMP_NUM_THREADS": "1",
}
ENGINE: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 64, "max_num_batched_tokens": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, help="folder that vllm-lens is installed into")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--only", choices=("capture", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure = {"capture": with_capture, "peer": with_peer}[args.only]
        measure(args.model, questions(args.num_samples), args.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        command = [sys.executable, __file__, "--model", folder, "--rounds", str(args.rounds)]
        command += ["--num-samples", str(args.num_samples), "--only"]
        subprocess.run([*command, "capture"], check=True, env=os.environ | SETTINGS)
        if args.peer is None:
            print("vllm-lens: not measured, no --peer given")
            return
        path = os.pathsep.join([str(args.peer.absolute()), os.environ.get("PYTHONPATH", "")])
        subprocess.run([*command, "peer"], check=True, env=os.environ | SETTINGS | {"PYTHONPATH": path})


def save(folder: Path) -> None:
    """A Llama of random weights and a tokenizer of words."""
    from zoo_parts import HUB, TEXT, grown, tokenizer

    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    made = grown(HUB.LlamaForCausalLM(HUB.LlamaConfig(**{**TEXT, **sizes, **heads})), tokenizer(), "bench")
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)


def questions(count: int) -> list[str]:
    """Prompts of about 120 tokens, all different."""
    text = "where is the red square relative to blue circle and ring cross left right above below"
    words = text.split(" ")
    lengths = [WORDS - number % 8 for number in range(count)]
    return [
        " ".join(words[(i + j * (i + 1)) % len(words)] for j in range(length))
        for i, length in enumerate(lengths)
    ]


def batches(prompts: list[str]) -> list[list[str]]:
    """The same batches for all, as many prompts as the engine takes at once."""
    size = ENGINE["max_num_seqs"]
    return [prompts[first : first + size] for first in range(0, len(prompts), size)]


def in_turns(rounds: int, ways: dict[str, Callable[[int], None]]) -> dict[str, float]:
    """CPU seconds of the best round of each way, the first round of all being for warming up."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            begun = time.process_time()
            run(number)
            spent[name].append(time.process_time() - begun)
    best = {name: min(each[1:]) for name, each in spent.items()}
    plain = best["plain generate"]
    for name, seconds in best.items():
        print(f"{name:44}{seconds:8.2f} CPU s{seconds / plain:8.2f} x", flush=True)
    return best


def with_capture(model: Path, prompts: list[str], rounds: int) -> None:
    """Plain rounds of an engine, and rounds that write a run."""
    from tiny_models import Listed
    from vllm import SamplingParams

    from mechanistic.capture.dataset import Sample
    from mechanistic.capture.job import capture_run
    from mechanistic.capture.models import load_model
    from mechanistic.capture.vllm_backend import VllmBackend

    loaded = load_model(str(model), backend="vllm", engine={**ENGINE, "in_process": True})
    backend = loaded.engine
    assert isinstance(backend, VllmBackend)
    engine, sampling = backend.engine, SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    data = Listed(tuple(Sample(f"s{i}", (), text, (), None) for i, text in enumerate(prompts)))

    def plain(number: int) -> None:
        backend.unwatch()
        for batch in batches(prompts):
            engine.llm.generate(batch, sampling, use_tqdm=False)

    def captured(name: str, sites: tuple[str, ...]) -> Callable[[int], None]:
        def run(number: int) -> None:
            capture_run(
                loaded,
                data,
                Path(folder) / f"{name}-{number}",
                sites=sites,
                batch_size=ENGINE["max_num_seqs"],
                max_new_tokens=0,
                quiet=True,
            )

        return run

    residuals = ("text.*.resid_post",)
    with tempfile.TemporaryDirectory() as folder:
        in_turns(
            rounds,
            {
                "plain generate": plain,
                "resid_post of all layers, to a run": captured("post", residuals),
                "resid_post, q and k, to a run": captured(
                    "qk", ("text.*.resid_post", "text.*.q", "text.*.k")
                ),
            },
        )
    backend.close()


def with_peer(model: Path, prompts: list[str], rounds: int) -> None:
    """Plain rounds of an engine of its own, and rounds that return residuals."""
    from vllm import LLM, SamplingParams

    fixed = {"enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True}
    llm = LLM(model=str(model), dtype="float32", **fixed, **ENGINE)
    plain = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    asked = {"output_residual_stream": list(range(LAYERS))}
    wanted = SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args=asked)

    def returned(number: int) -> None:
        for batch in batches(prompts):
            for output in llm.generate(batch, wanted, use_tqdm=False):
                held: Any = output.activations["residual_stream"]  # type: ignore[attr-defined]
                assert held.shape[0] == LAYERS

    def without(number: int) -> None:
        for batch in batches(prompts):
            llm.generate(batch, plain, use_tqdm=False)

    in_turns(
        rounds,
        {
            "plain generate": without,
            "vllm-lens: residuals of all layers, in memory": returned,
        },
    )


if __name__ == "__main__":
    main()
