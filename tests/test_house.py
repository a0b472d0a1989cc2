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

GROUND = {"__init__", "errors"}
ROOMS: tuple[tuple[str, ...], ...] = (
    ("checkpoint",),
    ("engines",),
    ("recipe", "formats"),
    ("verification", "backends"),
    ("runtime", "calibration"),
    ("pipeline",),
    ("validation",),
    ("api",),
    ("cli",),
)  # fmt: skip
"""From the ground up. A room imports rooms of earlier rows, never one of its own row."""

WITHIN: dict[str, tuple[tuple[str, ...], ...]] = {
    "backends": (
        ("child_process",),
        ("registry", "streaming"),
        ("environments",),
        ("process",),
        ("adapters",),
    ),
    "verification": (
        ("findings",),
        ("configuration", "engines", "files"),
        ("gguf", "weights"),
        ("run",),
    ),
    "runtime": (
        ("serving", "triton", "vllm_ops"),
        ("linear",),
        ("network",),
        ("loading",),
        ("model",),
        ("load",),
        ("preview",),
    ),
    "validation": (
        ("preflight", "subjects"),
        ("ask", "memory"),
        ("forecast", "judge"),
        ("online",),
        ("reports",),
        ("run",),
        ("search",),
        ("sweep",),
    ),
}  # fmt: skip
"""The same inside the large rooms: a folder (or a file) imports what stands in earlier rows."""


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def places(file: Path) -> set[tuple[str, ...]]:
    """What a file imports of the package, as the path of each module (`formats`, `base`)."""
    found = set()
    for name in imports(file):
        top, *parts = name.split(".")
        path = PACKAGE.joinpath(*parts)
        if top == "quantkit" and (path.is_dir() or path.with_suffix(".py").is_file()):
            found.add(tuple(parts))
    return found


def below(rows: tuple[tuple[str, ...], ...], name: str) -> set[str]:
    """The names of the rows before that of `name`, and `name` itself."""
    (at,) = (index for index, row in enumerate(rows) if name in row)
    return {name}.union(*rows[:at])


def own_place(file: Path) -> tuple[str, ...]:
    """The room and what is inside: `formats`, `base`."""
    return file.relative_to(PACKAGE).with_suffix("").parts


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    room, *inside = own_place(file)
    found = {place for place in places(file) if place}
    if file.parent.name == "adapters":
        allowed = (
            "quantkit.backends.process.job",
            "quantkit.backends.adapters",
            "quantkit.checkpoint.schemes",
            "quantkit.checkpoint.network.fused_experts",
            "quantkit.checkpoint.network.modules",
            "quantkit.checkpoint.network.norm_readers",
        )
        ours = [".".join(("quantkit", *place)) for place in found]
        assert all(name.startswith(allowed) for name in ours), ours
    if file.parent.name == "drivers":
        ours = [".".join(("quantkit", *place)) for place in found]
        assert all(name.startswith("quantkit.runtime.serving.drivers") for name in ours), ours
    if room in GROUND:  # the package itself names the API for type checkers, and imports it late
        assert {place[0] for place in found} <= GROUND | ({"api"} if room == "__init__" else set())
    elif any(room in row for row in ROOMS):
        above = {place[0] for place in found} - below(ROOMS, room) - GROUND
        assert not above, f"{file.name} ({room}) imports {above}"
    if room in WITHIN and inside[0] != "__init__":
        own = {place[1] for place in found if place[0] == room and len(place) > 1}
        assert own <= below(WITHIN[room], inside[0]), f"{file.name} imports {own}"


def test_every_part_is_a_room_in_its_place() -> None:
    """Rooms, the API and what stands beside them; inside the large ones every part is listed."""
    rooms = {name for row in ROOMS for name in row}
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__pycache__"} == rooms | GROUND | {"__main__"}
    for room, rows in WITHIN.items():
        listed = {name for row in rows for name in row}
        parts = {p.stem for p in (PACKAGE / room).iterdir() if p.suffix == ".py" or p.is_dir()}
        assert parts - {"__pycache__", "__init__"} == listed, room


STANDARD_LIBRARY_ONLY = (
    "__init__.py",
    "backends/process/worker.py",
    "backends/process/job.py",
    "backends/__init__.py",
    "checkpoint/__init__.py",
    "checkpoint/schemes.py",
    "runtime/serving/__init__.py",
    "runtime/serving/worker.py",
    "runtime/serving/drivers/__init__.py",
    "runtime/serving/drivers/base.py",
    "backends/adapters/__init__.py",
    "backends/process/__init__.py",
    "runtime/__init__.py",
)


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
        "--executor", "--engine", "--gpu", "--push", "--dry-run", "--json",
    },
    "export": {
        "--restore", "--out", "--model", "--device", "--python", "--trust-remote-code",
        "--overwrite", "--json",
    },
    "verify": {"--source", "--engine", "--tp", "--gpu", "--json"},
    "validate": {
        "--baseline", "--engine", "--kernel", "--as-on", "--device", "--data", "--samples",
        "--tasks", "--limit", "--chat", "--fewshot", "--sampled", "--thinking", "--new-tokens",
        "--seeds", "--gate", "--report", "--against", "--against-online", "--no-throughput",
        "--broken-baseline", "--json",
    },
    "analyze": {
        "--schemes", "--data", "--samples", "--engine", "--device", "--report", "--json",
    },
    "sweep": {"--out", "--resume", "--against", "--jobs", "--device", "--json"},
    "push": {"--public", "--force", "--json"},
    "plan": {
        "--method", "--recipe", "--set", "--engine", "--tp", "--gpu", "--measure",
        "--trust-remote-code", "--json",
    },
    "methods": {"--json"},
    "launch": {"--engine", "--tp", "--gpu", "--online", "--exec", "--json"},
    "platforms": {"--method", "--gpu", "--json"},
    "kernels": {"--kernel", "--as-on", "--device", "--json"},
    "demo": {"--method", "--out", "--set", "--moe", "--json"},
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
