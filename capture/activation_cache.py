"""ActivationCache: hook any modules of a model, run it, and look at what came out of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor, nn

from mechanistic.store.errors import SpecificationError

from .forward_cache import ForwardCache, as_array, weakly
from .hooks import Hooks, on_host
from .layer_names import layer_modules, resolve_module
from .residual import first_tensor

_DIMS = {1: ("feature",), 2: ("row", "feature"), 3: ("batch", "token", "feature")}


class ActivationCache(ForwardCache[Tensor]):
    """Outputs of chosen modules, kept in host memory, forward after forward.

        cache = ActivationCache()
        with cache.register_hooks(model, ["layer.5"]):
            model(**inputs)
        cache.get("layer.5")  # (batch, token, feature)

    Every run of a module adds one entry: `get(name)` is the last, `get(name, forward=0)` the first. `clear`
    empties the cache and leaves the hooks on. `remove_hooks`, the end of a `with` block, or the end of the
    cache itself takes them off; what was kept stays.
    """

    _registers = "register_hooks"
    _resolve = staticmethod(resolve_module)

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

        def attach(attached: ExitStack) -> None:
            for path in paths:
                hook = model.get_submodule(path).register_forward_hook(weakly(self._keep_output, path))
                attached.callback(hook.remove)

        return self._attach(model, paths, attach)

    def _keep_output(self, path: str, _: nn.Module, args: Any, output: Any) -> None:
        self._kept[path].append(on_host(first_tensor(output)))

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
        path, tensor = self._entry(name, forward)
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

        return write_residuals(Path(path), self._attached(), self._kept, self._inputs, processor)
