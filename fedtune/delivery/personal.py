"""Runs a client's personal model without an installation: the adapter of a run or of a delivered model, and the client's state on disk."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.clients.store import ClientStore, client_id
from fedtune.delivery.versions import Versions
from fedtune.errors import CheckpointError, ConfigError, ModelError
from fedtune.export.huggingface import write_hf
from fedtune.export.origin import read_origin
from fedtune.export.personal import ClientState, clients_in, run_of
from fedtune.models.adapter_folder import OWN
from fedtune.storage.ids import shown

__all__ = ["find_state", "personal_model"]


@contextmanager
def personal_model(source: Path, folder: Path) -> Iterator[Path]:
    """Yield a Hugging Face folder of the personal model, which is deleted at the end.

    Args:
        source: A run directory, its adapter folder, or a model that was delivered to a device.
        folder: As in `find_state`.

    Raises:
        ConfigError: A delivered model is already the personal one.
        CheckpointError: There is no such run or state, or the state is damaged.
        ModelError: `source` has merged weights, or the state does not fit it.
    """
    adapter, run = _adapter_of(source)
    origin = read_origin(adapter, state=find_state(folder, run))
    with tempfile.TemporaryDirectory(prefix="fedtune-", ignore_cleanup_errors=True) as temporary:
        yield write_hf(origin, Path(temporary) / origin.name)


def find_state(folder: Path, run: str | None) -> ClientState:
    """Find a client's state.

    Args:
        folder: A device's state folder (`fedtune-client --state`), a run's folder in it, or a client's folder of a run (RUN/clients/ID).
        run: The name of the run; None if it is unknown.

    Raises:
        CheckpointError: The state does not exist, or there are several.
    """
    place = folder.resolve()
    if not (place / "clients").is_dir():
        runs = sorted(path.parent for path in place.glob("*/clients"))
        own = [path for path in runs if run in (None, path.name)]
        if not runs and place.parent.name == "clients":
            return ClientState(place.parent, client_id(place))
        if not runs:
            raise CheckpointError(f"{folder} has no state of a client: give the --state folder of fedtune-client, or RUN/clients/ID")
        if len(own) != 1:
            what = f"states of {len(own)} runs" if own else f"no state of the run {shown(run or '')}"
            raise CheckpointError(f"{folder} has {what}: give the folder of one run in it, such as {runs[0]}")
        place = own[0]
    clients = clients_in(place / "clients", unknown=True)
    if len(clients) > 1:
        one = ClientStore(place / "clients", 1).folder_of(clients[0])
        raise CheckpointError(f"{place} has the states of {len(clients)} clients: give the folder of one, such as {one}")
    return ClientState(place / "clients", clients[0] if clients else "")


def _adapter_of(source: Path) -> tuple[Path, str | None]:
    """The run or adapter folder to combine with the state, and the run's name if it is known."""
    place = source.resolve()
    version = place.parent if place.name == "model" else place
    if version.parent.name == "versions" and (version / "source" / "config.yaml").is_file():
        found = next((v for v in Versions(version.parents[2]).names() if v.name == version.name), None)
        if found is None or found.record is None:
            raise ModelError(found.flaw if found else f"{source} is no complete version")
        if found.record.chosen == "personal":
            raise ConfigError(f"{source} is this device's personal model already: leave out --client-state")
        return version / "source", found.record.run
    if (run := run_of(source)) is not None:
        return source, run.resolve().name
    if (source / "config.json").is_file():
        raise ModelError(
            f"{source} has merged weights, which do not combine with a client's state: give the run or its adapter folder, or export the"
            " personal model with `fedtune export RUN --client ID`"
        )
    if source.is_dir() and not (source / OWN).is_file():
        raise ModelError(f"{source} has no {OWN}, which says the adapter's round: give the run or the adapter folder that fedtune wrote")
    return source, None
