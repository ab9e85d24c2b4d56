"""What runs inside each worker process of vLLM: methods that the engine calls by name.

vLLM mixes `CaptureExtension` into its worker class (``worker_extension_cls``). Methods take and return
JSON-like values and write tensors to files. What goes wrong in a hook stops the step, and with it the job:
the reason is left in a file, since a dying engine process takes its exception with it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mechanistic.store.errors import CaptureError, MechanisticError, ModelError

from .residual import Halves, first_tensor
from .vllm_layers import EngineLayer, find_engine_layers, find_readout
from .vllm_recorder import Recorder
from .vllm_stream import EngineLayerProbe, stream_into, stream_out


class CaptureExtension:
    """Mixed into vLLM's worker; `model_runner` and `rank` are the worker's own."""

    model_runner: Any
    rank: int
    _mechanistic_watch: Any = None

    def mechanistic_describe(self) -> dict[str, Any]:
        """What is inside this worker: JSON-like. ModelError where it cannot be captured."""
        import vllm

        runner = self.model_runner
        if not hasattr(runner, "input_batch"):
            raise ModelError(
                f"This engine runs {type(runner).__module__}, which keeps its requests in another way.",
                "Set VLLM_USE_V2_MODEL_RUNNER=0.",
            )
        model = runner.get_model()
        return {
            "version": vllm.__version__,
            "runner": type(runner).__name__,
            "model": type(model).__name__,
            "dtype": str(runner.dtype).removeprefix("torch."),
            "layers": [layer.describe() for layer in find_engine_layers(model)],
        }

    def mechanistic_watch(
        self, plan: dict[str, Any], halves: dict[str, Any] | None, probe: float, failures: str
    ) -> None:
        """Keep what `plan` names from now on; see `Recorder`.

        Parameters
        ----------
        halves
            The fields of `residual.Halves`, for the sites inside a layer.
        probe
            Look for the halves of each layer in the first step, within this tolerance; 0 for not.
        failures
            Folder for the reason of a failure.
        """
        self.mechanistic_unwatch()
        watch = Watch(
            self.model_runner, plan, Halves(**halves) if halves else None, probe, self._left(failures)
        )
        self._mechanistic_watch = watch

    def mechanistic_unwatch(self) -> None:
        """Take every hook away again."""
        if self._mechanistic_watch is not None:
            self._mechanistic_watch.hooks.close()
            self._mechanistic_watch = None

    def mechanistic_begin(self, requests: dict[str, Any]) -> None:
        """Expect these requests; see `Recorder.begin`."""
        self._mechanistic_watch.recorder.begin(requests)

    def mechanistic_write(self, folder: str) -> dict[str, Any]:
        """Write what was kept of them to a file of this rank, and say what the probes found."""
        watch = self._mechanistic_watch
        file = Path(folder) / f"rank{self.rank}.safetensors"
        watch.recorder.write(
            file, {f"sinks.{each.number}": each.sinks for each in watch.layers if each.has_sinks}
        )
        found = [probe.found for probe in watch.probes]
        return {
            "steps": watch.recorder.steps,
            "halves": [None if each is None else [vars(each[0]), each[1]] for each in found],
        }

    def mechanistic_readout(self, folder: str, tokens: list[int]) -> bool:
        """Write the final norm and the unembedding rows of some tokens; False where there are none."""
        found = find_readout(self.model_runner.get_model(), tokens)
        if found is None:
            return False
        from safetensors.torch import save_file

        save_file(found, Path(folder) / f"readout{self.rank}.safetensors")
        return True

    def _left(self, failures: str) -> Callable[[BaseException], None]:
        def leave(error: BaseException) -> None:
            text = str(error) if isinstance(error, MechanisticError) else traceback.format_exc()
            file = Path(failures) / f"rank{self.rank}.txt"
            if not file.exists():
                file.write_text(text)

        return leave


class Watch:
    """The hooks of one worker."""

    def __init__(
        self,
        runner: Any,
        plan: Mapping[str, Mapping[str, Any]],
        halves: Halves | None,
        probe: float,
        left: Callable[[BaseException], None],
    ) -> None:
        model = runner.get_model()
        self.layers = find_engine_layers(model)
        self.recorder = Recorder(plan)
        self.hooks = ExitStack()
        self.probes = [EngineLayerProbe(each.layer, probe, self._active) for each in self.layers if probe]
        self.left = left
        self._wrap(runner)
        for each in self.layers:
            self._before(each.layer, lambda *_: self.recorder.active and self.recorder.spans())
            self._attention(each)
            for name in plan:
                self._residual(each, name, halves)
        for processor in _logits_processors(model):
            self._after(processor, lambda _, args, kwargs, output: self.recorder.put_logits(output))
        for each_probe in self.probes:
            self.hooks.enter_context(each_probe.watching())

    def _active(self) -> bool:
        return self.recorder.active

    def _wrap(self, runner: Any) -> None:
        """Tell the recorder of every step; on the instance, and taken away with the hooks."""
        run = runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.recorder.enter(runner, scheduler_output)
            try:
                done = run(scheduler_output, *args, **kwargs)
                self.recorder.leave()
            except BaseException as error:
                self.left(error)
                raise
            finally:
                self.recorder.abandon()
            return done

        runner.execute_model = execute_model
        self.hooks.callback(delattr, runner, "execute_model")

    def _before(self, module: nn.Module, seen: Callable[..., Any]) -> None:
        def hook(part: nn.Module, args: Any, kwargs: Any) -> None:
            seen(part, args, kwargs)

        self.hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _after(self, module: nn.Module, seen: Callable[..., Any]) -> None:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen(part, args, kwargs, output)

        self.hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _attention(self, each: EngineLayer) -> None:
        """Queries, keys and values as they go in, head outputs as they come out.

        The method is wrapped, on the instance: models of transformers' own classes call it without hooks.
        """
        number, queries, keys = each.number, (each.heads, each.head_width), (each.kv_heads, each.head_width)
        attention: Any = each.attention
        attend, put = attention.forward, self.recorder.put

        def forward(query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.recorder.active and (key is None or value is None):
                raise CaptureError(
                    f"text.{number}: this layer attends to the keys of another.",
                    "Models that share keys between layers cannot be captured on vLLM.",
                )
            put("q", number, (query,), queries)
            if key is not None:
                put("k", number, (key,), keys)
                put("v", number, (value,), keys)
            output: Tensor = attend(query, key, value, *args, **kwargs)
            put("z", number, (output,), queries)
            return output

        attention.forward = forward
        self.hooks.callback(delattr, attention, "forward")

    def _residual(self, each: EngineLayer, name: str, halves: Halves | None) -> None:
        layer, number, put = each.layer, each.number, self.recorder.put
        if name == "resid_pre":
            self._before(layer, lambda m, args, kwargs: put(name, number, stream_into(m, args, kwargs)))
        elif name == "resid_post":
            self._after(layer, lambda m, args, kwargs, output: put(name, number, stream_out(output)))
        elif name in ("attn_out", "mlp_out", "resid_mid"):
            if halves is None:
                raise CaptureError(
                    f"{name} is not defined in this model.", "Ask for resid_pre and resid_post."
                )
            self._inner(each, name, halves)

    def _inner(self, each: EngineLayer, name: str, halves: Halves) -> None:
        layer, number, put = each.layer, each.number, self.recorder.put
        if halves.middle is not None:
            raise CaptureError(
                f"{name}: the layers of this model scale what they add to the residual stream.",
                "Ask for resid_pre and resid_post, or capture it with transformers.",
            )
        if name != "resid_mid":
            child = layer.get_submodule(halves.attention if name == "attn_out" else halves.mlp)
            self._after(child, lambda m, args, kwargs, output: put(name, number, (first_tensor(output),)))
            return
        entered: list[Tensor] = []

        def enter(m: nn.Module, args: Any, kwargs: Any) -> None:
            stream = stream_into(m, args, kwargs)
            # A copy: the sum of what goes in is overwritten before attention is done.
            entered[:] = [sum(stream[1:], stream[0].clone())]

        def between(m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            put(name, number, (entered.pop(), first_tensor(output)))

        self._before(layer, enter)
        self._after(layer.get_submodule(halves.attention), between)


def _logits_processors(model: nn.Module) -> list[nn.Module]:
    """The one module that turns hidden states into logits."""
    found = [module for module in model.modules() if type(module).__name__ == "LogitsProcessor"]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} of the engine has {len(found)} modules that compute logits, not one.",
            "This architecture needs an adapter; until it has one, nothing of it is captured.",
        )
    return found
