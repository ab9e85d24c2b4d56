"""The stages in which spatial-tiny learns: name patches, write captions, answer questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy, normalize

from .shapes_drawing import COLOURS, SHAPES, Thing
from .train_architecture import BACKGROUND, COLUMNS, END, GRID, ROWS, VOCABULARY, build_model
from .train_batches import packed_batch, patch_batch
from .train_scenes import IGNORED, Block, random_caption, random_question

Report = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. The defaults are what the bundled model was trained with.

    `patch_scenes` and `scenes` are images a step; behind each image stand `captions_alone` captions at
    first, then `texts` texts of which `captions` are captions. `distractor` is the share of scenes with a
    third object. Rates rise over `warm_up` steps and fall over the last share `decay` of them.
    """

    seed: int = 0
    patch_steps: int = 300
    caption_steps: int = 300
    question_steps: int = 2200
    patch_scenes: int = 24
    scenes: int = 12
    captions_alone: int = 5
    texts: int = 8
    captions: int = 2
    distractor: float = 0.4
    muon_rate: float = 0.003
    adam_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: int = 30
    decay: float = 0.35


class Progress:
    """Lines of progress with the time left, from what a step of each stage costs relative to the first."""

    COST: tuple[float, ...] = (1.0, 2.3, 2.8)

    def __init__(self, recipe: Recipe, report: Report) -> None:
        self._steps = (recipe.patch_steps, recipe.caption_steps, recipe.question_steps)
        self._names = ("1/3 naming patches", "2/3 captions", "3/3 questions and captions")
        self._report = report
        self._start = time.monotonic()

    def tell(self, stage: int, step: int, seen: str) -> None:
        costs = [count * cost for count, cost in zip(self._steps, self.COST, strict=True)]
        done = sum(costs[:stage]) + step * self.COST[stage]
        spent = time.monotonic() - self._start
        left = spent / done * (sum(costs) - done)
        self._report(
            f"{self._names[stage]}: step {step} of {self._steps[stage]}, {seen}; "
            f"{_clock(spent)} so far, about {_clock(left)} left"
        )


@contextmanager
def one_thread_deterministic() -> Iterator[None]:
    """One thread and deterministic kernels: sums are taken in the same order on every run."""
    threads, was = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was)


def train(recipe: Recipe, report: Report) -> Any:
    """A trained model in float32: the same weights for the same recipe on the same machine."""
    with one_thread_deterministic():
        model = build_model(recipe.seed)
        model.train()
        progress = Progress(recipe, report)
        name_patches(model, recipe, progress)
        match_word_scale(model, recipe.seed)
        read_scenes(model, recipe, progress)
        model.eval()
    return model


