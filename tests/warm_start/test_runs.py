"""Whole runs that begin with an earlier adapter: the model of version 0 is the earlier one, on every engine and after a stop."""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.cli import simulate as sim
from fedtune.cli.server import _shared_config
from fedtune.clients.deployed import Device, own_config
from fedtune.clients.host import ClientHost
from fedtune.config import (
    ClientConfig,
    Config,
    DeviceClass,
    DevicesConfig,
    EngineConfig,
    EvalConfig,
    PeftConfig,
    TrafficConfig,
    from_dict,
)
from fedtune.config.compose import compose
from fedtune.config.stored import read_config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.wire import ServerMessage
from fedtune.errors import CheckpointError, ConfigError, ModelError
from fedtune.experiment import simulate
from fedtune.export.huggingface import export_hf
from fedtune.export.origin import read_origin
from fedtune.export.provenance import provenance
from fedtune.models.adapter_folder import read_adapter
from fedtune.runs.report import read_metrics
from fedtune.warm_start import read_source
from fedtune.warm_start.folder import read_start
from tests.faults.deployment import STORIES, deploy, settings, write_rows
from tests.quick import quick
from tests.tiny import tiny_config

SCORED = EvalConfig(where="server", clients=0)
STILL = ClientConfig(steps=1, epochs=None, batch_size=4, lr=1e-30, schedule="constant")  # a step of 1e-30 is below float32's resolution
MOVING = ClientConfig(steps=2, epochs=None, batch_size=4, lr=1e-2, schedule="constant")
STRATEGIES = (
    "fedavg", "fedadam", "fedex", "fedsa", "fedsvd", "ffa", "flexlora", "flora", "hetlora", "lora_fair", "rolora", "scaffold", "slora",
)  # fmt: skip


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds; its folder has the model and the rows that the others use."""
    return simulate(tiny_config(tmp_path_factory.mktemp("warm"), name="earlier", eval=SCORED, client=MOVING))


def warm(
    earlier: Path, strategy: str = "fedavg", *, client: ClientConfig = STILL, peft: Mapping[str, Any] | None = None, **more: Any
) -> Config:
    """The earlier experiment again, from its adapter."""
    first = read_config(earlier)
    chosen = compose([f"strategy={strategy}", "rounds=30"])[0].config.strategy
    if "rounds" in chosen:
        chosen = {**chosen, "rounds": 2}
    if strategy == "scaffold":
        client = dataclasses.replace(client, optimizer="sgd", clip_norm=None)
    values = {"name": f"warm-{strategy}", "strategy": chosen, "client": client, **more}
    return dataclasses.replace(first, peft=dataclasses.replace(first.peft, **{"from_": str(earlier), **(peft or {})}), **values)


def change(run: Path) -> dict[str, Tensor]:
    """Module → what the run's result adds to the weight."""
    stored, total = read_adapter(run / "adapter"), dict[str, Tensor]()
    for state in (stored.state, *stored.shifts):
        for module in state.spec.ranks:
            total[module] = total.get(module, torch.zeros(())) + state.product(module)
    return total


def assert_same_model(run: Path, expected: Path, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    a, b = change(run), change(expected)
    assert a.keys() == b.keys() and max(t.abs().max() for t in b.values()) > 1e-3
    for module, t in b.items():
        torch.testing.assert_close(a[module], t, rtol=rtol, atol=atol, msg=module)


def lines(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run) if r["client"] is None]


@pytest.mark.parametrize("strategy", quick(list(STRATEGIES), "ffa"))
def test_without_training_the_model_stays(earlier: Path, strategy: str) -> None:
    run = simulate(warm(earlier, strategy))
    assert_same_model(run, earlier)
    first, *later = lines(run)
    last = lines(earlier)[-1]
    for name in ("loss", "perplexity"):
        assert first[f"earlier_{name}"] == pytest.approx(last[name], rel=1e-6)
        assert all(r[f"earlier_{name}"] == pytest.approx(last[name], rel=1e-5) for r in later)
    assert all(0 <= r["forgetting"] < 0.01 for r in (first, *later))
    assert first["start"]["from"] == earlier.name and first["start"]["round"] == 2
    assert first["start"]["merged"] is (strategy in ("fedsa", "hetlora", "slora"))


