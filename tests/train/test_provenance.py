"""Provenance holds what a result depends on, works without git, and leaks nothing."""

import json
import subprocess

import jax
import numpy as np

from train.files import write_json_atomic
from train.provenance import git_state, provenance, write_provenance


def test_record_is_json_and_holds_no_environment(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-secret")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    record = provenance(mesh, "abc123", 1e11)
    text = json.dumps(record)
    assert "hunter2-secret" not in text
    assert record["packages"]["jax"] == jax.__version__
    assert record["data_manifest_hash"] == "abc123"
    assert record["devices"]["platform"] == jax.devices()[0].platform
    assert record["devices"]["mesh"] == {"data": 1}


def test_a_start_keeps_what_earlier_ones_wrote(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    for data in ("first", "second", "third"):
        write_provenance(tmp_path, mesh, data, 1e11)
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["data_manifest_hash"] == "third"
    assert [one["data_manifest_hash"] for one in record["earlier_starts"]] == ["first", "second"]


def test_git_state_follows_the_tree(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    nothing = {"commit": "", "dirty": False, "diff_sha256": ""}
    assert git_state(tmp_path) == nothing
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init"], [*identity, "commit", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert not state["dirty"]
    assert state["diff_sha256"] == ""
    hashes = set()
    for text in ("one", "two"):
        (tmp_path / "new").write_text(text)
        subprocess.run(["git", "-C", str(tmp_path), "add", "new"], check=True)
        changed = git_state(tmp_path)
        assert (changed["commit"], changed["dirty"]) == (state["commit"], True)
        hashes.add(changed["diff_sha256"])
    assert len(hashes) == 2
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == nothing


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_json_atomic(path, {"val_loss": 1 / 3})
    try:
        write_json_atomic(path, {"val_loss": object()})
    except TypeError:
        pass
    else:
        raise AssertionError("an object is not JSON")
    assert json.loads(path.read_text()) == {"val_loss": 1 / 3}
    assert list(tmp_path.iterdir()) == [path]
