"""`fedtune bench`: its figures are consistent; their values are not checked."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedtune.cli.main import main
from fedtune.errors import ConfigError, DataError
from fedtune.inference import bench as module
from fedtune.inference.bench import Speeds, bandwidth, bench, bytes_read, prompts, table, use_threads, write
from fedtune.inference.engine.load import load_engine
from fedtune.models.checkpoint import NANO


@pytest.fixture(autouse=True)
def small_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ARRAY", 1 << 20)


def quick(**settings: object) -> Speeds:
    return bench(NANO, kind="fp32", prompt_tokens=9, new_tokens=4, repeats=2, **settings)  # pyright: ignore[reportArgumentType]


def test_the_figures_are_consistent() -> None:
    notes: list[str] = []
    speeds = quick(report=notes.append)
    assert len(speeds.prefill_tok_per_s) == len(speeds.decode_tok_per_s) == len(speeds.first_token_ms) == 2  # without the warm-up
    for rate, ms in zip(speeds.prefill_tok_per_s, speeds.first_token_ms, strict=True):
        assert rate * ms == pytest.approx(9 * 1000)
    assert speeds.limit_tok_per_s == pytest.approx(speeds.bandwidth_gb_per_s * 1e3 / speeds.weights_mb)
    assert speeds.share_of_limit == pytest.approx(statistics.median(speeds.decode_tok_per_s) / speeds.limit_tok_per_s)
    assert speeds.peak_mb > speeds.weights_mb > 0 and speeds.speculation == {}
    assert notes[0] == "loading" and "warming up" in notes and notes[-1] == "bandwidth"


def test_the_bytes_read_per_token() -> None:
    # nano in float32, d=128: qkv (4 + 2·2)·32 rows and o, gate-up 2·384 and down, 4 layers; the tied head 1024 rows; no embedding table
    layer = (4 + 2 * 2) * 32 * 128 + 128 * 128 + 2 * 384 * 128 + 128 * 384
    assert bytes_read(load_engine(NANO, "fp32")) == 4 * (4 * layer + 1024 * 128)


def test_speculation_is_measured_against_the_same_answers(tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text("turn on the light in the hall\n\nturn off the light in the hall\n")
    speeds = quick(speculate=True, draft=NANO, text=text)
    assert list(speeds.speculation) == ["none", "lookup", "early exit", "draft"]
    assert speeds.speculation["none"]["tokens_per_pass"] == 1 and speeds.speculation["none"]["acceptance"] == 0
    assert all(0 <= seen["acceptance"] <= 1 and seen["tok_per_s"] > 0 for seen in speeds.speculation.values())
    # the model is its own draft: all tokens are accepted, or drafting was never tried
    assert speeds.speculation["draft"]["acceptance"] in (0, 1)
    shown = table(speeds)
    assert "speculation, early exit" in shown and "prefill, 9 tokens" in shown


def test_prompts_follow_seed_length_and_file(tmp_path: Path) -> None:
    engine = load_engine(NANO, "fp32")
    own = prompts(engine, None, 2, 5, seed=0)
    assert all(2 <= len(row) <= 6 for row in own)  # a start token, and five more or an end token
    assert own == prompts(engine, None, 2, 5, seed=0) != prompts(engine, None, 2, 5, seed=1)
    (tmp_path / "a.txt").write_text("one line\n")
    assert len(set(map(tuple, prompts(engine, tmp_path / "a.txt", 3, 50, seed=0)))) == 1
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("empty.txt", "none.txt"):
        with pytest.raises(DataError, match=name):
            prompts(engine, tmp_path / name, 1, 5, seed=0)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "repeats"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0"):
        bench(NANO, **{name: 0})  # pyright: ignore[reportArgumentType]


def test_lengths_beyond_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="context of 256"):
        bench(NANO, prompt_tokens=200, new_tokens=57)


def test_the_number_of_threads_is_set_and_checked() -> None:
    before = torch.get_num_threads()
    use_threads(None)
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="threads=0"):
        use_threads(0)


def test_the_bandwidth_is_a_number() -> None:
    assert 0 < bandwidth(repeats=1) < 1e15


def test_json_and_plot_are_written(tmp_path: Path) -> None:
    speeds = replace(quick(), speculation={"none": {"tok_per_s": 9.0}, "lookup": {"tok_per_s": 12.0}})
    write(speeds, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["share_of_limit"] == speeds.share_of_limit
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_bench_command_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(NANO), "--kind", "fp32", "--prompt-tokens", "5", "--new-tokens", "2", "--repeats", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "bandwidth limit" in out and "linear layers      fp32 by native kernels (" in out
    assert main([*arguments, "--json"]) == 0
    stdout = json.loads(capsys.readouterr().out)
    assert stdout["prompt_tokens"] == 5
    # each figure has its unit, as in the table
    units = ("_tok_per_s", "_gb_per_s", "_ms", "_mb", "_s", "_tokens", "_of_limit")
    assert {name for name in stdout if not name.endswith(units)} == {"model", "kind", "linears", "passes", "threads", "speculation"}
    assert main([*arguments, "--repeats", "0"]) == 2
    assert "repeats=0" in capsys.readouterr().err