@pytest.mark.slow
def test_the_start_is_evaluated_to_the_bit(earlier: Path) -> None:
    first, last = lines(simulate(warm(earlier, client=MOVING)))[0], lines(earlier)[-1]
    assert all(first[f"earlier_{name}"] == first[name] == last[name] for name in ("loss", "perplexity"))


@pytest.mark.slow
def test_a_run_of_no_rounds_merges_to_the_earlier_model(earlier: Path, tmp_path: Path) -> None:
    one = export_hf(earlier, tmp_path / "one") / "model.safetensors"
    two = export_hf(simulate(warm(earlier, rounds=0)), tmp_path / "two") / "model.safetensors"
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "sent"), [("ffa", True), ("fedsa", False), ("fedavg", False)])
def test_only_tensors_that_a_client_lacks_are_sent_and_metered(earlier: Path, strategy: str, sent: bool) -> None:
    """ffa sends no A, so each client gets the start with its first message. fedsa's start is a shift, and its factors are drawn."""
    records, met = read_metrics(simulate(warm(earlier, strategy, rounds=3, clients_per_round=2))), set[str]()
    whole = read_adapter(earlier / "adapter").state.nbytes
    for number in (1, 2, 3):
        (line,) = (r for r in records if r["round"] == number and r["client"] is None)
        own = {r["client"]: r for r in records if r["round"] == number and r["client"]}
        cohort = {client for client, r in own.items() if "bytes_down" in r}
        starts = {client: r["bytes_start"] for client, r in own.items() if "bytes_start" in r}
        assert starts.keys() == (cohort - met if sent else set()) and line.get("bytes_start", 0) == sum(starts.values())
        assert all(whole < size < 1.5 * whole + 10_000 for size in starts.values())
        met |= cohort


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ffa", "fedsa", "flora", "slora"])
def test_a_stopped_run_continues_without_the_earlier_one(earlier: Path, strategy: str, tmp_path: Path) -> None:
    """The checkpoint and the folder start/ have everything: the earlier run may be gone."""
    home = Path(shutil.copytree(earlier, tmp_path / earlier.name))
    config = warm(home, strategy, client=MOVING, clients_per_round=2, output_dir=str(tmp_path / "out"), name=strategy)
    config.strategy = {**config.strategy, **({"rounds": 3} if strategy == "slora" else {})}
    straight = simulate(dataclasses.replace(config, rounds=3, name="straight"))
    stopped = simulate(dataclasses.replace(config, rounds=1))
    shutil.rmtree(home)
    records = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    for record in (r for r in records if r["round"] == 0 and r["client"] is None):
        record["earlier_perplexity"] = 1.0  # no later value is better, so the value from before the stop counts
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    resumed = simulate(dataclasses.replace(read_config(stopped), resume=str(stopped), rounds=3))
    assert resumed == stopped and read_config(stopped).peft.from_ == str(home)
    files = [run / "adapter" / "fedtune.safetensors" for run in (resumed, straight)]
    assert files[0].read_bytes() == files[1].read_bytes()
    both = [[(r["round"], r["earlier_loss"]) for r in lines(run)] for run in (resumed, straight)]
    assert both[0] == both[1] and len(both[0]) == 4
    assert all(r["forgetting"] == r["earlier_perplexity"] - 1.0 for r in lines(resumed)[2:])


