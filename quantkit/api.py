"""The Python API: what the commands do, as functions; `import quantkit` offers them lazily.

Paths may be `str` or `Path`. Failures are the exceptions of `quantkit.errors`; Ctrl-C and an
exception of the callback leave everything as it was. Heavy libraries are imported by the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit.checkpoint.progress import Progress
from quantkit.errors import InputError, ReportError

if TYPE_CHECKING:
    from quantkit.pipeline.plan_report import PlanReport
    from quantkit.pipeline.request import Outcome
    from quantkit.runtime.model import Runtime
    from quantkit.validation.reports.report import Report
    from quantkit.verification import EngineRequest, VerifyReport

SAMPLES = 32
"""Windows of text that `validate` asks about unless told otherwise."""


@dataclass(frozen=True)
class ProgressEvent:
    """What a progress callback is told: a stage begins, it advances, or there is a note.

    `done` of `total` steps or bytes of the stage are finished (total 0: unknown). `note` is
    something to know, which quantkit.json keeps too; empty but for the kind "note".
    """

    kind: Literal["stage", "advance", "note"]
    stage: str
    done: int = 0
    total: int = 0
    unit: Literal["steps", "bytes"] = "steps"
    note: str = ""


ProgressCallback = Callable[[ProgressEvent], object]
Changes = Mapping[str, Any] | Iterable[str]
"""{"group_size": 64, "ignore+": ["re:.*o_proj"]}, or the texts that `--set` takes."""


def quantize(
    model: str | Path,
    *,
    out: str | Path,
    method: str = "",
    recipe: str | Path = "",
    set: Changes = (),
    calibration: str | Path = "",
    device: str = "auto",
    checkpoint_save: str | Path | None = None,
    python: str | Path | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    memory: int | str | None = None,
    jobs: int | None = None,
    executor: str = "local",
    progress: ProgressCallback | None = None,
) -> Outcome:
    """Quantize a Hugging Face directory or Hub name into a checkpoint that is verified before it
    appears.

    method, recipe: exactly one, a name of `quantkit methods` or a YAML file; `set` changes it.
    calibration: a mixture's name or a data file, instead of the recipe's.
    checkpoint_save: also keep the fake-quantized state in this .pth file, for `export`.
    python: the interpreter that has the backend's library.
    resume: go on with a run of the same request that was stopped.
    memory (bytes, or "2GB"), jobs (0: as many fit), executor ("local", "ray"): of rtn_* methods.

    Raises InputError for what is wrong with the request or the model (before any work),
    BackendError when the library failed, CheckError when the result did not verify; `out` is then
    as it was.
    """
    from quantkit.pipeline.quantize import quantize as run
    from quantkit.pipeline.request import Request, chosen_recipe, executor_named
    from quantkit.recipe.units import parse_bytes

    _count("--jobs", jobs, least=0)
    request = Request(
        model=str(model),
        recipe=chosen_recipe(method, str(recipe), str(calibration), _changes(set)),
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
    return run(request, _Told(progress))


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

    changes = [*_changes(set), *_serve_changes(engine, tp, gpu)]
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

        seconds = measured_seconds(request, source, decided, _Told(progress))
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
    return run(request, _Told(progress))


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
    from quantkit.verification import verify as run

    told = _Told(progress)
    base = comparable(str(source)) if str(source) else None
    told.stage("verify")
    return run(
        Path(directory),
        base,
        progress=lambda done, _total: told.advance(done),
        engines=_engine_request(engine, tp, gpu),
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
    gates: str | Sequence[str] = (),
    reports: str | Path | Sequence[str | Path] = (),
    against: str | Path | None = None,
    throughput: bool = True,
    progress: ProgressCallback | None = None,
) -> Report:
    """Measure a checkpoint against its 16-bit baseline and hold its gates.

    baseline: a directory or Hub name; "": what quantkit.json remembers.
    engine, kernel: what runs both models ("builtin", "vllm", …), and the built-in one's kernel.
    as_on: the GPU (h100, b200, …) as whose engine activations are rounded; "": this.
    data: a text file instead of the held-out text; samples: windows of 512 tokens of it.
    tasks, limit: lm-eval tasks, and the most samples of each.
    gates: such as "ppl_ratio<=1.02", beside those of the scheme and the recipe.
    reports: files to write (.json, .md, .html, .xml); against: an earlier .json to compare with.

    A gate that fails is no exception: see `Report.ok` and `.gates`. The result is also written into
    the checkpoint's quantkit.json and model card. Raises InputError before anything is generated,
    BackendError when an engine fails, and ReportError, which holds the result, when a file of
    `reports` could not be written at the end.
    """
    from quantkit.validation.reports.record import record
    from quantkit.validation.reports.write import check_reports, write_reports
    from quantkit.validation.run import ValidateRequest
    from quantkit.validation.run import validate as run

    files = [Path(file) for file in _listed(reports)]
    check_reports(files)
    _count("--samples", samples)
    _count("--limit", limit)
    request = ValidateRequest(
        path=Path(directory),
        baseline=str(baseline),
        engine=engine,
        kernel=kernel,
        as_on=as_on,
        device=device,
        data=None if data is None else Path(data),
        samples=samples,
        tasks=tuple(name for entry in _listed(tasks) for name in entry.split(",")),
        limit=limit,
        gates=tuple(_listed(gates)),
        against=None if against is None else Path(against),
        throughput=throughput,
    )
    report = run(request, _Told(progress))
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

    steps = _Told(progress).steps("load")
    return run(
        Path(directory), device=device, kernel=kernel, dtype=dtype, as_on=as_on, progress=steps
    )


class _Told:
    """The Reporter of the pipeline that tells one callback."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._tell = callback or (lambda _event: None)
        self._at = ProgressEvent("stage", "")

    def stage(self, name: str, total: int = 0, unit: Literal["steps", "bytes"] = "steps") -> None:
        self._at = ProgressEvent("stage", name, 0, total, unit)
        self._tell(self._at)

    def advance(self, done: int) -> None:
        self._at = replace(self._at, kind="advance", done=done)
        self._tell(self._at)

    def note(self, text: str) -> None:
        self._tell(replace(self._at, kind="note", note=text))

    def steps(self, name: str) -> Progress:
        """What hears (done, total), and begins the stage when it first does."""

        def advance(done: int, total: int) -> None:
            if self._at.stage != name:
                self.stage(name, total)
            self.advance(done)

        return advance


