"""`push` against a local server that speaks the Hub's interface: only what is proven, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.checkpoint.provenance import PROVENANCE, add_validation
from tests.support.cli import inside, quantkit, refused
from tests.support.helpers import copy_checkpoint, edit_json
from tests.support.hubserver import Written, serve

pytestmark = [
    pytest.mark.broad,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the Hub's
]

REPO = "someone/small-w8a8"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Written]:
    written = Written()
    with serve({}, written) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield written


def validated(sealed: Path, out: Path, *, ok: bool = True) -> Path:
    """A copy of a checkpoint with what a validation would have noted in its quantkit.json."""
    copy_checkpoint(sealed, out)
    gate = {"metric": "kl_mean", "limit": "<=0.1", "value": 0.01 if ok else 0.2,
            "verdict": "pass" if ok else "fail"}  # fmt: skip
    add_validation(out, {"ok": ok, "gates": [gate]})
    return out


def push(directory: Path, *more: str) -> tuple[int, str, str]:
    return inside("push", directory, REPO, *more)


def test_what_is_proven_goes_private_and_whole(sealed: Path, hub: Written, tmp_path: Path) -> None:
    made = validated(sealed, tmp_path / "made")
    (made / "notes.txt").write_text("mine")
    run = quantkit("push", made, REPO, "--json")
    assert run.code == 0, run.err
    repository = f"models/{REPO}"
    assert hub.private[repository] is True
    assert hub.files[repository].keys() == {*run.document["files"]}
    assert "notes.txt" not in hub.files[repository]
    for name, content in hub.files[repository].items():
        assert content == (made / name).read_bytes(), name
    assert {"model.safetensors", "config.json", PROVENANCE, "README.md"} <= {*hub.files[repository]}
    assert len(hub.commits) == 1


def test_what_is_not_proven_stays_unless_a_reason_is_given(
    sealed: Path, hub: Written, tmp_path: Path
) -> None:
    never = copy_checkpoint(sealed, tmp_path / "never")
    edit_json(never / PROVENANCE, lambda document: document["results"].pop("validation", None))
    assert push(never)[:2] == (4, "push.not_proven")
    failed = validated(sealed, tmp_path / "failed", ok=False)
    assert "gates failed (kl_mean)" in push(failed)[2]
    broken = validated(sealed, tmp_path / "broken")
    edit_json(broken / "config.json", lambda config: config.update(hidden_size=64))
    assert "does not verify" in push(broken)[2]
    assert hub.files == {}
    assert push(failed, "--force", "a reproduction of issue 1")[0] == 0
    card = hub.files[f"models/{REPO}"]["README.md"].decode()
    assert "gates failed (kl_mean). Pushed all the same: a reproduction of issue 1" in card
    assert (failed / "README.md").read_bytes() == (sealed / "README.md").read_bytes()


def test_a_push_that_broke_off_sends_only_what_is_missing(
    sealed: Path, hub: Written, tmp_path: Path
) -> None:
    made = validated(sealed, tmp_path / "made")
    large = [p for p in made.iterdir() if p.stat().st_size > hub.large]
    assert len(large) >= 2
    hub.fail_after = 1
    refused(quantkit("push", made, REPO), 1, REPO)
    assert hub.commits == []
    assert (hub.uploads, len(hub.blobs)) == (1, 1)
    hub.fail_after = None
    assert push(made)[0] == 0
    assert hub.uploads == len(large)
    assert len(hub.commits) == 1


@pytest.mark.engine
@pytest.mark.slow
def test_quantize_validates_and_pushes(hub: Written, demo_model: Path, tmp_path: Path) -> None:
    """Of a model that answers: the baseline of one with random weights is refused."""
    words = ("quantize", demo_model, "--method", "rtn_w8a16", "--push", REPO)
    sober = ("--set", "gates=[canary_failures<=8,canary_drift<=100]")
    assert inside(*words, "--set", "gates=[kl_mean<=0]", "--out", tmp_path / "bad")[0] == 4
    assert (tmp_path / "bad" / PROVENANCE).is_file()
    assert hub.files == {}
    assert inside(*words, *sober, "--out", tmp_path / "good")[0] == 0
    assert hub.files[f"models/{REPO}"].keys() >= {"model.safetensors", PROVENANCE}
    assert b"type: quantkit-text" in hub.files[f"models/{REPO}"]["README.md"]


def test_a_public_repository_is_not_filled_by_chance(
    sealed: Path, hub: Written, tmp_path: Path
) -> None:
    made = validated(sealed, tmp_path / "made")
    hub.files[f"models/{REPO}"], hub.private[f"models/{REPO}"] = {}, False
    assert push(made)[1] == "push.public"
    assert hub.files[f"models/{REPO}"] == {}
    assert push(made, "--public")[0] == 0
    assert hub.files[f"models/{REPO}"]


def test_what_cannot_be_pushed_is_told(
    sealed: Path, hub: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = validated(sealed, tmp_path / "made")
    assert inside("push", made, "a/b/c")[1] == "push.bad_name"
    (tmp_path / "foreign").mkdir()
    assert push(tmp_path / "foreign")[1] == "push.no_provenance"
    monkeypatch.delenv("HF_TOKEN")
    assert push(made)[1] == "hub.refused"
    assert hub.files == {}
