"""Requests in shared passes get the same answers as alone."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fedtune.contracts.seeds import derive_seed
from fedtune.errors import ConfigError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.requests import Busy, GenerationRequest, Output, Stopping
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.schedule import Scheduler
from fedtune.inference.engine.text import Text
from tests.inference.serve.servers import answer_alone, make_scheduler, text_of

V, END = 40, 0
WORDS = Text(Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w1")), bos=None, ends=frozenset({END}), template=None, names={})


class Tape:
    """A cache of tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.blocks = 0

    @property
    def length(self) -> int:
        return len(self.tokens)


class Oracle:
    """A decoder whose logits depend on all tokens of the sequence and their order: a lost or repeated one changes all later logits."""

    def __init__(self, *, endless: bool = False) -> None:
        self.rows: list[list[int]] = []  # rows of each pass
        self._never = [END] if endless else []

    def forward(self, ids: Any, spans: Sequence[Span]) -> np.ndarray:
        self.rows.append([span.n for span in spans])
        out, rest = [], [int(i) for i in ids]
        for span in spans:
            tape: Any = span.cache
            tape.tokens += rest[: span.n]
            rest = rest[span.n :]
            if span.keep:
                generator = np.random.default_rng(derive_seed("oracle", span.adapter or "", *tape.tokens))
                out.append(3 * generator.standard_normal(V, np.float32))
                out[-1][self._never] = -np.inf
        assert not rest
        return np.stack(out) if out else np.empty((0, V), np.float32)


class Blocks:
    """A pool of blocks of 4 tokens; stores finished sequences as prefixes for others."""

    def __init__(self, blocks: int = 10**6, limit: int = 64) -> None:
        self.free, self.limit = blocks, limit
        self.kept: list[tuple[str | None, list[int]]] = []
        assert 4 * blocks >= limit

    def open(self, ids: Sequence[int], adapter: str | None) -> Tape | None:
        tape = Tape()
        shared = [old for whose, old in self.kept if whose == adapter and old and old == list(ids[: len(old)]) and len(old) < len(ids)]
        tape.tokens = list(max(shared, key=len, default=[]))
        if not self.reserve(tape, len(ids) - tape.length):
            return None
        return tape

    def reserve(self, tape: Tape, n: int) -> bool:
        more = -(-(tape.length + n) // 4) - tape.blocks
        if more > self.free:
            return False
        self.free -= more
        tape.blocks += more
        return True

    def close(self, tape: Tape, ids: Sequence[int], adapter: str | None) -> None:
        assert tape.tokens == list(ids)
        self.free += tape.blocks
        self.kept.append((adapter, list(ids)))


def new_scheduler(pool: Blocks | None = None, decoder: Oracle | None = None, **options: Any) -> Scheduler:
    return Scheduler(decoder or Oracle(), WORDS, pool or Blocks(), V, **options)  # type: ignore[arg-type]


def request(ids: Sequence[int], count: int = 8, *, seed: int = 0, outputs: list[Output] | None = None, **more: Any) -> GenerationRequest:
    sink = [] if outputs is None else outputs
    return GenerationRequest(
        ids=ids, sampling=Sampling(temperature=float(seed % 3), seed=seed), max_new_tokens=count, deliver=sink.append, **more
    )


def finish(made: Scheduler) -> None:
    while made.step():
        pass


def answer(ids: Sequence[int], count: int, seed: int, adapter: str | None = None) -> tuple[str, str | None]:
    """The answer to a single request."""
    outputs: list[Output] = []
    scheduler = new_scheduler()
    scheduler.submit(request(ids, count, seed=seed, outputs=outputs, adapter=adapter))
    finish(scheduler)
    return text_of(outputs), outputs[-1].end


REQUEST = st.tuples(
    st.lists(st.integers(1, V - 1), min_size=1, max_size=20), st.integers(1, 12), st.integers(0, 9), st.sampled_from([None, "a"])
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(REQUEST, st.integers(0, 6), st.booleans()), min_size=1, max_size=7),
    blocks=st.integers(8, 14),
    running=st.integers(1, 4),
    rows=st.integers(1, 9),
)
def test_batched_answers_equal_single_ones_with_any_arrivals_and_few_blocks(
    requests: list[Any], blocks: int, running: int, rows: int
) -> None:
    pool = Blocks(blocks, limit=32)
    scheduler = new_scheduler(pool, max_running=running, rows=rows)
    answers: list[list[Output]] = []
    canceled: list[GenerationRequest] = []
    for (ids, count, seed, adapter), wait, leaves in requests:
        for _ in range(wait):
            scheduler.step()
        for left in canceled:
            scheduler.cancel(left)
        answers.append([])
        new_request = request(ids, count, seed=seed, outputs=answers[-1], adapter=adapter)
        scheduler.submit(new_request)
        canceled += [new_request] if leaves else []
    finish(scheduler)
    assert scheduler.load == (0, 0)
    assert pool.free == blocks  # no block is lost
    for ((ids, count, seed, adapter), _, leaves), outputs in zip(requests, answers, strict=True):
        text, end = answer(ids, count, seed, adapter)
        if leaves:
            assert text.startswith(text_of(outputs))
        else:
            assert (text_of(outputs), outputs[-1].end) == (text, end)
            assert [out.end for out in outputs[:-1]] == [None] * (len(outputs) - 1)


