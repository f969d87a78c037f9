"""Answers of tiny random decoders: equal to those of transformers, with and without speculation."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.context import Context, common
from fedtune.inference.engine.generate import Generation, Speculation, generate
from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.sample import Sampler, Sampling
from fedtune.inference.engine.speculate import Drafter
from fedtune.inference.engine.speculate.adapt import Adapt, Verified
from fedtune.inference.engine.speculate.draft import DraftModel
from fedtune.inference.engine.speculate.early_exit import EarlyExit
from fedtune.inference.engine.speculate.lookup import Lookup
from fedtune.inference.engine.speculate.lookup_or_recycle import LookupOrRecycle
from tests.inference.engine.drafters import Oracle, Scribble, Silent, ThirdIsWrong
from tests.inference.engine.engines import build
from tests.inference.engine.tiny import VOCAB


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Any]:
    return build(tmp_path_factory.mktemp("target") / "m")


@pytest.fixture(scope="module")
def engine(pair: tuple[Engine, Any]) -> Engine:
    return pair[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build(tmp_path_factory.mktemp("draft") / "m", "qwen3", seed=5)[0]


def drafter(kind: str, engine: Engine, small: Engine) -> Drafter:
    makes = {
        "auto": LookupOrRecycle,
        "lookup": Lookup,
        "draft": lambda: DraftModel(small, engine),
        "early-exit": EarlyExit,
        "random": Scribble,
        "silent": Silent,
    }
    return makes[kind]()


KINDS = ["auto", "lookup", "draft", "early-exit", "random"]


def prompts(count: int, *, seed: int = 0, longest: int = 12) -> list[list[int]]:
    rng = random.Random(seed)
    few = [rng.choices(range(2, VOCAB), k=5) for _ in range(count)]  # few words, so that endings repeat
    return [rng.choices(words, k=rng.randint(1, longest)) for words in few]


def tokens(run: Generation) -> list[int]:
    return [piece.token for piece in run]


# -- plain decoding -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}])
def test_greedy_text_equals_that_of_transformers(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    engine, model = build(tmp_path / "m", name)
    for ids in prompts(3):
        with torch.inference_mode():
            theirs = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=1, pad_token_id=1, **options)
        assert tokens(Generation(engine, ids, Sampling(**options), 20)) == theirs[0, len(ids) :].tolist()


def test_a_text_prompt_gives_pieces_that_join_to_the_answer(engine: Engine) -> None:
    run = Generation(engine, "w5 w6 w7", max_new_tokens=6)
    pieces = list(run)
    assert [p.end for p in pieces] == [None] * 5 + ["length"]
    text = "".join(p.text for p in pieces)
    assert text == engine.text.decode([p.token for p in pieces]) == generate(engine, "w5 w6 w7", max_new_tokens=6)
    report = run.report
    assert (report.prompt, report.reused, report.tokens, report.passes, report.drafted) == (3, 0, 6, 5, 0)


def test_an_end_token_ends_the_answer_and_gives_no_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = tokens(Generation(engine, [5, 6], max_new_tokens=8))
    at = next(i for i in range(1, 8) if answer[i] not in answer[:i])
    monkeypatch.setattr(engine.text, "ends", frozenset({answer[at]}))
    pieces = list(Generation(engine, [5, 6], max_new_tokens=8))
    assert [p.token for p in pieces] == answer[: at + 1] and pieces[-1].end == "stop" and pieces[-1].text == ""


def test_a_stop_string_across_tokens_never_leaks(engine: Engine) -> None:
    whole = generate(engine, [5, 6], max_new_tokens=8)
    words = whole.split()
    stop = words[2][-1] + " " + words[3][0]  # from inside one token into the next
    pieces = list(Generation(engine, [5, 6], Sampling(stop=(stop,)), 8))
    assert "".join(p.text for p in pieces) == whole[: whole.find(stop)] and pieces[-1].end == "stop"
    assert len(pieces) <= 4


def test_logprobs_are_the_models_own(pair: tuple[Engine, Any]) -> None:
    engine, model = pair
    pieces = list(Generation(engine, [5, 6, 7], Sampling(temperature=2.0, top_k=7), 5, logprobs=3))
    ids = [5, 6, 7, *(p.token for p in pieces)]
    with torch.inference_mode():
        logs = model(torch.tensor([ids])).logits[0, 2:-1].float().log_softmax(-1)
    for piece, row in zip(pieces, logs, strict=True):
        assert piece.logprob == pytest.approx(float(row[piece.token]), abs=1e-4)
        assert [i for i, _ in piece.rivals] == row.topk(3).indices.tolist()
    assert all(p.logprob is None and not p.rivals for p in Generation(engine, [5], max_new_tokens=2))


def test_a_request_that_does_not_fit_is_refused(engine: Engine) -> None:
    for ids, length, words in [([5] * 60, 5, "exceed the model's context of 64"), ([5], 0, "max_new_tokens=0"), ([], 3, "no tokens"),
                               ([5] * 64, None, "exceed the model's context")]:  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            Generation(engine, ids, max_new_tokens=length)
    with pytest.raises(ModelError, match="token id 101 is out of range 0..100"):
        Generation(engine, [VOCAB], Sampling(repetition_penalty=1.1), 3)
    assert len(tokens(Generation(engine, [5] * 61, max_new_tokens=None))) == 3  # until the context is full


def test_sampling_depends_only_on_the_seed(engine: Engine) -> None:
    def text(seed: int) -> list[int]:
        return tokens(Generation(engine, [5, 6], Sampling(temperature=1.5, seed=seed), 12))

    state = torch.get_rng_state()
    assert text(1) == text(1) and len({tuple(text(s)) for s in range(4)}) == 4
    assert torch.equal(torch.get_rng_state(), state)


# -- turns --------------------------------------------------------------------------------------------------------------------------------


def test_a_second_turn_computes_only_its_new_tokens(engine: Engine) -> None:
    context = Context(engine)
    first = Generation(engine, [5, 6, 7], max_new_tokens=4, context=context)
    answer = tokens(first)
    turn = [5, 6, 7, *answer, 9, 10]
    second = Generation(engine, turn, max_new_tokens=4, context=context)
    assert tokens(second) == tokens(Generation(engine, turn, max_new_tokens=4))
    assert second.report.reused == 6  # three tokens of the prompt, and the answer except its last token, which no pass has read
    same = Generation(engine, turn, max_new_tokens=4, context=context)
    assert tokens(same) == tokens(Generation(engine, turn, max_new_tokens=4)) and same.report.reused == len(turn) - 1
    other = Generation(engine, [8, 9], max_new_tokens=4, context=context)
    assert tokens(other) == tokens(Generation(engine, [8, 9], max_new_tokens=4)) and other.report.reused == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_answer_leaves_a_valid_context(engine: Engine, small: Engine, kind: str) -> None:
    context, speculation = Context(engine), Speculation(drafter(kind, engine, small), Adapt(fixed=3))
    for ids in prompts(4, seed=2):
        for i, piece in enumerate(Generation(engine, ids, max_new_tokens=12, context=context, speculation=speculation)):
            assert len(context.ids) == context.cache.length and piece.end is None
            if i == 4:
                break
        turn = [*ids, 9]
        got = tokens(Generation(engine, turn, max_new_tokens=6, context=context, speculation=speculation))
        assert got == tokens(Generation(engine, turn, max_new_tokens=6))


def test_common_prefixes() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randint(0, 1) for _ in range(rng.randint(0, 9))] for _ in range(2))
        assert common(a, b) == next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_long_prompt_runs_in_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    want = tokens(Generation(engine, [5, 6, 7, 8, 9, 10, 11, 12], max_new_tokens=5))
    monkeypatch.setattr("fedtune.inference.engine.context.CHUNK", 3)
    assert tokens(Generation(engine, [5, 6, 7, 8, 9, 10, 11, 12], max_new_tokens=5)) == want


# -- speculation --------------------------------------------------------------------------------------------------------------------------


Answers = dict[tuple[tuple[int, ...], Sampling, int], list[int]]


@pytest.fixture(scope="module")
def plain_answers() -> Answers:
    """The answers of `engine` without speculation."""
    return {}


def compare(
    engine: Engine, small: Engine, plain_answers: Answers, kind: str, count: int, sampling: Sampling, adapt: Adapt, length: int = 16
) -> tuple[int, int]:
    """Compare every prompt's answer with and without speculation. Returns the numbers of drafted and accepted tokens."""
    speculation, drafted, accepted = Speculation(drafter(kind, engine, small), adapt), 0, 0
    for ids in prompts(count):
        run = Generation(engine, ids, sampling, length, speculation=speculation)
        key = (tuple(ids), sampling, length)
        if key not in plain_answers:
            plain_answers[key] = tokens(Generation(engine, ids, sampling, length))
        assert tokens(run) == plain_answers[key]
        assert run.report.close == []
        drafted, accepted = drafted + run.report.drafted, accepted + run.report.accepted
    return drafted, accepted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
