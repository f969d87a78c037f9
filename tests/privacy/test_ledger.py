"""The ledger keeps all costs over kills, restarts, incomplete lines and damage."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtune.errors import CheckpointError
from fedtune.privacy.accounting import Spend, epsilon
from fedtune.privacy.ledger import Ledger

COST = Spend(noise=1.0, rate=0.1, steps=5)


def test_turns_add_up_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "c" / "privacy.jsonl"
    assert Ledger(path).spent() == [] and Ledger(path).epsilon(1e-5, "rdp") == 0.0
    for round in (1, 2, 2, 5):  # round 2 is repeated after a kill and paid for again
        Ledger(path).spend(round, COST, "record")
    assert Ledger(path).spent() == [COST] * 4
    assert Ledger(path).epsilon(1e-5, "rdp") == epsilon([COST] * 4, 1e-5, "rdp")
    assert Ledger(path).epsilon(1e-5, "rdp", COST) == epsilon([COST] * 5, 1e-5, "rdp")
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ['{"round": 1', '{"round": 2', '{"round": 2', '{"round": 5']


def test_zero_costs_are_read(tmp_path: Path) -> None:
    nothing = Spend(noise=0.0, rate=0.0, steps=0)
    Ledger(tmp_path / "l").spend(1, nothing, "record")
    assert Ledger(tmp_path / "l").spent() == [nothing]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_an_incomplete_line_costs_nothing(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.spend(1, COST, "record")
    ledger.spend(2, COST, "record")
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-cut])
    assert ledger.spent() == [COST]
    ledger.spend(3, COST, "record")
    assert ledger.spent() == [COST, COST] and ledger.path.read_text().splitlines()[1].startswith('{"round": 3')


@pytest.mark.parametrize("line", ["", "{}", '{"round": 1, "noise": 1, "rate": 0.1, "steps": 5, "unit": "row"}',
                                  "not json", '{"noise": -1, "rate": 0.1, "steps": 5}', '{"noise": NaN, "rate": 0.1, "steps": 5}',
                                  '{"noise": 1, "rate": 2, "steps": 5}', '{"noise": 1, "rate": 0.1, "steps": -5}'])  # fmt: skip
def test_a_damaged_ledger_stops_further_spending(tmp_path: Path, line: str) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.spend(1, COST, "record")
    ledger.path.write_text(ledger.path.read_text() + line + "\n")
    with pytest.raises(CheckpointError, match="line 2 of the privacy ledger .* the spent budget is unknown"):
        ledger.spent()


def test_a_kill_at_any_moment_loses_no_recorded_cost(tmp_path: Path) -> None:
    path = tmp_path / "l"
    code = f"""
import sys
from pathlib import Path
from fedtune.privacy.accounting import Spend
from fedtune.privacy.ledger import Ledger
for round in range(100000):
    Ledger(Path({str(path)!r})).spend(round, Spend(noise=1.0, rate=0.1, steps=5), "record")
    sys.stdout.write(f"{{round}}\\n"); sys.stdout.flush()
"""
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)})
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    announced = len(child.stdout.read().splitlines()) + 1
    child.wait()
    assert len(Ledger(path).spent()) >= announced > 1


def test_a_ledger_that_cannot_be_written_stops_the_turn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Ledger(tmp_path / "file" / "l").spend(1, COST, "record")