@pytest.mark.slow
def test_a_damaged_start_is_not_continued(earlier: Path) -> None:
    run = simulate(warm(earlier, "ffa", rounds=1, name="damaged"))
    again = dataclasses.replace(read_config(run), resume=str(run), rounds=2)
    whole = (run / "start" / "adapter.safetensors").read_bytes()
    (run / "start" / "adapter.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="what it began with, cannot be read .adapter.safetensors has another checksum.: restore"):
        simulate(again)
    shutil.rmtree(run / "start")
    with pytest.raises(CheckpointError, match="cannot be read .*: restore the folder, or start a new run"):
        simulate(again)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ffa", "hetlora"])
def test_the_engines_agree(earlier: Path, strategy: str) -> None:
    """In process, batched, and on Ray, where any worker may take a client's next turn and so gets the start again."""
    alone = simulate(warm(earlier, strategy, client=MOVING, name=f"alone-{strategy}"))
    batched = simulate(warm(earlier, strategy, client=MOVING, name=f"batched-{strategy}", engine=EngineConfig(threads=1, batched="4")))
    assert_same_model(batched, alone, rtol=1e-3, atol=1e-5)
    pytest.importorskip("ray")
    ray = simulate(warm(earlier, strategy, client=MOVING, name=f"ray-{strategy}", engine=EngineConfig(kind="ray", batched="none")))
    assert_same_model(ray, alone, rtol=1e-4, atol=1e-5)
    if strategy == "ffa":
        sizes = [[r["bytes_start"] > 0 for r in lines(run) if "bytes_start" in r] for run in (alone, ray)]
        assert [len(s) for s in sizes] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["flexlora", "flora", "hetlora"])
def test_devices_of_smaller_ranks_do_not_change_the_model(earlier: Path, strategy: str) -> None:
    small = DevicesConfig(classes={"small": DeviceClass(share=0.5, rank=1), "large": DeviceClass(share=0.5)})
    assert_same_model(simulate(warm(earlier, strategy, devices=small, name=f"mixed-{strategy}")), earlier)


@pytest.mark.slow
@pytest.mark.parametrize("down", ["int8", "nf4"])
def test_encoded_broadcasts_start_from_the_earlier_adapter(earlier: Path, down: str) -> None:
    """The first adapter of the encoding stays the drawn one, which clients know."""
    run = simulate(warm(earlier, "fedavg", traffic=TrafficConfig(down=down, up=down), name=f"codec-{down}"))
    assert_same_model(run, earlier)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "ptuning_v2", "ia3", "adapter", "prompt", "full", "ravan", "fedsb"])
def test_every_method_continues(earlier: Path, method: str) -> None:
    first = dataclasses.replace(
        read_config(earlier), name=f"first-{method}", peft=dataclasses.replace(compose([f"peft={method}"])[0].config.peft, rank=2, tokens=3)
    )
    before = simulate(first)
    run = simulate(dataclasses.replace(warm(before, name=f"warm-{method}"), seed=5 if method == "ravan" else first.seed))  # other bases
    one, two = (AdapterState.load(path / "adapter" / "fedtune.safetensors") for path in (before, run))
    assert list(one.tensors) == list(two.tensors) and any(t.any() for t in one.tensors.values())
    for name, tensor in one.tensors.items():  # dora and full store differences from the backbone, which a client adds and subtracts
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6 if method in ("dora", "full") else 0)
    assert lines(run)[0]["earlier_loss"] == lines(before)[-1]["loss"]


@pytest.mark.slow
def test_prompts_that_the_server_never_sent_begin_at_the_start(earlier: Path) -> None:
    """fedpeptao without a warm-up: a client never receives the layers outside S, so it needs them from the start."""
    peft = dataclasses.replace(compose(["peft=ptuning_v2"])[0].config.peft, tokens=3)
    before = simulate(dataclasses.replace(read_config(earlier), name="first-prompts", peft=peft))
    strategy = {**compose(["strategy=fedpeptao", "peft=ptuning_v2", "rounds=30"])[0].config.strategy}
    strategy |= {"warmup_rounds": 0, "ratio": 0.5, "server_lr": 0.0}
    config = dataclasses.replace(warm(before, name="peptao", rounds=3), strategy=strategy)
    run = simulate(config)
    state = read_adapter(before / "adapter").state
    kept = list((run / "clients").rglob("round-*.safetensors"))
    assert kept
    for file in kept:
        own = AdapterState.load(file)
        assert own.tensors and all(torch.equal(t, state[n]) for n, t in own.tensors.items())


