"""What capturing residual stream, queries and keys costs, against a bare forward and two peers.

python tests/benchmarks/bench_capture.py [--samples 16] [--layers 12] [--width 768] [--repeats 3]

A decoder of random weights in float32 on one thread. Each contender is a process of its own, so that its peak
memory is its own; they take turns, and the figures are medians over the turns. CPU seconds are those of all
threads of the process. What is proven at attach is outside of the turns, and printed by itself.

Peers, written as their documentation recommends: transformers with output_hidden_states and
output_attentions, and nnsight reading the layers' outputs and the arguments of the attention function, both
with torch.save.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.batch_job import Job
from mechanistic.capture.dataset import Sample
from mechanistic.capture.forward import capture_forward
from mechanistic.capture.interruption import Interruption
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.progress import Progress
from mechanistic.capture.room import Room
from mechanistic.capture.run_description import CaptureSettings
from mechanistic.capture.specification import parse_sites
from mechanistic.capture.token_table import TokenTexts
from mechanistic.capture.train_architecture import BEGIN, END, PAD, WORDS

SITES = ("text.*.resid_post", "text.*.q", "text.*.k")
PEERS = ("transformers", "nnsight")
TARGETS = {"hooks": 1.10, "store": 1.25}
MEMORY_TARGET = 1.5


class Questions:
    """Samples of unequal length, up to 512 words."""

    name = "bench"

    def __init__(self, count: int) -> None:
        self.count = count

    def fingerprint(self) -> str:
        return str(self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Sample:
        words = [
            WORDS[8 + (7 * index + 3 * place) % (len(WORDS) - 8)] for place in range(511 - 16 * (index % 4))
        ]
        return Sample(sample_id=str(index), images=(), question=" ".join(words))


def build(layers: int, width: int, attention: str) -> LoadedModel:
    """A Llama of random weights that reads words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    config._attn_implementation = attention
    return LoadedModel(LlamaForCausalLM(config).eval(), tokenizer, "random-llama")


