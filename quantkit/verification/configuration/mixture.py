"""A mixture of experts that fits together: all experts, of one shape, and a router as wide."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantkit.checkpoint.network.config import expert_count, experts_per_token, text_size
from quantkit.checkpoint.network.language import text_config
from quantkit.checkpoint.network.modules import Module
from quantkit.verification.findings import Finding, error

_COPY_AGAIN = "take config.json and all shards from the model as it was published"
_ROUTING_LAYERS = ("gate", "router", "gate.weight", "router.weight", "router.layer", "router.proj")
_ALSO_ROUTED = ("zero_expert_num", "n_shared_experts")
"""Keys of what a router may weigh beside the experts: LongCat's, which compute nothing (of these
Transformers saves a first layer, and no second one), and Inkling's shared ones."""

Shapes = Mapping[str, tuple[int, ...]]


def check_mixture(modules: Iterable[Module], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Errors `complete.missing_expert`, `complete.expert_shape`, `complete.router_shape` and
    `complete.experts_per_token`, as far as names, shapes and config.json tell; none for a dense
    model."""
    if isinstance(text_config(config).get("moe_intermediate_size"), list):
        return  # experts of two kinds, for words and for pictures (ERNIE VL)
    count = expert_count(config)
    chosen = experts_per_token(config)
    if count and chosen > count:
        yield error(
            "complete.experts_per_token",
            f"config.json chooses {chosen} experts a token of {count}",
            _COPY_AGAIN,
        )
    kept = [m for m in modules if m.kind in ("linear", "experts", "router")]
    idle = count and text_size(config, "zero_expert_num")
    for block, experts in _blocks(kept).items():
        computed = {n: shapes for n, shapes in experts.items() if not idle or n < count}
        yield from _check_experts(block, computed, count)
    hidden = text_size(config, "hidden_size")
    widths = {count + text_size(config, key) for key in ("", *_ALSO_ROUTED)}
    blocks = {m.name.rpartition(".experts")[0] for m in kept if ".experts" in m.name}
    for module in kept if count else ():
        block, _, leaf = module.name.rpartition(".")
        outer, _, first = block.rpartition(".")
        routes = (block in blocks and leaf in _ROUTING_LAYERS) or (
            outer in blocks and f"{first}.{leaf}" in _ROUTING_LAYERS
        )
        if module.kind != "router" or len(module.shape) != 2 or not routes:
            continue
        rows, columns = module.shape
        if rows not in widths or (hidden and columns != hidden):
            yield error(
                "complete.router_shape",
                f"{module.name} is {list(module.shape)}; config.json has {count} experts and a "
                f"hidden size of {hidden}",
                _COPY_AGAIN,
                module.name,
            )


def _blocks(modules: Iterable[Module]) -> dict[str, dict[int, Shapes]]:
    """Block of experts → number of the expert → its layers' shapes by their last name part."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for module in modules:
        block, mark, rest = module.name.partition(".experts.")
        number, _, leaf = rest.partition(".")
        if mark and number.isdigit() and leaf:
            found[f"{block}.experts"][int(number)][leaf] = module.shape
    return {block: dict(experts) for block, experts in found.items()}


def _check_experts(block: str, experts: Mapping[int, Shapes], count: int) -> Iterator[Finding]:
    absent = sorted(set(range(count or max(experts) + 1)) - experts.keys())
    if absent:
        named = ", ".join(map(str, absent[:5])) + (" …" if len(absent) > 5 else "")
        yield error(
            "complete.missing_expert",
            f"{block} has no expert {named} of {count or max(experts) + 1}",
            _COPY_AGAIN,
            f"{block}.{absent[0]}",
        )
    if not experts:
        return
    usual = Counter(tuple(sorted(shapes.items())) for shapes in experts.values())
    wanted = dict(usual.most_common(1)[0][0])
    for number, shapes in sorted(experts.items()):
        for leaf in sorted(wanted.keys() | shapes.keys()):
            if shapes.get(leaf) != wanted.get(leaf):
                yield error(
                    "complete.expert_shape",
                    f"{block}.{number}.{leaf} is {_said(shapes.get(leaf))}, that of most experts "
                    f"beside it {_said(wanted.get(leaf))}",
                    _COPY_AGAIN,
                    f"{block}.{number}.{leaf}",
                )
                return


def _said(shape: tuple[int, ...] | None) -> str:
    return "nowhere" if shape is None else str(list(shape))
