"""What is built is what stands in the tree, and a laptop without torch can use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("capture", "store", "analysis")
DATA = ("*.md", "*.json", "*.safetensors", "*.jinja")


def tracked(folder: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        place = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(place, source / name, ignore=ignore) if place.is_dir() else shutil.copy(place, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_wheel__holds_the_tree(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("mechanistic/")}
    expected = {f"mechanistic/{name}" for folder in FOLDERS for name in tracked(folder)}
    assert names == expected


def test_pyproject__lists_every_package() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        "mechanistic." + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(config["packages"]) == found
    assert config["package-dir"] == {f"mechanistic.{f}": f for f in FOLDERS}


def test_pyproject__base_install_has_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [d for d in project["dependencies"] if d.startswith(("torch", "transformers", "vllm"))]
    assert set(project["optional-dependencies"]) == {"capture", "vllm", "notebooks", "test", "all"}


def test_pins__are_within_the_ranges_and_no_path() -> None:
    pins = [p for p in (ROOT / "constraints.txt").read_text().splitlines() if p and not p.startswith("#")]
    assert all("==" in pin and "/" not in pin for pin in pins)
    assert "torch==2.13.0" in pins


def interpreters() -> list[tuple[str, bool]]:
    """(interpreter, pinned?): this one with the pins, and a newer one with the newest of everything."""
    found = [(sys.executable, True)]
    roots = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    for minor in ("13", "12"):
        candidates = [str(p) for root in roots for p in sorted(root.glob(f"3.{minor}.*/bin/python"))]
        candidates += [p for p in [shutil.which(f"python3.{minor}")] if p]
        for candidate in candidates:
            if subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
                return [*found, (candidate, False)]
    return found


@pytest.mark.parametrize(
    ("python", "pinned"), interpreters(), ids=lambda v: str(v).rpartition("versions/")[2]
)
def test_laptop__without_torch_analyses_the_demo(
    python: str, pinned: bool, wheel: Path, demo_run: Path, tmp_path: Path
) -> None:
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    laptop = tmp_path / "venv" / "bin" / "python"
    pins = ["--constraint", str(ROOT / "constraints.txt")] if pinned else ["--upgrade"]
    subprocess.run([laptop, "-m", "pip", "install", "--quiet", *pins, str(wheel)], check=True)
    script = Path(__file__).with_name("laptop.py")
    done = subprocess.run([laptop, str(script), str(demo_run)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no torch" in done.stdout
