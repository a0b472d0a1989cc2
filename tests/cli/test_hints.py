"""Where hints lead: commands that exist, and not to the same error again."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import LlamaConfig

from quantkit.cli.app import app
from quantkit.errors import QuantkitError, command
from tests.backends.test_refusals import UNWRITABLE
from tests.cli.test_bad_input import REQUESTS
from tests.engines.refused_plans import PLANS, Asked
from tests.pipeline.test_engine_view import judged
from tests.pipeline.test_situations import ROWS
from tests.support.cli import inside
from tests.support.families import CONFIGS, SMALL, model

PACKAGE = Path(__file__).parents[2] / "quantkit"
Asking = tuple[str | Path, ...]
COMMAND = re.compile(r"(?<!the )(?<!that )quantkit [a-z][^;#,]*")
SETTING = re.compile(r"--set ('[^']*'|\S*='[^']*'|[^\s,:]+)")
COMMANDS = typer.main.get_command(app)
"""What typer made of the application."""


def commands(hint: str) -> list[list[str]]:
    """The quantkit commands of a hint, as words."""
    return [shlex.split(found)[1:] for found in COMMAND.findall(hint)]


def settings(hint: str) -> Iterator[list[str]]:
    """The alternatives of a hint that are settings, each as words of the command line."""
    for way in re.split(r", or |; ", hint):
        found = [shlex.split(value)[0] for value in SETTING.findall(way)]
        if found:
            yield [word for value in found for word in ("--set", value)]


def printed() -> Iterator[tuple[str, list[str]]]:
    """Every command in a text of the package that is a hint, with its place."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("hint", "fix"):
                place = f"{file.name}:{node.value.lineno}"
                for words in commands(_text(node.value)):
                    yield place, words


def _text(node: ast.AST) -> str:
    """A literal as text, with X for what is filled in; a call of `command` as what it makes."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value) if isinstance(node.value, ast.Call) else "X"
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command":
        return " ".join(["quantkit", *map(_text, node.args)])
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)}; {_text(node.orelse)}"
    return "X"


PRINTED = list(printed())


def test_there_are_commands_to_look_at() -> None:
    assert len(PRINTED) > 25
    assert {words[0] for _, words in PRINTED} >= {"methods", "verify", "validate", "export", "env"}


@pytest.mark.parametrize(("place", "words"), PRINTED, ids=[place for place, _ in PRINTED])
def test_a_printed_command_is_one(place: str, words: list[str]) -> None:
    """It exists, with its flags, and lacks nothing that it needs."""
    found: Any = COMMANDS
    rest = list(words)
    while hasattr(found, "commands"):
        assert rest, f"{place}: {words}"
        assert rest[0] in found.commands, f"{place}: there is no command {rest[0]}"
        found = found.commands[rest.pop(0)]
    parsed = found.make_context(found.name, rest).params
    if found.name == "plan":
        assert parsed["method"] or parsed["recipe"], f"{place}: {words}"


def test_commands_are_quoted_for_the_shell() -> None:
    path = Path("/data/my models/it's $HOME")
    assert shlex.split(command("verify", path)) == ["quantkit", "verify", str(path)]


def follow(error: QuantkitError, *asked: str | Path) -> int:
    """Do what a refusal's hint says in every way that can be typed, and count them."""
    alone = COMMAND.sub("", error.hint)
    ways: list[list[str]] = [[*map(str, asked), *more] for more in settings(alone)]
    ways += commands(error.hint)
    for way in ways:
        again = inside(*way)
        assert again[1:] != (error.code, error.message), f"{shlex.join(way)} ends alike"
        assert again[0] != 2, way
    return len(ways)


def refusal(*words: str | Path) -> QuantkitError:
    with pytest.raises(QuantkitError) as caught:
        app([*map(str, words)], standalone_mode=False)
    return caught.value


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model("llama", tmp_path_factory.mktemp("hints") / "with a space")


