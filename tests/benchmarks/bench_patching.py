"""Patched forwards per CPU second of a layer x position sweep, beside the loop that people write and nnsight.

Two models: spatial-tiny with its images, and a random text-only model of 12 layers and width 768. All patch
the clean residual stream into the corrupt run and must agree on the logits; in this one process, one thread.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechanistic.analysis import patch
from mechanistic.capture.dataset import Sample
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel, load_model
from mechanistic.capture.run_samples import asked_again
from mechanistic.capture.shapes import Shapes
from mechanistic.store import open_run

TARGET = 3.0


@dataclass(frozen=True)
class Listed:
    """A dataset that is a list."""

    samples: tuple[Sample, ...]
    name: str = "listed"

    def fingerprint(self) -> str:
        return "listed"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Sample:
        return self.samples[index]


def wide() -> tuple[LoadedModel, Listed]:
    """A random model of 12 layers, and a pair of prompts of 64 words."""
    torch.manual_seed(0)
    words = {f"w{n}": n for n in range(1000)} | {"<unk>": 1000, "<pad>": 1001, "left": 1002, "right": 1003}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        initializer_range=0.05,
    )
    random = np.random.default_rng(0)
    texts = [[f"w{n}" for n in random.integers(0, 1000, 64)] for _ in range(2)]
    pair = [
        Sample(f"s{n}", (), " ".join(text), ("left", "right"), answer, group="g", subject="a", object="b")
        for n, (text, answer) in enumerate(zip(texts, ("left", "right"), strict=True))
    ]
    return LoadedModel(LlamaForCausalLM(config).eval(), tokenizer, "wide"), Listed(tuple(pair))


def naive(loaded: LoadedModel, pair: list[dict[str, Tensor]], cells: list[tuple[int, int]]) -> list[Tensor]:
    """One forward a cell, with a hook on the layer; the clean run once, as people do it."""
    layers = loaded.anatomy.stack("text").layers
    clean: dict[int, Tensor] = {}
    found = []

    def hidden(args: Any, kwargs: Any) -> Tensor:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        return states

    with torch.no_grad():
        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, n=n: clean.update({n: hidden(args, kwargs).clone()}), with_kwargs=True
            )
            for n, layer in enumerate(layers)
        ]
        loaded.model(**pair[0])
        for handle in handles:
            handle.remove()
        for number, row in cells:

            def put(_: Any, args: Any, kwargs: Any, number: int = number, row: int = row) -> Any:
                states = hidden(args, kwargs).clone()
                states[:, row] = clean[number][:, row]
                return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

            handle = layers[number].register_forward_pre_hook(put, with_kwargs=True)
            found.append(loaded.model(**pair[1]).logits[0, -1])
            handle.remove()
    return found


def traced(loaded: LoadedModel, pair: list[dict[str, Tensor]], cells: list[tuple[int, int]]) -> list[Tensor]:
    """The same through nnsight: one trace a cell."""
    import nnsight

    model = nnsight.NNsight(loaded.model)
    layers = (
        model.model.language_model if hasattr(loaded.model.model, "language_model") else model.model
    ).layers
    found = []
    with torch.no_grad():
        clean = {}
        for number in sorted({number for number, _ in cells}):
            with model.trace(**pair[0]):
                clean[number] = layers[number].input.save()
        for number, row in cells:
            with model.trace(**pair[1]):
                states = layers[number].input.clone()
                states[:, row] = clean[number][:, row]
                layers[number].input = states
                logits = model.lm_head.output[0, -1].save()
            found.append(logits)
    return found


def timed(work: Any) -> tuple[Any, float]:
    begun = time.process_time()
    result = work()
    return result, time.process_time() - begun


def compare(name: str, loaded: LoadedModel, dataset: Any, pairs: int) -> bool:
    """Time all three, and print forwards per CPU second and the target; False if their logits differ."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        sites = ["text.*.resid_pre", "text.*.resid_post[last]"]
        capture_run(loaded, dataset, path, sites=sites, max_new_tokens=0, quiet=True)
        run = open_run(path)
        numbers = list(range(2 * pairs))
        batches = [asked_again(loaded, run, numbers)[number] for number in numbers]
        inputs = [batch.inputs for batch in batches]
        length = inputs[0]["input_ids"].shape[1]
        cells = [(n, row) for n in range(len(loaded.anatomy.stack("text").layers)) for row in range(length)]
        ours, seconds = timed(
            lambda: patch(
                run,
                loaded,
                base=numbers[1::2],
                source=numbers[::2],
                positions="every",
                min_difference=0,
                quiet=True,
            )
        )
        rate = len(cells) * pairs / seconds
        print(f"{name}: {len(cells)} cells x {pairs} pairs; patch {rate:8.1f} forwards per CPU second")
        # Of the loops one pair's every fifth cell tells the rate.
        some = cells[::5]
        answers = [loaded.tokenizer.convert_tokens_to_ids(batches[n].samples[0].answer) for n in (0, 1)]
        expected = [float(ours["patched"][0].sel(layer=n, position=row)) for n, row in some]
        ratio = {}
        # nnsight last: its hooks stay on the model.
        for peer, loop in (("naive hooks", naive), ("nnsight", traced)):
            logits, seconds = timed(lambda loop=loop: loop(loaded, inputs[:2], some))
            got = [float(each[answers[0]] - each[answers[1]]) for each in logits]
            error = float(np.abs(np.array(got) - expected).max())
            ratio[peer] = rate * seconds / len(some)
            print(
                f"  {peer:12s} {len(some) / seconds:8.1f} forwards per CPU second; patch is "
                f"{ratio[peer]:.1f}x; largest difference {error:.1e} logits"
            )
            if error > 1e-3:
                return False
    met = ratio["naive hooks"] >= TARGET
    print(f"  target {TARGET:.0f}x the naive loop: {'met' if met else 'NOT met'}")
    return True


def main() -> int:
    torch.set_num_threads(1)
    tiny = load_model("spatial-tiny")
    results = [compare("spatial-tiny", tiny, Shapes(8, distractor=0.0), 4)]
    loaded, pair = wide()
    results.append(compare("12 layers, width 768", loaded, replace(pair), 1))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
