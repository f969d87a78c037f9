"""The benchmark of linear layers."""

import sys

import pytest

from fedtune.inference.engine.linear import Native
from fedtune.inference.engine.native.choice import why_torch
from fedtune.inference.engine.reference.linears import Int4
from fedtune.simulations.benchmarks.inference import linears


@pytest.mark.slow
def test_torch_and_native_layers_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if why_torch("int4"):
        pytest.skip(str(why_torch("int4")))
    monkeypatch.setattr(linears, "SHAPES", ((32, 64), (48, 32)))
    assert [type(made) for choice in ("off", "portable") for made in linears.layers("int4", 1, choice)] == [Int4, Int4, Native, Native]
    monkeypatch.setattr(sys, "argv", ["linears", "--kinds", "int4", "--sets", "portable", "--blocks", "1", "--passes", "3"])
    linears.main()
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.split(" | ")[1] for row in rows] == ["1", "4", "8", "128"] and all("portable" in row for row in rows)