def test_without_free_blocks_the_youngest_sequence_is_computed_again() -> None:
    # 8 blocks of 4 tokens; two sequences of 4 + 24 tokens need 7 each at their ends
    pool = Blocks(8, limit=32)
    scheduler = new_scheduler(pool)
    answers: list[list[Output]] = [[], []]
    for i in (0, 1):
        scheduler.submit(request([5, 6, 7, 8 + i], 24, outputs=answers[i], seed=3 * i + 1))
    finish(scheduler)
    assert scheduler.preempted > 0
    assert [text_of(outputs) for outputs in answers] == [answer([5, 6, 7, 8 + i], 24, 3 * i + 1)[0] for i in (0, 1)]


def test_a_long_prompt_delays_no_other_request() -> None:
    decoder = Oracle(endless=True)
    scheduler = new_scheduler(decoder=decoder, max_running=4, rows=8)
    first: list[Output] = []
    scheduler.submit(request([3], 30, outputs=first, rivals=0))
    scheduler.step()
    assert len(first) == 1
    scheduler.submit(request([4] * 40, 2))
    for passed in range(1, 7):
        scheduler.step()
        assert len(first) == 1 + passed  # a token in every pass
    # by hand: 8 rows, of which the first request takes one: 40 = 5 x 7 + 5
    assert decoder.rows[1:7] == [[1, 7]] * 5 + [[1, 5]]


def test_a_cached_prefix_is_not_recomputed() -> None:
    decoder, pool = Oracle(), Blocks()
    scheduler = new_scheduler(pool, decoder)
    scheduler.submit(request([3, 4, 5], 1))
    finish(scheduler)
    again = request([3, 4, 5, 6], 4, seed=2, outputs=(outputs := []))
    scheduler.submit(again)
    finish(scheduler)
    assert again.cached == 3
    assert decoder.rows[:2] == [[3], [1]]
    assert text_of(outputs) == answer([3, 4, 5, 6], 4, 2)[0]
    other = request([3, 4, 5, 6], 1, adapter="a")  # with another adapter, keys and values differ
    scheduler.submit(other)
    finish(scheduler)
    assert other.cached == 0


@pytest.mark.parametrize("prompt", [[3, 4], [3] * 30, [END], []])
def test_an_answer_joins_its_prompt_or_stands_alone(prompt: list[int]) -> None:
    texts = []
    for joins in (False, True):
        outputs: list[Output] = []
        scheduler = new_scheduler(decoder=Oracle(endless=True))
        scheduler.submit(request([*prompt, 5], 4, outputs=outputs, joins=joins))
        finish(scheduler)
        texts.append(text_of(outputs))
    assert texts[0].startswith("w")
    assert texts[1] == " " + texts[0]  # words are joined by spaces, and the prompt's last word stands before the first


def test_a_full_queue_refuses_requests() -> None:
    scheduler = new_scheduler(max_running=1, max_waiting=1)
    running, waiting = request([1]), request([2])
    scheduler.submit(running)
    scheduler.step()
    scheduler.submit(waiting)
    assert scheduler.full
    with pytest.raises(Busy, match="2 requests are running or waiting"):
        scheduler.submit(request([3]))
    scheduler.cancel(waiting)
    assert scheduler.load == (1, 0)
    scheduler.submit(request([3]))
    scheduler.drain()
    with pytest.raises(Stopping):
        scheduler.submit(request([3]))
    finish(scheduler)
    assert scheduler.load == (0, 0)


@pytest.mark.parametrize(("ids", "count"), [([], 1), ([1] * 60, 5), ([V], 1), ([-1], 1), ([1], 0)])
def test_a_request_that_does_not_fit_is_refused(ids: list[int], count: int) -> None:
    with pytest.raises(ConfigError):
        new_scheduler().submit(request(ids, count))


def test_running_and_waiting_requests_reach_their_deadline() -> None:
    scheduler = new_scheduler(max_running=1)
    outputs: list[list[Output]] = [[], [], []]
    scheduler.submit(request([1], 40, seed=1, outputs=outputs[0], deadline=time.monotonic() + 0.05))
    scheduler.submit(request([2], 40, outputs=outputs[1], deadline=0.0))
    scheduler.submit(request([3], 3, seed=4, outputs=outputs[2]))
    scheduler.step()
    assert outputs[1][-1].end == "timeout"
    time.sleep(0.06)
    finish(scheduler)
    assert outputs[0][-1].end in ("timeout", "stop")
    assert text_of(outputs[2]) == answer([3], 3, 4)[0]


