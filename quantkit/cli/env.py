"""`quantkit env list|create|check|remove`: the environments of libraries that need their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import options
from quantkit.cli.output import Output
from quantkit.errors import EXIT_BACKEND

app = typer.Typer(help="Make, check and remove managed environments.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="An environment's name: quantkit env list.")]


@app.command("list")
def list_command(as_json: options.Json = False) -> None:
    """List the environments: what each is for, and whether it is made."""
    from quantkit.backends.environments.managed import ready, specs, unavailable

    out = Output(as_json=as_json)
    rows: list[dict[str, Any]] = [
        {
            "name": spec.name,
            "purpose": spec.purpose,
            "packages": len(spec.pins),
            "key": spec.key,
            "python": str(spec.python) if ready(spec.name) else None,
            "unavailable": unavailable(spec),
        }
        for spec in specs().values()
    ]
    out.table(
        "",
        ["environment", "for", "packages", "made"],
        [
            (r["name"], r["purpose"], r["packages"], r["python"] or r["unavailable"] or "no")
            for r in rows
        ],
    )
    out.document({"schema_version": 1, "environments": rows})


@app.command("create")
def create_command(
    name: Name,
    wheels: Annotated[
        Path | None,
        typer.Option("--wheels", help="A folder of wheels, where no package index is reached."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Make an environment; nothing happens when it exists and works."""
    from quantkit.backends.environments.managed import create, spec_named

    out = Output(as_json=as_json)
    python = create(spec_named(name), wheels, out.info)
    out.text(f"{name}: {python}")
    out.document({"schema_version": 1, "name": name, "python": str(python)})


@app.command("check")
def check_command(name: Name, as_json: options.Json = False) -> None:
    """Check an environment's versions and imports; exit 3 when it does not work."""
    from quantkit.backends.environments.managed import check, spec_named

    out = Output(as_json=as_json)
    reason = check(spec_named(name))
    out.text(f"{name}: {reason or 'works'}")
    out.document({"schema_version": 1, "name": name, "works": reason is None, "reason": reason})
    if reason:
        out.info(f"hint: quantkit env create {name}")
        raise typer.Exit(EXIT_BACKEND)


@app.command("remove")
def remove_command(name: Name, as_json: options.Json = False) -> None:
    """Delete an environment, older ones of its name too."""
    from quantkit.backends.environments.managed import remove, spec_named

    out = Output(as_json=as_json)
    removed = [str(path) for path in remove(spec_named(name), out.info)]
    out.text("\n".join(f"removed {path}" for path in removed) or f"{name} is not made")
    out.document({"schema_version": 1, "name": name, "removed": removed})
