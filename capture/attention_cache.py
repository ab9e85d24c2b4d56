"""AttentionCache: the attention weights of chosen layers, from any implementation that the model runs on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor, nn

from mechanistic.store.errors import CaptureError, SpecificationError

from .attended import Attended
from .forward_cache import ForwardCache, weakly
from .hooks import Hooks, on_host
from .layer_names import attention_modules, resolve_attention
from .tap import AttentionCall, Tap


class AttentionCache(ForwardCache[Attended]):
    """Attention weights of chosen modules, kept in host memory, forward after forward.

        cache = AttentionCache()
        cache.register_attention_hooks(model, ["layer.5"])
        model(**inputs)
        cache.get_attention("layer.5")  # (batch, head, query, key)
        cache.remove_hooks()

    What is kept are queries and keys; weights are rebuilt from them when asked for, so that it does not
    matter whether the model computes any. (A model on flash attention computes through sdpa meanwhile.)
    Every run of a module adds one entry: `get_attention(name)` is the last, `get_attention(name, forward=0)`
    the first. `clear` empties the cache and leaves the hooks on. `remove_hooks`, the end of a `with` block,
    or the end of the cache itself takes them off; what was kept stays.
    """

    _registers = "register_attention_hooks"
    _resolve = staticmethod(resolve_attention)

    def __init__(self) -> None:
        super().__init__()
        # Layers share masks, which are the largest tensors here: each is copied once.
        self._masks: list[tuple[Tensor, Tensor]] = []
        self._of_module: dict[nn.Module, str] = {}

    def register_attention_hooks(self, model: nn.Module, layer_names: Sequence[str] | None = None) -> Hooks:
        """Watch attention modules: all of the model, or those named.

        A name is the path of an attention module or of the layer that holds one, the end of such a path, or
        ``layer.5`` of the decoder. Hooks of an earlier registration of this cache come off first.

        Raises
        ------
        SpecificationError    a name means no attention, or several; the message lists those that exist.
        """
        every = attention_modules(model)
        paths = list(every) if layer_names is None else [resolve_attention(model, n) for n in layer_names]
        if not paths:
            raise SpecificationError(
                f"{type(model).__name__} has no module that attends.",
                "Pass the transformers model itself, such as pipeline.model.",
            )

        def attach(attached: ExitStack) -> None:
            self._of_module = {every[path]: path for path in paths}
            attached.callback(Tap(model, weakly(self._keep_call)).remove)
            for module, path in self._of_module.items():
                begin, end = weakly(self._begin, path), weakly(self._keep_weights, path)
                attached.callback(module.register_forward_pre_hook(begin).remove)
                attached.callback(module.register_forward_hook(end).remove)

        return self._attach(model, paths, attach)

    def _begin(self, path: str, *_: Any) -> None:
        self._kept[path].append(Attended())

    def _keep_call(self, call: AttentionCall) -> None:
        if call.module not in self._of_module:
            return
        nothing = call.value.new_empty(0, device="cpu")
        kept = replace(
            call,
            query=on_host(call.query),
            key=on_host(call.key),
            value=nothing,
            output=nothing,
            mask=self._keep_mask(call.mask),
            sinks=None if call.sinks is None else on_host(call.sinks),
            position_bias=None if call.position_bias is None else on_host(call.position_bias),
        )
        self._kept[self._of_module[call.module]][-1].calls.append(kept)

    def _keep_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        for known, copy in self._masks:
            if known is mask:
                return copy
        self._masks = [*self._masks[-1:], (mask, on_host(mask))]
        return self._masks[-1][1]

    def _keep_weights(self, path: str, _: nn.Module, args: Any, output: Any) -> None:
        """Of modules that attend by code of their own and return the weights behind their output."""
        last = self._kept[path][-1]
        if last.calls or not isinstance(output, tuple):
            return
        if len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4:
            last.weights = on_host(output[1])

    def get_attention(self, name: str, *, forward: int = -1) -> xr.DataArray:
        """The attention weights of a layer, A = softmax over the allowed keys of softcap(scale * q.k).

        Parameters
        ----------
        forward
            Which run of the module since the last `clear`: -1 is the last.

        Returns
        -------
        attention_pattern (batch, head, query, key), float32, share of the row.
            NaN in the row of a query that may look at no key, such as some padding. With a cache of keys
            (as in `generate`) the queries are the last of the keys.

        Raises
        ------
        UsageError            nothing was registered, or the module has not run so often.
        SpecificationError    the name means no attention module that was watched.
        CaptureError          the module ran, and attends in a way that cannot be seen.
        """
        path, attended = self._entry(name, forward)
        if not attended.seen:
            raise CaptureError(
                f"'{name}' ran, and its attention was not seen: it attends by code of its own, or failed.",
                "Watch another layer, or load the model with attn_implementation='eager'.",
            )
        return xr.DataArray(
            attended.pattern().numpy(),
            dims=("batch", "head", "query", "key"),
            name="attention_pattern",
            attrs={
                "units": "1",
                "long_name": "attention weight",
                "layer_name": path,
                "source_dtype": attended.source_dtype,
            },
        )

    def to_run(self, path: str | Path, *, processor: Any = None) -> Path:
        """Write all forwards as a run that `open_run` reads: pattern of the layers that were watched.

        Parameters
        ----------
        processor
            For the texts of the tokens; without it they are empty.

        Raises
        ------
        SpecificationError    attention outside the layers of the decoder and the encoder was watched.
        UsageError            nothing was kept, or the forwards do not fit together.
        OutputExistsError     something is at `path`.
        """
        from .cache_run import write_patterns

        kept = {name: [run for run in runs if run.seen] for name, runs in self._kept.items()}
        return write_patterns(Path(path), self._attached(), kept, self._inputs, processor)

    def clear(self) -> None:
        """Forget what was kept; hooks stay on."""
        super().clear()
        self._masks = []

    def remove_hooks(self) -> None:
        """Take the hooks off; the model is exactly as it was. What was kept stays."""
        super().remove_hooks()
        self._masks = []
