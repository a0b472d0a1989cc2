"""`quantkit platforms`: what runs where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.cli import options
from quantkit.cli.output import Output

if TYPE_CHECKING:
    from quantkit.engines import Gpu


def platforms_command(
    method: options.Method = "",
    gpu: options.GpuName = "",
    as_json: options.Json = False,
) -> None:
    """Show which engine runs which method on which GPU or NPU, and mark this machine's."""
    from quantkit.backends.environments.device import amd_note
    from quantkit.engines.capability import gemm_order
    from quantkit.engines.gpus import generations, gpu_here, gpu_named

    here = gpu_here()
    asked = gpu_named(gpu) if gpu else None
    shown = {n: d for n, d in generations().items() if asked is None or asked in d}
    rows = platform_rows(method, asked)
    out = Output(as_json=as_json)
    out.table(
        "generations of devices" + ("" if here else " (none of them is in this machine)"),
        ["", "name", "devices"],
        [
            (
                f"{name} ← this machine: {here.name}" if here in devices and here else name,
                devices[0].generation,
                ", ".join(device.key for device in devices),
            )
            for name, devices in shown.items()
        ],
    )
    out.table(
        "how each method runs (16-bit: only memory is saved; *: experts too; –: not at all)",
        ["method", "engine", *shown],
        [
            (row["method"], row["engine"], *(_cell(row["runs"][name]) for name in shown))
            for row in rows
        ],
    )
    for name, devices in shown.items():
        for flag, order in gemm_order(asked or devices[0]).items():
            out.text(f"SGLang on {name}, {flag} auto: {', '.join(order)}")
    for vendor, note in (rows[0]["documented"] if method else {}).items():
        out.text(f"SGLang's documentation, {rows[0]['layout']}, {vendor}: {note}")
    if note := amd_note():
        out.info(f"note: {note}")
    out.document(
        {
            "schema_version": 1,
            "here": here.key if here else None,
            "generations": {
                name: {"name": devices[0].generation, "devices": [d.key for d in devices]}
                for name, devices in shown.items()
            },
            "methods": rows,
            "sglang_gemm_auto": {
                name: gemm_order(asked or devices[0]) for name, devices in shown.items()
            },
        }
    )


def platform_rows(method: str, gpu: Gpu | None) -> list[dict[str, Any]]:
    """One row a method and engine; `runs` by generation."""
    from quantkit.backends.registry import backend_named, load_recipe
    from quantkit.engines import NAMES, engines
    from quantkit.engines.capability import capabilities, sglang_notes
    from quantkit.recipe.load import recipe_files

    names = [method] if method else sorted({file.stem for file in recipe_files().values()})
    rows = []
    for name in names:
        recipe = load_recipe(name)
        made = backend_named(recipe.backend).method(recipe)
        found = capabilities(made.layout, made.algorithm, recipe.scheme, gpu)
        for engine in engines():
            mine = [c for c in found if c.engine == engine]
            rows.append(
                {
                    "method": recipe.name,
                    "engine": NAMES[engine],
                    "layout": made.layout,
                    "runs": {c.generation: {"runs": c.runs, "experts": c.experts} for c in mine},
                    "documented": sglang_notes(made.layout, made.algorithm),
                }
            )
    return rows


_WORDS = {"native": "native", "yes": "yes", "weight-only": "16-bit", "no": "–"}


def _cell(entry: dict[str, Any]) -> str:
    return _WORDS[entry["runs"]] + ("*" if entry["experts"] else "")
