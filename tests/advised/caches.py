"""The advice of the key-value caches, and of the sizes that they are given."""

from collections.abc import Callable, Iterator
from typing import Any

from safetensors.torch import load_file, save_file

from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.caches.budget import Choice
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.caches.prefix import PagedCaches
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.rope import Rope
from tests.advised.measures import model_of
from tests.advised.rows import Place, error_of, follows
from tests.inference.engine.caches.reference import passes, shape, tokens
from tests.inference.serve.servers import tiny_model

SHAPE = shape(layers=1, heads=4, kv_heads=2, head_dim=8)
QKV, ROPE = tokens(SHAPE, 40), Rope(SHAPE)


def fill(cache: Cache, count: int) -> Cache:
    passes(cache, ROPE, QKV, [count])
    return cache


@follows("the cache holds {} tokens and cannot be cropped to {}: start the sequence again")
def _(place: Place) -> Iterator[str]:
    yield error_of(lambda: fill(FullCache(SHAPE, 40), 5).crop(9))
    yield error_of(lambda: fill(FullCache(SHAPE, 40), 9).crop(9))


@follows("tokens exceed the cache's limit of {}: shorten the text or raise the limit")
def _(place: Place) -> Iterator[str]:
    yield error_of(lambda: fill(FullCache(SHAPE, 8), 9))
    yield error_of(lambda: fill(FullCache(SHAPE, 8), 8))
    yield error_of(lambda: fill(FullCache(SHAPE, 9), 9))


def _crop_errors(make: Callable[..., Cache]) -> Iterator[str]:
    def crop(first: int, undo: int) -> str:
        return error_of(lambda: fill(make(undo=undo), first).crop(4))

    yield crop(40, 3)
    yield crop(4, 3)  # the sequence starts again and reads only the kept tokens
    yield crop(40, 36)


@follows("older ones exist only as codes (start the sequence again, or raise undo)")
def _(place: Place) -> Iterator[str]:
    yield from _crop_errors(lambda undo: KiviCache(SHAPE, 40, 4, residual=4, group=4, undo=undo))


@follows("cannot be cropped to {}, only by {} (start the sequence again, or raise undo)")
def _(place: Place) -> Iterator[str]:
    yield from _crop_errors(lambda undo: WindowCache(SHAPE, 40, 6, 2, undo=undo))


@follows("is not a memory size: write for example 64MB, 1.5GiB or 65536")
def _(place: Place) -> Iterator[str]:
    bench = ["fedtune", "generate", model_of(place), "turn on", "--max-new-tokens", "2", "--kv-budget"]
    error = place.run(*bench, "plenty")
    yield error
    for size in error.rpartition("example ")[2].replace(" or ", ", ").split(", "):
        yield place.run(*bench, size.strip())


@follows("give at least {} for a text of {} tokens, or use a shorter text")
def _(place: Place) -> Iterator[str]:
    generate = ["fedtune", "generate", model_of(place), "--max-new-tokens", "2", "--kv-budget"]
    error = place.run(*generate, "2kB", "turn on the light " * 10)
    yield error
    yield place.run(*generate, error.rpartition("at least ")[2].split()[0], "turn on the light " * 10)
    yield place.run(*generate, "2kB", "turn")


@follows("there is no cache policy {}: choose full, window, kivi8, kivi4 or kivi2")
def _(place: Place) -> Iterator[str]:
    def policy_error(policy: str) -> str:
        return error_of(lambda: fill(Choice(shape=SHAPE, tokens=40, policy=policy).build(), 40))

    error = policy_error("best")
    yield error
    for policy in error.rpartition("choose ")[2].replace(" or ", ", ").split(", "):
        yield policy_error(policy)


@follows("a cache cannot have {} bits: choose 8, 4 or 2")
def _(place: Place) -> Iterator[str]:
    for bits in (3, 8, 4, 2):
        yield error_of(lambda bits=bits: fill(KiviCache(SHAPE, 40, bits, residual=4), 40))


@follows("does not fill a byte at {} bits: give at least {}")
def _(place: Place) -> Iterator[str]:
    error = error_of(lambda: KiviCache(SHAPE, 40, 2, group=3))
    yield error
    yield error_of(lambda: fill(KiviCache(SHAPE, 40, 2, group=int(error.rpartition(" ")[2]), residual=4), 40))


@follows("too large for float16: use the full cache, as without --kv-budget")
def _(place: Place) -> Iterator[str]:
    model = tiny_model(place.folder / "m", context=512)
    weights = load_file(model / "model.safetensors")
    save_file({name: w * (1e6 if "k_proj" in name else 1) for name, w in weights.items()}, model / "model.safetensors", {"format": "pt"})
    generate = ["fedtune", "generate", model, "turn on the light " * 60, "--max-new-tokens", "2"]
    yield place.run(*generate, "--kv-budget", "40kB")
    yield place.run(*generate)


@follows("blocks are needed and {} of the pool's {} are free: wait, or end a sequence")
def _(place: Place) -> Iterator[str]:
    pool = PagedPool(SHAPE, 4, 4)
    first = pool.take(3)
    yield error_of(lambda: pool.take(2))
    pool.release(first)  # that sequence has ended
    yield error_of(lambda: pool.take(2))


@follows("blocks and {} of the pool's {} are free: run fewer sequences")
def _(place: Place) -> Iterator[str]:
    for count in (3, 2):
        pool = PagedPool(SHAPE, 4, 4)
        yield error_of(lambda pool=pool, count=count: pool.admit([Span(pool.cache(), 8) for _ in range(count)]))


@follows("do not fit in {} blocks of {}: use at most {}")
def _(place: Place) -> Iterator[str]:
    error = error_of(lambda: PagedCaches(PagedPool(SHAPE, 4, 4), 40))
    yield error
    caches = PagedCaches(PagedPool(SHAPE, 4, 4), most := int(error.rpartition(" ")[2]))
    cache: Any = caches.open(list(range(most)))
    yield error_of(lambda: fill(cache, most))


@follows("sinks fill the model's own sliding window of {} tokens: use fewer")
def _(place: Place) -> Iterator[str]:
    own = shape(layers=1, heads=4, kv_heads=2, head_dim=8, windows=(4,))
    for sinks in (4, 3):
        yield error_of(lambda sinks=sinks: fill(WindowCache(own, 40, 8, sinks), 40))
