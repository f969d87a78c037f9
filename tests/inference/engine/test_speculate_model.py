"""Speculation in a complete generation loop: the exact distribution of short texts, and real weights."""

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import fedtune.inference.engine.sample as sample_module
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.generate import Generation, Speculation
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.sample import Sampling, probabilities
from fedtune.inference.engine.speculate import Draft, Drafter
from fedtune.inference.engine.speculate.adapt import Adapt
from fedtune.inference.engine.speculate.draft import DraftModel
from fedtune.inference.engine.speculate.early_exit import EarlyExit
from fedtune.inference.engine.speculate.lookup import Lookup
from tests.inference.engine.engines import build
from tests.inference.engine.test_generate import Answers, compare, tokens
from tests.inference.engine.test_speculate import critical

DATA = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[3] / "../shared/data")).resolve()
V, LENGTH, PROMPT = 4, 4, [2, 3, 2]  # the lookup drafts 3 first


class CachedDecoder:
    """Caches a small decoder's logits: each text over four tokens is computed once."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._known = engine, dict[tuple[tuple[int, ...], int | None], np.ndarray]()
        self.layers, self.head = engine.decoder.layers, engine.decoder.head

    def forward(self, ids: Any, spans: Sequence[Span], *, layers: int | None = None) -> np.ndarray:
        cache, n, keep = cast(Any, spans[0].cache), spans[0].n, spans[0].keep
        cache.ids = cache.ids[: cache.length] + [int(i) for i in ids]
        cache.advance(n)
        begun = len(cache.ids) - (n if keep is None else keep)
        return np.stack([self.logits(tuple(cache.ids[: i + 1]), layers) for i in range(begun, len(cache.ids))])

    def logits(self, text: tuple[int, ...], layers: int | None = None) -> np.ndarray:
        if (text, layers) not in self._known:
            span = Span(self._engine.cache(), len(text))
            out = self._engine.decoder.forward(text, [span], layers=layers)[0, :V]
            self._known[text, layers] = 3 * out
        return self._known[text, layers]


class Ids(Cache):
    """A cache of tokens instead of keys and values."""

    ids: list[int] = []

    def prepare(self, n: int) -> None:
        raise NotImplementedError

    def native_span(self, n: int) -> Any:
        raise NotImplementedError

    def write(self, *_: Any, **more: Any) -> None:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return 0


def cached_engine(engine: Engine) -> Any:
    shape = SimpleNamespace(vocab=V, layers=engine.shape.layers, context=64)
    text = SimpleNamespace(ends=frozenset(), special=frozenset(), bytes=frozenset(), decode=lambda ids: "", same_as=lambda other: True)
    return SimpleNamespace(
        shape=shape, text=text, decoder=CachedDecoder(engine), cache=lambda: Ids(engine.shape, 64), start=lambda cache: None, folder="stub"
    )


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return cached_engine(build(folder / "a")[0]), cached_engine(build(folder / "b", "qwen3", seed=4)[0])


@pytest.fixture
def known_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes each distribution only once. Within a test the sampling settings are constant, so the key leaves them out."""
    compute, known = probabilities, dict[tuple[bytes, bytes], np.ndarray]()

    def remember(logits: np.ndarray, sampling: Sampling, seen: np.ndarray) -> np.ndarray:
        key = logits.tobytes(), seen.tobytes()
        if key not in known:
            known[key] = compute(logits, sampling, seen)
            known[key].flags.writeable = False
        return known[key]

    monkeypatch.setattr(sample_module, "probabilities", remember)


def drafters(stubs: tuple[Any, Any]) -> dict[str, Callable[[], Drafter]]:
    return {"lookup": Lookup, "draft": lambda: DraftModel(stubs[1], stubs[0]), "early-exit": lambda: EarlyExit(1)}


