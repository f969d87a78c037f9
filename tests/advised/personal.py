"""The advice of exports and answers of clients' personal models."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedtune.clients import turns
from fedtune.clients.store import ClientStore
from fedtune.clients.turns import TURNS, Turn
from fedtune.contracts.adapter_state import AdapterState
from fedtune.export.huggingface import export_hf
from tests.advised.rows import Place, error_of, follows
from tests.export.test_huggingface import CAUSAL, make_run
from tests.export.test_personal import personal_run, random_state
from tests.inference.serve.servers import tiny_model
from tests.models.build import hub


def made(place: Place, name: str = "run", turn: str = "ditto", round: int = 1) -> tuple[Path, ClientStore, AdapterState]:
    """A run whose client c0 has the state of a turn, with the turn's store and its state."""
    run, live = make_run(place.folder / name, hub(place.keep("served", lambda path: tiny_model(path, context=128))), CAUSAL)
    store, own = ClientStore(run / "clients", 3).substore(f"turn-{turn}"), random_state(live.read(1), 1)
    store.write("c0", round, own)
    return run, store, own


def export(place: Place, source: Path, *flags: str) -> str:
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    return place.run("fedtune", "export", source, "--out", place.folder / "out", *flags)


def generate(place: Place, source: Path, state: Path | None = None) -> str:
    flags = [] if state is None else ["--client-state", state]
    return place.run("fedtune", "generate", source, "turn on", "--max-new-tokens", "2", *flags)


def device(place: Place, name: str = "run") -> tuple[Path, Path]:
    """A run, and a device's state folder with the state of its client."""
    run, _, _ = made(place, name)
    return run, Path(shutil.copytree(run / "clients", place.folder / "state" / name / "clients")).parents[1]


def last(output: str) -> Path:
    """The path at the end of a sentence."""
    return Path(output.rpartition("such as ")[2].strip())


@follows("it is {}; export a client's personal model with `{}`")
def _(place: Place) -> Iterator[str]:
    for run in (personal_run(place.folder)[0], made(place, "second")[0]):  # tensors of the plan, and a turn's state
        assert not export(place, run)
        output = place.warned
        yield output if run.name == "run" else ""
        (line,) = re.findall(r"`(fedtune export .*?)`", output)
        yield place.run(*shlex.split(line))


@follows("is not a run directory, so it has no client '{}': give the run of that client")
def _(place: Place) -> Iterator[str]:
    run, _, _ = made(place)
    yield export(place, run / "clients/c0", "--client", "c0")
    yield export(place, run, "--client", "c0")


@follows("or each keeps its own on its device; leave the client out")
def _(place: Place) -> Iterator[str]:
    run, _, _ = made(place)
    shutil.rmtree(run / "clients")
    yield export(place, run, "--client", "c0")
    yield export(place, run)


@follows("there is no client '{}' in {}: give one with a personal model, such as {}")
def _(place: Place) -> Iterator[str]:
    run, _, _ = made(place)
    output = export(place, run, "--client", "bert")
    yield output
    (client,) = re.findall(r"such as '(.*?)'", output)
    yield export(place, run, "--client", client)


@follows("because it took no turn that trained one: leave the client out to take the run's model")
def _(place: Place) -> Iterator[str]:
    run, _, _ = made(place)
    (run / "partition.json").write_text('{"labels": [], "clients": [{"id": "c0"}, {"id": "c1"}]}')
    yield export(place, run, "--client", "c1")
    yield export(place, run)


@follows("are newer than the adapter, which is of round {}: give a later adapter of the run")
def _(place: Place) -> Iterator[str]:
    run, _, _ = made(place, round=2)
    yield export(place, run, "--client", "c0")
    file = run / "adapter/fedtune.safetensors"
    AdapterState.load(file).replace(version=2).save(file)
    yield export(place, run, "--client", "c0")


@follows("update fedtune, or call fedtune.export_hf in the program that registers the turn")
def _(place: Place) -> Iterator[str]:
    class Mine(Turn):
        @classmethod
        def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
            return kept or given

    run, _, _ = made(place, turn="mine")
    yield export(place, run, "--client", "c0")
    turns.register("mine", Mine)  # a newer fedtune has it as well
    try:
        yield error_of(lambda: export_hf(run, place.folder / "own", client="c0"))
    finally:
        TURNS.remove("mine")


