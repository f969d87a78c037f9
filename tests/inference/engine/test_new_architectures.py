"""Decoders that differ from Llama give the text of transformers with any drafter, with any cache, and in the server."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedtune.inference.engine.caches.base import Cache
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.caches.prefix import PagedCaches
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.generate import Generation, Speculation
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.schedule import Scheduler
from fedtune.inference.engine.speculate.adapt import Adapt
from tests.inference.engine.engines import build
from tests.inference.engine.test_generate import KINDS, drafter, prompts, tokens

NAMES = ["gemma2", "gemma3", "gemma3_composite", "phi3", "phi4_mini", "smollm3", "smollm3_window", "olmo2"]
CACHES: dict[str, Callable[..., Cache]] = {
    "full": lambda shape: FullCache(shape, 64),
    "window": lambda shape: WindowCache(shape, 64, 10, 2, undo=6),
    "kivi": lambda shape: KiviCache(shape, 64, 4, residual=8, group=4, undo=6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_equals_that_of_transformers_with_any_draft_and_cache(tmp_path: Path, name: str) -> None:
    engine, model = build(tmp_path / "m", name)
    small, _ = build(tmp_path / "small", "qwen3", seed=5)
    answers = []
    for ids in prompts(3):
        with torch.inference_mode():
            theirs = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=1, pad_token_id=1)
        answers.append(theirs[0, len(ids) :].tolist())
        assert tokens(Generation(engine, ids, max_new_tokens=20)) == answers[-1]
        for cache, make in CACHES.items():
            run = Generation(engine, ids, max_new_tokens=20, context=Context(engine, lambda make=make: make(engine.shape)))
            plain = tokens(run)
            assert cache != "full" or plain == answers[-1]
            for kind in KINDS:
                speculation = Speculation(drafter(kind, engine, small), Adapt(fixed=4))
                context = Context(engine, lambda make=make: make(engine.shape))
                assert tokens(Generation(engine, ids, max_new_tokens=20, context=context, speculation=speculation)) == plain, (cache, kind)
    # the server: all at once, each twice, so that the second finds its prefix in the pool
    scheduler = Scheduler(engine.decoder, engine.text, PagedCaches(PagedPool(engine.shape, 60, 4)), engine.shape.vocab, max_running=4)
    for _ in range(2):
        got: list[list[Output]] = [[] for _ in answers]
        for ids, out in zip(prompts(3), got, strict=True):
            scheduler.submit(GenerationRequest(ids=ids, sampling=Sampling(), max_new_tokens=20, deliver=out.append))
        while scheduler.step():
            pass
        assert [[o.token for o in out if o.token is not None] for out in got] == answers