def exact_probabilities(target: Any, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every answer, one token after the other."""
    out = {}
    for answer in itertools.product(range(V), repeat=LENGTH):
        p = 1.0
        for i, token in enumerate(answer):
            before = (*PROMPT, *answer[:i])
            seen = np.array([[t in before for t in range(V)]])
            p *= float(probabilities(target.decoder.logits(before)[None], sampling, seen)[0, token])
        out[answer] = p
    return out


def statistic(target: Any, make: Callable[[], Drafter], options: dict[str, Any], draws: int) -> tuple[float, int, float]:
    """Chi-square of `draws` answers, its degrees of freedom, and the share of accepted draft tokens."""
    wanted = exact_probabilities(target, Sampling(**options))
    counts = dict.fromkeys(wanted, 0)
    speculation, context = Speculation(make(), Adapt(fixed=2)), Context(target)
    drafted = accepted = 0
    for seed in range(draws):
        run = Generation(target, PROMPT, Sampling(**options, seed=seed), LENGTH, context=context, speculation=speculation)
        counts[tuple(tokens(run))] += 1
        drafted, accepted = drafted + run.report.drafted, accepted + run.report.accepted
    assert not any(n for answer, n in counts.items() if wanted[answer] == 0)
    common = [a for a, p in wanted.items() if p * draws >= 5]
    rare = [a for a, p in wanted.items() if 0 < p * draws < 5]
    bins = [(counts[a], wanted[a] * draws) for a in common]
    if rare:
        bins.append((sum(counts[a] for a in rare), sum(wanted[a] for a in rare) * draws))
    return sum((n - e) ** 2 / e for n, e in bins), len(bins) - 1, accepted / drafted


SHAPED = {"temperature": 1.3, "top_k": 3, "top_p": 0.95, "repetition_penalty": 1.8}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lookup", "draft", "early-exit"])
def test_answers_follow_the_models_distribution(stubs: tuple[Any, Any], kind: str) -> None:
    value, freedom, _ = statistic(stubs[0], drafters(stubs)[kind], SHAPED, 400)
    assert value < critical(freedom)


@pytest.mark.slow
@pytest.mark.usefixtures("known_distributions")
@pytest.mark.parametrize("kind", ["lookup", "draft", "early-exit"])
def test_a_hundred_thousand_answers_follow_the_models_distribution(stubs: tuple[Any, Any], kind: str) -> None:
    value, freedom, kept = statistic(stubs[0], drafters(stubs)[kind], SHAPED, 100_000)
    print(f"{kind}: chi-square {value:.1f} of {freedom} degrees of freedom (.9999: {critical(freedom):.1f}), {kept:.2f} accepted")
    assert value < critical(freedom) and 0.05 < kept < 0.98


@pytest.mark.slow
def test_a_wrong_acceptance_in_the_loop_is_caught(stubs: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = Generation._take

    def wrong(self: Generation, logits: np.ndarray, verifies: bool = False) -> tuple[int, np.ndarray]:
        if verifies:  # with the random number of another position
            self._sampler.count -= 1
        return right(self, logits, verifies)

    monkeypatch.setattr(Generation, "_take", wrong)
    value, freedom, _ = statistic(stubs[0], drafters(stubs)["draft"], SHAPED, 1500)
    assert value > critical(freedom)


def test_a_draft_model_reads_a_long_text_before_it_drafts(tmp_path: Path) -> None:
    target, draft = build(tmp_path / "a")[0], build(tmp_path / "b", seed=4)[0]
    ids = [2 + i % 7 for i in range(40)]
    drafter = DraftModel(draft, target)
    drafter.begin(Sampling(), Context(target))
    assert drafter.draft(ids, 3) == Draft([], only_read=True)  # the time to read the text is not a cost of drafting
    late = drafter.draft([*ids, 5], 3).tokens
    fresh = DraftModel(draft, target)
    fresh.begin(Sampling(), Context(target))
    own = [p.token for p in Generation(draft, [*ids, 5], Sampling(), 3)]
    assert late == own and len(late) == 3
    assert fresh.draft(ids[:20], 2).tokens == [
        p.token for p in Generation(draft, ids[:20], Sampling(), 2)
    ]  # a short text needs no separate call
    passes = []
    for speculation in (None, Speculation(DraftModel(draft, target), Adapt(fixed=2))):
        run = Generation(target, ids, max_new_tokens=12, speculation=speculation)
        passes.append(tokens(run))
    assert passes[0] == passes[1] and run.report.drafted > 0


# -- real weights -------------------------------------------------------------------------------------------------------------------------


def real(name: str, kind: str | None = None) -> Engine:
    return load_engine(DATA / "models" / name / "hf", kind)


def beginnings(engine: Engine, count: int, length: int = 24) -> list[list[int]]:
    """Prompts from Shakespeare, with only known characters, and from a story."""
    text = (DATA / "fed/tinyshakespeare/input.txt").read_text().replace("\n", " ")
    stories = ["Once upon a time, there was a little girl named Lily.", "One day, Tom and his dog went to the park."]
    step = len(text) // count
    return [engine.text.encode(stories[i % 2] if i % 10 == 0 else text[i * step : i * step + 80])[:length] for i in range(count)]


@pytest.fixture(scope="module")
def plain() -> dict[str, Answers]:
    """Each model's answers without speculation, with which the answers of each drafter are compared."""
    return defaultdict(dict)


needs_data = pytest.mark.skipif(not (DATA / "models").is_dir(), reason="needs FEDTUNE_DATA with models and fed/tinyshakespeare")


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["stories260k", "babyllama_tok105"])
def test_real_weights_give_the_text_of_transformers(name: str) -> None:
    from transformers import AutoModelForCausalLM

    engine = real(name)
    model = cast(Any, AutoModelForCausalLM.from_pretrained(engine.folder, dtype=torch.float32))
    for ids in beginnings(engine, 10):
        with torch.inference_mode():
            theirs = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False, pad_token_id=2)[0, len(ids) :].tolist()
        for speculation in (None, Speculation(Lookup()), Speculation(EarlyExit(3), Adapt(fixed=3))):
            assert tokens(Generation(engine, ids, max_new_tokens=60, speculation=speculation)) == theirs


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["stories260k", "babyllama_tok105"])
@pytest.mark.parametrize("drafter", [Lookup, EarlyExit])
def test_two_hundred_real_prompts_token_for_token(
    name: str, drafter: type[Drafter], plain: dict[str, Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = real(name)
    monkeypatch.setattr("tests.inference.engine.test_generate.drafter", lambda kind, engine, small: drafter())
    monkeypatch.setattr("tests.inference.engine.test_generate.prompts", lambda count: beginnings(engine, count))
    drafted, accepted = compare(engine, engine, plain[name], drafter.name, 200, Sampling(), Adapt(fixed=5), 24)
    print(f"{name} {drafter.name}: {accepted} of {drafted} draft tokens accepted")
    assert accepted > 0


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_other_kinds_differ_only_where_two_tokens_are_too_close_to_call(kind: str) -> None:
    engine, differ, accepted = real("stories260k", kind), 0, 0
    for ids in beginnings(engine, 40):
        plain = tokens(Generation(engine, ids, max_new_tokens=40))
        run = Generation(engine, ids, max_new_tokens=40, speculation=Speculation(Lookup(), Adapt(fixed=5)))
        got = tokens(run)
        accepted += run.report.accepted
        if got != plain:
            first = next(i for i, (a, b) in enumerate(zip(got, plain, strict=False)) if a != b)
            assert any(at <= first for at in run.report.close)
            differ += 1
    print(f"{kind}: {differ} of 40 answers differ")
    assert accepted > 0  # without an accepted draft token no answer could differ