FOLLOWED = [case for case, row in REQUESTS.items() if row[1] == 1 and case != "no interpreter"]


@pytest.mark.parametrize("case", FOLLOWED)
def test_the_hint_of_a_wrong_request(case: str, llama: Path) -> None:
    flags = ("--set", "group_size=96") if case == "group size" else ()  # 128 divides these layers
    asked: Asking = ("plan", llama, *(REQUESTS[case][0]), *flags)
    if "--calibration" in asked:
        at = asked.index("--calibration")
        asked = (*asked[:at], "--set", f"calibration.name={asked[at + 1]}", *asked[at + 2 :])
    follow(refusal(*asked), *asked)


@pytest.mark.parametrize(("method", "sets", "telling"), UNWRITABLE)
def test_the_hint_of_what_a_library_cannot_write(
    method: str, sets: tuple[str, ...], telling: str, llama: Path
) -> None:
    asked: Asking = ("plan", llama, "--method", method, *(w for s in sets for w in ("--set", s)))
    assert follow(refusal(*asked), *asked), telling


SIZES = [(200, 100), (96, 64), (100, 32), (36, 16)]


@pytest.mark.parametrize("sets", [(), ("--set", "options.layout=awq", "--set", "symmetric=false")])
@pytest.mark.parametrize(("inner", "group"), SIZES)
def test_the_hint_of_a_shape_that_does_not_fit(
    inner: int, group: int, sets: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(**{**SMALL, "intermediate_size": inner})
    monkeypatch.setitem(CONFIGS, "odd", lambda: config)
    path = model("odd", tmp_path / "odd")
    asked: Asking = ("plan", path, "--method", "rtn_w4a16", "--set", f"group_size={group}", *sets)
    error = refusal(*asked)
    assert follow(error, *asked), error.hint
    ways = [(*asked, *more) for more in settings(error.hint)]
    misfits = [way for way in ways if inside(*way)[1] == "stream.misfit"]
    assert bool(misfits) == (bool(sets) and inner % 8 > 0)  # AWQ packs eight rows
    for way in misfits:
        assert follow(refusal(*way), *way)


@pytest.mark.parametrize(
    ("family", "method"), [("mixtral", "autoround_nvfp4"), ("qwen2_5_vl", "msmodelslim_w8a8")]
)
def test_the_hint_of_a_network_beyond_a_library(family: str, method: str, tmp_path: Path) -> None:
    path = model(family, tmp_path / "its name")
    asked = ("plan", path, "--method", method)
    error = refusal(*asked)
    assert error.code == "plan.architecture"
    assert follow(error, *asked)


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case.name)
def test_the_fix_of_an_engine_ends_elsewhere(case: Asked, tmp_path: Path) -> None:
    def told(flags: tuple[str, ...], name: str) -> list[tuple[str, str, str]]:
        try:
            (verdict,) = judged(case.config, case.method, flags, tmp_path / name)
        except QuantkitError as error:
            return [(error.code, error.message, error.hint)]
        return [(reason.code, reason.text, reason.fix) for reason in verdict.reasons]

    for number, reason in enumerate(told(case.flags, "asked")):
        for other, more in enumerate(settings(reason[2])):
            again = told((*case.flags, *more), f"fixed{number}.{other}")
            assert reason[:2] not in [found[:2] for found in again], more


REFUSED = [name for name, row in ROWS.items() if row.ask[0] == "plan" and row.code == 1]


@pytest.mark.parametrize("name", REFUSED)
def test_the_hint_of_a_situation(name: str, tmp_path: Path) -> None:
    """Those that are commands; what is to be moved or merged by hand is told where it is tested."""
    path, row = tmp_path / "its name", ROWS[name]
    row.odd(path)
    asked: Asking = tuple(str(path) if word == "@" else word for word in row.ask)
    if "--engine" in asked:  # a verdict, not a refusal: followed with the engines' fixes
        assert inside(*asked)[0] == 1
        return
    follow(refusal(*asked), *asked)
