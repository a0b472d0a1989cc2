"""`quantkit validate DIR --baseline MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit import api
from quantkit.cli import options
from quantkit.cli.output import Output
from quantkit.errors import EXIT_CHECK, ReportError
from quantkit.recipe.gates import outcome

if TYPE_CHECKING:
    from quantkit.validation.reports.report import Report


def validate_command(
    directory: Annotated[Path, typer.Argument(help="A finished checkpoint.")],
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline",
            help="The 16-bit model; default: the directory here that it was made from, or what "
            "quantkit.json names.",
        ),
    ] = "",
    engine: Annotated[
        str, typer.Option("--engine", help="What runs both models: builtin, transformers, vllm …")
    ] = "builtin",
    kernel: Annotated[
        str, typer.Option("--kernel", help="The kernel of every quantized layer, or auto.")
    ] = "auto",
    as_on: options.AsOn = "",
    device: options.Device = "auto",
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Another text than the held-out one (.txt, .jsonl …)."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Windows of 512 tokens, twelve facts each.")
    ] = api.SAMPLES,
    tasks: Annotated[
        list[str],
        typer.Option("--tasks", help="lm-eval tasks, or their YAML files; repeatable."),
    ] = [],  # noqa: B006
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Most samples of an lm-eval task.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask lm-eval tasks through the chat template.")
    ] = False,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", min=0, help="Answered examples before each question.")
    ] = None,
    sampled: Annotated[
        bool | None,
        typer.Option(
            "--sampled/--greedy",
            help="How lm-eval tasks are answered: sampled as generation_config.json says, or "
            "greedily; default: as each task has it.",
            show_default=False,
        ),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="What --chat tells the template.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=1, help="The most of an answer.")
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Sampled answers to each question.")
    ] = 1,
    gate: Annotated[
        list[str], typer.Option("--gate", help="Such as 'ppl_ratio<=1.02'; repeatable.")
    ] = [],  # noqa: B006
    report: Annotated[
        list[Path],
        typer.Option("--report", help="Write PATH.json, .md, .html or .xml (JUnit); repeatable."),
    ] = [],  # noqa: B006
    against: Annotated[
        Path | None,
        typer.Option("--against", help="An earlier JSON report; exit 4 when something got worse."),
    ] = None,
    against_online: Annotated[
        str,
        typer.Option(
            "--against-online",
            help="Also the baseline as an engine quantizes it while it loads: fp8, mxfp8, "
            "sglang:fp8 …",
        ),
    ] = "",
    no_throughput: Annotated[
        bool, typer.Option("--no-throughput", help="Measure accuracy alone.")
    ] = False,
    broken_baseline: Annotated[
        bool,
        typer.Option(
            "--broken-baseline", help="Measure though the baseline answers nothing, and say so."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure a checkpoint against its baseline and hold its gates; exit 4 when one fails."""
    ui = Output(as_json=as_json)
    try:
        result = api.validate(
            directory,
            baseline=baseline,
            engine=engine,
            kernel=kernel,
            as_on=as_on,
            device=device,
            data=data,
            samples=samples,
            tasks=tasks,
            limit=limit,
            chat=chat,
            fewshot=fewshot,
            sampled=sampled,
            thinking=thinking,
            new_tokens=new_tokens,
            seeds=seeds,
            gates=gate,
            reports=report,
            against=against,
            against_online=against_online,
            throughput=not no_throughput,
            broken_baseline=broken_baseline,
            progress=ui.follow,
        )
    except ReportError as error:
        ui.finish()
        _show(ui, error.result)
        raise
    finally:
        ui.finish()
    _show(ui, result)
    ui.document(result.to_json())
    if not result.ok:
        raise typer.Exit(EXIT_CHECK)


def _show(ui: Output, report: Report) -> None:
    """The gates, what became worse, and the verdict."""
    ui.table(
        "",
        ["gate", "limit", "measured", "95 % interval", "verdict"],
        [
            (gate.metric, gate.limit, _number(gate.value), _interval(gate.interval), gate.verdict)
            for gate in report.gates
        ],
    )
    if report.changes is not None:
        moved = [c for c in report.changes if c.verdict not in ("same", "noise")]
        ui.table(
            "since the earlier report" if moved else "nothing moved since the earlier report",
            ["metric", "before", "now", "change", "verdict"],
            [(c.metric, _number(c.old), _number(c.new), f"{c.delta:+.4g}", c.verdict)
             for c in moved],
        )  # fmt: skip
    if report.online is not None:
        ui.info(f"note: {report.online.sentence}")
    for gate in report.gates:
        if gate.verdict == "undecided" or (gate.verdict == "fail" and gate.reason):
            ui.info(f"warning: {gate.metric}{gate.limit}: {gate.verdict}: {gate.reason}")
    for talk in report.canary:
        if talk["quantized_problem"]:
            ui.info(f"warning: canary {talk['prompt']!r}: {talk['quantized_problem']}")
    for warning in report.warnings:
        ui.info(f"warning: {warning}")
    for note in report.notes:
        ui.info(f"note: {note}")
    failed = [gate.metric for gate in report.gates if not gate.held]
    worse = [c.metric for c in report.changes or () if c.verdict == "worse"]
    verdict = outcome(report.ok, report.undecided)
    verdict = verdict if report.ok else f"{verdict}: {', '.join([*failed, *worse])}"
    both = report.values["perplexity"]
    ui.text(
        f"{report.checkpoint['name']}: perplexity {both.quantized:.2f} (baseline "
        f"{both.baseline:.2f}), {verdict}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} … {interval[1]:.4g}"
