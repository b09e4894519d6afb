from __future__ import annotations

import pytest

from lars_train.monitoring.say import complain, first_process, say

LAUNCHERS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID")


@pytest.mark.parametrize(
    ("environment", "says", "complains"),
    [
        ({}, True, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True, True),
        ({"RANK": "3", "LOCAL_RANK": "3"}, False, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False, True),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True, True),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, False, False),
        ({"SLURM_PROCID": "8", "SLURM_LOCALID": "0"}, False, True),
    ],
)
def test_one_process_speaks_and_one_on_each_machine_complains(
    environment: dict[str, str],
    says: bool,
    complains: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    say("a line")
    complain("a fault")
    said = capsys.readouterr()
    assert first_process() is says
    assert said.out == ("a line\n" if says else "")
    assert said.err == ("lars-train: a fault\n" if complains else "")
