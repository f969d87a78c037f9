"""An invalid id is refused when the rows are partitioned; any other id works in a whole run."""

import json
from pathlib import Path

import pytest

import fedtune.cli.server
from fedtune.clients.store import ClientStore
from fedtune.config import ClientConfig, PrivacyConfig, from_dict
from fedtune.data import load_federation
from fedtune.errors import ConfigError, DataError
from fedtune.experiment import simulate
from fedtune.export.personal import ClientState, client_of
from fedtune.runs.report import read_metrics
from fedtune.storage.ids import file_name, flaw, is_run_name
from tests.tiny import texts, tiny_config

LONG = "Администрация городского округа, " * 6  # 198 characters, each of which takes seven in a file name
FLAWS = {
    "x" * 201: "has 201 characters, more than the limit of 200",
    "a\tb": r"has an unprintable character \(U\+0009\)",
    "a\u00a0b": r"has an unprintable character \(U\+00A0\)",
    "a\u200bb": r"has an unprintable character \(U\+200B\)",
    "a\nb": r"has an unprintable character \(U\+000A\)",
}


@pytest.mark.parametrize("client", FLAWS, ids=ascii)
def test_an_invalid_id_is_refused_in_the_partition(tmp_path: Path, client: str) -> None:
    rows = [{"text": "a b", "client": "good"}, {"text": "c d", "client": client}, {"text": "e f", "client": client}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {"data": {"source": "local", "path": str(tmp_path), "test_fraction": 0.0}, "task": {"kind": "causal_lm"}}
    with pytest.raises(DataError, match=f"the client id '.+' of training row 2 {FLAWS[client]}: give it another") as caught:
        load_federation(from_dict(config | {"partition": {"kind": "natural"}}))
    assert str(caught.value).isprintable()
    # with a partition whose ids do not come from the data
    load_federation(from_dict(config | {"partition": {"kind": "iid", "clients": 2}}))


def test_an_invalid_id_is_refused_in_the_config() -> None:
    with pytest.raises(ConfigError, match=r"data\.client='a b' has an unprintable character \(U\+0009\): give the client"):
        from_dict({"data": {"client": "a\tb"}})
    for name in ("x" * 65, "a\tb"):
        with pytest.raises(ConfigError, match="the name of the device class '.*' is too long or not printable: use at most 64 printable"):
            from_dict({"devices": {"classes": {name: {"share": 1.0}}}})


def test_blanks_around_an_id_are_stripped(tmp_path: Path) -> None:
    rows = [{"text": "a b", "client": "\u00a0good\t"}, {"text": "c d", "client": "good"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {"data": {"source": "local", "path": str(tmp_path), "test_fraction": 0.0}, "task": {"kind": "causal_lm"}}
    assert list(load_federation(from_dict(config)).clients) == ["good"]


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_any_other_id_works_in_a_run_with_files_per_client(tmp_path: Path, capsys: pytest.CaptureFixture[str], private: bool) -> None:
    ids = [LONG.strip(), LONG.strip()[:-1], "../x y/ä.b", "😀"]
    rows = [{**row, "client": ids[i % 4]} for i, row in enumerate(texts(32))]
    assert not any(map(flaw, ids))
    target = "fedtune.strategies.fedavg.FedAvg" if private else "fedtune.strategies.fedsa.FedSA"
    config = tiny_config(tmp_path, rows, rounds=2, strategy={"_target_": target}, client=ClientConfig(steps=1, epochs=None, batch_size=4))
    if private:
        config.privacy = PrivacyConfig(kind="record", noise=1.0, epsilon=None)
    run = simulate(config)
    assert [line.get("counted") for line in read_metrics(run) if line["client"] is None and line["round"]] == [4, 4]
    if private:
        assert {p.name for p in (run / "privacy").iterdir()} >= {f"{file_name(c)}.jsonl" for c in ids}
    else:
        store = ClientStore(run / "clients", 1)
        assert store.clients() == sorted(ids)
        assert {client_of(store.folder_of(c)) for c in ids} == {ClientState(run.resolve() / "clients", c) for c in ids}


def test_a_run_name_that_is_not_a_folder_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_run_name("run-20260101") and not is_run_name("my run") and not is_run_name("")
    assert fedtune.cli.server.main(["--insecure", "--run", str(tmp_path / "my run")]) == 2
    assert "use the run's name 'my run' as a folder name: use only letters" in capsys.readouterr().err
