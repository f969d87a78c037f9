"""A client's personal model, in runs whose clients keep tensors of their own, and notes on the run's global adapter."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fedtune.clients.store import client_id
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import CheckpointError, ModelError
from fedtune.models.adapter_folder import StoredAdapter
from fedtune.models.methods import method

__all__ = ["client_of", "global_note", "personal_adapter"]


def client_of(source: Path) -> tuple[Path, str] | None:
    """Return the run directory and the client's id if `source` is RUN/clients/ID; None for other folders."""
    source = source.resolve()
    run = source.parent.parent
    if source.parent.name != "clients" or not (run / "config.yaml").is_file():
        return None
    return run, client_id(source)


def personal_adapter(adapter: StoredAdapter, run: Path, client: str) -> StoredAdapter:
    """Combine the global adapter with the tensors that the client kept in its last turn up to the adapter's round.

    Raises:
        CheckpointError: The client kept no tensors, or its file is damaged.
        ModelError: A kept tensor does not fit this adapter.
    """
    from fedtune.clients.store import ClientStore

    state, store = adapter.state, ClientStore(run / "clients", 1)
    kept = store.read(client, state.spec.version + 1)
    if kept is None:
        raise CheckpointError(
            f"client {client} keeps no tensors in {run / 'clients'} up to round {state.spec.version}: it took no turn that trained a"
            f" personal model; export the run itself, {run}"
        )
    for name, tensor in kept.tensors.items():
        if name not in state.tensors or state[name].shape != tensor.shape:
            raise ModelError(f"client {client} keeps '{name}' {tuple(tensor.shape)}, which the adapter of {run} does not have")
    return dataclasses.replace(adapter, state=state.replace({**state.tensors, **kept.tensors}))


def global_note(run: Path | None, state: AdapterState, shifts: Sequence[AdapterState]) -> str:
    """Describe what the global adapter lacks, in a sentence; "" if it is complete.

    Args:
        run: The run directory; None for a bare adapter folder.
        state: The adapter.
        shifts: What the run merged into the frozen weights.
    """
    from fedtune.clients.store import ClientStore

    untouched = not shifts and method(state.spec.method).is_noop(state)
    some = ClientStore(run / "clients", 1).clients() if run else []
    if some and run:
        example = ClientStore(run / "clients", 1).folder_of(some[0])
        what = "the untouched backbone" if untouched else "the part that all clients share"
        return (
            f"each of {len(some)} clients keeps tensors of its own, which this model does not have: it is {what}; export a client's"
            f" personal model with `fedtune export {example}`"
        )
    if untouched:
        return (
            "the adapter changes no weight, so the model is the untouched backbone: nothing was trained, or the trained tensors stay with"
            " the clients"
        )
    return ""
