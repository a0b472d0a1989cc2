"""`quantkit recipes list|show`: the bundled recipes, and one as it resolves."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.output import Output

app = typer.Typer(help="List recipes, or show one as it resolves.", no_args_is_help=True)


@app.command("list")
def list_command(
    library: Annotated[
        str, typer.Option("--from", help="Recipes that a library ships instead: modelopt.")
    ] = "",
    as_json: options.Json = False,
) -> None:
    """List the bundled recipes, or those of a library and which of them are methods here."""
    from quantkit.backends.registry import load_recipe
    from quantkit.recipe.load import recipe_files

    out = Output(as_json=as_json)
    if library:
        _list_shipped(library, out)
        return
    recipes = [load_recipe(file.stem) for file in sorted(set(recipe_files().values()))]
    out.table(
        "",
        ["recipe", "aliases", "description"],
        [(r.name, ", ".join(r.aliases), r.description) for r in recipes],
    )
    out.document({"schema_version": 1, "recipes": [r.model_dump(mode="json") for r in recipes]})


def _list_shipped(library: str, out: Output) -> None:
    from quantkit.backends.registry.shipped import LIBRARIES, shipped_names, why_not
    from quantkit.errors import InputError

    if library not in LIBRARIES:
        raise InputError(
            f"No recipes are known to come with {library}.",
            hint=f"--from {' or '.join(LIBRARIES)}",
            code="recipe.no_library",
        )
    found = [(name, why_not(name)) for name in shipped_names()]
    found.sort(key=lambda one: bool(one[1]))
    out.table("", ["recipe", "as --method"], [(name, why or "yes") for name, why in found])
    out.document(
        {"schema_version": 1, "from": library,
         "recipes": [{"name": name, "usable": not why, "why_not": why} for name, why in found]}
    )  # fmt: skip


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="A method name or a recipe file.")],
    sets: options.Sets = [],  # noqa: B006
    as_json: options.Json = False,
) -> None:
    """Print the resolved recipe as YAML: every key with its value."""
    import yaml

    from quantkit.backends.registry import load_recipe

    out = Output(as_json=as_json)
    recipe = load_recipe(name, tuple(sets)).model_dump(mode="json")
    out.text(yaml.safe_dump(recipe, sort_keys=False).rstrip())
    out.document(recipe)
