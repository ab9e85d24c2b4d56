"""The way flows one way: store <- capture, store <- analysis; analysis calls capture only where it may."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("capture", "store", "analysis")
MAY_CALL_CAPTURE = {
    "analysis/ablation.py",
    "analysis/activation_patching.py",
    "analysis/answer_change.py",
    "analysis/answer_pairs.py",
    "analysis/attention_knockout.py",
    "analysis/attention_relevancy.py",
    "analysis/attribute.py",
    "analysis/attribution_patching.py",
    "analysis/causal_tracing.py",
    "analysis/cli.py",
    "analysis/demo.py",
    "analysis/embedding_statistics.py",
    "analysis/experiment.py",
    "analysis/gradcam.py",
    "analysis/integrated_gradients.py",
    "analysis/intervention_sweep.py",
    "analysis/patch_activations.py",
    "analysis/patch_ends.py",
    "analysis/patch_grid.py",
    "analysis/patching.py",
    "analysis/path_patching.py",
    "analysis/pattern_source.py",
    "analysis/steering.py",
    "analysis/swapped_pairs.py",
    "analysis/traced_batch.py",
    "analysis/sweep.py",
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported inside a function, or for types alone) of every import in a file."""
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or for_types_only(function)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        found += [(name, id(node) in inner) for name in names]
    return found


def for_types_only(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports__flow_one_way(path: Path) -> None:
    here = path.relative_to(ROOT).as_posix()
    folder = here.split("/")[0]
    allowed = {"store": set(), "capture": {"store"}, "analysis": {"store"}}[folder]
    for module, inside in imports(path):
        assert module.split(".")[0] not in FOLDERS, f"{here} imports {module} by its folder name"
        if not module.startswith("mechanistic."):
            continue
        target = module.split(".")[1]
        if target == "capture" and here in MAY_CALL_CAPTURE:
            assert inside, f"{here} imports {module} outside a function"
        else:
            assert target in allowed, f"{here} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports__torch_stays_in_capture(path: Path) -> None:
    heavy = {"torch", "transformers", "vllm", "captum"}
    if path.relative_to(ROOT).parts[0] == "store":
        assert not {m.split(".")[0] for m, _ in imports(path)} & heavy
    if path.relative_to(ROOT).parts[0] == "analysis":
        assert not {m.split(".")[0] for m, inside in imports(path) if not inside} & heavy


def test_imports__analysis_and_command_line_load_no_torch() -> None:
    code = (
        "import sys, mechanistic.analysis, mechanistic.store;"
        "from mechanistic.analysis.cli import build_parser; build_parser();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports__capture_names_the_missing_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from mechanistic.analysis.cli import main;"
        "command = 'capture --model-name spatial-tiny --dataset shapes --output-dir x';"
        "sys.exit(main(command.split()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert 'pip install "mechanistic[capture]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "call",
    [
        "integrated_gradients('spatial-tiny', [])",
        "gradcam('spatial-tiny', [])",
        "attention_relevancy('spatial-tiny', [])",
        "causal_tracing([], 'spatial-tiny')",
        "patch_activations('spatial-tiny', {}, {}, ['layer.0'])",
    ],
)
def test_imports__model_analyses_name_the_missing_extra(call: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; from mechanistic.analysis import *; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UsageError" in done.stderr, done.stderr
    assert 'pip install "mechanistic[capture]"' in done.stderr
