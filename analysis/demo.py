"""The whole way in one command: capture, open, analyse, show."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechanistic.store import group, open_run
from mechanistic.store.info import format_info, human_bytes, run_info

from .attention_entropy import attention_entropy
from .attention_mass import attention_mass
from .attention_pattern import attention_pattern
from .linear_probe import linear_probe
from .plot_attention_heatmap import plot_attention_heatmap
from .plot_attention_on_image import plot_attention_on_image
from .plot_layers import plot_layers
from .plot_probe import plot_probe
from .report import Report
from .sample_image import sample_image
from .splits import summarize, with_samples

MODEL, DATASET = "spatial-tiny", "shapes"


@dataclass(frozen=True)
class Findings:
    """Everything the page shows; each a Dataset, computed."""

    accuracy: float
    samples: int
    mass: xr.Dataset
    entropy: xr.Dataset
    probes: dict[str, xr.Dataset]

    @property
    def peak(self) -> int:
        """The layer at which the last token looks at the image most."""
        mean = self.mass["mass_image"].mean(("token", "head"))
        return int(mean["layer"][int(np.argmax(mean.values))])


def run_demo(output_dir: str | Path, *, num_samples: int = 400, seed: int = 0) -> int:
    """Write OUTPUT/run, OUTPUT/figures and OUTPUT/index.html, and print the numbers that matter."""
    begun = time.monotonic()
    folder = Path(output_dir)
    print(f"capturing {num_samples} drawn scenes with {MODEL} into {folder / 'run'}")
    capture(folder / "run", num_samples, seed)
    run = open_run(folder / "run")
    findings = analyse(run)
    figures = draw(run, findings, folder / "figures")
    numbers = summary(run_info(folder / "run"), findings, time.monotonic() - begun)
    write_page(run, findings, figures, numbers, folder)
    width = max(len(name) for name, _ in numbers)
    print("\n".join(f"  {name.ljust(width)}  {value}" for name, value in numbers))
    print(f"\nread {folder / 'index.html'}; explore {folder / 'run'} with open_run")
    return 0


def capture(path: Path, num_samples: int, seed: int) -> None:
    """The one time that the model runs."""
    import torch

    from mechanistic.capture.job import capture_run
    from mechanistic.capture.shapes import Shapes

    threads = torch.get_num_threads()
    # The matrices of this model are so small that sharing them among threads costs more than it gives.
    torch.set_num_threads(1)
    try:
        capture_run(MODEL, Shapes(num_samples, seed=seed), path, dtype="float32", batch_size=16)
    finally:
        torch.set_num_threads(threads)


def analyse(run: xr.DataTree) -> Findings:
    """What the run says, without the model: where it looks, and when the relation can be read."""
    correct = group(run, "samples")["correct"].values
    return Findings(
        accuracy=float(np.mean(correct == 1)),
        samples=len(correct),
        mass=with_samples(attention_mass(run, tokens="last"), run, ["correct", "relation"]).compute(),
        entropy=with_samples(attention_entropy(run, tokens="last"), run, "correct").compute(),
        probes={
            "last prompt token": linear_probe(run, target="relation", tokens="last").compute(),
            "question mark": linear_probe(run, target="relation", tokens="'?'").compute(),
        },
    )


def draw(run: xr.DataTree, findings: Findings, folder: Path) -> dict[str, Any]:
    """The figures, also as PNG files."""
    by_head = findings.mass.mean("head", keep_attrs=True)
    samples = group(run, "samples")
    sample = int(np.flatnonzero(samples["correct"].values == 1)[0])
    row = attention_pattern(run, sample=sample, layer=findings.peak, query="last")["attention_pattern"]
    square = attention_pattern(run, sample=sample, layer=findings.peak)["attention_pattern"].compute()
    texts = [str(text) for text in square["query_token_text"].values]
    own = square.isel(key=np.flatnonzero(np.isin(square["key_position"], square["query_position"])))
    question = str(samples["question"][sample].values)
    return {
        "mass": plot_layers(
            summarize(by_head[["mass_image"]], by="correct"),
            "mass_image",
            label="attention on image tokens (share)",
            title="The last prompt token, mean of the heads",
            save_path=folder / "image_mass.png",
        )[0],
        "probe": plot_probe(
            findings.probes, title="Can the relation be read linearly?", save_path=folder / "probe.png"
        )[0],
        "image": plot_attention_on_image(
            sample_image(run, sample),
            row.compute().mean("head").squeeze(),
            title=f"{question}",
            save_path=folder / "attention_on_image.png",
        )[0],
        "heatmap": plot_attention_heatmap(
            own.transpose("head", "query", "key"),
            tokens=texts,
            layer_name=f"layer {findings.peak}, without the image tokens",
            save_path=folder / "attention_heatmap.png",
        )[0],
    }


def summary(info: dict[str, Any], findings: Findings, seconds: float) -> list[tuple[str, str]]:
    """The numbers that matter, as text."""
    rows = [("accuracy", f"{findings.accuracy:.1%} of {findings.samples} questions (chance 25%)")]
    for name, probe in findings.probes.items():
        best = probe.isel(layer=int(np.argmax(probe["accuracy"].values)))
        rows.append(
            (
                f"best probe, {name}",
                f"{float(best['accuracy']):.1%} at layer {int(best['layer'])}"
                f" (labels shuffled: {float(best['shuffled_accuracy']):.1%})",
            )
        )
    on_image = findings.mass["mass_image"].mean(("token", "head")).sel(layer=findings.peak)
    entropy = findings.entropy["attention_entropy"].mean(("token", "head")).sel(layer=findings.peak)
    stored, raw = info["stored_bytes"], info["raw_bytes"]
    return [
        *rows,
        ("last token's attention on the image", f"{float(on_image):.1%} at its peak, layer {findings.peak}"),
        ("its entropy there", f"{float(entropy):.2f} nats"),
        ("stored", f"{human_bytes(stored / findings.samples)} a sample, {raw / stored:.2f}x compressed"),
        ("time", f"{seconds:.0f} s"),
    ]


def write_page(
    run: xr.DataTree,
    findings: Findings,
    figures: dict[str, Any],
    numbers: list[tuple[str, str]],
    folder: Path,
) -> None:
    """index.html: what the model gets right, where it looks, where the relation becomes readable."""
    page = Report("How a small model tells left from right")
    page.paragraph(
        f"{MODEL} is a vision-language model of about a million parameters, built like LLaVA and trained "
        "until it really answers where one drawn object lies relative to another. The model ran once; "
        "everything below was computed from the store, without it."
    )
    page.table(numbers)
    page.heading("What it gets right")
    page.table(accuracy_rows(run))
    page.heading("Where it looks")
    page.paragraph(
        f"The answer is given at the last prompt token. It looks at the image most in layer {findings.peak}."
    )
    page.figure(figures["mass"], "Share of the last token's attention on image tokens, with 95 % intervals.")
    page.figure(
        figures["image"], "One question: where the last token looks, mean of the heads, on the true patches."
    )
    page.figure(figures["heatmap"], "The same sample and layer among the words: queries down, keys across.")
    page.heading("At which layer the relation becomes readable")
    page.paragraph(
        "A linear probe is trained at each layer to name the relation. The four scenes of a minimal-pair "
        "set, in which only the relation changes, never straddle training and test. The relation can be "
        "read at the question mark too, although patching it changes no answer: readable is not the same "
        "as used."
    )
    page.figure(figures["probe"], "Probe accuracy by layer; dashed: the same probes on shuffled labels.")
    page.heading("What is in the store")
    page.code(format_info(run_info(folder / "run")))
    page.code(
        f"from mechanistic.store import group, open_run\nrun = open_run({str(folder / 'run')!r})\nprint(run)"
    )
    page.write(folder / "index.html")


def accuracy_rows(run: xr.DataTree) -> list[tuple[str, str]]:
    """Accuracy by relation, with the number of questions."""
    samples = group(run, "samples")[["relation", "correct"]].compute()
    relations = np.asarray(samples["relation"].values).astype(object)
    correct = samples["correct"].values == 1
    return [
        (name, f"{correct[relations == name].mean():.1%} of {int((relations == name).sum())}")
        for name in sorted(set(relations))
    ]
