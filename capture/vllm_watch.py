"""The hooks of one worker of vLLM, which show its recorder what goes through the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from mechanistic.store.errors import CaptureError, ModelError

from .output_projection import projection_problem
from .residual import Halves, first_tensor, require_halves
from .tap import AttentionCall, Tap
from .vllm_encoder import EncoderLayer, find_encoder_layers
from .vllm_layers import EngineLayer, find_engine_layers
from .vllm_plan import stack_of
from .vllm_projection import PackedProjectionProbe
from .vllm_recorder import Recorder
from .vllm_stream import EngineLayerProbe, stream_into, stream_out


class Watch:
    """The hooks of one worker; of its image encoder only where the plan names something of that."""

    def __init__(
        self,
        runner: Any,
        plan: Mapping[str, Mapping[str, Any]],
        halves: Mapping[str, Halves],
        probe: float,
        left: Callable[[BaseException], None],
    ) -> None:
        model = runner.get_model()
        self.layers = find_engine_layers(model)
        self.encoder = find_encoder_layers(model) if "vision" in map(stack_of, plan) else []
        self.recorder = Recorder(plan)
        self.hooks = ExitStack()
        self.left = left
        self.told: dict[str, dict[str, Any]] = {}
        self.probes = {
            stack: [
                EngineLayerProbe(each.layer, probe, self._active, encoder=stack == "vision")
                for each in layers
            ]
            for stack, layers in (("text", self.layers), ("vision", self.encoder))
            if probe
        }
        self.projections = [PackedProjectionProbe(each.layer, probe) for each in self.layers if probe]
        self._wrap(runner)
        for decoding in self.layers:
            self._attention(decoding)
        for encoding in self.encoder:
            self._encoder_attention(encoding)
        if any(each.attention is None for each in self.encoder):
            self.hooks.callback(Tap(model.model.get_encoder(modality="image"), self._encoder_call).remove)
        for name in ("text/", "vision/"):
            self._layers(name.rstrip("/"), [each for each in plan if each.startswith(name)], halves)
        for processor in _logits_processors(model):
            self._after(processor, lambda _, args, kwargs, output: self.recorder.put_logits(output))
        for projection in self.projections:
            self.hooks.enter_context(projection.watching())
        for probing in (one for each in self.probes.values() for one in each):
            self.hooks.enter_context(probing.watching())

    def _layers(self, stack: str, tensors: Sequence[str], halves: Mapping[str, Halves]) -> None:
        for each in self.layers if stack == "text" else self.encoder:
            self._run_hooks(each.layer)
            self._before(each.layer, partial(self._check_rows, stack))
            for name in tensors:
                self._residual(stack, each, name, halves.get(stack))

    def found(self) -> dict[str, Any]:
        """What probes found: halves by stack, why a projection is not known; and the encoder's calls."""
        halves = {stack: [each.found for each in probes] for stack, probes in self.probes.items()}
        problems = [
            projection_problem(probe, None if known is None else known[0])
            for probe, known in zip(self.projections, halves.get("text", ()), strict=True)
        ]
        return {
            "halves": {
                stack: [None if each is None else [vars(each[0]), each[1]] for each in found]
                for stack, found in halves.items()
            },
            "projection_problem": next((problem for problem in problems if problem is not None), None),
            "encoder": self.told,
        }

    def _active(self) -> bool:
        return self.recorder.active

    def _check_rows(self, stack: str, *_: Any) -> None:
        if self.recorder.active:
            self.recorder.spans(stack)

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

    def _run_hooks(self, module: nn.Module) -> None:
        """Have a module run its hooks whose class calls forward without: some that vLLM may compile."""
        if type(module).__call__ is nn.Module.__call__:
            return
        run: Any = module.forward
        entered: list[bool] = []
        self._before(module, lambda *_: entered.append(True))

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not entered:
                return nn.Module.__call__(module, *args, **kwargs)
            entered.clear()
            return run(*args, **kwargs)

        module.forward = forward
        self.hooks.callback(delattr, module, "forward")

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
            put("text/q", number, (query,), queries)
            if key is not None:
                put("text/k", number, (key,), keys)
                put("text/v", number, (value,), keys)
            output: Tensor = attend(query, key, value, *args, **kwargs)
            put("text/z", number, (output,), queries)
            if self.projections and self.recorder.active:
                self.projections[number].attended(output.reshape(1, -1, *queries))
            return output

        attention.forward = forward
        self.hooks.callback(delattr, attention, "forward")

    def _encoder_attention(self, each: EncoderLayer) -> None:
        if each.attention is None:
            return
        number, attention, put = each.number, each.attention, self.recorder.put
        own: Any = attention
        queries, keys = (own.num_heads, own.head_size), (own.num_kv_heads, own.head_size)
        self.told[str(number)] = {"scale": float(own.scale), "exact": not own.fp8_enabled}
        attend = own.forward

        def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            for name, given, shape in (("q", query, queries), ("k", key, keys), ("v", value, keys)):
                put(f"vision/{name}", number, (given,), shape)
            output: Tensor = attend(query, key, value, *args, **kwargs)
            put("vision/z", number, (output,), queries)
            return output

        own.forward = forward
        self.hooks.callback(delattr, own, "forward")

    def _encoder_call(self, call: AttentionCall) -> None:
        """The same of an encoder that attends by transformers' code."""
        number = next(
            (
                each.number
                for each in self.encoder
                if any(part is call.module for part in each.layer.modules())
            ),
            None,
        )
        if number is None:
            return
        plain = call.softcap is None and call.sinks is None and call.position_bias is None
        self.told[str(number)] = {"scale": call.scale, "exact": plain and call.mask is None}
        for name, given in (("q", call.query), ("k", call.key), ("v", call.value)):
            tokens = given.transpose(1, 2)
            self.recorder.put(f"vision/{name}", number, (tokens,), tokens.shape[2:])
        self.recorder.put("vision/z", number, (call.output,), call.output.shape[2:])

    def _residual(
        self, stack: str, each: EngineLayer | EncoderLayer, name: str, halves: Halves | None
    ) -> None:
        layer, number, put = each.layer, each.number, self.recorder.put
        site, encoder = name.partition("/")[2], stack == "vision"
        if site == "resid_pre":
            self._before(
                layer,
                lambda m, args, kwargs: put(name, number, stream_into(m, args, kwargs, encoder=encoder)),
            )
        elif site == "resid_post":
            self._after(layer, lambda m, args, kwargs, output: put(name, number, stream_out(output)))
        elif site in ("attn_out", "mlp_out", "resid_mid"):
            require_halves(stack, site, halves)
            assert halves is not None
            self._inner(each, name, site, halves, encoder=encoder)

    def _inner(
        self, each: EngineLayer | EncoderLayer, name: str, site: str, halves: Halves, *, encoder: bool
    ) -> None:
        layer, number, put = each.layer, each.number, self.recorder.put
        if halves.middle is not None:
            raise CaptureError(
                f"{name}: the layers of this model scale what they add to the residual stream.",
                "Ask for resid_pre and resid_post, or capture it with transformers.",
            )
        if site != "resid_mid":
            child = layer.get_submodule(halves.attention if site == "attn_out" else halves.mlp)
            self._after(child, lambda m, args, kwargs, output: put(name, number, (first_tensor(output),)))
            return
        entered: list[Tensor] = []

        def enter(m: nn.Module, args: Any, kwargs: Any) -> None:
            stream = stream_into(m, args, kwargs, encoder=encoder)
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
