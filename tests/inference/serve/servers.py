"""A server for a tiny random model in a thread of this process, with its schedulers and models."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.schedule import Caches, Decodes, Scheduler
from fedtune.inference.engine.text import Text
from fedtune.inference.serve.app import create_app
from fedtune.inference.serve.limits import ApiKeys, Limits
from fedtune.inference.serve.listener import listen, url
from fedtune.inference.serve.served_model import ServedModel
from fedtune.inference.serve.server import Server
from fedtune.inference.serve.start import make_caches
from tests.tiny import tiny_llama

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def tiny_model(folder: Path, *, context: int = 512, chat: bool = True) -> Path:
    """`tiny_llama` with a longer context, and a chat template."""
    tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def make_scheduler(engine: Engine, caches: Caches | None = None, pace: float = 0.0, **options: Any) -> Scheduler:
    """Other arguments: pace, additional seconds per pass."""
    caches = caches or Separate(engine.cache, engine.shape.context)
    decoder = Paced(engine.decoder, pace) if pace else engine.decoder
    return Scheduler(decoder, engine.text, caches, engine.shape.vocab, virtual=engine.virtual_length, begin=engine.start, **options)


class Separate:
    """A separate cache from `make` for each sequence, as for a single request."""

    def __init__(self, make: Callable[[], Cache], limit: int) -> None:
        self._make, self.limit = make, limit

    def open(self, ids: Sequence[int], adapter: str | None) -> Cache | None:
        return self._make()

    def reserve(self, cache: Cache, n: int) -> bool:
        return True

    def close(self, cache: Cache, ids: Sequence[int], adapter: str | None) -> None:
        """Nothing to do: the cache is garbage collected with the sequence."""


class Paced:
    """A slow decoder."""

    def __init__(self, decoder: Decodes, seconds: float) -> None:
        self._decoder, self._seconds = decoder, seconds

    def forward(self, ids: Any, spans: Sequence[Span]) -> Any:
        time.sleep(self._seconds)
        return self._decoder.forward(ids, spans)


def answer_alone(engine: Engine, ids: list[int], sampling: Sampling, count: int, **request: Any) -> list[Output]:
    """The answer of an otherwise idle scheduler."""
    outputs: list[Output] = []
    scheduler = make_scheduler(engine)
    scheduler.submit(GenerationRequest(ids=ids, sampling=sampling, max_new_tokens=count, deliver=outputs.append, **request))
    while scheduler.step():
        pass
    return outputs


def continuation(text: Text, prompt: Sequence[int], answer: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of the answer after the prompt, up to the first stop string."""
    added = text.decode([*prompt, *answer])[len(text.decode(prompt)) :]
    return added[: min((added.index(stop) for stop in stops if stop in added), default=len(added))]


def text_of(outputs: list[Output]) -> str:
    return "".join(out.text for out in outputs)


@dataclass
class Served:
    url: str
    engine: Engine
    scheduler: Scheduler
    server: Server

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def raw(self) -> socket.socket:
        """A TCP connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def serve_model(
    model: Path | Engine, *, limits: Limits | None = None, keys: tuple[str, ...] = (), prompt: str | None = None, **options: Any
) -> Iterator[Served]:
    """Serve a model as "tiny" until the block ends."""
    engine = load_engine(model) if isinstance(model, Path) else model
    scheduler = make_scheduler(engine, make_caches(engine, None, options.get("max_running", 16)), **options)
    served = ServedModel(name="tiny", text=engine.text, adapters=tuple(engine.adapters), prompt=prompt)
    with run_server(scheduler, served, limits, keys) as (where, server):
        yield Served(where, engine, scheduler, server)


@contextlib.contextmanager
def run_server(
    scheduler: Scheduler, served: ServedModel, limits: Limits | None = None, keys: tuple[str, ...] = ()
) -> Iterator[tuple[str, Server]]:
    """A server for a scheduler, and its address."""
    limits = limits or Limits(grace=5)
    app = create_app(scheduler, served, limits, ApiKeys(keys), local=not keys)
    server = Server(app, scheduler, grace=limits.grace, connections=512)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_on, args=(listener,), daemon=True)
    thread.start()
    try:
        yield url(listener), server
    finally:
        server.stop()
        server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"
