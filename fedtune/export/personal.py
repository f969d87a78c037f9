"""A client's personal model, in runs whose clients keep state of their own, and notes on the run's global adapter.

The personal adapter is the global one with the tensors of `plan.keep`, which `Turn.personal` then combines with the turn's own state. The
names of turns are those of folders. Only turns of fedtune, and turns registered in this process, are looked up by them.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.clients.store import ClientStore, client_id, round_of
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import CheckpointError, ModelError
from fedtune.models.adapter_folder import StoredAdapter
from fedtune.models.methods import method
from fedtune.storage.ids import shown
from fedtune.storage.parsing import parse_json, read_text

if TYPE_CHECKING:
    from fedtune.clients.turns import Turn

__all__ = ["ClientState", "clients_in", "client_folder", "client_of", "global_note", "personal_adapter", "run_of"]


@dataclass(frozen=True)
class ClientState:
    """A client's state between its turns.

    Args:
        folder: The clients' folder: RUN/clients, or STATE/RUN/clients on a device.
        client: The client's id.
    """

    folder: Path
    client: str


def run_of(source: Path) -> Path | None:
    """The run directory that `source` is, or whose adapter it is; None for other folders."""
    if source.name == "adapter" and (source.parent / "config.yaml").is_file():
        return source.parent  # the run has more than its adapter: the prompt template, the labels' names
    return source if (source / "config.yaml").is_file() else None


def client_of(source: Path) -> ClientState | None:
    """The client if `source` is RUN/clients/ID; None for other folders."""
    source = source.resolve()
    is_client = source.parent.name == "clients" and (source.parents[1] / "config.yaml").is_file()
    return ClientState(source.parent, client_id(source)) if is_client else None


def client_folder(source: Path, client: str) -> Path:
    """RUN/clients/ID of a client.

    Args:
        source: RUN, or RUN/adapter.
        client: The client's id.

    Raises:
        CheckpointError: `source` is not a run, or has no state of the client.
    """
    if (run := run_of(source)) is None:
        raise CheckpointError(f"{source} is not a run directory, so it has no client '{shown(client)}': give the run of that client")
    store = ClientStore(run / "clients", 1)
    if not any(one.folder_of(client).is_dir() for one in (store, *store.turns().values())):
        raise _missing(ClientState(store.folder, client))
    return store.folder_of(client)


def clients_in(folder: Path, *, unknown: bool = False) -> list[str]:
    """Sorted ids of the clients with a personal model in a clients' folder.

    Args:
        folder: As in `ClientState`.
        unknown: Also those with the state of a turn that this process does not have.
    """
    store = ClientStore(folder, 1)
    stores = [store, *(one for name, one in store.turns().items() if (kind.is_personal() if (kind := _kind(name)) else unknown))]
    return sorted({client for one in stores for client in one.clients()})


def personal_adapter(adapter: StoredAdapter, of: ClientState) -> tuple[StoredAdapter, str]:
    """Combine the global adapter with a client's state after its last turn up to the adapter's round.

    If several turns have a state of the client, the newest state counts.

    Returns:
        The adapter, perhaps with other ranks, and a note on the choice of the state; "" without one.

    Raises:
        CheckpointError: The client has no personal model, its state is damaged, or this process does not have the turn.
        ModelError: The state does not fit this adapter.
    """
    state, store, note = adapter.state, ClientStore(of.folder, 1), ""
    before = state.spec.version + 1
    own, turns = store.find(of.client, before), _states(store, of.client, before)
    if own is None and not turns:
        raise _missing(of, state.spec.version)
    if own is not None:
        kept = _load(own, state)
        for name, tensor in kept.tensors.items():
            if name not in state.tensors or state[name].shape != tensor.shape:
                raise ModelError(
                    f"client {of.client} keeps '{name}' {tuple(tensor.shape)}, which the adapter does not have: give the state and the"
                    " adapter of the same run"
                )
        state = state.replace({**state.tensors, **kept.tensors})
    if turns:
        turn, file = turns[-1]
        if (kind := _kind(turn)) is None:
            raise CheckpointError(
                f"client {of.client} has a state of the turn '{shown(turn)}', which this process does not have: update fedtune, or call"
                " fedtune.export_hf in the program that registers the turn"
            )
        kept = _load(file, state)
        try:
            made = kind.personal(state, kept)
            if _sizes(made) != _sizes(state):
                raise ValueError("other tensors")
        except (CheckpointError, LookupError, RuntimeError, TypeError, ValueError):
            raise ModelError(
                f"{file} is no state of the turn '{turn}' that fits the adapter: give the state and the adapter of the same run"
            ) from None
        state = made.replace(version=state.spec.version, base=state.spec.base)
        if len(turns) > 1:
            names = ", ".join(sorted(name for name, _ in turns))
            note = (
                f"client {of.client} has states of several turns ({names}): this model has the newest, of {turn} in round {round_of(file)}"
            )
    return dataclasses.replace(adapter, state=state), note


def global_note(run: Path | None, state: AdapterState, shifts: Sequence[AdapterState]) -> str:
    """Describe what the global adapter lacks, in a sentence; "" if it is complete.

    Args:
        run: The run directory; None for a bare adapter folder.
        state: The adapter.
        shifts: What the run merged into the frozen weights.
    """
    untouched = not shifts and method(state.spec.method).is_noop(state)
    some = clients_in(run / "clients") if run else []
    if some and run:
        example = shlex.join(["fedtune", "export", str(run), "--client", some[0]])
        what = "the untouched backbone" if untouched else "the part that all clients share"
        return (
            f"each of {len(some)} clients keeps tensors of its own, which this model does not have: it is {what}; export a client's"
            f" personal model with `{example}`"
        )
    if untouched:
        return (
            "the adapter changes no weight, so the model is the untouched backbone: nothing was trained, or the trained tensors stay with"
            " the clients"
        )
    return ""


def _kind(turn: str) -> "type[Turn] | None":
    """The class of a turn; None if this process has none of that name."""
    from fedtune.clients.turns import TURNS, find  # lazy: it loads PEFT

    return find(turn) if turn in TURNS else None


def _states(store: ClientStore, client: str, before: int) -> list[tuple[str, Path]]:
    """Turn and file of the client's states before this round, the newest last; none of turns without a personal adapter."""
    found = [(name, file) for name, one in store.turns().items() if (file := one.find(client, before))]
    # a run that was resumed from an older round may leave a file of another turn for the same round
    found.sort(key=lambda state: (round_of(state[1]), state[1].stat().st_mtime))
    return [(name, file) for name, file in found if (kind := _kind(name)) is None or kind.is_personal()]


