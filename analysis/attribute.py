"""Attributions by name, for the command line: of every sample, its numbers, and pictures of the first."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import UsageError
from mechanistic.store.schema import KIND

from .attention_relevancy import attention_relevancy
from .attribution_sparsity import attribution_sparsity
from .attribution_table import attribution_of, sample_row
from .gradcam import gradcam
from .integrated_gradients import integrated_gradients
from .plot_attribution_on_image import plot_attribution_on_image


@dataclass(frozen=True)
class Options:
    """What the command line lets a user choose; each method takes what it has a use for."""

    target: tuple[str, ...] = ()
    baseline: str = "mean"
    steps: int = 50

    @property
    def words(self) -> Any:
        """The target as the functions take it."""
        return None if not self.target else self.target[0] if len(self.target) == 1 else self.target


def _integrated(to: Any) -> Callable[[Any, Any, Options, Path], xr.Dataset]:
    return lambda model, samples, options, path: integrated_gradients(
        model,
        samples,
        to=to,
        baseline=options.baseline,  # type: ignore[arg-type]
        steps=options.steps,
        target=options.words,
        name=path,
    )


Method = Callable[[Any, Any, Options, Path], xr.Dataset]

METHODS: Mapping[str, tuple[str, Method]] = {
    "pixels": ("integrated gradients to the patches of the image", _integrated("pixels")),
    "image-tokens": ("integrated gradients to the decoder's image tokens", _integrated("image_embeddings")),
    "words": ("integrated gradients to the words of the question", _integrated("token_embeddings")),
    "gradcam": (
        "Grad-CAM on the last used layer of the image encoder",
        lambda model, samples, options, path: gradcam(model, samples, target=options.words, name=path),
    ),
    "relevancy": (
        "gradient x attention relevancy of every token for the last",
        lambda model, samples, options, path: attention_relevancy(
            model, samples, target=options.words, name=path
        ),
    ),
}


def attribute_samples(
    model: Any,
    samples: Sequence[Any],
    names: Sequence[str],
    output: str | Path,
    options: Options | None = None,
    *,
    pictures: int = 8,
) -> list[Path]:
    """Compute attributions and write METHOD.zarr, METHOD.csv, and METHOD_N.png of the first `pictures`.

    The same call goes on with a METHOD.zarr that was interrupted, and leaves a finished one as it is.

    Raises
    ------
    UsageError    no such method; and what the methods raise.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise UsageError(
            f"there is no attribution {', '.join(unknown)}.", f"The methods are: {', '.join(METHODS)}."
        )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        stored, numbers = folder / f"{name}.zarr", folder / f"{name}.csv"
        table = METHODS[name][1](model, samples, options or Options(), stored)
        of_sample = table.drop_dims([dim for dim in table.dims if dim != "sample"])
        of_sample["attribution_gini"] = ("sample", _gini(attribution_of(table)))
        of_sample.to_dataframe().to_csv(numbers)
        written += [stored, numbers, *_pictures(table, samples, folder / name, pictures)]
    return written


def _gini(attribution: xr.DataArray) -> NDArray[np.float32]:
    """Of each sample, over the tokens of its image; of an attribution to words, over those."""
    image = attribution["kind"].values == KIND["image"]
    kept = attribution.isel({attribution.dims[-1]: image}) if image.any() else attribution
    found: NDArray[np.float32] = attribution_sparsity(kept)["attribution_gini"].values
    return found


def _pictures(table: xr.Dataset, samples: Sequence[Any], path: Path, count: int) -> list[Path]:
    """One a sample, on its first image and, where that is cut into tiles, its first tile."""
    from mechanistic.capture.dataset import load_image

    written = []
    for number, sample in enumerate(list(samples)[:count]):
        row = sample_row(attribution_of(table), number)
        place = row["image_index"].values == 0
        if not place.any() or not (row["patch_row"].values[place] >= 0).any():
            continue
        tile = int(row["tile"].values[place & (row["patch_row"].values >= 0)].min())
        written.append(path.with_name(f"{path.name}_{number}.png"))
        title = f"{sample.question}\n{table['target'].values[number]}"
        image = load_image(sample.images[0]).pixels
        plot_attribution_on_image(image, row, tile=tile, title=title, save_path=written[-1])
    return written


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Mount `attribute`."""
    width = max(map(len, METHODS))
    listed = "\n".join(f"  {name.ljust(width)}  {meaning}" for name, (meaning, _) in METHODS.items())
    command = commands.add_parser(
        "attribute",
        help="ask a model which part of the image, or which words, made its answers",
        description="Attribute a model's answers to pixels, image tokens or words. Each method writes "
        "METHOD.zarr (the labelled result), METHOD.csv (a row a sample: target, score, completeness gap, "
        "Gini index over the patches or the words) and METHOD_N.png, the attribution on the image, of the "
        "first samples. Interrupted, the same command continues.",
        epilog=f"methods:\n{listed}\n\nexample:\n"
        "  mechanistic attribute relevancy pixels --model-name spatial-tiny --dataset shapes --num-samples 9",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Options()
    command.add_argument("names", metavar="METHOD", nargs="+", help="which attributions, see below")
    command.add_argument("--model-name", required=True, metavar="NAME", help="as for capture")
    command.add_argument("--dataset", required=True, metavar="NAME", help="as for capture")
    command.add_argument("--data-root", metavar="DIR", help="where the files of the dataset are")
    command.add_argument("--num-samples", type=int, metavar="N", help="only the first N samples")
    command.add_argument("--output-dir", default="attributions", metavar="DIR", help="default: %(default)s")
    command.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="WORD",
        help="the answer to explain, or two whose difference is; default: the preferred option less the next",
    )
    command.add_argument("--baseline", default=default.baseline, help="mean, blurred or zero (default: mean)")
    command.add_argument(
        "--steps",
        type=int,
        default=default.steps,
        help="points on the path of integrated gradients (default: %(default)s)",
    )
    command.add_argument("--pictures", type=int, default=8, metavar="N", help="samples to draw (default: 8)")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="as for capture")
    command.add_argument("--device", metavar="DEVICE", help="such as cpu, cuda, cuda:1 (default: cpu)")
    command.add_argument("--seed", type=int, default=0, help="seed of the dataset (default: 0)")
    command.set_defaults(run_command=_attribute)


def _attribute(args: argparse.Namespace) -> int:
    from mechanistic.capture.datasets import open_dataset
    from mechanistic.capture.libraries import require_libraries

    if len(args.target) > 2:
        raise UsageError(
            f"--target takes one word or two, not {len(args.target)}.", "Such as: --target left right."
        )
    dataset = open_dataset(
        args.dataset, data_root=args.data_root, num_samples=args.num_samples, seed=args.seed
    )
    require_libraries(quiet=False)
    from mechanistic.capture.models import load_model

    loaded = load_model(args.model_name, dtype=args.dtype, device=args.device)
    samples = [dataset[number] for number in range(len(dataset))]
    options = Options(tuple(args.target), args.baseline, args.steps)
    written = attribute_samples(loaded, samples, args.names, args.output_dir, options, pictures=args.pictures)
    print("\n".join(map(str, written)))
    return 0