def test_greedy_answers_are_the_same_token_for_token(
    engine: Engine, small: Engine, plain_answers: Answers, kind: str, options: dict[str, Any]
) -> None:
    drafted, _ = compare(engine, small, plain_answers, kind, 12, Sampling(**options), Adapt(fixed=4))
    assert drafted > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guesses", [1, 4, 10, None])
def test_greedy_answers_of_two_hundred_prompts(
    engine: Engine, small: Engine, plain_answers: Answers, kind: str, guesses: int | None
) -> None:
    drafted, accepted = compare(engine, small, plain_answers, kind, 200, Sampling(), Adapt(fixed=guesses))
    assert drafted > (200 if guesses else 0) and (accepted > 0 or kind == "random" or not guesses)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_keep_the_text_of_the_seed(engine: Engine, small: Engine, plain_answers: Answers, kind: str) -> None:
    for seed in range(4):
        sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=seed)
        compare(engine, small, plain_answers, kind, 4, sampling, Adapt(fixed=1 + seed))


@pytest.mark.parametrize("fixed", [None, 3])
def test_a_drafter_without_a_draft_changes_nothing(engine: Engine, small: Engine, plain_answers: Answers, fixed: int | None) -> None:
    assert compare(engine, small, plain_answers, "silent", 3, Sampling(), Adapt(fixed=fixed), 30) == (0, 0)