@pytest.mark.slow
def test_a_chain_measures_the_last_run(earlier: Path) -> None:
    second = simulate(warm(earlier, client=MOVING, name="second"))
    third = simulate(warm(second, name="third"))
    assert lines(third)[0]["start"]["from"] == second.name
    assert lines(third)[0]["earlier_loss"] == lines(second)[-1]["loss"]


@pytest.mark.slow
def test_a_peft_folder_is_a_start_without_a_measure(earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = Path(shutil.copytree(earlier / "adapter", tmp_path / "bare"))
    (bare / "fedtune.safetensors").unlink()
    run = simulate(warm(earlier, name="bare", peft={"from_": str(bare)}))
    assert_same_model(run, earlier)
    assert lines(run)[0]["start"]["from"] == "bare" and not any(k.startswith(("earlier", "forgetting")) for r in lines(run) for k in r)
    output = capsys.readouterr().err
    assert "forgetting is not measured: it started from an adapter folder, which names no test rows" in output


@pytest.mark.slow
def test_earlier_rows_on_another_machine_are_not_measured(earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = Path(shutil.copytree(earlier, tmp_path / "moved"))
    text = (moved / "config.yaml").read_text().replace("/test.jsonl", "/gone.jsonl").replace("/rows.jsonl", "/lost.jsonl")
    (moved / "config.yaml").write_text(text)
    run = simulate(warm(earlier, name="moved", peft={"from_": str(moved)}))
    assert "forgetting is not measured: the test rows of the earlier run 'earlier' are not on this machine" in capsys.readouterr().err
    assert "forgetting" not in lines(run)[-1]


@pytest.mark.slow
def test_the_report_and_the_cards_name_the_earlier_run(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = simulate(warm(earlier, client=MOVING, name="reported"))
    last = lines(run)[-1]
    card, report, output = (run / "adapter" / "README.md").read_text(), (run / "report.html").read_text(), capsys.readouterr().out
    sha256 = lines(run)[0]["start"]["sha256"]
    assert f"warm start: from the adapter of `{earlier.name}` (round 2, file's sha256 `{sha256}`)" in card and "(0 is the start)" in card
    assert f"from {earlier.name} → round 2" in report and "Earlier task: perplexity" in report and "untuned" not in report
    assert "round 0 (warm start)" in output and "untuned" not in output
    assert "earlier test rows: perplexity" in output and f"forgetting {last['forgetting']:.3f}" in output
    about = provenance(read_origin(run))["provenance"]  # for the cards of edge packages and GGUF files
    assert about["start"] == {"from": earlier.name, "round": 2, "sha256": sha256}


def test_an_unusable_source_is_refused_before_a_run_begins(earlier: Path, tmp_path: Path) -> None:
    def expect_error(path: Path, error: type[Exception], sentence: str) -> None:
        with pytest.raises(error, match=sentence):
            simulate(warm(earlier, peft={"from_": str(path)}, output_dir=str(tmp_path / "none"), name="refused"))
        assert not (tmp_path / "none").exists()

    expect_error(tmp_path / "gone", ConfigError, "^peft.from=.*/gone: there is no such folder")
    expect_error(earlier.parents[2] / "model", ConfigError, "model is a whole model, not an adapter: leave peft.from out")
    pickled = Path(shutil.copytree(earlier / "adapter", tmp_path / "pickled"))
    for name in ("fedtune.safetensors", "adapter_model.safetensors"):
        (pickled / name).rename(pickled / "adapter_model.bin")
    expect_error(pickled, ModelError, "has only a pickled adapter_model.bin, which can run code")
    going = Path(shutil.copytree(earlier, tmp_path / "going", ignore=shutil.ignore_patterns("adapter")))
    expect_error(going, CheckpointError, "the run has no adapter yet, because it has not ended; continue it with resume=")
    assert read_source(str(earlier / "adapter")).config == read_config(earlier)  # the folder adapter/ of a run identifies the run


@pytest.mark.slow
def test_the_stored_start_names_its_source(earlier: Path) -> None:
    stored = copy.deepcopy(read_config(earlier))
    run = simulate(warm(earlier, rounds=0, name="stored"))
    start, before = read_start(run)
    assert before == stored and start.about["from"] == earlier.name
    assert start.adapter.digest == read_adapter(earlier / "adapter").state.replace(version=0).digest
    assert not (run / "start" / "config.yaml").exists()  # it must not look like a run directory


@pytest.mark.slow
def test_a_client_that_lost_the_start_gets_it_again(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a device restart that the server does not notice: one round is lost, and the next message has the start."""
    real = ClientHost.take_start

    def forgetful(host: ClientHost, request: ServerMessage) -> None:
        if request.round == 2:
            host.space.start = None
        real(host, request)

    monkeypatch.setattr(ClientHost, "take_start", forgetful)
    run = simulate(warm(earlier, "ffa", rounds=3, name="forgetful"))
    _, *rounds = lines(run)
    assert [r["counted"] for r in rounds] == [4, 0, 4] and [r.get("bytes_start", 0) > 0 for r in rounds] == [True, False, True]
    assert_same_model(run, earlier)


def test_a_server_does_not_send_the_path() -> None:
    config = Config(peft=PeftConfig(from_="some/run"))
    assert "from" not in _shared_config(config)["peft"] and from_dict(_shared_config(config)).peft.from_ is None
    assert own_config(config, Device(client="a", state=Path("s")), []).peft.from_ is None  # a server of another kind may send it


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k and fed/tinyshakespeare")
def test_devices_over_tls_begin_with_the_earlier_adapter(tmp_path: Path) -> None:
    """ffa: three clients get A once, from the server alone; the result is the simulation's."""
    clients, rows = ("anna", "bert", "carla"), tmp_path / "rows"
    write_rows(rows, clients)
    experiment = settings(rows, clients)
    before = run_simulation(tmp_path, "before", experiment)
    begin = [*experiment, "strategy=ffa", f"peft.from={before}"]
    with deploy(tmp_path, clients, begin) as made:
        made.start()
        assert made.finish() == 0, made.output("server")
        records = made.rounds()
    assert ["bytes_start" in r for r in records] == [False, True, *[False] * (len(records) - 2)]
    assert_same_model(made.run, run_simulation(tmp_path, "again", begin), rtol=1e-3, atol=1e-5)
    for client in clients:
        assert str(before) not in made.output(client)
    hellos = list(tmp_path.rglob("hello.json"))
    assert len(hellos) == 3 and not any(str(before) in file.read_text() for file in hellos)


def run_simulation(folder: Path, name: str, experiment: list[str]) -> Path:
    (job,) = compose([*experiment, f"output_dir={folder / name}", "engine.batched=none"])
    return simulate(job.config)


@pytest.mark.slow
def test_the_command_in_the_docs_measures_forgetting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["rounds=1", "data.homes=3", "data.test_limit=6", "client.steps=2", "clients_per_round=2", "eval.clients=0", "devices=none"]
    assert sim.main(["conf=heterogeneous", *small, f"output_dir={tmp_path}"]) == 0
    (before,) = (tmp_path / "heterogeneous").iterdir()
    page = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"-m fedtune\.sim (conf=heterogeneous .* peft\.from=\S+)", page)
    command = line.replace("outputs/heterogeneous/RUN", str(before)).split()
    assert sim.main([*command, *small, f"output_dir={tmp_path / 'again'}"]) == 0
    (after,) = (tmp_path / "again" / "heterogeneous").iterdir()
    first, last = lines(after)
    assert first["earlier_exact_match"] == lines(before)[-1]["exact_match"] and first["loss"] != lines(before)[-1]["loss"]
    assert last["forgetting"] == max(first["earlier_exact_match"], last["earlier_exact_match"]) - last["earlier_exact_match"]
    assert f"forgetting {last['forgetting']:.3f}" in capsys.readouterr().out
