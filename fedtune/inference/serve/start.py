"""`fedtune serve`: starts a server for a model's folder."""

import logging
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.caches.budget import show_least, show_size
from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.caches.prefix import PagedCaches
from fedtune.inference.engine.decoder import describe_passes, linears_of
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.make_linear import describe_path
from fedtune.inference.engine.schedule import Caches, Scheduler
from fedtune.inference.engine.text import Text
from fedtune.inference.generate import falls_back, read_card
from fedtune.inference.serve.adapters import add_adapter
from fedtune.inference.serve.app import create_app
from fedtune.inference.serve.limits import ApiKeys, Limits
from fedtune.inference.serve.listener import is_loopback, listen, public_warning, url
from fedtune.inference.serve.served_model import ServedModel
from fedtune.inference.serve.server import Server

BUDGET = 1 << 29  # default size of the KV cache, in bytes
CONCURRENT = 16  # default number of concurrent requests
QUEUE = 64  # default number of waiting requests
LEAST = 32  # tokens of the shortest useful context


def serve(
    model: Path,
    *,
    host: str,
    port: int,
    keys: ApiKeys,
    limits: Limits,
    kind: str | None = None,
    kv_budget: int | None = None,
    max_concurrent: int | None = None,
    queue: int = QUEUE,
    adapters: Mapping[str, Path] | None = None,
) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C. Prints the address to stdout, everything else to stderr.

    Raises:
        ModelError: The model cannot be loaded, or generates no text.
        ConfigError: A number is out of range, the budget is too small for the KV cache, or an option is not available with transformers.
        NetworkError: The address is not available.
    """
    log_to_stderr()
    listener = listen(host, port)  # first: fail on a used port before loading the model
    with listener:
        served = make_server(model, listener, keys, limits, kind, kv_budget, max_concurrent, queue, adapters or {})
        if warning := public_warning(listener, keyed=bool(keys)):
            print(f"fedtune: {warning}", file=sys.stderr, flush=True)
        print(f"fedtune: {served.description}", file=sys.stderr, flush=True)
        print(url(listener), flush=True)
        served.server.serve_on(listener)


def log_to_stderr() -> None:
    """Print the warnings of all libraries to stderr."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns about every client that disconnects early


@dataclass(frozen=True, kw_only=True)
class MadeServer:
    """A server with a loaded model, and its description."""

    server: Server
    description: str


def make_server(
    model: Path,
    listener: socket.socket,
    keys: ApiKeys,
    limits: Limits,
    kind: str | None = None,
    kv_budget: int | None = None,
    max_concurrent: int | None = None,
    queue: int = QUEUE,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    *,
    rename: Callable[[ServedModel], ServedModel] = lambda served: served,
    ready: Callable[[], None] | None = None,
) -> MadeServer:
    """Load a model and make its server for a listening socket, which this or another process has opened.

    Other arguments:
        rename: Changes the names under which the model is served.
        ready: Called when the server accepts connections.

    Raises:
        ModelError, ConfigError: As for `serve`.
    """
    card = read_card(model)
    if falls_back(model, card, kind=kind, kv_budget=kv_budget, max_concurrent=max_concurrent, adapters=adapters or None):
        scheduler, served, description = transformers_scheduler(model, card, queue)
        concurrent = 1
    else:
        concurrent = CONCURRENT if max_concurrent is None else max_concurrent
        scheduler, served, description = engine_scheduler(model, kind, kv_budget, concurrent, queue, adapters)
    served = rename(served)
    app = create_app(scheduler, served, limits, keys, local=is_loopback(listener) and not keys)
    server = Server(app, scheduler, grace=limits.grace, connections=4 * (concurrent + queue) + 64, ready=ready)
    return MadeServer(server=server, description=f"{', '.join(served.models)}: {description}")


