"""Saved states that are damaged or hostile are refused without running code from them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.errors import InputError
from quantkit.pipeline.state import check_state, read_state_note


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A file of the shape that mto.save writes."""
    file = tmp_path / "state.pth"
    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "a._amax": torch.tensor(1.5)}
    torch.save({"modelopt_state": {"slices": (slice(0, 2),)}, "model_state_dict": tensors}, file)
    return file


def refused(file: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        check_state(file)
    assert caught.value.exit_code == 1
    assert str(file) in caught.value.message
    return caught.value


def test_an_intact_file_passes_and_has_no_note(state: Path) -> None:
    check_state(state)
    assert read_state_note(state) is None


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_attack_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    witness, file = tmp_path / "witness", tmp_path / "attack.pth"
    torch.save({"modelopt_state": Attack(f"touch {witness}")}, file, pickle_protocol=protocol)
    error = refused(file)
    assert error.code == "state.unsafe_pickle"
    assert f"{os.system.__module__}.system" in error.message
    assert not witness.exists()
    torch.load(file, weights_only=False)
    assert witness.exists(), "the attack is real: without the check it runs"


def test_an_attack_in_another_record_is_refused(state: Path, tmp_path: Path) -> None:
    """torch reads data.pkl, but would also believe other pickles of the archive."""
    attack = pickle.dumps(Attack(f"touch {tmp_path / 'witness'}"), protocol=0)
    with zipfile.ZipFile(state, "a") as archive:
        archive.writestr("state/constants.pkl", attack)
    assert refused(state).code == "state.unsafe_pickle"


def test_two_records_of_one_name_are_refused(state: Path) -> None:
    """One reader may take the first and another the last."""
    with (
        zipfile.ZipFile(state, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("state/data.pkl", b"\x80\x02N.")
    assert refused(state).code == "state.corrupt"


def test_a_pickle_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("cut/data.pkl", b"\x80\x02}X\x05\x00\x00\x00abc")
    assert refused(file).code == "state.unsafe_pickle"


def test_a_truncated_file_is_refused(state: Path) -> None:
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    error = refused(state)
    assert error.code == "state.truncated"
    assert f"{len(whole) // 2} bytes" in error.message


def test_a_flipped_bit_in_a_tensor_is_refused(state: Path) -> None:
    data = bytearray(state.read_bytes())
    with zipfile.ZipFile(state) as archive:
        record = archive.getinfo("state/data/0")
    at = data.index(bytes(torch.arange(12.0).numpy().tobytes()), record.header_offset)
    data[at + 5] ^= 1
    state.write_bytes(data)
    error = refused(state)
    assert error.code == "state.corrupt"
    assert "state/data/0" in error.message


def test_files_that_are_no_state_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(pickle.dumps({"a": 1}))
    assert refused(other).code == "state.not_an_archive"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("folder/text", "x")
    assert refused(other).code == "state.not_an_archive"
    assert refused(tmp_path / "absent.pth").code == "state.missing"


@pytest.mark.parametrize("note", ["{", "[]", '{"model": "m"}', '{"schema_version": "1"}'])
def test_a_damaged_note_is_refused(state: Path, note: str) -> None:
    with zipfile.ZipFile(state, "a") as archive:
        archive.writestr("state/quantkit.json", note)
    with pytest.raises(InputError) as caught:
        read_state_note(state)
    assert caught.value.code == "state.corrupt"
