"""ActivationCache: hook any modules of a model, run it, and look at what came out of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from mechanistic.store.errors import SpecificationError, UsageError

from .hooks import ForwardInputs, Hooks, on_host, watch_inputs
from .layer_names import layer_modules, resolve_module
from .residual import first_tensor

_DIMS = {1: ("feature",), 2: ("row", "feature"), 3: ("batch", "token", "feature")}


class ActivationCache:
    """Outputs of chosen modules, kept in host memory, forward after forward.

        cache = ActivationCache()
        with cache.register_hooks(model, ["layer.5"]):
            model(**inputs)
        cache.get("layer.5")  # (batch, token, feature)

    Every run of a module adds one entry: `get(name)` is the last, `get(name, forward=0)` the first. `clear`
    empties the cache and leaves the hooks on. `remove_hooks`, the end of a `with` block, or the end of the
    cache itself takes them off; what was kept stays.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._removal = ExitStack()
        self._kept: dict[str, list[Tensor]] = {}
        self._inputs: list[ForwardInputs] = []

    def register_hooks(self, model: nn.Module, layer_names: Sequence[str] | None = None) -> Hooks:
        """Watch the outputs of modules: of all layers of all stacks, or of those named.

        A name is the path of a module, the end of one, or ``layer.5`` of the decoder. Hooks of an earlier
        registration of this cache come off first.

        Raises
        ------
        SpecificationError    a name means no module, or several; the message lists the layers that exist.
        """
        paths = (
            list(layer_modules(model))
            if layer_names is None
            else [resolve_module(model, name) for name in layer_names]
        )
        if not paths:
            raise SpecificationError(
                f"{type(model).__name__} has no list of layers that attend.",
                "Name the modules to watch: layer_names=['encoder.block.0'].",
            )
        self.remove_hooks()
        self._start(model, paths)
        # Only a weak reference to the cache: one that is thrown away must not go on collecting.
        me = weakref.ref(self)
        with ExitStack() as attached:
            attached.callback(watch_inputs(model, _inputs_into(me)).remove)
            for path in paths:
                module = model.get_submodule(path)
                attached.callback(module.register_forward_hook(_output_into(me, path)).remove)
            self._removal = attached.pop_all()
        weakref.finalize(self, self._removal.close)
        return Hooks(paths, self._removal)

    def _start(self, model: nn.Module, paths: Sequence[str]) -> None:
        if model is not self._model:
            self.clear()
        self._model = model
        self._kept |= {path: self._kept.get(path, []) for path in paths}

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the modules that have been watched."""
        return tuple(self._kept)

    def get(self, name: str, *, forward: int = -1) -> xr.DataArray:
        """What came out of a module, of several tensors the first.

        Parameters
        ----------
        forward
            Which run of the module since the last `clear`: -1 is the last.

        Returns
        -------
        (batch, token, feature) for a tensor of three dimensions; in the dtype of the model, bfloat16 as
        float32, which holds its values exactly (`source_dtype` says so). Padding is as the model had it.

        Raises
        ------
        UsageError            nothing was registered, or the module has not run so often.
        SpecificationError    the name means no module that was watched.
        """
        path = self._path(name)
        runs = self._kept[path]
        if not -len(runs) <= forward < len(runs):
            raise UsageError(
                f"'{name}' has run {len(runs)} times since it was registered or cleared; "
                f"forward={forward} is not among them.",
                "Run the model while the hooks are on.",
            )
        tensor = runs[forward]
        dims = _DIMS.get(tensor.ndim) or ("batch", *(f"dim_{n}" for n in range(1, tensor.ndim)))
        attrs = {"layer_name": path, "source_dtype": str(tensor.dtype).removeprefix("torch.")}
        return xr.DataArray(as_array(tensor), dims=dims, name="activation", attrs=attrs)

    def to_run(self, path: str | Path, *, processor: Any = None) -> Path:
        """Write all forwards as a run that `open_run` reads: resid_post of the layers that were watched.

        Parameters
        ----------
        processor
            For the texts of the tokens; without it they are empty.

        Raises
        ------
        SpecificationError    something else than whole layers was watched.
        UsageError            nothing was kept, or the forwards do not fit together.
        OutputExistsError     something is at `path`.
        """
        from .cache_run import write_residuals

        model = self._require_model()
        return write_residuals(Path(path), model, self._kept, self._inputs, processor)

    def clear(self) -> None:
        """Forget what was kept; hooks stay on."""
        self._kept = {path: [] for path in self._kept}
        self._inputs = []

    def remove_hooks(self) -> None:
        """Take the hooks off; the model is exactly as it was. What was kept stays."""
        self._removal.close()

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove_hooks()

    def _path(self, name: str) -> str:
        path = name if name in self._kept else resolve_module(self._require_model(), name)
        if path not in self._kept:
            raise SpecificationError(f"'{name}' is not watched.", f"Watched are: {', '.join(self._kept)}.")
        return path

    def _require_model(self) -> nn.Module:
        if self._model is None:
            raise UsageError("This cache is not attached to a model.", "Call register_hooks(model) first.")
        return self._model


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A numpy array; bfloat16, which numpy lacks, as float32."""
    array: NDArray[Any] = np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    return array


def _inputs_into(cache: weakref.ref[ActivationCache]) -> Any:
    def seen(inputs: ForwardInputs) -> None:
        me = cache()
        if me is not None:
            me._inputs.append(inputs)

    return seen


def _output_into(cache: weakref.ref[ActivationCache], path: str) -> Any:
    def seen(_: nn.Module, args: Any, output: Any) -> None:
        me = cache()
        if me is not None:
            me._kept[path].append(on_host(first_tensor(output)))

    return seen
