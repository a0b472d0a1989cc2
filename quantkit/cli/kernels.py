"""`quantkit kernels [DIR]`: what can compute here and why not, and which kernel each layer gets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.output import Output


def kernels_command(
    directory: Annotated[
        Path | None, typer.Argument(help="A checkpoint: which kernel would each layer get?")
    ] = None,
    kernel: Annotated[
        str, typer.Option("--kernel", help="Only this kernel, or SGLang's name of a GEMM backend.")
    ] = "auto",
    as_on: options.AsOn = "",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """List the kernels of the builtin runtime, in the order in which they are preferred."""
    from quantkit.backends.environments.device import amd_note, resolve_device
    from quantkit.runtime.linear.kernels import sglang
    from quantkit.runtime.linear.kernels.select import check_name
    from quantkit.runtime.load import pick_device
    from quantkit.runtime.loading.make_layers import notes_as_served
    from quantkit.runtime.preview import available, preview

    out = Output(as_json=as_json)
    if note := amd_note():
        out.info(f"note: {note}")
    found = pick_device(resolve_device(device))
    check_name(kernel, found)
    kernels = {n: why for n, why in available(found).items() if kernel in ("auto", n)}
    autos = {option: sglang.auto(option, found) for option in sglang.OPTIONS}
    backends = [
        {"option": b.option, "name": b.name, "reason": sglang.why_not(b, found)}
        for b in sglang.BACKENDS
        if kernel in ("auto", b.name)
    ]
    document = {
        "schema_version": 1,
        "device": str(found),
        "kernels": [{"name": name, "reason": reason} for name, reason in kernels.items()],
        "gemm_backends": backends,
        "gemm_backend_auto": autos,
    }
    if directory is None:
        if kernels:
            out.table(
                f"kernels on {found}, in order",
                ["kernel", "runs here"],
                [(name, reason or "yes") for name, reason in kernels.items()],
            )
        if backends:
            out.table(
                "SGLang's GEMM backends",
                ["backend", "option", "runs here"],
                [(b["name"], f"--{b['option']}", b["reason"] or "yes") for b in backends],
            )
        for option, name in autos.items():
            out.text(f"--{option} auto here: {name or 'none'}")
    else:
        records = preview(directory, found, kernel, as_on)
        document["layers"] = [vars(record) for record in records]
        alike = Counter(
            (r.scheme, r.kernel, "\n".join(f"{n}: {why}" for n, why in r.refused.items()))
            for r in records
        )
        out.table(
            f"{directory} on {found}",
            ["scheme", "layers", "kernel", "why none before it"],
            [(scheme, n, chosen, why or "-") for (scheme, chosen, why), n in alike.items()],
        )
        if any(record.weights_only for record in records):
            out.text("weights only: activations that the scheme quantizes are computed in 16 bit")
        for sentence in notes_as_served(records):
            out.text(sentence)
        if not records:
            out.text("no layer is quantized")
    out.document(document)
