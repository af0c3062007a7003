"""`vlmalign doctor`: each thing that a run needs, and what to do where it is not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from vlmalign import doctor
from vlmalign.cli import main

STUDY = "configs/chexreason/quickstart.yaml"


@pytest.fixture
def found(tmp_path, repository, monkeypatch):
    monkeypatch.chdir(repository)

    def examine(*overrides: str) -> dict[str, doctor.Finding]:
        findings: Iterator[doctor.Finding] = doctor.examine(STUDY, [f"run={tmp_path / 'run'}", *overrides])
        return {each.what: each for each in findings}

    return examine


def test_nothing_is_wrong(found, capsys, repository, tmp_path):
    findings = found()
    assert [each for each in findings.values() if each.advice] == []
    assert list(findings)[:5] == ["packages", "devices", "memory", "study", "run folder"]
    assert findings["stage base"].found.endswith("tiny-medgemma: gemma3")
    assert findings["source mimic"].found == "will be invented"
    assert main(["doctor", STUDY, "--set", f"run={tmp_path / 'run'}"]) == 0
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("overrides", "what", "expected"),
    [
        (["stages.base.path=nowhere"], "stage base", "nowhere is not a folder"),
        (["sources.nih-test.phantom=null", "sources.nih-test.root=nowhere"], "source nih-test", "no folder nowhere"),
        (["seed=-1"], "study", "seed"),
    ],
)
def test_what_a_study_lacks_is_named(found, capsys, overrides, what, expected):
    finding = found(*overrides)[what]
    assert expected in finding.found
    assert finding.advice
    assert main(["doctor", STUDY, "--set", *overrides]) == 2
    said = capsys.readouterr()
    assert f"!!  {what}" in said.out
    assert finding.advice in said.out
    assert "of these need something" in said.err


def test_a_package_of_another_version(found, monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.0" if name == "optax" else real(name))
    finding = found()["packages"]
    assert finding.found == "optax is 0.1.0, needed >=0.2.8"
    assert finding.advice == "pip install -e . -c constraints.txt"


def test_a_card_that_jax_does_not_see(found, monkeypatch):
    monkeypatch.setattr(doctor, "_cards", lambda: ["NVIDIA H100"])
    finding = found()["devices"]
    assert "though the driver shows NVIDIA H100" in finding.found
    assert '".[cuda]"' in finding.advice


def test_a_full_disk_and_a_folder_that_cannot_be_written(found, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: real(path)._replace(free=2**20))
    assert "make room" in found()["run folder"].advice
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "not writable" in found()["run folder"].found
