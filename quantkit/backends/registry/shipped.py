"""The recipes that ModelOpt ships (`modelopt_recipes/`), as recipes of quantkit's.

They are read as the YAML that they are; the library is not imported. A recipe becomes one of
quantkit's where it says one thing of all layers that it quantizes, in a scheme that the library's
backend here writes; everything else is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from quantkit.backends.registry.modelopt import MODELOPT
from quantkit.backends.registry.shipped_formats import cache_named, scheme_named
from quantkit.engines.capability import capabilities
from quantkit.errors import InputError
from quantkit.recipe.documents import meant

PREFIX = "modelopt:"
LIBRARIES = ("modelopt",)
_HINT = "quantkit recipes list --from modelopt"
_FOLDERS = ("general", "huggingface", "models")
_WEIGHT, _INPUT = "weight_quantizer", "input_quantizer"


class _UnusableError(ValueError):
    """Why a recipe of the library's is none of quantkit's."""


def shipped_names() -> list[str]:
    """`modelopt:FOLDER/NAME` of every recipe for post-training quantization that is installed.

    Raises InputError where the library is not.
    """
    root = _root()
    found = []
    for folder in _FOLDERS:
        for file in sorted((root / folder).rglob("*.yaml")):
            data = _read(str(file))[1]
            kind = data.get("metadata", {}).get("recipe_type") if isinstance(data, dict) else None
            if kind == "ptq":
                found.append(f"{PREFIX}{file.relative_to(root).with_suffix('').as_posix()}")
    return found


def why_not(name: str) -> str:
    """Why a recipe of `shipped_names` is no method; "" for one that is."""
    try:
        _translated(name)
    except _UnusableError as error:
        return str(error)
    return ""


def shipped_recipe(name: str) -> dict[str, Any]:
    """The recipe's fields, as a YAML file of quantkit's would hold them.

    Raises InputError for a name that is none and for a recipe that is no method here.
    """
    names = shipped_names()
    if name not in names:
        raise InputError(
            f"ModelOpt ships no recipe {name.removeprefix(PREFIX)!r}.{meant(name, names)}",
            hint=_HINT,
            code="recipe.unknown_method",
        )
    try:
        return _translated(name)
    except _UnusableError as error:
        raise InputError(
            f"{name} is no method here: {error}.", hint=_HINT, code="recipe.unusable"
        ) from error


def _translated(name: str) -> dict[str, Any]:
    path = name.removeprefix(PREFIX)
    data = _resolved(_root() / f"{path}.yaml")
    asked = data["quantize"]
    on, off, kv = _scopes(asked["quant_cfg"])
    pairs = [(weight, given) for weight, given in on.values()]
    if any(pair != pairs[0] for pair in pairs):
        raise _UnusableError("it mixes number formats, and ModelOpt's recipes here have one")
    algorithm, layerwise = _algorithm(asked.get("algorithm"))
    scheme = scheme_named(*pairs[0])
    if scheme is None or scheme not in MODELOPT.methods:
        raise _UnusableError("its number format is none that a scheme names")
    usual = {"w8a8": "smoothquant", "w4a16": "awq_lite", "w4a8_awq": "awq_lite"}.get(scheme, "max")
    method = MODELOPT.methods[scheme]
    if all(one.runs == "no" for one in capabilities(method.layout, method.algorithm, scheme)):
        raise _UnusableError(f"no engine loads its layout ({method.algorithm})")
    found: dict[str, Any] = {
        "name": name,
        "description": " ".join(data.get("metadata", {}).get("description", "").split()),
        "backend": MODELOPT.name,
        "scheme": scheme,
        "targets": [_expression(on, off)],
        "kv_cache": kv,
    }
    if algorithm != usual:
        found["options"] = {"algorithm": algorithm}
    if layerwise:
        found["placement"] = "layerwise"
    return found


Format = Any
_Pair = tuple[Format, Format]


def _scopes(entries: list[dict[str, Any]]) -> tuple[dict[str, _Pair], list[str], str]:
    """Glob of layers → formats of their weights and inputs; globs of layers that are left out; the
    KV cache. Later entries override earlier ones, which here only leaving out may do."""
    weights: dict[str, Format] = {}
    inputs: dict[str, Format] = {}
    off: list[str] = []
    kv = "none"
    for entry in entries:
        pattern, cfg = entry["quantizer_name"], entry.get("cfg")
        if pattern.endswith("_quantizer*"):
            pattern = pattern.removesuffix("*")
        leaves_out = entry.get("enable", True) is False
        if entry.get("parent_class"):
            if not leaves_out:
                raise _UnusableError(f"it quantizes {entry['parent_class']}")
        elif leaves_out:
            if pattern == "*":
                weights, inputs, off = {}, {}, []
            elif pattern == f"*{_INPUT}":
                inputs = {}
            elif not pattern.endswith(("output_quantizer", "bmm_quantizer", _INPUT)):
                off.append(pattern.removesuffix(_WEIGHT))
        elif pattern.endswith("[kv]_bmm_quantizer"):
            kv = cache_named(cfg) or ""
            if not kv:
                raise _UnusableError("its KV cache has constant, rotated or shifted scales")
        elif pattern.endswith((_WEIGHT, _INPUT)) and cfg:
            if off:
                raise _UnusableError("it quantizes layers again that it has left out")
            held = weights if pattern.endswith(_WEIGHT) else inputs
            held[pattern.removesuffix(_WEIGHT).removesuffix(_INPUT)] = cfg
        else:
            raise _UnusableError(f"it sets {pattern}")
    if any(not scope.endswith(("*", ".")) for scope in weights):
        raise _UnusableError("it names parts of fused experts")
    if not weights or not inputs.keys() <= weights.keys():
        raise _UnusableError("it quantizes other things than the weights of layers")
    return {scope: (cfg, inputs.get(scope)) for scope, cfg in weights.items()}, off, kv


def _expression(on: Mapping[str, _Pair], off: list[str]) -> str:
    """One `re:` entry that names the layers: a list of globs would be refused wherever one of them
    matches no layer of the model."""

    def joined(globs: Iterable[str]) -> str:
        return "|".join(dict.fromkeys(_of_layers(one) for one in globs))

    left = f"(?!(?:{joined(off)})$)" if off else ""
    return f"re:{left}(?:{joined(on)})$"


def _of_layers(glob: str) -> str:
    """The expression of the names of layers, for a glob of those of their quantizers."""
    inside = glob.removesuffix(".*") if glob.endswith(".*") else glob.removesuffix(".")
    parts = re.split(r"(\*|\?|\[[^]]*\])", inside)
    kept = {"*": ".*", "?": "."}
    found = "".join(kept.get(p) or (p if p.startswith("[") else re.escape(p)) for p in parts)
    return found + (r"(?:\..*)?" if inside != glob and glob.endswith(".*") else "")


def _algorithm(stated: Any) -> tuple[str, bool]:
    """The algorithm that `options.algorithm` names, and whether it goes layer by layer."""
    given: dict[str, Any] = (
        dict(stated) if isinstance(stated, dict) else {"method": stated or "max"}
    )
    layers = given.pop("layerwise", None) or {}
    method = given.pop("method")
    known = ("max", "mse", "smoothquant", "awq_lite", "awq_full", "awq_clip")
    if given or method not in known:
        told = ", ".join([str(method), *(f"{key}={value}" for key, value in given.items())])
        raise _UnusableError(f"its algorithm cannot be set here: {told}")
    return method, bool(layers.get("enable"))


@cache
def _root() -> Path:
    found = find_spec("modelopt_recipes")
    if found is None or found.origin is None:
        raise InputError(
            "ModelOpt's recipes are not installed.",
            hint="pip install 'quantkit[modelopt]'",
            code="recipe.no_library",
        )
    return Path(found.origin).parent


@cache
def _read(file: str) -> tuple[dict[str, str], Any]:
    """The imports of a file (name → path below the root), and what it holds."""
    documents: list[Any] = list(yaml.safe_load_all(Path(file).read_text(encoding="utf-8")))
    held = documents[-1]
    head: dict[str, Any] = documents[0] if isinstance(documents[0], dict) else {}
    return head.get("imports", {}), held


def _resolved(file: Path) -> Any:
    """What a file holds, with its `$import`s in place."""
    imports, held = _read(str(file))

    def imported(names: Any) -> list[Any]:
        listed = names if isinstance(names, list) else [names]
        return [_resolved(_root() / f"{imports[one]}.yaml") for one in listed]

    def filled(node: Any) -> Any:
        if isinstance(node, list):
            found: list[Any] = []
            for one in node:
                value = filled(one)
                spliced = isinstance(one, dict) and set(one) == {"$import"}
                found += value if spliced and isinstance(value, list) else [value]
            return found
        if not isinstance(node, dict):
            return node
        own = {k: filled(value) for k, value in node.items() if k not in ("$import", "imports")}
        if "$import" not in node:
            return own
        parts = imported(node["$import"])
        if all(isinstance(part, dict) for part in parts):
            merged: dict[str, Any] = {}
            for part in parts:
                merged |= part
            return merged | own
        return [one for part in parts for one in (part if isinstance(part, list) else [part])]

    return filled(held)