class Contender:
    """One way of running the model over all samples; `turn` is one pass, into a new folder."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.loaded = build(arguments.layers, arguments.width, "eager" if name == "transformers" else "sdpa")
        self.dataset = Questions(arguments.samples)
        self.settings = CaptureSettings(parse_sites(SITES), arguments.batch_size, 0, images=False)
        self.job = Job(self.loaded, self.dataset, Path(), self.settings)
        self.plan = [batch for window in self.job.windows(self.job.span) for batch in self.job.plan(window)]
        self.texts = TokenTexts(self.loaded.tokenizer)
        self.turn: Callable[[Path], Any] = getattr(self, name)
        self.proof_seconds = 0.0

    def ready(self) -> None:
        """What is done once for a whole job."""
        if self.turn.__name__ in ("hooks", "store"):
            before = cpu_seconds()
            assert self.job.proof is not None
            self.proof_seconds = cpu_seconds() - before

    def inputs(self) -> Iterator[Batch]:
        """The batches, as a job makes them."""
        for numbers in self.plan:
            asked = [self.dataset[number] for number in numbers]
            yield prepare_batch(self.loaded, asked, 0, max_new_tokens=0, texts=self.texts)

    def forward(self, folder: Path) -> None:
        """Nothing is kept."""
        import torch

        with torch.no_grad():
            for batch in self.inputs():
                self.loaded.model(**batch.inputs, use_cache=False, logits_to_keep=1)

    def hooks(self, folder: Path) -> None:
        """Everything but the store."""
        proof, room = self.job.proof, Room()
        for batch in self.inputs():
            capture_forward(self.loaded, batch, self.job.sites, proof.halves, proof.rules, room)

    def store(self, folder: Path) -> None:
        """A whole job."""
        self.job.path = self.job.root = folder / "run"
        progress = Progress(len(self.dataset), stream=io.StringIO(), quiet=True)
        with self.job.open() as writer:
            self.job.run(writer, progress, Interruption())

    def transformers(self, folder: Path) -> None:
        """What the library returns by itself."""
        import torch

        wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
        with torch.no_grad():
            for number, batch in enumerate(self.inputs()):
                output = self.loaded.model(**batch.inputs, **wanted, logits_to_keep=1)
                kept = {"hidden_states": output.hidden_states, "attentions": output.attentions}
                torch.save(kept, folder / f"{number}.pt")

    def nnsight(self, folder: Path) -> None:
        """The same tensors, read off the modules in a trace."""
        import nnsight
        import torch
        from nnsight import NNsight

        model = NNsight(self.loaded.model)
        for number, batch in enumerate(self.inputs()):
            with torch.no_grad(), model.trace(**batch.inputs, use_cache=False, logits_to_keep=1):
                kept = nnsight.save([])
                for layer in model.model.layers:
                    given = layer.self_attn.source.attention_interface_1.inputs[0]
                    kept.append({"q": given[1], "k": given[2], "resid_post": layer.output})
            torch.save(kept, folder / f"{number}.pt")


CONTENDERS = ("forward", "hooks", "store", *PEERS)


def cpu_seconds() -> float:
    """User and system time of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def serve(name: str, arguments: argparse.Namespace) -> None:
    """One contender: a turn for each line on stdin, its figures as a line on stdout."""
    import torch

    torch.set_num_threads(1)
    contender = Contender(name, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        contender.ready()
        print(json.dumps({"proof": contender.proof_seconds}), flush=True)
        for number, _ in enumerate(sys.stdin):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            before = cpu_seconds()
            contender.turn(folder)
            cpu = cpu_seconds() - before
            written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            shutil.rmtree(folder)
            print(json.dumps({"cpu": cpu, "peak": peak, "written": written}), flush=True)


@contextmanager
def started(name: str) -> Iterator[subprocess.Popen[str]]:
    """The process of one contender."""
    command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def answer(process: subprocess.Popen[str], ask: str = "") -> dict[str, float]:
    """One line of a contender; SystemExit if it died, which a benchmark without a peer does."""
    assert process.stdin is not None
    assert process.stdout is not None
    if ask:
        process.stdin.write(f"{ask}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args[-1]} failed")  # type: ignore[index]
    found: dict[str, float] = json.loads(line)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Figures of every turn; the first, which warms up, is left out but for its peak."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}

    with ExitStack() as running:
        processes = {name: running.enter_context(started(name)) for name in CONTENDERS}
        proof = {name: answer(process)["proof"] for name, process in processes.items()}
        for repeat in range(arguments.repeats + 1):
            for name, process in processes.items():
                figures = answer(process, "turn")
                turns[name] += [figures] if repeat else []
    print(f"proof at attach, once a job: {proof['store']:.2f} CPU seconds")
    return turns


def report(turns: dict[str, list[dict[str, float]]]) -> None:
    """The table, and which targets are met."""
    names = {name: f"{name} {importlib.metadata.version(name)}" for name in PEERS}
    bare = median(turn["cpu"] for turn in turns["forward"])
    floor = max(turn["peak"] for turn in turns["forward"])
    print(f"{'':24}{'CPU s':>8}{'x forward':>11}{'peak MB':>9}{'x forward':>11}{'on disk MB':>12}")
    missed = []
    for name, figures in turns.items():
        cpu, peak = median(turn["cpu"] for turn in figures), max(turn["peak"] for turn in figures)
        ratios = [turn["cpu"] / base["cpu"] for turn, base in zip(figures, turns["forward"], strict=True)]
        written = figures[-1]["written"]
        print(f"{names.get(name, name):24}{cpu:8.2f}{cpu / bare:11.2f}", end="")
        print(f"{peak / 1e6:9.0f}{peak / floor:11.2f}{written / 1e6:12.0f}", end="")
        print(f"   ({min(ratios):.2f} to {max(ratios):.2f} over the turns)")
        if cpu / bare > TARGETS.get(name, float("inf")):
            missed.append(f"{name}: {cpu / bare:.2f} of a forward, target {TARGETS[name]}")
        if name in TARGETS and peak / floor > MEMORY_TARGET:
            missed.append(f"{name}: {peak / floor:.2f} of its memory, target {MEMORY_TARGET}")
    print("targets met" if not missed else "targets missed: " + "; ".join(missed))


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        serve(arguments.contender, arguments)
    else:
        report(measure(arguments))


if __name__ == "__main__":
    main()