def _changes(given: Changes) -> list[str]:
    from quantkit.recipe.load import as_changes

    if isinstance(given, Mapping):
        return as_changes(given)
    return [given] if isinstance(given, str) else list(given)


def _listed(given: Any) -> list[Any]:
    """One value, or a sequence of them, as a list."""
    return [given] if isinstance(given, str | Path) else list(given)


def _count(what: str, value: int | None, least: int = 1) -> None:
    if value is not None and value < least:
        raise InputError(
            f"{what} {value} is less than {least}.",
            hint=f"for example {what} 8",
            code="request.count",
        )


def _serve_changes(
    engine: str | Sequence[str], tp: int | str | Sequence[int], gpu: str
) -> list[str]:
    """Where the result is served, as changes of the recipe; InputError for values that are none."""
    from quantkit.engines import gpu_named

    names, sizes = _engine_names(engine), _sizes(tp)
    if gpu:
        gpu_named(gpu)
    named = {
        "engines": f"[{','.join(names)}]" if names else "",
        "tp": f"[{','.join(map(str, sizes))}]" if sizes else "",
        "gpu": gpu,
    }
    return [f"serve.{key}={value}" for key, value in named.items() if value]


def _engine_request(
    engine: str | Sequence[str], tp: int | str | Sequence[int], gpu: str
) -> EngineRequest | None:
    from quantkit.verification import EngineRequest

    names = _engine_names(engine)
    return EngineRequest(names, _sizes(tp), gpu or None) if names else None


def _engine_names(engine: str | Sequence[str]) -> tuple[str, ...]:
    from quantkit.engines import engine_named

    if isinstance(engine, str):
        engine = engine.split(",") if engine else ()
    return tuple(engine_named(name.strip()).engine for name in engine)


def _sizes(tp: int | str | Sequence[int]) -> tuple[int, ...]:
    """Tensor-parallel sizes: a number, numbers, or the text of `--tp` such as "1,2,4"."""
    if isinstance(tp, str):
        tp = tp.split(",") if tp else ()  # type: ignore[assignment]
    sizes = [str(size).strip() for size in ([tp] if isinstance(tp, int) else tp)]
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise InputError(
            f"--tp {','.join(sizes)} is no list of tensor-parallel sizes.",
            hint="for example --tp 1,2,4,8",
            code="request.tp",
        )
    return tuple(map(int, sizes))
