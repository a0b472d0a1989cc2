"""Completeness that needs no source: the layers and shapes that the config itself promises."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from quantkit.checkpoint.directory import Checkpoint
from quantkit.checkpoint.network.config import is_tied, missing_head
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.modules import layer_index
from quantkit.checkpoint.tensors import same_bytes
from quantkit.errors import InputError
from quantkit.formats.quantized import QuantizedCheckpoint, as_subject
from quantkit.formats.registry import writer_named
from quantkit.verification.configuration.mixture import check_mixture
from quantkit.verification.configuration.towers import check_towers
from quantkit.verification.findings import Finding, error, warning

Fault = tuple[str, str | None]
"""Code and place of a finding."""

_COPY_AGAIN = "export the checkpoint again, and verify it with --source MODEL"
_INPUT_IS_HIDDEN = {
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj", "q_a_proj",
    "kv_a_proj_with_mqa", "w1", "w3",
}  # fmt: skip
_OUTPUT_IS_HIDDEN = {"o_proj", "down_proj", "w2"}
_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_layers")


def check_completeness(
    subject: QuantizedCheckpoint, source: Checkpoint | None, sealed: Collection[Fault] = ()
) -> list[Finding]:
    """Findings on missing layers, modules, embeddings and heads, and on impossible shapes.

    What a known source lacks too (its promised multi-token-prediction layers, parts that were
    pruned) is worth a warning only; without it what quantkit.json says of it (`sealed`).
    """
    found = _check(subject)
    if not found:
        return found
    before = set(sealed)
    if source is not None:
        before = set(faults(_check(as_subject(source, subject.layout))))
    return [replace(f, severity="warning") if _fault(f) in before else f for f in found]


def faults(findings: Iterable[Finding]) -> list[Fault]:
    """The findings of this check in the form in which quantkit.json keeps them."""
    return [_fault(f) for f in findings if f.code.startswith("complete.")]


def _fault(finding: Finding) -> Fault:
    return finding.code, finding.where


def refuse_incomplete(source: Checkpoint) -> None:
    """InputError (`plan.incomplete`) for a 16-bit source that no engine can start from, as far as
    its headers tell: a layer, the embedding, the final norm or an untied head is nowhere, or a
    mixture of experts does not fit together."""
    subject = as_subject(source, writer_named("compressed-tensors"))
    text = text_config(source.config)
    found = [
        *_check_layers(_by_layer(subject, text), text),
        *_check_ends(subject, text),
        *check_mixture(subject.modules.values(), source.config),
    ]
    found = [finding for finding in found if finding.severity == "error"]
    if found:
        raise InputError(
            f"{source.path} is no whole model: {'; '.join(f.message for f in found)}.",
            hint="take config.json and weights from the same model, as it was published",
            code="plan.incomplete",
        )


def _check(subject: QuantizedCheckpoint) -> list[Finding]:
    text = text_config(subject.checkpoint.config)
    layers = _by_layer(subject, text)
    return [
        *_check_layers(layers, text),
        *_check_peers(layers, text),
        *_check_ends(subject, text),
        *_check_tied_head(subject),
        *_check_mtp(subject, text),
        *_check_towers(subject),
        *_check_shapes(subject, text),
        *check_mixture(subject.modules.values(), subject.checkpoint.config),
    ]


def _by_layer(subject: QuantizedCheckpoint, text: Mapping[str, Any]) -> dict[int, frozenset[str]]:
    """Layer of the decoder → the modules in it, named from the layer on.

    The decoder is the stack with the most modules (an encoder or a tower is another one); layers
    past `num_hidden_layers` are multi-token prediction.
    """
    count = _layer_count(text)
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, module in subject.modules.items():
        index = layer_index(name)
        if index is None or module.kind in ("tower", "mtp"):
            continue
        prefix, _, rest = name.partition(f".{index}.")
        if not {"mtp", "nextn"}.isdisjoint(name.split(".")) or (count and index >= count):
            continue
        stacks[prefix][index].add(rest)
    if not stacks:
        return {}
    decoder = max(stacks.values(), key=lambda stack: sum(map(len, stack.values())))
    return {index: frozenset(names) for index, names in decoder.items()}


def _layer_count(text: Mapping[str, Any]) -> int | None:
    """Decoder layers as the checkpoint numbers them (LongCat's hold two blocks each)."""
    stated = [text.get(key) for key in ("num_hidden_layers", "num_layers")]
    counts = [count for count in stated if isinstance(count, int)]
    return min(counts) if counts else None


def _check_layers(
    layers: Mapping[int, frozenset[str]], text: Mapping[str, Any]
) -> Iterator[Finding]:
    count = _layer_count(text)
    if count is None or not layers:
        return
    missing = [index for index in range(count) if index not in layers]
    if missing:
        yield error(
            "complete.missing_layer",
            f"config.json says {count} layers; the checkpoint has no tensor of layer "
            f"{', '.join(map(str, missing[:5]))}{' …' if len(missing) > 5 else ''}",
            _COPY_AGAIN,
            f"layers.{missing[0]}",
        )


def _check_peers(
    layers: Mapping[int, frozenset[str]], text: Mapping[str, Any]
) -> Iterator[Finding]:
    """A layer that lacks what most layers of its kind have.

    Hybrid models have several kinds: layers whose entries in the config's per-layer lists differ
    are no peers, nor are layers that each have something that the other lacks.
    """
    count = _layer_count(text)
    lists = [v for v in text.values() if isinstance(v, list) and len(v) == count]
    shared = text.get("num_kv_shared_layers")
    first_shared = (count or 0) - shared if isinstance(shared, int) else None
    kinds: dict[str, list[int]] = defaultdict(list)
    for index in sorted(layers):
        entries = [entry[index] for entry in lists if index < len(entry)]
        late = first_shared is not None and index >= first_shared
        kinds[f"{entries}{late}"].append(index)
    for indices in kinds.values():
        numbers = Counter(layers[index] for index in indices)
        for index in indices:
            own = layers[index]
            richer = [peer for peer in numbers if own < peer]
            if not richer:
                continue
            peer = max(richer, key=lambda p: numbers[p])
            lacking = sorted(peer - own)
            yield error(
                "complete.missing_module",
                f"layer {index} has no {', '.join(lacking[:4])}"
                f"{' …' if len(lacking) > 4 else ''}, which {numbers[peer]} of its "
                f"{len(indices) - 1} peers have",
                _COPY_AGAIN,
                f"layers.{index}.{lacking[0]}",
            )


def _check_ends(subject: QuantizedCheckpoint, text: Mapping[str, Any]) -> Iterator[Finding]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, module in subject.modules.items():
        kinds[module.kind].append(name)
    if not kinds["embedding"]:
        yield error(
            "complete.no_embedding",
            "the checkpoint has no input embedding",
            _COPY_AGAIN,
        )
    decoder = [n for n in kinds["norm"] if layer_index(n) is not None]
    final = [n for n in kinds["norm"] if layer_index(n) is None]
    if decoder and not final:
        yield error("complete.no_final_norm", "the checkpoint has no final norm", _COPY_AGAIN)
    config, heads = subject.checkpoint.config, kinds["head"]
    tied, said = is_tied(config), "tie_word_embeddings" in config or "tie_word_embeddings" in text
    generates = "CausalLM" in str(config.get("architectures"))
    if not heads and said and not tied and generates:
        yield error(
            "complete.no_head",
            "config.json says that the output head is not tied, and the checkpoint has none",
            "restore tie_word_embeddings of the source's config.json, or export the head",
        )
    if note := missing_head(config, bool(heads)):
        yield warning(
            "complete.silent_head", note, "state tie_word_embeddings in config.json, true or false"
        )


def _check_tied_head(subject: QuantizedCheckpoint) -> Iterator[Finding]:
    """A tied head that is written out must be the embedding."""
    if not is_tied(subject.checkpoint.config):
        return
    modules = subject.modules.items()
    embeddings = [name for name, module in modules if module.kind == "embedding"]
    for head in (name for name, module in modules if module.kind == "head"):
        weight = subject.parts[head].get("weight")
        rows = [subject.parts[e]["weight"] for e in embeddings if "weight" in subject.parts[e]]
        same_shape = [e for e in rows if weight is not None and e.shape == weight.shape]
        if head in subject.declaration.layers or weight is None or not same_shape:
            continue
        if not any(same_bytes(weight, embedding) for embedding in same_shape):
            yield error(
                "complete.tied_head_differs",
                f"config.json ties the output head to the embedding, and {weight.name} is another "
                "matrix; engines drop it",
                "set tie_word_embeddings as in the source's config.json, or export the head again",
                weight.name,
            )


def _check_mtp(subject: QuantizedCheckpoint, text: Mapping[str, Any]) -> Iterator[Finding]:
    promised = next((text[k] for k in _MTP_COUNTS if isinstance(text.get(k), int)), 0)
    found = [m for m in subject.modules.values() if m.kind == "mtp"]
    if promised and not found:
        yield error(
            "complete.no_mtp",
            f"config.json promises {promised} multi-token-prediction layers; the checkpoint has "
            "none, and speculative decoding with it fails",
            "copy them from the source in 16 bit, or set their number in config.json to 0",
        )


def _check_towers(subject: QuantizedCheckpoint) -> Iterator[Finding]:
    checkpoint = subject.checkpoint
    towers = [name for name, module in subject.modules.items() if module.kind == "tower"]
    if any(name in subject.declaration.layers for name in towers):
        return  # of codes and scales the shapes tell nothing
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    yield from check_towers(subject.modules.values(), shapes, checkpoint.config)


def _check_shapes(subject: QuantizedCheckpoint, text: Mapping[str, Any]) -> Iterator[Finding]:
    hidden, vocabulary = text.get("hidden_size"), text.get("vocab_size")
    if not isinstance(hidden, int):
        return
    for name, module in subject.modules.items():
        index, leaf = layer_index(name), name.rpartition(".")[2]
        if len(module.shape) != 2 or index is None or module.kind == "tower":
            continue
        if name.partition(f".{index}.")[2].count(".") != 1:
            continue  # a block within the layer (Zamba's shared one) has widths of its own
        rows, columns = module.shape
        if leaf in _INPUT_IS_HIDDEN and columns != hidden:
            yield _wrong_shape(name, module.shape, f"{hidden} columns (hidden_size)")
        elif leaf in _OUTPUT_IS_HIDDEN and rows != hidden:
            yield _wrong_shape(name, module.shape, f"{hidden} rows (hidden_size)")
    for name, module in subject.modules.items():
        if module.kind == "tower":
            continue  # of sizes of its own
        if name.endswith("embed_tokens") and module.kind == "embedding":
            rows, columns = module.shape
            if isinstance(vocabulary, int) and rows < vocabulary:
                yield _wrong_shape(name, module.shape, f"{vocabulary} rows (vocab_size)")
            elif columns not in text.values():
                yield _wrong_shape(name, module.shape, f"{hidden} columns (hidden_size)")
        elif _is_main_norm(name) and module.shape != (hidden,):
            yield _wrong_shape(name, module.shape, f"{hidden} values (hidden_size)")


def _is_main_norm(name: str) -> bool:
    index = layer_index(name)
    of_layer = index is not None and name.endswith(f"layers.{index}.input_layernorm")
    return of_layer or name.endswith("model.norm")


def _wrong_shape(name: str, shape: tuple[int, ...], wanted: str) -> Finding:
    return error(
        "complete.wrong_shape",
        f"{name} is {list(shape)}; config.json asks for {wanted}",
        _COPY_AGAIN,
        name,
    )