@follows("{}: restore this file, or delete it to take the client's state of an earlier turn")
def _(place: Place) -> Iterator[str]:
    run, store, own = made(place)
    store.write("c0", 0, own)
    file = store.folder_of("c0") / "round-0001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:99])
    yield export(place, run, "--client", "c0")
    file.unlink()
    yield export(place, run, "--client", "c0")
    file.write_bytes(whole)
    yield export(place, run, "--client", "c0")


def _foreign(place: Place, state: AdapterState, turn: str = "turn-ditto") -> Iterator[str]:
    """The client's state is replaced by that of another run."""
    run, store, own = made(place)
    store = ClientStore(run / "clients", 3).substore(turn) if turn else ClientStore(run / "clients", 3)
    store.write("c0", 1, state)
    yield export(place, run, "--client", "c0")
    store.write("c0", 1, own)
    yield export(place, run, "--client", "c0")


@follows("keeps '{}' {}, which the adapter does not have: give the state and the adapter of the same run")
def _(place: Place) -> Iterator[str]:
    own = made(place, "second")[2]
    yield from _foreign(place, own.replace({"another.lora_A": next(iter(own.tensors.values()))}), turn="")


@follows("belongs to the backbone {}, but the adapter to {}: give the state and the adapter of the same run")
def _(place: Place) -> Iterator[str]:
    yield from _foreign(place, made(place, "second")[2].replace(base="another"))


@follows("is no state of the turn '{}' that fits the adapter: give the state and the adapter of the same run")
def _(place: Place) -> Iterator[str]:
    yield from _foreign(place, made(place, "second")[2].replace({}))


# -- answers of a device ------------------------------------------------------------------------------------------------------------------


@follows("{} has no state of a client: give the --state folder of fedtune-client, or RUN/clients/ID")
def _(place: Place) -> Iterator[str]:
    run, state = device(place)
    for folder in (run / "adapter", state, run / "clients/c0"):
        yield generate(place, run, folder)


@follows("{} has {}: give the folder of one run in it, such as {}")
def _(place: Place) -> Iterator[str]:
    run, state = device(place)
    renamed = run.rename(place.folder / "renamed")
    output = generate(place, renamed, state)
    assert "no state of the run renamed" in output
    yield output
    yield generate(place, renamed, last(output))
    shutil.copytree(state / "run", state / "second")
    adapter = Path(shutil.copytree(renamed / "adapter", place.folder / "adapter"))
    output = generate(place, adapter, state)
    assert "states of 2 runs" in output
    yield generate(place, adapter, last(output))


@follows("{} has the states of {} clients: give the folder of one, such as {}")
def _(place: Place) -> Iterator[str]:
    run, store, own = made(place)
    store.write("c1", 1, own)
    output = generate(place, run, run)
    yield output
    yield generate(place, run, last(output))


@follows("{} is this device's personal model already: leave out --client-state")
def _(place: Place) -> Iterator[str]:
    run, state = device(place)
    version = state / "models/versions/v1"
    assert not place.run("fedtune", "export", run, "--client", "c0", "--out", version / "model")
    shutil.copytree(run, version / "source")
    (version / "record.json").write_text(
        '{"run": "run", "round": 1, "chosen": "personal", "metric": null, "scores": {}, "installed": 0.0, "bytes": 1}'
    )
    yield generate(place, version / "model", state)
    yield generate(place, version / "model")


@follows("or export the personal model with `fedtune export RUN --client ID`")
def _(place: Place) -> Iterator[str]:
    run, state = device(place)
    assert not export(place, run, "--to", "edge")
    output = generate(place, place.folder / "out", state)
    yield output
    for source in (run, run / "adapter"):
        yield generate(place, source, state)
    (line,) = re.findall(r"`(fedtune export .*?)`", output)
    yield place.run(*(word.replace("RUN", str(run)).replace("ID", "c0") for word in line.split()))
    yield generate(place, Path(place.printed.strip()))


@follows("has no {}, which says the adapter's round: give the run or the adapter folder that fedtune wrote")
def _(place: Place) -> Iterator[str]:
    run, state = device(place)
    bare = Path(shutil.copytree(run / "adapter", place.folder / "bare"))
    (bare / "fedtune.safetensors").unlink()
    yield generate(place, bare, state)
    yield generate(place, run, state)
    yield generate(place, run / "adapter", state)
