"""The house rules: import directions, lean start, file sizes, frozen flags, no leftovers."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantkit"
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS: dict[str, int] = {
    "errors": 0, "gates": 0, "units": 0, "schemes": 0, "job": 0, "cache": 0, "resources": 0,
    "documents": 0,
    "worker": 0, "modules": 0, "headers": 1, "model_config": 1, "checkpoint": 1,
    "engines": 1, "derive": 2, "formats": 2, "registry": 3, "recipe": 3, "hub": 3, "scan": 3,
    "statefile": 3, "publish": 3, "environments": 3, "device": 1, "calibration": 4, "plan": 4, "plan_notes": 4,
    "contradictions": 3, "fp8_blocks": 1, "experts": 1, "sources": 1,
    "seam": 4, "streaming": 4,
    "verify": 4, "process": 4, "card": 5, "origin": 5, "seal": 5, "demo": 5, "request": 5,
    "finish": 5, "runtime": 4, "serving": 5, "validate": 6, "streamed": 6, "pipeline": 6,
    "measure": 7, "cli": 7,
    "__main__": 8, "__init__": 0,
}  # fmt: skip
"""Every part of the package with its level: imports point to the same level or a lower one."""


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module: str) -> str:
    """`quantkit.formats.base` → `formats`."""
    return [*module.split("."), "__init__"][1]


def own_part(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    if own_part(file) == "backends":
        allowed = ("quantkit.job", "quantkit.backends")
        ours = [name for name in imports(file) if name.startswith("quantkit.")]
        assert all(name.startswith(allowed) for name in ours), ours
        return
    if file.parent.name == "drivers":
        ours = [name for name in imports(file) if name.startswith("quantkit.")]
        assert all(name.startswith("quantkit.serving.drivers") for name in ours), ours
        return
    level = LAYERS[own_part(file)]
    for name in imports(file):
        target = part(name) if name.startswith("quantkit") else None
        if target in LAYERS:
            assert LAYERS[target] <= level, f"{file.name} (level {level}) imports {name}"


STANDARD_LIBRARY_ONLY = (
    "__init__.py", "worker.py", "job.py", "backends/__init__.py", "serving/__init__.py",
    "serving/worker.py", "serving/drivers/__init__.py", "serving/drivers/base.py",
)  # fmt: skip


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_the_worker_side_starts_with_the_standard_library_alone(name: str) -> None:
    foreign = {
        module.split(".")[0]
        for module in imports(PACKAGE / name)
        if module.split(".")[0] not in {*sys.stdlib_module_names, "quantkit", "__future__"}
    }
    assert not foreign


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("code", ["import quantkit", "import quantkit.cli.app"])
def test_start_loads_no_heavy_library(code: str) -> None:
    heavy = ["torch", "transformers", "modelopt", "pydantic", "numpy", "safetensors", "datasets"]
    probe = f"{code}; import sys, json; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_plan_loads_neither_torch_nor_transformers(small_model: Path) -> None:
    probe = (
        "import sys; from quantkit.cli.app import app\n"
        f"app(['plan', {str(small_model)!r}, '--method', 'modelopt_fp8'], standalone_mode=False)\n"
        "loaded = [m for m in ('torch', 'transformers') if m in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


FLAGS = {
    "quantize": {
        "--out", "--method", "--recipe", "--calibration", "--set", "--checkpoint-save", "--device",
        "--python", "--trust-remote-code", "--overwrite", "--resume", "--memory", "--jobs",
        "--executor", "--dry-run", "--json",
    },
    "export": {
        "--restore", "--out", "--model", "--device", "--python", "--trust-remote-code",
        "--overwrite", "--json",
    },
    "verify": {"--source", "--engine", "--tp", "--gpu", "--json"},
    "validate": {
        "--baseline", "--engine", "--kernel", "--device", "--data", "--samples", "--tasks",
        "--limit", "--gate", "--report", "--against", "--no-throughput", "--json",
    },
    "plan": {
        "--method", "--recipe", "--set", "--engine", "--tp", "--gpu", "--measure",
        "--trust-remote-code", "--json",
    },
    "methods": {"--json"},
    "launch": {"--engine", "--tp", "--exec", "--json"},
    "platforms": {"--method", "--gpu", "--json"},
    "kernels": {"--kernel", "--device", "--json"},
    "demo": {"--method", "--out", "--set", "--json"},
}  # fmt: skip
"""Scripts depend on these: a flag is added here on purpose or not at all."""


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_frozen(command: str) -> None:
    from quantkit.cli.app import app

    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    flags = {opt for p in found.params for opt in p.opts if opt.startswith("--")} - {"--help"}
    assert flags == FLAGS[command]


def test_every_recipe_is_listed_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        assert recipe.stem in readme, f"the README's table lacks {recipe.stem}"


def test_nothing_of_this_machine_is_in_the_tree() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the tree's files")
    telling = re.compile(r"/(?:work|root|home/\w+)/\w|(?:index|extra-index)-url\s*=\s*http")
    for name in listed.stdout.split("\0"):
        file = ROOT / name
        if name and file.is_file() and file != Path(__file__):
            found = telling.search(file.read_text(encoding="utf-8", errors="ignore"))
            assert found is None, f"{name}: {found and found.group()}"
