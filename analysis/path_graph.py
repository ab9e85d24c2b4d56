"""The paths that carry an answer, read as a graph of heads and MLPs, and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mechanistic.store.errors import DimensionError

from .palette import BLUE, GREY, VERMILLION, new_axes, quiet, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOGITS = "logits"


def path_graph(result: xr.Dataset, *, threshold: float = 0.05) -> xr.Dataset:
    """The edges of a path-patching result that carry at least a share of the answer, strongest first.

    Returns
    -------
    source, target (edge), node names: "2.3" is head 3 of layer 2, "2.mlp" its MLP, "logits" the end.
    input (edge), text: q, k, v or logits, what of the target the source reaches.
    share (edge), float64; effect (edge), float64, logits: mean over pairs.
    node_layer (node), int32: layer, the logits one above the last; total_share (node), float64: what the
        whole node carries, NaN for one that was no sender.
    Keys and values of a group of heads are one node, named by its first head.

    Raises
    ------
    DimensionError  not what `path_patching` returned.
    """
    if not {"share", "mean_effect", "total_share"} <= set(result.variables):
        raise DimensionError("this holds no shares of paths.", "Pass what path_patching returned.")
    share = result["share"].transpose("sender", "receiver")
    values = np.abs(share.values)
    at, to = np.nonzero(np.nan_to_num(values) >= threshold)
    order = np.argsort(-values[at, to], kind="stable")
    at, to = at[order], to[order]
    heads = int(result.attrs.get("heads_per_key_head", 1))
    names = [_target(result, int(place), heads) for place in to]
    sources = result["sender"].values[at].astype(str)
    layers = {
        str(name): int(layer) for name, layer in zip(sources, result["sender_layer"].values[at], strict=True)
    }
    layers |= {
        name: int(layer) for name, layer in zip(names, result["receiver_layer"].values[to], strict=True)
    }
    nodes = sorted(layers, key=lambda name: (layers[name], name))
    totals = dict(zip(result["sender"].values.astype(str), result["total_share"].values, strict=True))
    effect = result["mean_effect"].transpose("sender", "receiver").values[at, to]
    unit = {"units": "1", "long_name": "share of the difference between clean and corrupt"}
    return xr.Dataset(
        {
            "source": ("edge", sources.astype(object)),
            "target": ("edge", np.array(names, object)),
            "input": ("edge", result["receiver_input"].values[to].astype(object)),
            "share": ("edge", share.values[at, to], unit),
            "effect": ("edge", effect, {"units": "logit", "long_name": "mean effect of the path"}),
            "total_share": ("node", np.array([totals.get(name, np.nan) for name in nodes]), unit),
        },
        {"node": nodes, "node_layer": ("node", np.array([layers[name] for name in nodes], np.int32))},
        {**result.attrs, "threshold": threshold},
    )


def _target(result: xr.Dataset, place: int, heads: int) -> str:
    """The node of a receiver; key heads are named by the first head that uses them."""
    name = str(result["receiver_input"].values[place])
    if name == LOGITS:
        return LOGITS
    head = int(result["receiver_head"].values[place])
    return f"{int(result['receiver_layer'].values[place])}.{head if name == 'q' else head * heads}"


def plot_path_graph(
    graph: xr.Dataset, *, title: str = "", ax: Axes | None = None, save_path: str | Path | None = None
) -> tuple[Figure, Axes]:
    """Draw a graph of `path_graph`, its layers from below; wide lines carry more, red ones work against it.

    Raises
    ------
    DimensionError  no edge, or not what `path_graph` returned.
    """
    if "edge" not in graph.dims:
        raise DimensionError("this is no graph of paths.", "Pass path_graph(result).")
    if not graph.sizes["edge"]:
        raise DimensionError(
            "there is no path to draw.", "Lower the threshold: path_graph(result, threshold=0.01)."
        )
    names = [str(name) for name in graph["node"].values]
    # One above the other, however many layers without a node lie between.
    layers, heights = np.unique(graph["node_layer"].values, return_inverse=True)
    places: dict[str, tuple[float, float]] = {}
    for height in range(len(layers)):
        here = [name for name, own in zip(names, heights, strict=True) if own == height]
        places |= {name: (place - (len(here) - 1) / 2, float(height)) for place, name in enumerate(here)}
    figure, ax = new_axes(ax, (5.4, 1.2 + 0.8 * len(layers)))
    widest = float(np.abs(graph["share"].values).max())
    reach = max(abs(x) for x, _ in places.values())
    columns = (graph[key].values for key in ("source", "target", "input", "share"))
    for source, target, name, share in zip(*columns, strict=True):
        label = f"{share:.2f}" if name == LOGITS else f"{name} {share:.2f}"
        colour, width = (BLUE if share > 0 else VERMILLION), 0.5 + 3.5 * abs(float(share)) / widest
        farthest = _draw_edge(ax, places[str(source)], places[str(target)], label, colour, width)
        reach = max(reach, farthest)
    for name, (x, y) in places.items():
        ax.text(
            x,
            y,
            name,
            ha="center",
            va="center",
            fontsize=9,
            zorder=4,
            bbox={"boxstyle": "round", "fc": "white"},
        )
    ax.set_xlim(-reach - 0.5, reach + 0.5)
    ax.set_ylim(-0.5, len(layers) - 0.5)
    ax.set_xticks([])
    # The logits, above all layers, are none.
    ticks = np.unique(heights[np.array(names) != LOGITS])
    ax.set_yticks(ticks, [str(number) for number in layers[ticks]])
    ax.set_ylabel("layer")
    quiet(ax)
    ax.set_title(title, fontsize=10)
    save(figure, save_path)
    return figure, ax


def _draw_edge(
    ax: Axes, start: tuple[float, float], stop: tuple[float, float], label: str, colour: str, width: float
) -> float:
    """A curve upwards; one that passes a layer swings to the right of it. How far from 0 it comes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    swing = 0.6 * (stop[1] - start[1] - 1)
    middle = ((start[0] + stop[0]) / 2 + swing, (start[1] + stop[1]) / 2)
    curve = Curve([start, middle, stop], [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3])
    ax.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=width, zorder=1))
    # Nearer to the source than to the middle, where lines cross.
    along = 0.36
    weights = ((1 - along) ** 2, 2 * along * (1 - along), along**2)
    x, y = (
        sum(w * v for w, v in zip(weights, three, strict=True))
        for three in zip(start, middle, stop, strict=True)
    )
    box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}
    ax.text(x, y, label, fontsize=8, color=GREY, ha="center", va="center", zorder=3, bbox=box)
    return abs((start[0] + 2 * middle[0] + stop[0]) / 4)
