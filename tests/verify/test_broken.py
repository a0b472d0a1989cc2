"""No known damage passes verify, with quantkit.json or without; every undamaged twin does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.verification import verify
from tests.support.helpers import edit_json
from tests.support.rtn import folded, rotated, rtn, tiny_moe, untied
from tests.verify.damages import DAMAGES, Damage

INT4 = SCHEMES["w4a16"].with_weight(group_size=64)
MODELOPT = {
    "fp8": "modelopt_fp8",
    "fp4": "modelopt_fp4",
    "mlp": "modelopt_nvfp4_mlp_only",
    "awq": "modelopt_int4_awq",
}


@dataclass(frozen=True)
class Base:
    """An intact checkpoint and the model it was made from."""

    path: Path
    source: Path


@pytest.fixture(scope="session")
def bases(
    outputs: dict[str, tuple[Path, Path]],
    artifact: Callable[[str], Path],
    small_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Base]:
    """Every base that the damages name."""
    root = tmp_path_factory.mktemp("bases")
    moe = tiny_moe(root / "moe", extra_layer=True)
    by_awq = INT4.with_weight(symmetric=False)
    pre_scaled = folded(small_model, root / "pre_scaled")
    two_heads = untied(small_model, root / "untied")
    turned = rotated(two_heads, root / "turned")
    ordered = rtn(small_model, root / "act_order", INT4, layout="gptq")
    edit_json(ordered / "config.json", lambda c: c["quantization_config"].update(desc_act=True))
    return {
        "act_order": Base(ordered, small_model),
        **{name: Base(outputs[method][0], small_model) for name, method in MODELOPT.items()},
        "w8a8": Base(rtn(small_model, root / "w8a8", SCHEMES["w8a8_dynamic"]), small_model),
        "gptq": Base(rtn(small_model, root / "gptq", INT4, layout="gptq"), small_model),
        "gptq8": Base(artifact("gptqmodel/w8_v2"), artifact("gptqmodel/source")),
        "asym": Base(rtn(small_model, root / "asym", by_awq), small_model),
        "folded": Base(rtn(pre_scaled, root / "folded", by_awq, layout="awq"), small_model),
        "rotated": Base(rtn(turned, root / "rotated", SCHEMES["fp8_dynamic"]), two_heads),
        "mxfp4": Base(rtn(small_model, root / "mxfp4", SCHEMES["mxfp4a16"]), small_model),
        "moe": Base(rtn(moe, root / "moe_fp8", SCHEMES["fp8_dynamic"]), moe),
    }


@pytest.mark.parametrize("name", sorted({damage.base for damage in DAMAGES}))
def test_the_undamaged_twin_passes(bases: dict[str, Base], name: str) -> None:
    base = bases[name]
    for report in (verify(base.path), verify(base.path, base.source)):
        assert report.ok, report.errors
        assert report.modules_quantized > 0


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damage_is_found(bases: dict[str, Base], damage: Damage, tmp_path: Path) -> None:
    base = bases[damage.base]
    broken = tmp_path / "broken"
    shutil.copytree(base.path, broken)
    damage.apply(broken)
    provenance = broken / "quantkit.json"
    if provenance.exists():
        assert not verify(broken).ok, "quantkit.json says how it was"
        provenance.unlink()
    assert damage.code in verify(broken, base.source).codes()
    alone = verify(broken)
    if damage.alone is None:
        assert alone.ok, alone.errors
    else:
        assert damage.alone in alone.codes()
    for finding in alone.errors:
        assert finding.hint
        assert finding.message
