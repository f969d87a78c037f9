"""Draft tokens within a batch: answers are those of plain decoding, and only drafts that pay are made."""

import random
from collections.abc import Sequence
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.contracts.seeds import derive_seed
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.native.library import kernels
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.schedule import Scheduler
from fedtune.inference.engine.speculate.adapt import WORTH, Acceptance
from fedtune.inference.engine.speculate.batch import BatchAdapt, SequenceDrafts
from fedtune.inference.serve.start import make_caches
from fedtune.models.checkpoint import NANO
from tests.inference.serve.servers import make_scheduler
from tests.inference.serve.test_schedule import END, WORDS, Blocks, Tape, V


class CroppedTape(Tape):
    undo = None

    def crop(self, length: int) -> None:
        assert 0 <= length <= len(self.tokens)
        del self.tokens[length:]


class CheckedBlocks(Blocks):
    """Checks that caches hold the tokens of their sequences."""

    def open(self, ids: Sequence[int], adapter: str | None) -> Any:
        tape = super().open(ids, adapter)
        if tape is not None:
            tape.__class__ = CroppedTape
        return tape

    def close(self, tape: Any, ids: Sequence[int], adapter: str | None) -> None:
        assert tape.tokens == list(ids)
        super().close(tape, ids, adapter)


class Copier:
    """A decoder that often repeats the token of three positions ago; its logits depend on all tokens before."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward(self, ids: Any, spans: Sequence[Span]) -> np.ndarray:
        self.rows.append(len(ids))
        out, rest = [np.empty((0, V), np.float32)], [int(i) for i in ids]
        for span in spans:
            tape: Any = span.cache
            for at in range(span.n):
                tape.tokens.append(rest.pop(0))
                if at >= span.n - (span.n if span.keep is None else span.keep):
                    logits = np.random.default_rng(derive_seed("copier", *tape.tokens)).standard_normal((1, V), np.float32)
                    logits[0, END] -= 1
                    logits[0, tape.tokens[-3:][0]] += 4
                    out.append(logits)
            assert len(tape.tokens) <= 4 * tape.blocks  # reserved
        return np.concatenate(out)


def some_requests(rng: random.Random) -> list[dict[str, Any]]:
    ways = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.1),
        Sampling(stop=("w5 w", "w7")),
    ]
    out = []
    for i in range(rng.randrange(1, 9)):
        sampling = rng.choice(ways)
        chosen = Sampling(**{**vars(sampling), "seed": i})
        ids = [rng.randrange(1, V) for _ in range(rng.randrange(1, 12))]
        out.append({"ids": ids, "sampling": chosen, "max_new_tokens": rng.randrange(1, 40), "rivals": rng.choice((None, 2))})
    return out


def answers(requests: list[dict[str, Any]], *, blocks: int, speculates: bool) -> tuple[list[list[Output]], Scheduler, Copier]:
    outputs: list[list[Output]] = [[] for _ in requests]
    decoder = Copier()
    pool: Any = CheckedBlocks(blocks)
    scheduler = Scheduler(decoder, WORDS, pool, V, max_running=4, rows=8, speculates=speculates)
    for request, own in zip(requests, outputs, strict=True):
        scheduler.submit(GenerationRequest(**request, deliver=own.append))
    while scheduler.step():
        pass
    return outputs, scheduler, decoder


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_answers_are_those_without_drafts(seed: int) -> None:
    rng = random.Random(seed)
    requests, blocks = some_requests(rng), rng.choice((16, 30, 10**6))  # with the fewest blocks, sequences are preempted
    plain, _, _ = answers(requests, blocks=blocks, speculates=False)
    with patch.object(BatchAdapt, "counts", lambda self, acceptances: [rng.randrange(7) if a else 0 for a in acceptances]):
        found, _, _ = answers(requests, blocks=blocks, speculates=True)
    assert found == plain and all(output[-1].end for output in found)


def test_accepted_drafts_save_passes_and_are_counted() -> None:
    requests = [{"ids": [1, 2, 3], "sampling": Sampling(seed=i), "max_new_tokens": 60} for i in range(3)]
    plain, before, _ = answers(requests, blocks=10**6, speculates=False)
    noted = list[tuple[int, int]]()
    with (
        patch.object(BatchAdapt, "counts", lambda self, acceptances: [3 if a else 0 for a in acceptances]),
        patch.object(SequenceDrafts, "saw", lambda self, *saw: noted.append(saw)),
    ):
        found, after, decoder = answers(requests, blocks=10**6, speculates=True)
    assert found == plain and before.drafted == 0 < after.accepted < after.drafted
    assert (sum(g for g, _ in noted), sum(k for _, k in noted)) == (after.drafted, after.accepted)
    assert after.passes == len(decoder.rows) < 0.7 * before.passes
    # a pass that also reads prompts verifies no draft
    assert sum(decoder.rows) == sum(len(o) for o in found) - 3 + 9 + after.drafted - after.accepted


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.95]), min_size=1, max_size=3), st.integers(0, 10**6))
def test_the_counts_are_the_best_ones(acceptances: list[float], seed: int) -> None:
    rng, adapt, n = random.Random(seed), BatchAdapt(), len(acceptances)
    costs, more = [0.0, 1.0], rng.choice((0.05, 0.3, 1.0))
    for _ in range(2, 41):
        costs.append(costs[-1] + more * rng.random())
    for rows in range(1, 41):
        for _ in range(2):
            adapt.ran(rows, costs[rows])

    def speed(counts: Sequence[int]) -> float:
        tokens = sum(sum(a**k for k in range(count + 1)) for a, count in zip(acceptances, counts, strict=True))
        return tokens / costs[n + sum(counts)]

    best = max(speed(counts) for counts in product(*(range(9 if a else 1) for a in acceptances)))
    found = adapt.counts(acceptances)
    if best > WORTH * speed([0] * n) * (1 + 1e-9):
        assert speed(found) == pytest.approx(best)
    else:
        assert found == [0] * n or speed(found) == pytest.approx(best)


def test_nothing_is_drafted_before_a_pass_is_measured_nor_in_a_full_batch() -> None:
    adapt = BatchAdapt()
    assert adapt.counts([0.9]) == [0]
    adapt.ran(1, 1.0)
    assert adapt.counts([0.9]) == [1]  # twice the rows of the largest pass
    assert adapt.counts([0.9] * 70) == [0] * 70
    adapt.ran(100, 1.0)  # passes of this many rows are not measured
    assert adapt.counts([0.9]) == [1]


def test_a_sequence_whose_drafts_fail_is_tried_again_later() -> None:
    of_all = dict[int, Acceptance]()
    drafts, ids = SequenceDrafts(of_all), [1, 2, 3, 1, 2]
    assert drafts.acceptance([1, 2, 3]) == 0.0  # no ending has been seen before
    first = drafts.acceptance(ids)
    assert first > 0.5 and drafts.draft(ids, 4) == [3, 1, 2, 3]
    for _ in range(5):
        drafts.saw(4, 0)
    low = drafts.acceptance(ids)
    assert low < 0.15
    other = SequenceDrafts(of_all)  # a new sequence starts with the statistics of the others
    assert other.acceptance(ids) < 0.15 and SequenceDrafts({}).acceptance(ids) == first
    for _ in range(5):
        other.saw(4, 4)
    assert other.acceptance(ids) > 0.9 and low < drafts.acceptance(ids) < 0.9
    low = drafts.acceptance(ids)
    for _ in range(20_000):
        drafts.saw(0, 0)
    assert drafts.acceptance(ids) == pytest.approx(first, abs=0.2) and drafts.acceptance(ids) > low


@pytest.mark.skipif(kernels() is None, reason="torch's rows depend on their number")
@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_the_engine_gives_the_same_bits(kind: str) -> None:
    engine = load_engine(NANO, kind, keep=False)
    found = []
    for speculates in (False, True):
        outputs: list[list[Output]] = [[] for _ in range(6)]
        scheduler = make_scheduler(engine, make_caches(engine, None, 6), max_running=6, speculates=speculates)
        for i, own in enumerate(outputs):
            ids, how = engine.text.encode("turn on the light in the kitchen, turn on the light"), Sampling(temperature=i % 2 * 0.5, seed=i)
            scheduler.submit(GenerationRequest(ids=ids, sampling=how, max_new_tokens=60, deliver=own.append, rivals=1))
        with patch.object(BatchAdapt, "counts", lambda self, acceptances: [3 if a else 0 for a in acceptances]):
            while scheduler.step():
                pass
        found.append(outputs)
        assert (scheduler.accepted > 0) == speculates
    assert found[0] == found[1]
