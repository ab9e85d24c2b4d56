"""What runs inside each worker process of vLLM: methods that the engine calls by name.

vLLM mixes `CaptureExtension` into its worker class (``worker_extension_cls``). Methods take and return
JSON-like values and write tensors to files. What goes wrong in a hook stops the step, and with it the job:
the reason is left in a file, since a dying engine process takes its exception with it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechanistic.store.errors import MechanisticError, ModelError

from .residual import Halves
from .vllm_encoder import find_encoder_layers
from .vllm_layers import find_engine_layers, find_readout
from .vllm_watch import Watch


class CaptureExtension:
    """Mixed into vLLM's worker; `model_runner` and `rank` are the worker's own."""

    model_runner: Any
    rank: int
    _mechanistic_watch: Any = None
    _mechanistic_projections: Any = None

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
            "encoder": _encoder(model),
        }

    def mechanistic_watch(
        self, plan: dict[str, Any], halves: dict[str, dict[str, Any]], probe: float, failures: str
    ) -> None:
        """Keep what `plan` names from now on; see `Recorder`.

        Parameters
        ----------
        halves
            The fields of `residual.Halves` by stack, for the sites inside a layer.
        probe
            Look for the halves of each layer in the first step, within this tolerance; 0 for not.
        failures
            Folder for the reason of a failure.
        """
        self.mechanistic_unwatch()
        known = {stack: Halves(**each) for stack, each in halves.items()}
        self._mechanistic_watch = Watch(self.model_runner, plan, known, probe, self._left(failures))

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
        watch.recorder.write(
            Path(folder) / f"rank{self.rank}",
            {f"sinks.{each.number}": each.sinks for each in watch.layers if each.has_sinks},
        )
        if watch.projections:
            self._mechanistic_projections = [probe.found for probe in watch.projections]
        return {"steps": watch.recorder.steps, **watch.found()}

    def mechanistic_projection(self, folder: str, layer: int) -> None:
        """Write the output projection of a layer, which the probes found."""
        from safetensors.torch import save_file

        found = self._mechanistic_projections[layer]
        held = {"weight": found.weight, "bias": found.bias}
        file = Path(folder) / f"projection{self.rank}.safetensors"
        save_file({name: each.cpu().contiguous() for name, each in held.items()}, file)

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


def _encoder(model: Any) -> dict[str, Any]:
    try:
        return {"layers": [layer.describe() for layer in find_encoder_layers(model)], "problem": None}
    except ModelError as error:
        return {"layers": [], "problem": error.what}