def engine_scheduler(
    model: Path, kind: str | None, kv_budget: int | None, max_concurrent: int, queue: int, adapters: Mapping[str, Path]
) -> tuple[Scheduler, ServedModel, str]:
    """Return the engine's scheduler, the served model, and a description; raises like `serve`."""
    engine = load_engine(model, kind)
    for name, folder in adapters.items():
        add_adapter(engine, name, folder)
    caches = make_caches(engine, kv_budget, max_concurrent)
    scheduler = make_scheduler(engine, caches, max_concurrent=max_concurrent, queue=queue)
    pool = caches.pool
    return (
        scheduler,
        make_served_model(model, engine.card, engine.text, tuple(engine.adapters)),
        f"{max_concurrent} requests at once, {queue} waiting, up to {scheduler.limit} tokens each; "
        f"keys and values: at most {show_size(pool.nbytes)} for {pool.blocks * pool.block} tokens; "
        f"linear layers: {describe_path(linears_of(engine.decoder))}; passes {describe_passes(engine.decoder)}",
    )


def transformers_scheduler(model: Path, card: dict[str, Any], queue: int) -> tuple[Scheduler, ServedModel, str]:
    """Return a scheduler on transformers, the served model, and a description; raises like `serve`."""
    from fedtune.inference.generate_transformers import load_model  # lazy: it imports transformers
    from fedtune.inference.sequential import SequentialScheduler

    scheduler = SequentialScheduler(load_model(model, card), max_waiting=queue)
    description = f"one request at a time, {queue} waiting, up to {scheduler.limit} tokens each"
    return scheduler, make_served_model(model, card, scheduler.text), description


def make_served_model(model: Path, card: Mapping[str, Any], text: Text, adapters: tuple[str, ...] = ()) -> ServedModel:
    """Describe the served model from a folder's card; its name is the folder's.

    Raises:
        ModelError: The chat template fails. It is reported here to the operator, not to each client.
    """
    try:
        text.check_template()
    except ModelError as bad:
        raise ModelError(f"{model}: {bad}: correct or remove its chat template") from None
    return ServedModel(
        name=model.resolve().name, text=text, adapters=adapters, prompt=card.get("prompt"), answer=card.get("max_new_tokens")
    )


def make_caches(engine: Engine, budget: int | None, max_concurrent: int) -> PagedCaches:
    """Create a cache pool within the budget in bytes, but no larger than all concurrent requests can fill.

    Raises:
        ConfigError: The budget is too small.
    """
    shape, dtype, budget = engine.shape, engine.entries, BUDGET if budget is None else budget
    one = PagedPool.bytes_for(shape, 1, dtype=dtype) - PagedPool.bytes_for(shape, 0, dtype=dtype)
    size = PagedPool.bytes_for(shape, 0) // PagedPool.bytes_for(shape, 0, block=1)
    blocks = min(budget // one - 1, max_concurrent * -(-shape.context // size))
    limit = min(shape.context, blocks * size)
    wanted = min(engine.virtual_length + LEAST, shape.context)
    if limit < wanted:
        least = (1 + -(-wanted // size)) * one
        raise ConfigError(f"--kv-budget {show_size(budget)} is too small for this model: give at least {show_least(least)}")
    return PagedCaches(PagedPool(shape, blocks, size, dtype), limit, virtual=engine.virtual_length)


def make_scheduler(engine: Engine, caches: Caches, *, max_concurrent: int, queue: int) -> Scheduler:
    """Create the engine's scheduler for `max_concurrent` running and `queue` waiting requests."""
    return Scheduler(
        engine.decoder,
        engine.text,
        caches,
        engine.shape.vocab,
        max_running=max_concurrent,
        max_waiting=queue,
        virtual=engine.virtual_length,
        begin=engine.start,
        speculates=True,
    )


def parse_adapters(pairs: Sequence[str]) -> dict[str, Path]:
    """Parse NAME=FOLDER ... to a mapping. Raises ConfigError."""
    out: dict[str, Path] = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII) or not folder:
            raise ConfigError(
                f"--adapters {pair} is invalid: write NAME=FOLDER, with a name of letters, digits, dots, dashes and underscores"
            )
        if name in out:
            raise ConfigError(f"--adapters uses the name '{name}' twice: give each adapter its own name")
        out[name] = Path(folder)
    return out