def test_a_failing_pass_fails_its_requests_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    class Shaky(Oracle):
        def forward(self, ids: Any, spans: Sequence[Span]) -> np.ndarray:
            if 13 in ids:
                raise ArithmeticError("bad luck")
            return super().forward(ids, spans)

    pool = Blocks(100)
    scheduler = new_scheduler(pool, Shaky())
    worker = threading.Thread(target=scheduler.run)
    ended = [threading.Event(), threading.Event()]
    outputs: list[list[Output]] = [[], []]

    def sink(i: int) -> Any:
        return lambda out: (outputs[i].append(out), out.end and ended[i].set())

    scheduler.submit(GenerationRequest(ids=[13], sampling=Sampling(), max_new_tokens=3, deliver=sink(0)))
    worker.start()
    assert ended[0].wait(10)
    scheduler.submit(GenerationRequest(ids=[12], sampling=Sampling(temperature=1.0, seed=1), max_new_tokens=3, deliver=sink(1)))
    assert ended[1].wait(10)
    scheduler.close()
    worker.join(10)
    assert outputs[0][-1].end == "failed"
    assert "bad luck" in caplog.text
    assert outputs[1][-1].end in ("length", "stop")
    assert pool.free == 100


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("bad", "places"), [(np.nan, slice(None)), (np.nan, slice(7, 8)), (np.inf, slice(7, 8)), (-np.inf, slice(None))])
def test_logits_that_are_not_finite_fail_their_own_request(temperature: float, bad: float, places: slice) -> None:
    class Broken(Oracle):
        def forward(self, ids: Any, spans: Sequence[Span]) -> np.ndarray:
            rows = super().forward(ids, spans)
            for row, span in zip(rows, spans, strict=True):
                if span.adapter:
                    row[places] = bad
            return rows

    scheduler = new_scheduler(decoder=Broken())
    answers: list[list[Output]] = [[], []]
    for outputs, adapter in zip(answers, ("a", None), strict=True):
        way = Sampling(temperature=temperature, seed=4)
        scheduler.submit(GenerationRequest(ids=[3], sampling=way, max_new_tokens=6, deliver=outputs.append, adapter=adapter))
    finish(scheduler)
    assert [outputs[-1].end for outputs in answers][0] == "failed"
    other: list[Output] = []
    single = new_scheduler()
    single.submit(GenerationRequest(ids=[3], sampling=Sampling(temperature=temperature, seed=4), max_new_tokens=6, deliver=other.append))
    finish(single)
    assert text_of(answers[1]) == text_of(other)


def test_closing_ends_running_requests() -> None:
    scheduler = new_scheduler(max_running=1)
    answers: list[list[Output]] = [[], []]
    for i in (0, 1):
        scheduler.submit(request([1 + i], 5, outputs=answers[i]))
    scheduler.close()
    scheduler.run()
    assert [outputs[-1].end for outputs in answers] == ["stopping", "stopping"]


def test_a_request_whose_delivery_fails_is_dropped() -> None:
    def broken(out: Output) -> None:
        raise RuntimeError("the loop is closed")

    scheduler = new_scheduler()
    scheduler.submit(GenerationRequest(ids=[1], sampling=Sampling(temperature=1.0), max_new_tokens=20, deliver=broken))
    scheduler.step()
    scheduler.step()
    assert scheduler.load == (0, 0)


def test_the_real_decoder_gives_the_same_answers_in_a_batch(engine: Engine) -> None:
    prompts = ["turn on the light", "good morning", "the kettle and the radio in the kitchen, please, and then", "a", "stop", "warm"]
    ways = [
        Sampling(),
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.7, top_p=0.9, seed=6),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.2, top_k=20, seed=2, stop=("e",)),
        Sampling(temperature=1.0, min_p=0.5, seed=9),
    ]
    ids = [engine.text.encode(prompt) for prompt in prompts]
    scheduler = make_scheduler(engine, max_running=4, rows=8)
    outputs: list[list[Output]] = [[] for _ in prompts]
    for i, way in enumerate(ways):
        scheduler.submit(GenerationRequest(ids=ids[i], sampling=way, max_new_tokens=20, deliver=outputs[i].append, rivals=2))
        scheduler.step()
    finish(scheduler)
    for i, way in enumerate(ways):
        single = answer_alone(engine, ids[i], way, 20, rivals=2)
        assert [out.token for out in outputs[i]] == [out.token for out in single]
        assert text_of(outputs[i]) == text_of(single)
        for batched, one in zip(outputs[i], single, strict=True):
            assert batched.logprob == pytest.approx(one.logprob, abs=1e-4)
            assert one.rivals[0][1] >= one.rivals[1][1]


def test_withheld_text_is_sent_at_the_end(engine: Engine) -> None:
    ids = engine.text.encode("turn on")
    plain = text_of(answer_alone(engine, ids, Sampling(), 6))
    # the stop string begins like the answer's end but continues differently, so text is held back until the end
    outputs = answer_alone(engine, ids, Sampling(stop=(plain[-2:] + "~~~",)), 6)
    assert text_of(outputs) == plain
    assert outputs[-1].end == "length"
