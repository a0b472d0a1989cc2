"""The model card: Hub front matter, how to serve, and only numbers that this run measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.provenance import Calibration, Provenance
from quantkit.engines import NAMES, SILENT_GARBAGE, Support
from quantkit.pipeline.frontmatter import front_matter, header, with_results
from quantkit.pipeline.plan import Plan
from quantkit.recipe.gates import outcome

_MEASURED = "## Measured"
_MADE = "## How it was made"
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def hub_name(asked_for: str, source: Checkpoint) -> str | None:
    """The base model's name on the Hub: as it was asked for, or, for a directory whose own card
    says that it is a quantized form of a base, that base."""
    if not Path(asked_for).exists():
        name = asked_for.partition("@")[0]
        return name if _HUB_NAME.match(name) else None
    card = front_matter(source)
    base = card.get("base_model")
    if isinstance(base, list) and len(base) == 1:
        base = base[0]
    same_model = card.get("base_model_relation") == "quantized" and _HUB_NAME.match(str(base))
    return str(base) if same_model else None


def model_card(
    plan: Plan,
    source: Checkpoint,
    base: str | None,
    provenance: Provenance,
) -> str:
    """The README.md of a finished checkpoint."""
    recipe = plan.recipe
    old = front_matter(source)
    head: dict[str, Any] = {}
    if base:
        head |= {"base_model": base, "base_model_relation": "quantized"}
    head |= {key: old[key] for key in ("license", "license_name", "license_link", "language")
             if key in old}  # fmt: skip
    head |= {
        "pipeline_tag": old.get("pipeline_tag", "text-generation"),
        "tags": ["quantkit", recipe.backend, recipe.scheme],
    }
    title = f"{(base or source.path.name).split('/')[-1]}, {recipe.name}"
    version = provenance.versions.get(plan.backend.distribution, "")
    library = f"{plan.backend.distribution} {version}".strip()
    return "\n".join(
        [
            header(head),
            "",
            f"# {title}",
            "",
            f"{recipe.description or recipe.name}. Made from {base or source.path.name} by "
            f"quantkit {__version__} with {library} ({plan.method.algorithm}).",
            "",
            "## Serve",
            "",
            *_serving(plan.loads, plan.method.layout),
            "",
            *_measured_section(provenance),
            _MADE,
            "",
            *_calibration(provenance.calibration),
            f"- {len(plan.layers)} linear layers quantized, {len(plan.kept)} kept in 16 bit.",
            f"- Seed {recipe.seed}; the resolved recipe, library versions and a digest of every "
            "tensor are in `quantkit.json`.",
            *(f"- {note}" for note in provenance.notes),
            "",
        ]
    )


def with_measured(card: str, provenance: Provenance) -> str:
    """A card of ours with the section of measurements, and the results in its head, written anew;
    another's card as it is."""
    before, start, rest = card.partition(f"\n{_MEASURED}\n")
    _, end, after = rest.partition(f"\n{_MADE}\n")
    if not start or not end:
        return card
    whole = "\n".join([before, *_measured_section(provenance), _MADE, after])
    found = provenance.results.validation
    return with_results(whole, found) if found else whole


def _measured_section(provenance: Provenance) -> list[str]:
    lines = [_MEASURED, "", "| what | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _measured(provenance)]
    found = provenance.results.validation
    if found is None:
        return [*lines, "", "Accuracy and throughput were not measured.", ""]
    text, engine = found["text"], found["engine"]
    undecided = found.get("undecided", 0)
    said = outcome(found["ok"], undecided) if found["ok"] else "not every gate held"
    return [
        *lines,
        *(f"| {name} | {value} |" for name, value in _validated(found)),
        "",
        f"Against {found['baseline']['name']} in {engine['name']} {engine['version']} on "
        f"{engine['device']}, on {text['windows']} windows of {text['length']} tokens of "
        f"{text['name']}: {said}.",
        "",
    ]


def _validated(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What `quantkit validate` measured; weights-only runs say so."""
    values, metrics = found["values"], found["metrics"]
    only = " (weights only)" if found["engine"]["weights_only"] else ""
    for title, key, form in (
        ("perplexity", "perplexity", ".2f"),
        ("four-choice facts", "mcq_accuracy", ".1%"),
    ):
        both = values[key]
        if both["quantized"] is not None:
            yield (
                f"{title}{only}",
                f"{both['quantized']:{form}} (baseline {both['baseline']:{form}})",
            )
    kl = metrics["kl_mean"]["value"]
    if kl is not None:
        yield f"KL divergence from the baseline, mean{only}", f"{kl:.4f} nats"
    share = ((found.get("reference") or {}).get("recovered") or {}).get("kl")
    if share is not None:
        yield f"of what rounding to nearest loses, recovered (KL){only}", f"{share:.0%}"
    seen = metrics.get("image_kl_mean", {}).get("value")
    if seen is not None:
        yield f"KL divergence of the words that follow a picture, mean{only}", f"{seen:.4f} nats"
    cache = metrics.get("kv_kl", {}).get("value")
    if cache is not None:
        yield f"KL divergence that the quantized KV cache adds{only}", f"{cache:.4f} nats"
    for name, title in (("prefill_speedup", "prefill"), ("decode_speedup", "decode")):
        value = metrics[name]["value"]
        if value is not None:
            yield f"{title} speed on {found['engine']['device']}", f"{value:.2f} × the baseline's"


def _measured(provenance: Provenance) -> list[tuple[str, str]]:
    results = provenance.results
    if not results.source_bytes:  # an old file, or one that was edited
        return []
    rows = [
        ("size of the weights", f"{results.weight_bytes / 1e6:.0f} MB "
         f"({results.weight_bytes / results.source_bytes:.2f} of the source)"),
        ("bits a weight in quantized layers", f"{results.bits_per_weight:.2f}"),
    ]  # fmt: skip
    sqnr = results.weight_sqnr_db
    if sqnr:
        rows.append(
            ("weight SQNR against the source, mean / worst layer",
             f"{sqnr.mean:.1f} dB / {sqnr.min:.1f} dB ({sqnr.worst_layer})")
        )  # fmt: skip
    return rows


def _serving(loads: Support, layout: str) -> list[str]:
    if loads.export_only:
        return [f"This is {loads.describe()}."]
    if layout == "gguf":
        return ["```bash", "llama-server -m PATH_TO_THIS_DIRECTORY/*.gguf", "```"]
    serving = (*loads.loading, *loads.unknown)
    if not {"vllm", "sglang"} & set(serving):
        return [f"This model's shapes, quantized so, load in: {loads.describe()}."]
    lines = ["```bash"]
    if "vllm" in serving:
        lines.append("vllm serve PATH_TO_THIS_DIRECTORY")
    if "sglang" in serving:
        flag = " --quantization modelopt" if layout == "modelopt" else ""
        lines.append(f"python -m sglang.launch_server --model-path PATH_TO_THIS_DIRECTORY{flag}")
    lines.append("```")
    for engine in loads.unknown:
        lines += ["", f"Whether {NAMES[engine]} loads this model is unknown: try it once."]
    if layout in SILENT_GARBAGE:
        lines += ["", f"**{SILENT_GARBAGE[layout]}**"]
    return lines


def _calibration(calibration: Calibration | None) -> list[str]:
    if not calibration:
        return ["- No calibration."]
    if not calibration.digest:
        return ["- Calibration unknown: the state was made elsewhere."]
    return [
        f"- Calibrated with `{calibration.name}`: {calibration.samples} samples, "
        f"{calibration.tokens} tokens, digest `{calibration.digest[:16]}`."
    ]
