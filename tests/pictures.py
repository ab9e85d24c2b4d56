"""One drawing of each plot function, from numbers written here: what tests/images holds.

    python tests/pictures.py            draws all of them again, to be looked at before they are committed
    python tests/pictures.py probe      only this one

tests/images/README.md says in a sentence what is to be seen on each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr

from mechanistic import analysis

IMAGES = Path(__file__).parent / "images"
# Whatever a user's matplotlibrc says; this font comes with matplotlib.
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "text.hinting": "none",
    "savefig.dpi": 60,
}
WORDS = ("where", "is", "the", "cup", "?")
LAYERS = np.array([0, 2, 4, 6])
RISE = np.array([0.26, 0.31, 0.84, 0.93])


def causal(heads: int) -> np.ndarray[Any, Any]:
    """Attention (head, query, key) that falls off with distance, each head faster than the one before."""
    place = np.arange(len(WORDS))
    apart = (place[:, None] - place[None, :]).astype(float)
    scores = np.where(apart >= 0, -apart[None] * (0.2 + np.arange(heads)[:, None, None]), -np.inf)
    weights = np.exp(scores)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def scene() -> np.ndarray[Any, Any]:
    """A blue square on the left and a red one on the right of a light ground (48, 64, 3)."""
    pixels = np.full((48, 64, 3), 235, np.uint8)
    pixels[16:32, 8:24] = (40, 90, 200)
    pixels[16:32, 40:56] = (200, 60, 40)
    return pixels


def looking(column: int) -> np.ndarray[Any, Any]:
    """Weights (4 * 4,) of a grid of patches, most of them on one column."""
    weights = np.full((4, 4), 0.02)
    weights[1:3, column] = 0.35
    return np.asarray(weights.ravel() / weights.sum())


def with_interval(name: str, values: Any, half: float, dims: tuple[str, ...]) -> dict[str, Any]:
    values = np.asarray(values, float)
    return {
        name: (dims, values, {"long_name": name, "units": "1"}),
        f"{name}_low": (dims, values - half),
        f"{name}_high": (dims, values + half),
    }


def probe_of(score: str) -> xr.Dataset:
    base = 0.25 if score == "accuracy" else -0.05
    variables = with_interval(score, RISE if score == "accuracy" else RISE - 0.3, 0.04, ("layer",))
    variables |= with_interval(f"shuffled_{score}", np.full(4, base), 0.03, ("layer",))
    variables |= with_interval(f"control_{score}", np.full(4, base + 0.1), 0.05, ("layer",))
    extra = {"chance": 0.25} if score == "accuracy" else {}
    return xr.Dataset({**variables, **extra, "n_sample": 400}, {"layer": LAYERS})


def layers() -> Any:
    rows = np.stack([RISE, RISE[::-1] * 0.5])
    table = with_interval("mass_image", rows, 0.05, ("correct", "layer"))
    summary = xr.Dataset(table, {"correct": ["correct", "incorrect"], "layer": LAYERS})
    return analysis.plot_layers(summary.assign(n_sample=("correct", [340, 60])), "mass_image", title="Share")


def head_map() -> Any:
    values = xr.DataArray(
        np.linspace(0.2, 0.9, 12).reshape(3, 4), {"layer": [1, 3, 5], "head": range(4)}, ("layer", "head")
    )
    values[0, 1] = np.nan
    return analysis.plot_head_map(values, label="AUROC", title="Against the object's box", centre=0.5)


def rdm_data() -> xr.Dataset:
    points = np.array([[0, 0], [0.2, 0.1], [2, 0], [2.1, 0.3], [0, 2], [0.1, 2.2]])
    apart = ((points[:, None] - points[None, :]) ** 2).sum(axis=-1)
    relation = np.repeat(["left", "right", "above"], 2)
    return xr.Dataset(
        {"dissimilarity": (("layer", "condition", "other"), apart[None], {"long_name": "squared distance"})},
        {
            "layer": [3],
            "condition": [f"c{number}" for number in range(6)],
            "relation": ("condition", relation),
            "other_relation": ("other", relation),
        },
    )


def logit_lens() -> Any:
    probability = np.stack([RISE, RISE - 0.05, RISE * 0.6], axis=1)
    rest = np.repeat((1 - probability)[..., None] / 3, 3, axis=-1)
    logits = np.log(np.concatenate([probability[..., None], rest], axis=-1))
    lens = xr.Dataset(
        {
            "answer_probability": (("layer", "sample"), probability),
            "option_logit": (("layer", "sample", "option"), logits),
        },
        {"layer": LAYERS, "sample_index": ("sample", np.arange(3))},
    )
    return analysis.plot_logit_lens(lens, title="Probability of the right option")


def attribution() -> Any:
    signed = looking(0) - looking(2)
    return analysis.plot_attribution_on_image(scene(), signed, num_patches=4, title="signed")


def causal_tracing() -> Any:
    recovered = np.array([[0.9, 0.7, 0.1, 0.0], [0.0, 0.2, 0.8, 1.0]])
    result = xr.Dataset(
        {"recovered": (("site", "layer", "place"), recovered.T[None], {"long_name": "share recovered"})},
        {"site": ["resid_post"], "layer": LAYERS, "place": ["subject", "last"]},
        {"corrupt": "subject"},
    )
    return analysis.plot_causal_tracing(result)


def path_graph() -> Any:
    inputs = ["q", "v", "logits"]
    share = np.array([[0.02, 0.45, 0.1], [0.0, 0.0, 0.75], [np.nan, np.nan, -0.2]])
    names = ("sender", "receiver")
    result = xr.Dataset(
        {
            "share": (names, share),
            "mean_effect": (names, 4 * share),
            "total_share": ("sender", [0.6, 0.8, -0.2]),
            "receiver_input": ("receiver", inputs),
            "receiver_layer": ("receiver", [2, 2, 4]),
            "receiver_head": ("receiver", [3, 3, -1]),
            "sender_layer": ("sender", [0, 2, 3]),
        },
        {"sender": ["0.1", "2.3", "3.mlp"]},
    )
    return analysis.plot_path_graph(analysis.path_graph(result), title="from the colour to the answer")


def pixel_attribution() -> Any:
    # The middle square of the scene was read: 4 x 4 patches of 8 pixels, each 12 pixels of the original wide.
    values = np.zeros((1, 32, 32))
    values[0, 12:20, :12] = np.linspace(0.2, 1, 12)
    values[0, 12:20, 24:32] = -0.5
    row, column = (place.ravel() for place in np.indices((4, 4)))
    corner = np.stack([8 + 12 * column, 12 * row])
    boxes = {
        f"box_{axis}{end}": corner[number] + 12 * end for number, axis in enumerate("xy") for end in (0, 1)
    }
    labels = {"patch_row": row, "patch_col": column, **boxes}
    labels |= dict.fromkeys(("sample_index", "image_index", "tile"), np.zeros(16, int))
    canvases = {f"canvas_{name}": ("canvas", [0]) for name in ("sample_index", "image_index", "tile")}
    found = xr.Dataset(
        {
            "pixel_attribution": (
                ("canvas", "y", "x"),
                values,
                {"long_name": "gradients of the pixel", "units": "logit"},
            )
        },
        {**canvases, **{name: ("patch", column) for name, column in labels.items()}},
        {"patch_size": 8},
    )
    return analysis.plot_pixel_attribution(scene(), found, title="what speaks for left")


PICTURES: Mapping[str, Callable[[], Any]] = {
    "attention_heatmap": lambda: analysis.plot_attention_heatmap(
        causal(2), tokens=WORDS, layer_name="layer 3"
    ),
    "attention_on_image": lambda: analysis.plot_attention_on_image(
        scene(), looking(0), num_patches=4, title="cup"
    ),
    "attribution_on_image": attribution,
    "multi_head_attention": lambda: analysis.plot_multi_head_attention(
        causal(3), tokens=WORDS, layer_name="layer 3"
    ),
    "cross_attention_attribution": lambda: analysis.plot_cross_attention_attribution(
        scene(), ["blue", "red"], np.stack([looking(0), looking(2)]), num_patches=4, title="two words"
    ),
    "layers": layers,
    "head_map": head_map,
    "probe": lambda: analysis.plot_probe(probe_of("accuracy"), title="relation at the last token"),
    "probe_r2": lambda: analysis.plot_probe({"x": probe_of("r2")}, title="place of the object"),
    "rdm": lambda: analysis.plot_rdm(rdm_data(), by="relation"),
    "mds": lambda: analysis.plot_mds(rdm_data(), by="relation"),
    "logit_lens": logit_lens,
    "causal_tracing": causal_tracing,
    "path_graph": path_graph,
    "pixel_attribution": pixel_attribution,
}


def draw(name: str, folder: Path) -> Path:
    """Draw one picture into a folder."""
    path = folder / f"{name}.png"
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure, _ = PICTURES[name]()
        # Nothing in the file may change with the day or the version.
        figure.savefig(path, metadata={"Software": None})
    return path


if __name__ == "__main__":
    for picture in sys.argv[1:] or PICTURES:
        print(draw(picture, IMAGES))
