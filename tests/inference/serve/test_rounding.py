"""Greedy answers in batches compared with single requests, for every kind of weights. Run with -s for the counts."""

import os
import random
from pathlib import Path

import pytest

from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.caches.prefix import PagedCaches
from fedtune.inference.engine.generate import Generation
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from tests.inference.serve.rounding import bound, first_difference, lead
from tests.inference.serve.servers import make_scheduler, tiny_model
from tests.inference.serve.soak import BEGINNINGS

MANY, LONG = 60, 40  # requests, tokens of an answer
BLOCKS = 30  # of 16 tokens: so few that sequences are preempted and computed again in other passes


def folder_of(name: str, own: Path) -> Path:
    if name == "tiny":
        return tiny_model(own / "tiny")
    path = Path(os.environ.get("FEDTUNE_DATA", "/nowhere")) / "models" / name / "hf"
    if not (path / "config.json").is_file():
        pytest.skip(f"FEDTUNE_DATA names no folder with models/{name}/hf")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["tiny", "stories260k", "babyllama_tok105"])
def test_a_batch_differs_only_where_rounding_could_have_decided(name: str, kind: str, tmp_path: Path) -> None:
    engine, rng = load_engine(folder_of(name, tmp_path), kind), random.Random(0)
    texts: dict[str, None] = {}  # all texts differ, so that differences are independent
    while len(texts) < MANY:
        texts[" ".join(rng.sample(BEGINNINGS, rng.choice([1, 2, 3, 4])))] = None
    prompts = [engine.text.encode(text) for text in texts]
    longest = min(engine.shape.context, BLOCKS * 16)
    assert all(len(ids) + LONG <= longest for ids in prompts)
    scheduler = make_scheduler(engine, PagedCaches(PagedPool(engine.shape, BLOCKS, 16), longest), max_running=16, max_waiting=MANY)
    answers: list[list[Output]] = [[] for _ in prompts]
    for ids, outputs in zip(prompts, answers, strict=True):
        scheduler.submit(GenerationRequest(ids=ids, sampling=Sampling(), max_new_tokens=LONG, deliver=outputs.append, rivals=0))
        if rng.random() < 0.4:
            scheduler.step()
    while scheduler.step():
        pass
    leads: list[float] = []
    for ids, outputs in zip(prompts, answers, strict=True):
        one = [piece.token for piece in Generation(engine, ids, Sampling(), LONG)]
        batched = [out.token for out in outputs if out.token is not None]
        if (at := first_difference(one, batched)) is None:
            assert one == batched  # not just a prefix
        else:
            leads.append(lead(engine, ids, one, at, batched[at]))
    largest = f", the widest lead {max(leads):.4f}" if leads else ""
    print(
        f"\n{name} {kind}: {len(leads)} of {MANY} differ{largest} (bound {bound(engine):.4f}); {scheduler.preempted} gave up their blocks"
    )
    assert all(gap <= bound(engine) for gap in leads)
    assert kind != "fp32" or not leads
    assert scheduler.preempted > 0