def name_patches(model: Any, recipe: Recipe, progress: Progress) -> None:
    """Vision tower and projector learn to write patches in the language of the word embeddings.

    The cosine of a patch's projection with the words must name its colour, shape, row and column.
    """
    rng = np.random.default_rng([recipe.seed, 0])
    seen = list(model.model.vision_tower.named_parameters())
    seen += list(model.model.multi_modal_projector.named_parameters())
    optimizers = _optimizers(seen, muon_rate=0.01, adam_rate=2e-3, weight_decay=0.01)
    words = model.get_input_embeddings().weight
    optimizers[1].add_param_group({"params": [words]})
    rates = _rates(optimizers)
    parameters = [parameter for _, parameter in seen] + [words]
    place = torch.arange(GRID * GRID).expand(recipe.patch_scenes, -1)
    for step in range(recipe.patch_steps):
        _set_rates(rates, min(1, (step + 1) / 50) * _tail(step, recipe.patch_steps, 0.4, least=0.05))
        pixels, colours, shapes = patch_batch(rng, recipe.patch_scenes)
        patches = 16 * normalize(project(model, pixels), dim=-1)
        loss = (
            _naming_loss(patches, words, (*COLOURS, BACKGROUND), colours)
            + _naming_loss(patches, words, (*SHAPES, BACKGROUND), shapes)
            + 0.3 * _naming_loss(patches, words, ROWS, place // GRID)
            + 0.3 * _naming_loss(patches, words, COLUMNS, place % GRID)
        )
        _descend(loss, parameters, optimizers)
        if (step + 1) % 50 == 0 or step + 1 == recipe.patch_steps:
            progress.tell(0, step + 1, f"loss {loss.item():.3f}")


def match_word_scale(model: Any, seed: int) -> None:
    """Scale the projector so that image tokens come in as large as words."""
    pixels, _, _ = patch_batch(np.random.default_rng([seed, 1]), 16)
    with torch.no_grad():
        last = model.model.multi_modal_projector.linear_2
        scale = model.get_input_embeddings().weight.std() / project(model, pixels).std()
        last.weight.mul_(scale)
        last.bias.mul_(scale)


def read_scenes(model: Any, recipe: Recipe, progress: Progress) -> None:
    """The whole model learns: captions alone at first, then questions with captions among them."""
    rng = np.random.default_rng([recipe.seed, 2])
    optimizers = _optimizers(
        list(model.named_parameters()), recipe.muon_rate, recipe.adam_rate, recipe.weight_decay
    )
    rates = _rates(optimizers)
    parameters = list(model.parameters())
    total = recipe.caption_steps + recipe.question_steps
    right = asked = 0
    for step in range(total):
        _set_rates(rates, min(1, (step + 1) / recipe.warm_up) * _tail(step, total, recipe.decay, least=0.02))
        asking = step >= recipe.caption_steps
        batch = packed_batch(rng, recipe.scenes, recipe.distractor, _writer(recipe, rng, asking))
        labels = batch.labels
        if step % 4:
            # The end follows every answer, and is learned from one step in four.
            labels = labels.masked_fill(labels == END, IGNORED)
        taught = labels != IGNORED
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state[taught]
        logits, wanted = model.lm_head(hidden), labels[taught]
        loss = cross_entropy(logits, wanted)
        _descend(loss, parameters, optimizers)
        hits = (logits.argmax(-1) == wanted)[batch.about_relation[taught]]
        right, asked = right + int(hits.sum()), asked + len(hits)
        stage, done = (2, step + 1 - recipe.caption_steps) if asking else (1, step + 1)
        if done % 50 == 0 or step + 1 in (recipe.caption_steps, total):
            relations = f", relation questions {right / asked:.1%} right" if asked else ""
            progress.tell(stage, done, f"loss {loss.item():.3f}{relations}")
            right = asked = 0


def project(model: Any, pixels: Tensor) -> Tensor:
    """The image tokens (scene, patch, d_model), as they go into the decoder."""
    vision = model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
    projected: Tensor = model.model.multi_modal_projector(vision)
    return projected


def _writer(
    recipe: Recipe, rng: np.random.Generator, asking: bool
) -> Callable[[Sequence[Thing]], list[Block]]:
    questions, captions = 0, recipe.captions_alone
    if asking:
        questions, captions = recipe.texts - recipe.captions, recipe.captions

    def write(things: Sequence[Thing]) -> list[Block]:
        asked = [random_question(things, rng) for _ in range(questions)]
        return asked + [random_caption(things, rng) for _ in range(captions)]

    return write


def _naming_loss(patches: Tensor, words: Tensor, names: Sequence[str], wanted: Tensor) -> Tensor:
    logits = patches @ normalize(words[[VOCABULARY[name] for name in names]], dim=-1).T
    # Nine patches in ten are background.
    weight = torch.tensor([0.15 if name == BACKGROUND else 1.0 for name in names])
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight=weight, ignore_index=IGNORED)


def _optimizers(
    named: list[tuple[str, Parameter]], muon_rate: float, adam_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for embeddings, norms, biases and the head."""
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


Rates = list[tuple[dict[str, Any], float]]


def _rates(optimizers: Sequence[torch.optim.Optimizer]) -> Rates:
    return [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]


def _set_rates(rates: Rates, factor: float) -> None:
    for group, rate in rates:
        group["lr"] = rate * factor


def _tail(step: int, steps: int, share: float, *, least: float) -> float:
    """1, then a straight line down to `least` over the last `share` of the steps."""
    return min(1.0, max(least, (steps - step) / (share * steps)))


def _descend(loss: Tensor, parameters: list[Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
