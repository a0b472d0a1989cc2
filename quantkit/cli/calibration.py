"""`quantkit calibration list|build|show`: the mixtures, and the tokens that one becomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import options
from quantkit.cli.output import Output
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.calibration import TokenFile

app = typer.Typer(
    help="List calibrations, build one's tokens for a model, or show one.", no_args_is_help=True
)

Name = Annotated[
    str, typer.Argument(help="A name, a calibration file, or a .jsonl/.json/.csv/.parquet/.txt.")
]
Sets = Annotated[
    list[str], typer.Option("--set", help="KEY.PATH=VALUE in the calibration; repeatable.")
]


@app.command("list")
def list_command(as_json: options.Json = False) -> None:
    """List the bundled calibrations."""
    from quantkit.calibration import calibration_files, load_calibration

    out = Output(as_json=as_json)
    configs = [load_calibration(name) for name in calibration_files()]
    out.table(
        "",
        ["calibration", "samples", "sources", "network", "licence", "description"],
        [
            (
                config.name,
                f"{config.samples} × {config.sequence_length}",
                ", ".join(source.label for source in config.sources),
                "needed" if any(source.type == "hub" for source in config.sources) else "no",
                config.licence,
                config.description,
            )
            for config in configs
        ],
    )
    out.document(
        {
            "schema_version": 1,
            "calibrations": [config.model_dump(mode="json") for config in configs],
        }
    )


@app.command("build")
def build_command(
    name: Name,
    model: Annotated[
        str, typer.Option("--model", help="The model whose tokenizer to use: a directory or name.")
    ],
    sets: Sets = [],  # noqa: B006
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Make the token file of a calibration for a model, and say what is in it."""
    from quantkit.calibration import build_tokens, load_calibration
    from quantkit.checkpoint.hub import resolve_model

    out = Output(as_json=as_json)
    config = load_calibration(name, _overrides(sets))
    path = resolve_model(model, weights=False, trust_remote_code=trust_remote_code)
    out.stage(f"tokenize {config.name}", config.samples)
    try:
        tokens = build_tokens(
            config,
            path,
            progress=lambda done, _: out.advance(done),
            trust_remote_code=trust_remote_code,
        )
    finally:
        out.finish()
    _show_tokens(out, tokens)


@app.command("show")
def show_command(
    name: Annotated[
        str, typer.Argument(help="A name, a calibration or data file, or a built token file.")
    ],
    sets: Sets = [],  # noqa: B006
    as_json: options.Json = False,
) -> None:
    """Print a calibration as YAML, every key with its value; or what a token file holds."""
    import yaml

    from quantkit.calibration import load_calibration, read_token_file

    out = Output(as_json=as_json)
    if name.endswith(".safetensors"):
        tokens = read_token_file(Path(name))
        if tokens is None:
            raise InputError(
                f"{name} is no complete token file: it, or the JSON beside it, is missing or "
                "does not have the digest that the JSON states.",
                hint="quantkit calibration build NAME --model MODEL",
                code="calibration.bad_token_file",
            )
        _show_tokens(out, tokens)
        return
    config = load_calibration(name, _overrides(sets)).model_dump(mode="json")
    out.text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip())
    out.document(config)


def _overrides(sets: list[str]) -> dict[str, object]:
    import yaml

    from quantkit.recipe.documents import parse_yaml

    changes: dict[str, object] = {}
    for change in sets:
        key, sign, text = change.partition("=")
        try:
            changes[key] = parse_yaml(text)
        except (yaml.YAMLError, ValueError):
            sign = ""
        if not sign or not key:
            raise InputError(
                f"--set {change!r} is not KEY=VALUE.",
                hint="for example --set samples=64, or --set sources.0.weight=2",
                code="calibration.bad_set",
            )
    return changes


def _show_tokens(out: Output, tokens: TokenFile) -> None:
    summary = tokens.summary
    out.table(
        f"{summary['name']}: {tokens.samples} samples × {tokens.length}, {tokens.tokens} tokens",
        ["source", "samples", "tokens", "documents", "dropped", "tokens cut"],
        [
            (
                part["source"],
                part["samples"],
                part["tokens"],
                f"{part['documents_used']} of {part['documents_seen']} seen",
                _reasons(part["documents_dropped"]),
                part["tokens_cut"],
            )
            for part in summary["sources"]
        ],
    )
    lengths = summary["document_lengths"]
    out.table("Documents by length in tokens", list(lengths), [list(lengths.values())])
    out.table(
        "How each source's first sample begins",
        ["source", "text"],
        [(part["source"], part["preview"][:300]) for part in summary["sources"]],
    )
    for note in summary.get("notes", []):  # files of earlier versions have none
        out.note(note)
    out.text(f"digest {tokens.digest}\nlicence {summary['licence']}\n{tokens.path}")
    out.document({**summary, "path": str(tokens.path)})


def _reasons(dropped: dict[str, Any]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
