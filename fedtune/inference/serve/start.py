"""`fedtune serve`: from a folder to a server that runs."""

import logging
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.caches.budget import show_least, show_size
from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.caches.prefix import PagedCaches
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.schedule import Caches, Scheduler
from fedtune.inference.engine.text import Text
from fedtune.inference.generate import falls_back, read_card
from fedtune.inference.serve.adapters import add_adapter
from fedtune.inference.serve.app import create_app
from fedtune.inference.serve.limits import KEY_VARIABLE, ApiKeys, Limits
from fedtune.inference.serve.offer import Offer
from fedtune.inference.serve.server import Server, is_loopback, listen, url

BUDGET = 1 << 29  # bytes of keys and values where none are given
CONCURRENT = 16  # requests under way where no number is given
LEAST = 32  # tokens of a context that is of any use


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
    queue: int = 64,
    adapters: Mapping[str, Path] | None = None,
) -> None:
    """Load a model and answer until SIGTERM or Ctrl-C. The address goes to stdout, everything else to stderr.

    Raises:
        ModelError: The model cannot be loaded, or generates no text.
        ConfigError: A number is impossible, the keys and values do not fit in the budget, or transformers runs the model and an option is
            the engine's alone.
        NetworkError: The address cannot be had.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that hangs up in the middle
    listener = listen(host, port)  # first: a port that is taken should not cost the loading of a model
    with listener:
        card = read_card(model)
        if falls_back(model, card, kind=kind, kv_budget=kv_budget, max_concurrent=max_concurrent, adapters=adapters or None):
            scheduler, offer, said = by_transformers(model, card, queue)
            under_way = 1
        else:
            under_way = CONCURRENT if max_concurrent is None else max_concurrent
            scheduler, offer, said = by_engine(model, kind, kv_budget, under_way, queue, adapters or {})
        app = create_app(scheduler, offer, limits, keys, local=is_loopback(listener) and not keys)
        warn_of_strangers(listener, keyed=bool(keys))
        print(f"fedtune: {', '.join(offer.models)}: {said}", file=sys.stderr, flush=True)
        print(url(listener), flush=True)
        Server(app, scheduler, grace=limits.grace, connections=4 * (under_way + queue) + 64).serve_on(listener)


def by_engine(
    model: Path, kind: str | None, kv_budget: int | None, max_concurrent: int, queue: int, adapters: Mapping[str, Path]
) -> tuple[Scheduler, Offer, str]:
    """The engine over a model, what it offers, and a sentence about it; raises as `serve`."""
    engine = load_engine(model, kind)
    for name, folder in adapters.items():
        add_adapter(engine, name, folder)
    caches = make_caches(engine, kv_budget, max_concurrent)
    scheduler = make_scheduler(engine, caches, max_concurrent=max_concurrent, queue=queue)
    pool = caches.pool
    return (
        scheduler,
        make_offer(model, engine.card, engine.text, tuple(engine.adapters)),
        f"{max_concurrent} requests at once, {queue} waiting, up to {scheduler.limit} tokens each; "
        f"keys and values: at most {show_size(pool.nbytes)} for {pool.blocks * pool.block} tokens",
    )


def by_transformers(model: Path, card: dict[str, Any], queue: int) -> tuple[Scheduler, Offer, str]:
    """transformers over a model, what it offers, and a sentence about it; raises as `serve`."""
    from fedtune.inference.generate_transformers import load_model  # late: it loads transformers
    from fedtune.inference.one_by_one import OneByOne

    scheduler = OneByOne(load_model(model, card), max_waiting=queue)
    said = f"one request after the other, {queue} waiting, up to {scheduler.limit} tokens each"
    return scheduler, make_offer(model, card, scheduler.text), said


def make_offer(model: Path, card: Mapping[str, Any], text: Text, adapters: tuple[str, ...] = ()) -> Offer:
    """What a folder's card says of its prompts and answers, under the folder's name.

    Raises:
        ModelError: The chat template cannot be run: the operator hears of it, not each client.
    """
    try:
        text.check_template()
    except ModelError as bad:
        raise ModelError(f"{model}: {bad}: mend or remove its chat template") from None
    return Offer(name=model.resolve().name, text=text, adapters=adapters, prompt=card.get("prompt"), answer=card.get("max_new_tokens"))


def make_caches(engine: Engine, budget: int | None, max_concurrent: int) -> PagedCaches:
    """A pool within so many bytes; never more than all requests at once can fill.

    Raises:
        ConfigError: Hardly anything fits.
    """
    shape, budget = engine.shape, BUDGET if budget is None else budget
    one = PagedPool.bytes_for(shape, 1) - PagedPool.bytes_for(shape, 0)
    size = PagedPool.bytes_for(shape, 0) // PagedPool.bytes_for(shape, 0, block=1)
    blocks = min(budget // one - 1, max_concurrent * -(-shape.context // size))
    limit = min(shape.context, blocks * size)
    wanted = min(engine.virtual + LEAST, shape.context)
    if limit < wanted:
        least = (1 + -(-wanted // size)) * one
        raise ConfigError(f"--kv-budget {show_size(budget)} is too small for this model: give at least {show_least(least)}")
    return PagedCaches(PagedPool(shape, blocks, size), limit, virtual=engine.virtual)


def make_scheduler(engine: Engine, caches: Caches, *, max_concurrent: int, queue: int) -> Scheduler:
    """The engine's scheduler: so many requests in a pass, and so many more that may wait."""
    return Scheduler(
        engine.decoder,
        engine.text,
        caches,
        engine.shape.vocab,
        max_running=max_concurrent,
        max_waiting=queue,
        virtual=engine.virtual,
        begin=engine.start,
    )


def named(pairs: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER ... as a mapping. Raises ConfigError."""
    out: dict[str, Path] = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII) or not folder:
            raise ConfigError(f"--adapters {pair} is wrong: write NAME=FOLDER, a name of letters, digits, dots, dashes and underscores")
        if name in out:
            raise ConfigError(f"--adapters names '{name}' twice: give each adapter its own name")
        out[name] = Path(folder)
    return out


def warn_of_strangers(listener: socket.socket, *, keyed: bool) -> None:
    """Say on stderr who can reach a server that is not bound to loopback."""
    if is_loopback(listener):
        return
    who = "whoever has an API key" if keyed else f"ANYBODY, since no API key is set (--api-key-file or {KEY_VARIABLE})"
    print(
        f"fedtune: WARNING: {url(listener)} can be reached from other machines and answers {who}; "
        "prompts and answers cross the network in the clear, so put a TLS proxy before it",
        file=sys.stderr,
        flush=True,
    )
