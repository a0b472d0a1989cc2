"""`quantkit methods`: every method, what it writes, who loads it, whether it runs here."""

from __future__ import annotations

from typing import Any

from quantkit.cli import options
from quantkit.cli.output import Output


def methods_command(
    as_json: options.Json = False,
) -> None:
    """List the methods that --method takes."""
    out = Output(as_json=as_json)
    rows = method_rows()
    out.table(
        "",
        ["method", "writes", "bits", "needs", "loads in", "resumes after", "runs here"],
        [
            (
                "\n".join([row["method"], *(f"({alias})" for alias in row["aliases"])]),
                row["algorithm"],
                f"{row['bits_per_weight']:.1f}",
                ", ".join(row["needs"]) or "-",
                row["loads_in"],
                f"a {row['resumes']}",
                "yes" if row["available"] else row["reason"],
            )
            for row in rows
        ],
    )
    out.document({"schema_version": 1, "methods": rows})


def method_rows() -> list[dict[str, Any]]:
    """One row a bundled recipe; `available` is whether it can run here, `reason` why not."""
    from quantkit.backends.environments import missing_reason
    from quantkit.backends.environments.device import resolve_device
    from quantkit.backends.registry import backend_named, load_recipe
    from quantkit.engines import support
    from quantkit.recipe.load import recipe_files

    device = resolve_device("auto")
    rows = []
    for file in sorted(set(recipe_files().values())):
        recipe = load_recipe(file.stem)
        backend = backend_named(recipe.backend)
        scheme = recipe.resolved_scheme()
        method = backend.method(recipe)
        loads = support(method.layout, method.algorithm, scheme.name)
        reason = missing_reason(backend)
        if reason is None and method.accelerator and device == "cpu":
            reason = "needs an accelerator"
        needs = {
            "calibration": method.calibrated,
            "accelerator": method.accelerator,
            f"environment {backend.environment}": backend.environment is not None,
        }
        rows.append(
            {
                "method": recipe.name,
                "aliases": recipe.aliases,
                "description": recipe.description,
                "library": backend.distribution,
                "layout": method.layout,
                "scheme": scheme.name,
                "algorithm": method.algorithm,
                "bits_per_weight": round(scheme.weight.bits_per_weight((4096, 4096)), 2),
                "needs": [need for need, needed in needs.items() if needed],
                "engines": list(loads.engines),
                "export_only": loads.export_only,
                "loads_in": loads.describe().partition(":")[0],
                "resumes": backend.resumes,
                "available": reason is None,
                "reason": reason,
            }
        )
    return rows