def test_the_repetition_penalty_counts_drafted_tokens_for_later_rows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(repetition_penalty=1.6)
    answer = tokens(Generation(engine, [5, 6], sampling, 40))

    def speculative() -> list[int]:
        return tokens(Generation(engine, [5, 6], sampling, 40, speculation=Speculation(Oracle(answer, 2), Adapt(fixed=6))))

    assert speculative() == answer
    monkeypatch.setattr(Sampler, "take", lambda self, token: setattr(self, "count", self.count + 1))
    assert speculative() != answer


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, repetition_penalty=1.3)], ids=["greedy", "sampled"])
def test_a_correct_alternative_token_saves_a_pass(engine: Engine, sampling: Sampling) -> None:
    answer = tokens(Generation(engine, [5, 6], sampling, 41))
    drafter, passes = ThirdIsWrong(answer, 2), list[int]()
    for drafter.others in (False, True):
        run = Generation(engine, [5, 6], sampling, 41, speculation=Speculation(drafter, Adapt(fixed=6)))
        assert tokens(run) == answer and run.report.tokens == 1 + run.report.passes + run.report.accepted
        passes.append(run.report.passes)
    assert passes == [14, 10]  # of three tokens each, and of four


def test_after_an_error_in_a_verifying_pass_the_context_holds_no_draft(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, context = tokens(Generation(engine, [5, 6], max_new_tokens=20)), Context(engine)
    drafter = ThirdIsWrong(answer, 2)
    drafter.others = True
    right = Sampler.next

    def fails(self: Sampler, logits: Any) -> int:
        if self.count == 6:
            raise ModelError("the logits are not finite")
        return right(self, logits)

    with monkeypatch.context() as patched, pytest.raises(ModelError):
        patched.setattr(Sampler, "next", fails)
        tokens(Generation(engine, [5, 6], max_new_tokens=20, context=context, speculation=Speculation(drafter, Adapt(fixed=6))))
    assert context.ids == [5, 6, *answer][: len(context.ids)] and context.cache.length == len(context.ids)
    assert tokens(Generation(engine, [5, 6], max_new_tokens=20, context=context)) == answer


def test_passes_grow_with_what_was_measured(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, rows = tokens(Generation(engine, [5, 6], max_new_tokens=30)), list[int]()
    drafter, adapt = ThirdIsWrong(answer, 2), Adapt()
    drafter.others = True
    verified = adapt.verified

    def watch(seen: Verified, *more: Any) -> None:
        rows.append(seen.rows)
        assert seen.rows <= adapt.most_rows
        verified(seen, *more)

    monkeypatch.setattr(adapt, "verified", watch)
    assert tokens(Generation(engine, [5, 6], max_new_tokens=30, speculation=Speculation(drafter, adapt))) == answer
    assert rows and rows[0] <= 3


def test_good_drafts_save_passes_and_keep_the_text(engine: Engine) -> None:
    plain = Generation(engine, [5, 6], max_new_tokens=40)
    answer = tokens(plain)
    run = Generation(engine, [5, 6], max_new_tokens=40, speculation=Speculation(Oracle(answer, 2), Adapt(fixed=6)))
    assert tokens(run) == answer and run.report.passes < 16 < plain.report.passes == 39
    assert run.report.tokens == 1 + run.report.passes + run.report.accepted


def test_the_number_of_draft_tokens_depends_on_the_given_clock(engine: Engine) -> None:
    answer = tokens(Generation(engine, [5, 6], max_new_tokens=40))

    def passes(step: float) -> tuple[int, int]:
        time = iter(range(10**6))
        run = Generation(engine, [5, 6], max_new_tokens=40, speculation=Speculation(Oracle(answer, 2)), clock=lambda: step * next(time))
        assert tokens(run) == answer
        return run.report.passes, run.report.drafted

    assert passes(1.0) == passes(1.0) == passes(3.0)  # all passes cost the same: only the ratio of costs matters
    assert passes(1.0)[0] < 30


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_tokens_of_a_full_context_are_drafted_without_overflow(engine: Engine, small: Engine, kind: str) -> None:
    ids = prompts(1, longest=3)[0]
    run = Generation(engine, ids, max_new_tokens=None, speculation=Speculation(drafter(kind, engine, small), Adapt(fixed=10)))
    assert tokens(run) == tokens(Generation(engine, ids, max_new_tokens=None)) and run.report.tokens == 64 - len(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["window", "kivi4"])
def test_other_caches_can_crop_rejected_draft_tokens(engine: Engine, small: Engine, kind: str, policy: str) -> None:
    def make() -> Cache:
        if policy == "window":
            return WindowCache(engine.shape, 64, 10, 2, undo=6)
        return KiviCache(engine.shape, 64, 4, residual=8, group=4, undo=6)

    for ids in prompts(3, seed=1):
        plain = tokens(Generation(engine, ids, max_new_tokens=40, context=Context(engine, make)))
        speculation = Speculation(drafter(kind, engine, small), Adapt(fixed=10))  # more than the cache can crop
        assert tokens(Generation(engine, ids, max_new_tokens=40, context=Context(engine, make), speculation=speculation)) == plain


def test_a_draft_model_must_have_the_same_tokenizer(tmp_path: Path, engine: Engine) -> None:
    other, _ = build(tmp_path / "other", words=["<s>", "</s>", *(f"v{i}" for i in range(2, VOCAB))])
    with pytest.raises(ModelError, match="cannot draft for .*: their tokenizers differ"):
        DraftModel(other, engine)


@pytest.mark.parametrize("width", [97, 110])
def test_a_draft_model_may_have_a_narrower_or_wider_table(engine: Engine, width: int, tmp_path: Path) -> None:
    small, _ = build(tmp_path / "m", "qwen3", seed=5, vocab=width)
    assert small.shape.vocab == width
    assert compare(engine, small, {}, "draft", 3, Sampling(), Adapt(fixed=3))[0] > 0
    sampled = Generation(engine, [5], Sampling(temperature=1.0), 10, speculation=Speculation(DraftModel(small, engine), Adapt(fixed=3)))
    assert max(tokens(sampled)) < VOCAB


def test_a_draft_model_drafts_its_own_continuation(engine: Engine, small: Engine) -> None:
    drafter, ids = DraftModel(small, engine), [5, 3, 9, 4]
    drafter.begin(Sampling(), Context(engine))

    def likeliest(text: list[int]) -> int:
        return int(small.decoder.forward(text, [Span(small.cache(), len(text))]).argmax())

    for count in (1, 3):  # the second time, over a cache that holds the text and the first guess
        guessed = list[int]()
        for _ in range(count):
            guessed.append(likeliest([*ids, *guessed]))
        assert drafter.draft(ids, count).tokens == guessed
    guessed = drafter.draft(ids, 3).tokens
    assert drafter._own.cache.length == len(drafter._own.ids)
    ids += [*guessed, likeliest([*ids, *guessed])]  # all guesses were right
    assert drafter.draft(ids, 1).tokens == [likeliest(ids)]
    ids += [7, 2]  # the guess was wrong
    assert drafter.draft(ids, 1).tokens == [likeliest(ids)]


@pytest.mark.parametrize("layers", [0, 3])
def test_an_exit_after_no_layer_or_all_is_refused(engine: Engine, layers: int) -> None:
    with pytest.raises(ConfigError, match=f"an early exit after layer {layers} of 3 saves nothing"):
        tokens(Generation(engine, [5], max_new_tokens=3, speculation=Speculation(EarlyExit(layers))))


@pytest.mark.parametrize(("asked", "layers"), [(None, 1), (2, 2)])  # by default half of the three layers
def test_an_early_exit_drafts_the_continuation_of_its_layers(engine: Engine, asked: int | None, layers: int) -> None:
    ids, guessed, context = [5, 3, 9, 4], list[int](), Context(engine)
    context.run(ids[:-1])
    drafter = EarlyExit(asked)
    drafter.begin(Sampling(), context)
    for _ in range(3):
        text, cache = [*ids, *guessed], engine.cache()
        # the first layers only, over the whole text
        guessed.append(int(engine.decoder.forward(text, [Span(cache, len(text))], layers=layers).argmax()))
    assert drafter.draft(ids, 3).tokens == guessed
    assert context.cache.length == 3  # unchanged: the guesses are removed