def _load(file: Path, state: AdapterState) -> AdapterState:
    """Read a client's state for this adapter."""
    try:
        kept = AdapterState.load(file)
    except CheckpointError as bad:
        raise CheckpointError(f"{bad}: restore this file, or delete it to take the client's state of an earlier turn") from None
    if kept.spec.base and state.spec.base and kept.spec.base != state.spec.base:
        raise ModelError(
            f"{file} belongs to the backbone {kept.spec.base[:12]}, but the adapter to {state.spec.base[:12]}: give the state and the"
            " adapter of the same run"
        )
    return kept


def _sizes(state: AdapterState) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The method, and the tensors' shapes without the ranks. Raises ValueError if the ranks differ from the tensors' own."""
    sizes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    for module, rank in state.spec.ranks.items():
        (a, *inputs), (*outputs, b) = sizes[f"{module}.lora_A"], sizes[f"{module}.lora_B"]
        if not a == b == rank or module not in state.spec.scaling:
            raise ValueError(module)
        sizes |= {f"{module}.lora_A": tuple(inputs), f"{module}.lora_B": tuple(outputs)}
    return state.spec.method, sizes


def _missing(of: ClientState, version: int | None = None) -> CheckpointError:
    """Why the client has no personal model up to the adapter's round, `version`."""
    some = clients_in(of.folder, unknown=True)
    if not some:
        return CheckpointError(
            f"no client has a personal model in {of.folder}: all share the run's model, or each keeps its own on its device; leave the"
            " client out"
        )
    if of.client not in some and of.client not in _partition(of.folder.parent):
        few = ", ".join(f"'{shown(client)}'" for client in some[:3])
        return CheckpointError(f"there is no client '{shown(of.client)}' in {of.folder}: give one with a personal model, such as {few}")
    if of.client in some and version is not None:
        return CheckpointError(
            f"the states of client {shown(of.client)} in {of.folder} are newer than the adapter, which is of round {version}: give a later"
            " adapter of the run"
        )
    return CheckpointError(
        f"client {shown(of.client)} has no personal model in {of.folder}, because it took no turn that trained one: leave the client out to"
        " take the run's model"
    )


def _partition(run: Path) -> set[str]:
    """Ids of the run's clients by its partition.json; empty if it cannot be read."""
    try:
        return {client["id"] for client in parse_json(read_text(run / "partition.json"))["clients"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
