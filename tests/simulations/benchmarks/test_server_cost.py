"""The benchmark of server cost at toy size: the measured quantities, not speed."""

import json
from pathlib import Path

import pytest
import torch

from fedtune.errors import ConfigError
from fedtune.simulations.benchmarks.server_cost import (
    Stream,
    affordable,
    cost,
    main,
    numpy_mean,
    strategy_of,
    whole_adapter,
)
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.ffa import FFA


def test_the_bare_mean_does_the_same_work_as_fedavg() -> None:
    stream = Stream(FedAvg(), whole_adapter(0.3))
    ours, bare = FedAvg().aggregate(1, stream.state, stream(5)).adapter, numpy_mean(stream(5))
    assert list(ours.tensors) == list(bare)
    for name, expected in bare.items():
        torch.testing.assert_close(ours[name], torch.from_numpy(expected), atol=1e-7, rtol=1e-4)


def test_every_pass_sees_the_same_updates_and_no_two_clients_are_alike() -> None:
    stream = Stream(FFA(), whole_adapter(0.3))
    first, again = list(stream(3)), list(stream(3))
    names = list(first[0].adapter.tensors)
    assert names == list(stream.wanted.tensors) and all(n.endswith("lora_B") for n in names)  # FFA's clients send only B
    assert all(torch.equal(a.adapter[n], b.adapter[n]) for a, b in zip(first, again, strict=True) for n in names)
    assert not torch.equal(first[0].adapter[names[0]], first[1].adapter[names[0]])


def test_an_adapter_has_the_requested_size() -> None:
    assert whole_adapter(10.0).nbytes == pytest.approx(10e6, rel=0.02)


def test_retained_memory_is_measured() -> None:
    def keep() -> list[torch.Tensor]:
        return [torch.ones(250_000) for _ in range(40)]  # 40 MB

    held = [cost(keep)[1] for _ in range(2)]  # twice, because the memory of the first pass is returned
    if held[0] == 0:
        pytest.skip("this system does not report a process's peak memory")
    assert all(35 < mb < 60 for mb in held)


def test_a_cohort_that_does_not_fit_shrinks_with_a_note() -> None:
    stream = Stream(FedAvg(), whole_adapter(0.3))
    assert affordable(stream, 20, max_mb=1e9, max_s=1e9) == (20, "")
    clients, why = affordable(stream, 1000, max_mb=1e9, max_s=0.0)
    assert clients == 16 and why.startswith("1,000 clients would take") and why.endswith("the table shows 16")


def test_a_strategy_that_needs_more_clients_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="bulyan"):
        strategy_of("bulyan", 3)


def test_prompts_are_as_large_as_lora() -> None:
    assert whole_adapter(10.0, prompts=True).nbytes == pytest.approx(10e6, rel=0.02)
    assert list(whole_adapter(0.3, prompts=True).tensors) == ["layers.0.prompt"]


def test_a_tiny_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost"
    main(["--clients", "6", "--mb", "0.3", "--repeats", "1", "--strategies", "fedavg", "hetlora", "fedpeptao", "bulyan", "--out", str(out)])
    document = json.loads(out.with_suffix(".json").read_text())
    assert [r["strategy"] for r in document["rows"]] == ["fedavg", "hetlora", "fedpeptao"] and list(document["not_measured"]) == ["bulyan"]
    assert all(r["clients"] == 6 and r["update_mb"] == pytest.approx(0.262, abs=0.001) and r["seconds"] >= 0 for r in document["rows"])
    lines = out.with_suffix(".md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 4 and lines[-1].startswith("not measured: bulyan")
    assert "not measured: bulyan" in capsys.readouterr().out
