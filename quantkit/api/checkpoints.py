"""The functions of the main commands: quantize, plan, export, verify, validate, load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.api.given import (
    Changes,
    changes_of,
    check_count,
    listed,
)
from quantkit.api.progress import ProgressCallback, Told
from quantkit.api.search import AUTO
from quantkit.errors import InputError, ReportError

if TYPE_CHECKING:
    from quantkit.pipeline.plan_report import PlanReport
    from quantkit.pipeline.request import Outcome
    from quantkit.runtime.model import Runtime
    from quantkit.validation.reports.report import Report
    from quantkit.verification import VerifyReport

SAMPLES = 32
"""Windows of text that `validate` asks about unless told otherwise."""


def quantize(
    model: str | Path,
    *,
    out: str | Path,
    method: str = "",
    recipe: str | Path = "",
    set: Changes = (),
    calibration: str | Path = "",
    engine: str | Sequence[str] = (),
    gpu: str = "",
    device: str = "auto",
    checkpoint_save: str | Path | None = None,
    python: str | Path | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    memory: int | str | None = None,
    jobs: int | None = None,
    executor: str = "local",
    push: str = "",
    progress: ProgressCallback | None = None,
) -> Outcome:
    """Quantize a Hugging Face directory or Hub name into a checkpoint that is verified before it
    appears.

    method, recipe: exactly one, a name of `quantkit methods` or a YAML file; `set` changes it. The
    method "auto" searches a recipe (`set`: target_bits, max_bytes or max_kl) and writes it to
    OUT.recipe.yaml, what it measured to OUT.search.json.
    calibration: a mixture's name or a data file, instead of the recipe's.
    engine, gpu: engines ("vllm", "sglang") that must load the result, and the device it is for.
    checkpoint_save: also keep the fake-quantized state in this .pth file, for `export`.
    python: the interpreter that has the backend's library.
    resume: go on with a run of the same request that was stopped.
    push: validate the result, then send it to this private repository of the Hub.
    memory (bytes, or "2GB"), jobs (0: as many fit): of rtn_* methods.
    executor: "local", or "ray" for the cluster that RAY_ADDRESS names: shards of rtn_* methods on
    all nodes, a library's job on one.

    Raises InputError for what is wrong with the request or the model (before any work),
    BackendError when the library failed, CheckError when the result did not verify; `out` is then
    as it was. With `push` a CheckError may also say that a gate failed: `out` is then there.
    """
    from quantkit.pipeline.quantize import quantize as run
    from quantkit.pipeline.request import Request, chosen_recipe, executor_named
    from quantkit.pipeline.serve_words import serve_changes
    from quantkit.recipe.units import parse_bytes

    check_count("--jobs", jobs, least=0)
    if push:
        from quantkit.pipeline.push import check_name

        check_name(push)
    changes = [*changes_of(set), *serve_changes(engine, (), gpu)]
    if method == AUTO and not str(recipe):
        from quantkit.validation.search.resolve import searched_recipe

        recipe = searched_recipe(
            str(model),
            Path(out),
            changes,
            Told(progress),
            device=device,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            resume=resume,
        )
        method, changes = "", []
    request = Request(
        model=str(model),
        recipe=chosen_recipe(method, str(recipe), str(calibration), changes),
        out=Path(out),
        checkpoint_save=None if checkpoint_save is None else Path(checkpoint_save),
        device=device,
        python=None if python is None else str(python),
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        resume=resume,
        memory=parse_bytes("--memory", memory) if isinstance(memory, str) else memory,
        jobs=jobs,
        executor=executor_named(executor),
    )
    if not push:
        return run(request, Told(progress))
    from quantkit.pipeline.push import push as send

    outcome = run(request, Told(progress))
    validate(out, baseline=model, device=device, throughput=False, progress=progress)
    send(Path(out), push, Told(progress), public=False)
    return outcome


def plan(
    model: str | Path,
    *,
    method: str = "",
    recipe: str | Path = "",
    set: Changes = (),
    calibration: str | Path = "",
    engine: str | Sequence[str] = (),
    tp: int | str | Sequence[int] = (),
    gpu: str = "",
    measure: bool = False,
    strict: bool = False,
    device: str = "auto",
    checkpoint_save: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
) -> PlanReport:
    """Say what `quantize` would do to every layer, what it costs, and which engine will load it.

    No weights are read: they may be absent, or only on the Hub. `engine` ("vllm", "sglang"), `tp`
    (tensor-parallel sizes) and `gpu` say where the result is to be served; whether it will be is
    `PlanReport.served`. `measure` times the first layers for real. `strict` decides as `quantize`
    does before its work: the weights must be here, an engine that refuses is an InputError.

    Raises InputError for whatever speaks against the job.
    """
    from quantkit.pipeline.plan_report import report_of
    from quantkit.pipeline.quantize import plan_only, preflight
    from quantkit.pipeline.request import Request, chosen_recipe
    from quantkit.pipeline.serve_words import serve_changes

    changes = [*changes_of(set), *serve_changes(engine, tp, gpu)]
    request = Request(
        model=str(model),
        recipe=chosen_recipe(method, str(recipe), str(calibration), changes),
        out=Path("unused"),
        checkpoint_save=None if checkpoint_save is None else Path(checkpoint_save),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    source, decided = preflight(request) if strict else plan_only(request)
    seconds = None
    if measure:
        from quantkit.pipeline.trial import measured_seconds

        seconds = measured_seconds(request, source, decided, Told(progress))
    return report_of(source, decided, seconds)


def export(
    restore: str | Path,
    *,
    out: str | Path,
    model: str | Path = "",
    device: str = "auto",
    python: str | Path | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Outcome:
    """Write the checkpoint of a state that `quantize(checkpoint_save=…)` kept, without calibrating
    again. `model` is its base, where the file does not name it.

    Raises as `quantize`, and InputError for a state of another model or library version.
    """
    from quantkit.pipeline.export import export as run
    from quantkit.pipeline.request import ExportRequest

    request = ExportRequest(
        restore=Path(restore),
        out=Path(out),
        model=str(model),
        device=device,
        python=None if python is None else str(python),
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    return run(request, Told(progress))


def verify(
    directory: str | Path,
    *,
    source: str | Path = "",
    engine: str | Sequence[str] = (),
    tp: int | str | Sequence[int] = 1,
    gpu: str = "",
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check the integrity of a finished checkpoint, of quantkit or anyone's.

    `source` is the 16-bit model that it was made from; `engine` names those that must load it, at
    the sizes `tp` on the device `gpu`. What is wrong is a finding (`VerifyReport.ok`, `.errors`);
    only a path that cannot be read raises InputError.
    """
    from quantkit.pipeline.quantized_source import comparable
    from quantkit.pipeline.serve_words import engine_request
    from quantkit.verification import verify as run

    told = Told(progress)
    base = comparable(str(source)) if str(source) else None
    told.stage("verify")
    return run(
        Path(directory),
        base,
        progress=lambda done, _total: told.advance(done),
        engines=engine_request(engine, tp, gpu),
    )


