"""The seam to the engines: every failure that threads describe is refused, every twin accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.cli.plan import chosen_recipe
from quantkit.derive import open_headers
from quantkit.engines import Verdict
from quantkit.plan import make_plan
from quantkit.seam import verdicts
from quantkit.verify import EngineRequest, VerifyReport, verify
from tests.families import BASES
from tests.seeded import PLANS, SEEDS, Asked, Seed

Base = Callable[[str], Path]
USED = sorted({(seed.base, seed.engine) for seed in SEEDS})


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A checkpoint of `BASES`, made on first use."""
    root = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = root / name.replace(" ", "-")
            made[name] = BASES[name](folder / "model", folder / "out")
        return made[name]

    return get


def verified(path: Path, engine: str) -> VerifyReport:
    return verify(path, engines=EngineRequest((engine,)))


def test_there_are_forty_of_them_in_several_families() -> None:
    assert len(SEEDS) + len(PLANS) >= 40
    assert len({seed.base.split()[0] for seed in SEEDS}) >= 8
    assert all(seed.thread for seed in SEEDS)
    assert all(case.thread for case in PLANS)


@pytest.mark.parametrize(("name", "engine"), USED, ids=lambda value: str(value))
def test_the_sound_checkpoint_is_accepted(base: Base, name: str, engine: str) -> None:
    report = verified(base(name), engine)
    assert report.ok, report.errors
    assert report.modules_quantized > 0
    assert "engine.loads" in report.codes("info")


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_the_broken_one_is_refused(base: Base, seed: Seed, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base(seed.base), broken)
    seed.change(broken)
    report = verified(broken, seed.engine)
    assert seed.code in report.codes(), report.errors
    assert all(finding.hint and finding.message for finding in report.errors)


def judged(config: dict[str, Any], method: str, flags: tuple[str, ...], at: Path) -> list[Verdict]:
    """The verdicts of `quantkit plan` on a config.json without weights."""
    at.mkdir()
    (at / "config.json").write_text(json.dumps(config))
    pairs = list(zip(flags[::2], flags[1::2], strict=True))
    named = {flag: value for flag, value in pairs if flag != "--set"}
    serve = [f"serve.engines=[{named['--engine']}]", f"serve.tp=[{named.get('--tp', 1)}]"]
    serve += [f"serve.gpu={named['--gpu']}"] if "--gpu" in named else []
    sets = [value for flag, value in pairs if flag == "--set"]
    source = open_headers(at)
    return verdicts(source, make_plan(source, chosen_recipe(method, "", "", [*sets, *serve])))


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case.name)
def test_the_plan_is_refused_and_its_twin_is_not(case: Asked, tmp_path: Path) -> None:
    (verdict,) = judged(case.config, case.method, case.flags, tmp_path / "refused")
    assert not verdict.loads
    assert case.code in {reason.code for reason in verdict.reasons}
    assert all(reason.fix for reason in verdict.reasons)
    flags = case.flags if case.twin_flags is None else case.twin_flags
    method = case.twin_method or case.method
    (twin,) = judged(case.config | case.twin, method, flags, tmp_path / "accepted")
    assert twin.loads, twin.reasons
