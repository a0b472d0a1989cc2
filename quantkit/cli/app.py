"""The commands of `quantkit`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantkit import __version__
from quantkit.cli import (
    analyze,
    calibration,
    demo,
    env,
    export,
    kernels,
    launch,
    methods,
    plan,
    platforms,
    push,
    quantize,
    recipes,
    sweep,
    validate,
    verify,
)


class Commands(TyperGroup):
    """The commands; that nobody reads what they print is told like any failure, not in silence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            from quantkit.cli.failures import explained

            raise explained(error) from error


app = typer.Typer(
    cls=Commands,
    name="quantkit",
    help="Quantize a large language model offline, prove the result, ship it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.quantize_command)
app.command("export")(export.export_command)
app.command("verify")(verify.verify_command)
app.command("validate")(validate.validate_command)
app.command("plan")(plan.plan_command)
app.command("analyze")(analyze.analyze_command)
app.command("sweep")(sweep.sweep_command)
app.command("push")(push.push_command)
app.command("launch")(launch.launch_command)
app.command("methods")(methods.methods_command)
app.command("platforms")(platforms.platforms_command)
app.command("kernels")(kernels.kernels_command)
app.add_typer(recipes.app, name="recipes")
app.add_typer(calibration.app, name="calibration")
app.add_typer(env.app, name="env")
app.command("demo")(demo.demo_command)


def _version(shown: bool) -> None:
    if shown:
        sys.stdout.write(f"quantkit {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run() -> None:
    """Run the command line; ends in SystemExit, or in an exception for `failures.end`."""
    try:
        app()
    finally:
        sys.stdout.flush()  # what the end of the process could only complain of
