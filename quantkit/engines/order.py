"""Columns quantized out of order, as settings say it: GPTQ's `desc_act`, compressed-tensors'
`actorder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNSORTED = ("group", "dynamic")


def columns_out_of_order(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """The setting that puts the columns of a group in different places, and the fix; or None.

    With one group a row (group size -1) the order changes nothing.
    """
    for name, group in (settings.get("config_groups") or {}).items():
        order = (group.get("weights") or {}).get("actorder")
        if order is True or str(order).lower() in _UNSORTED:
            return f"actorder {order} in {name}", "--set options.actorder=static"
    fix = "--set options.desc_act=false, or --set options.act_group_aware=true"
    base, size = settings.get("desc_act"), settings.get("group_size", -1)
    if base and size != -1:
        return "desc_act", fix
    for rule, changes in (settings.get("dynamic") or {}).items():
        if rule.startswith("-:") or not isinstance(changes, Mapping):
            continue
        if changes.get("desc_act", base) and changes.get("group_size", size) != -1:
            return f"desc_act by the dynamic rule {rule}", fix
    return None