def validate(
    directory: str | Path,
    *,
    baseline: str | Path = "",
    engine: str = "builtin",
    kernel: str = "auto",
    as_on: str = "",
    device: str = "auto",
    data: str | Path | None = None,
    samples: int = SAMPLES,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    chat: bool = False,
    fewshot: int | None = None,
    sampled: bool | None = None,
    thinking: bool | None = None,
    new_tokens: int | None = None,
    seeds: int = 1,
    gates: str | Sequence[str] = (),
    reports: str | Path | Sequence[str | Path] = (),
    against: str | Path | None = None,
    against_online: str = "",
    throughput: bool = True,
    broken_baseline: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Measure a checkpoint against its 16-bit baseline and hold its gates.

    baseline: a directory or Hub name; "": what quantkit.json remembers.
    engine, kernel: what runs both models ("builtin", "vllm", …), and the built-in one's kernel.
    as_on: the GPU (h100, b200, …) as whose engine activations are rounded; "": this.
    data: a text file instead of the held-out text; samples: windows of 512 tokens of it.
    tasks, limit: lm-eval tasks, and the most samples of each; chat: through the chat template;
    fewshot: answered examples before each question (None: as the task has it).
    sampled, thinking, new_tokens, seeds: how they are answered (`--sampled` or `--greedy`,
    `--thinking` or `--no-thinking`, `--new-tokens`, `--seeds`; None: as task and template have it).
    gates: such as "ppl_ratio<=1.02", beside those of the scheme and the recipe.
    reports: files to write (.json, .md, .html, .xml); against: an earlier .json to compare with.
    against_online: an engine's method ("fp8", "sglang:fp8") for the baseline, as a third column.
    broken_baseline: measure though the baseline answers nothing, which the report then says.

    A gate that fails is no exception: see `Report.ok` and `.gates`. The result is also written into
    the checkpoint's quantkit.json and model card. Raises InputError before anything is generated,
    BackendError when an engine fails, and ReportError, which holds the result, when a file of
    `reports` could not be written at the end.
    """
    from quantkit.validation.ask.answers import Answers
    from quantkit.validation.reports.record import record
    from quantkit.validation.reports.write import check_reports, write_reports
    from quantkit.validation.run import ValidateRequest
    from quantkit.validation.run import validate as run

    files = [Path(file) for file in listed(reports)]
    check_reports(files)
    check_count("--samples", samples)
    check_count("--limit", limit)
    check_count("--new-tokens", new_tokens)
    check_count("--seeds", seeds)
    request = ValidateRequest(
        path=Path(directory),
        baseline=str(baseline),
        engine=engine,
        kernel=kernel,
        as_on=as_on,
        device=device,
        data=None if data is None else Path(data),
        samples=samples,
        tasks=tuple(name for entry in listed(tasks) for name in entry.split(",")),
        limit=limit,
        chat=chat,
        fewshot=fewshot,
        answers=Answers(sampled, thinking, new_tokens, seeds),
        gates=tuple(listed(gates)),
        against=None if against is None else Path(against),
        against_online=against_online,
        throughput=throughput,
        broken_baseline=broken_baseline,
    )
    report = run(request, Told(progress))
    document = report.to_json()
    record(Path(directory), document)
    try:
        write_reports(document, files)
    except InputError as error:
        raise ReportError(error.message, hint=error.hint, code=error.code, result=report) from error
    return report


def load(
    directory: str | Path,
    *,
    device: str = "auto",
    kernel: str = "auto",
    as_on: str = "",
    dtype: str = "auto",
    progress: ProgressCallback | None = None,
) -> Runtime:
    """Load a checkpoint of any known layout (or a 16-bit one) as a model with the `forward` and
    `generate` of Transformers, computed with the kernels that serve it.

    `as_on` names the GPU as whose engine activations are rounded (h100, b200, …; "": this one).
    `kernel` is "auto" or the one that every quantized layer must get; `dtype` that of the config
    unless named (bfloat16, float16, float32). Raises InputError for a checkpoint that is not
    consistent in itself, and for a kernel or device that is not there.
    """
    from quantkit.runtime.load import load as run

    steps = Told(progress).steps("load")
    return run(
        Path(directory), device=device, kernel=kernel, dtype=dtype, as_on=as_on, progress=steps
    )
