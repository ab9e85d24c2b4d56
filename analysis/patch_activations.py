"""One call: run a model on a corrupt input with some of its modules' outputs taken from the clean one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mechanistic.store.errors import DataError, SpecificationError, UsageError


def patch_activations(
    model: Any,
    clean_input: Any,
    corrupt_input: Any,
    layer_names: Sequence[str],
    *,
    positions: Sequence[int] | None = None,
    processor: Any = None,
) -> Any:
    """Output of the corrupt run in which the named modules give what they gave in the clean run.

    For a grid of places, heads and samples, from a run that was captured once, use `patch`.

    Parameters
    ----------
    model
        A transformers model, what `load_model` returns, or a name for it.
    clean_input, corrupt_input
        (image, text), where the model's own chat template goes around the text; or what a processor returned.
    layer_names
        Paths of modules, ends of such paths, or ``layer.5`` of the decoder.
    positions
        Only these tokens; absent, all of them. Negative ones count from the end of each input.
    processor
        For pairs (image, text) and a plain model; absent, that of the folder or repository it came from.

    Returns
    -------
    what the model returns, without gradients; `causal_effect_strength` compares it with the clean output.

    Raises
    ------
    SpecificationError  no layer is named, or a name means none, or several; the message lists them.
    DataError           a module's outputs have different shapes and no positions are given; no such position.
    UsageError          an input is neither a pair nor a mapping of tensors; a module did not run.
    """
    from mechanistic.capture.libraries import require_model_libraries

    require_model_libraries()
    import torch

    from mechanistic.capture.layer_names import resolve_module
    from mechanistic.capture.models import LoadedModel
    from mechanistic.capture.residual import first_tensor

    if not layer_names or isinstance(layer_names, str):
        raise SpecificationError("No layer is named.", "Name one or more: layer_names=['layer.5'].")
    prepared = [_inputs(model, each, processor) for each in (clean_input, corrupt_input)]
    network = prepared[0][0].model if isinstance(prepared[0][0], LoadedModel) else prepared[0][0]
    modules = {name: network.get_submodule(resolve_module(network, name)) for name in layer_names}
    kept: dict[str, list[Any]] = {name: [] for name in modules}
    put: dict[str, int] = dict.fromkeys(modules, 0)

    def keep(name: str) -> Any:
        return lambda _, args, output: kept[name].append(first_tensor(output).detach().clone())

    def patched(name: str) -> Any:
        def replace(_: Any, args: Any, output: Any) -> Any:
            had = first_tensor(output)
            clean = kept[name][put[name]] if put[name] < len(kept[name]) else None
            put[name] += 1
            new = _with_rows(had, clean, positions, name)
            return new if output is had else (new, *output[1:])

        return replace

    with torch.no_grad():
        _run(network, prepared[0][1], {modules[name]: keep(name) for name in modules})
        output = _run(network, prepared[1][1], {modules[name]: patched(name) for name in modules})
    if idle := [name for name in modules if not put[name]]:
        raise UsageError(
            f"{', '.join(idle)} did not run, so nothing was patched.", "Name a layer that is used."
        )
    return output


def _run(network: Any, inputs: Mapping[str, Any], hooks: Mapping[Any, Any]) -> Any:
    # Before the library's own hooks, which keep what leaves an encoder's layer for those who read it there.
    handles = [module.register_forward_hook(hook, prepend=True) for module, hook in hooks.items()]
    try:
        return network(**inputs)
    finally:
        for handle in handles:
            handle.remove()


def _with_rows(had: Any, clean: Any, positions: Sequence[int] | None, name: str) -> Any:
    if clean is None or had.ndim != clean.ndim or had.shape[-1] != clean.shape[-1]:
        raise DataError(
            f"{name} gives {tuple(had.shape)} in the corrupt run and "
            f"{'nothing' if clean is None else tuple(clean.shape)} in the clean one.",
            "Give inputs with as many images, of one size.",
        )
    if positions is None:
        if had.shape != clean.shape:
            raise DataError(
                f"{name} gives {tuple(had.shape)} in the corrupt run, {tuple(clean.shape)} in the clean one.",
                "Give inputs of one length, or the tokens to patch: positions=[-1].",
            )
        return clean
    rows = list(positions)
    lengths = (had.shape[-2], clean.shape[-2])
    if outside := [row for row in rows if not all(-length <= row < length for length in lengths)]:
        raise DataError(
            f"There is no position {outside[0]} in inputs of {lengths[0]} and {lengths[1]} tokens.",
            "Count from 0, or back from the end with negative numbers.",
        )
    new = had.clone()
    new[..., rows, :] = clean[..., rows, :]
    return new


def _inputs(model: Any, given: Any, processor: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what it is called with."""
    from mechanistic.capture.answers import to_device
    from mechanistic.capture.batch import prepare_batch
    from mechanistic.capture.given import given_model, given_samples
    from mechanistic.capture.models import LoadedModel
    from mechanistic.capture.token_table import TokenTexts

    if isinstance(given, Mapping) or hasattr(given, "data"):
        network = model.model if isinstance(model, LoadedModel) else model
        if isinstance(network, str):
            network = given_model(network, None, "").model
        tensors = {name: value for name, value in dict(given).items() if hasattr(value, "is_floating_point")}
        return network, to_device(tensors, network)
    if not (isinstance(given, tuple) and len(given) == 2):
        raise UsageError(
            f"This is no input of a model: {type(given).__name__}.",
            "Give (image, text), or what the processor returned: processor(..., return_tensors='pt').",
        )
    loaded = given_model(model, processor, "patch_activations(..., processor=processor)")
    batch = prepare_batch(
        loaded, given_samples(given), 0, max_new_tokens=0, texts=TokenTexts(loaded.tokenizer), generate=False
    )
    return loaded, to_device(batch.inputs, loaded.model)
