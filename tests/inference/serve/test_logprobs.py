"""Texts of tokens with log-probabilities join to the sent text, and their bytes to its UTF-8."""

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.schedule import Scheduler
from fedtune.inference.engine.text import Text
from fedtune.inference.generate_transformers import HubText
from fedtune.inference.serve.logprobs import LogprobFormatter, TokenLogprob
from tests.inference.engine.test_text import TOKENIZERS
from tests.inference.serve.servers import Served, serve_model
from tests.quick import quick

TEXTS = {name: Text(make(), bos=None, ends=frozenset({2}), template=None, names={}) for name, make in TOKENIZERS.items()}


def answer(
    text: Text, ids: list[int], *, before: list[int], stop: tuple[str, ...] = (), rivals: int = 0
) -> tuple[GenerationRequest, list[Output]]:
    """A scheduler's outputs for an answer of these tokens; the rivals of each are the token itself and its neighbors."""
    outputs: list[Output] = []
    request = GenerationRequest(
        ids=before or [0],
        sampling=Sampling(stop=stop),
        max_new_tokens=len(ids),
        deliver=outputs.append,
        joins=bool(before),
        rivals=rivals,
    )

    def forward(_: Any, spans: Any) -> np.ndarray:
        for span in spans:
            span.cache.length += span.n
        logits = -np.roll(np.arange(text.size, dtype=np.float32), ids[request.answered])
        return logits[None]

    caches: Any = SimpleNamespace(
        limit=10_000, open=lambda ids, adapter: SimpleNamespace(length=0), reserve=lambda cache, n: True, close=lambda *of: None
    )
    decoder: Any = SimpleNamespace(forward=forward)
    scheduler = Scheduler(decoder, text, caches, text.size, rows=10_000)
    scheduler.submit(request)
    while scheduler.step():
        pass
    return request, outputs


def receive(text: Text, outputs: list[Output], request: GenerationRequest, *, trims: bool = False) -> tuple[str, list[TokenLogprob]]:
    """The text and the tokens that a client gets; no token comes before its text."""
    formatter, sent, logprobs, trimming = (
        LogprobFormatter(text, request.ids if request.joins else (), trims=trims),
        "",
        list[TokenLogprob](),
        trims,
    )
    for out in outputs:
        piece = out.text.lstrip() if trimming else out.text
        trimming = trimming and not piece
        sent += piece
        logprobs += formatter.push(Output(piece, out.token, out.logprob, out.rivals, out.end))
        assert sent.startswith("".join(token.token for token in logprobs))
    return sent, logprobs


def token(text: Text, name: str) -> int:
    token_id = text.tokenizer.token_to_id(name)
    assert token_id is not None
    return token_id


def check(text: Text, ids: list[int], *, before: list[int], stop: tuple[str, ...], trims: bool, rivals: int = 3) -> list[TokenLogprob]:
    request, outputs = answer(text, ids, before=before, stop=stop, rivals=min(rivals, text.size))
    sent, logprobs = receive(text, outputs, request, trims=trims)
    assert "".join(token.token for token in logprobs) == sent
    assert b"".join(token.raw or b"" for token in logprobs) == sent.encode()
    assert [token.logprob for token in logprobs] == [out.logprob for out in outputs if out.token is not None]
    for entry, out in zip(logprobs, [out for out in outputs if out.token is not None], strict=True):
        names = [rival.token for rival in entry.top]
        assert len(set(names)) == len(names) == len(out.rivals)
        assert entry.top[0].token == entry.token  # the token itself, under the same name
    return logprobs


@pytest.mark.parametrize("name", TEXTS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_the_texts_of_any_tokens_join_to_the_answer(name: str, data: st.DataObject) -> None:
    text = TEXTS[name]
    ids = st.lists(st.integers(0, text.size - 1), min_size=1, max_size=20)
    before = data.draw(st.just([]) | ids)
    stop = data.draw(st.just(()) | st.tuples(st.sampled_from(["a", "b ", "ab", "\ufffd", "on the"])))
    check(text, data.draw(ids), before=before, stop=stop, trims=data.draw(st.booleans()))


@pytest.mark.parametrize("name", ["byte_fallback", "byte_level"])
@given(string=st.text("ab c,é→😀👩🏽‍🚀e\u0301\u3000 ", min_size=1, max_size=12), trims=st.booleans())
@settings(max_examples=40, deadline=None)
def test_characters_of_several_tokens_join(name: str, string: str, trims: bool) -> None:
    text = TEXTS[name]
    logprobs = check(text, text.encode(string), before=text.encode("a"), stop=(), trims=trims)
    assert not any("\ufffd" in token.token for token in logprobs)


def test_an_emoji_of_four_tokens_by_hand() -> None:
    text = TEXTS["byte_fallback"]
    ids = [token(text, t) for t in ("▁a", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "b", "</s>")]
    logprobs = check(text, ids, before=[token(text, "b")], stop=(), trims=False)
    assert [token.token for token in logprobs] == [" a", " ", "", "", "", "😀", "b", ""]
    assert [token.raw for token in logprobs] == [b" a", b" ", b"\xf0", b"\x9f", b"\x98", b"\x80", b"b", b""]
    # the rivals of a byte are other bytes: no two of them have the same name
    assert [rival.token for rival in logprobs[3].top] == ["", "bytes:\\xa0", "bytes:\\xa1"]
    # a chat answer does not include its leading space
    assert [t.token for t in check(text, ids[:1], before=[], stop=(), trims=False)] == ["a"]


def test_invalid_bytes_join_as_displayed() -> None:
    text = TEXTS["byte_level"]
    ids = [token(text, t) for t in ("ð", "Ł", "b", "ð")]
    logprobs = check(text, ids, before=[], stop=(), trims=False)
    assert "".join(token.token for token in logprobs) == "\ufffdb\ufffd"


def test_tokens_after_a_stop_string_have_no_text() -> None:
    text = TEXTS["byte_level"]
    ids = text.encode("  ab c bc ab")
    logprobs = check(text, ids, before=[], stop=("c b",), trims=True)
    assert "".join(token.token for token in logprobs) == "ab "
    request, outputs = answer(text, text.encode("abc"), before=[], stop=("cab",))
    assert receive(text, outputs, request)[0] == "abc"  # held back for a stop string that does not come


def test_rivals_with_the_same_text_have_distinct_names() -> None:
    text = TEXTS["byte_fallback"]
    plain, byte = token(text, "b"), token(text, "<0x62>")
    for chosen, rest in ((plain, byte), (byte, plain)):
        out = Output("b", chosen, -0.1, ((chosen, -0.1), (rest, -2.0), (2, -3.0)), "length")
        (logprob,) = LogprobFormatter(text).push(out)
        assert [(t.token, t.raw) for t in logprob.top] == [("b", b"b"), (f"token_id:{rest}", b"b"), ("</s>", None)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_of_transformers_has_the_same_bytes(name: str) -> None:
    ours, theirs = TEXTS[name], HubText(PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name]()), frozenset({2}), closes=False)
    assert [theirs.raw(i) for i in range(ours.size) if i not in ours.special] == [
        ours.raw(i) for i in range(ours.size) if i not in ours.special
    ]


# -- over the server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(engine: Engine) -> Iterator[Served]:
    with serve_model(engine) as server:
        yield server


def ask(here: Served, *, chat: bool, stream: bool, **more: Any) -> tuple[str, list[Any]]:
    """The text and the `logprobs` of each choice."""
    path = "chat/completions" if chat else "completions"
    what: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 9}
    body = {"model": "tiny", "stream": stream, **(what if chat else {"prompt": "turn on", "logprobs": 9}), **more}
    got = httpx.post(f"{here.url}/v1/{path}", json=body, timeout=20)
    lines = [line[6:] for line in got.text.split("\n\n") if line and line != "data: [DONE]"] if stream else [got.text]
    choices = [json.loads(line)["choices"][0] for line in lines]
    parts = [c["text"] if "text" in c else c.get("delta", c.get("message")).get("content") or "" for c in choices]
    return "".join(parts), [c["logprobs"] for c in choices if c["logprobs"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", quick(range(3), 0))
def test_offsets_and_bytes_over_the_server_match_the_text(here: Served, stream: bool, seed: int) -> None:
    letters = random.Random(seed).sample("etaoin", 2)
    for stop in (None, "".join(letters), letters[0]):
        options: dict[str, Any] = {"temperature": 1.5, "seed": seed, "max_tokens": 60, "stop": stop, "stream": stream}
        text, result = ask(here, chat=False, **options)
        tokens = [token for logprobs in result for token in logprobs["tokens"]]
        offsets = [at for logprobs in result for at in logprobs["text_offset"]]
        tops = [top for logprobs in result for top in logprobs["top_logprobs"]]
        assert "".join(tokens) == text
        assert [text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
        assert all(len(top) == 9 for top in tops) and len(tops) == len(tokens)
        chats, result = ask(here, chat=True, **options)
        entries = [entry for logprobs in result for entry in logprobs["content"]]
        assert "".join(entry["token"] for entry in entries) == chats
        assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == chats
        assert all(len({rival["token"] for rival in entry["top_logprobs"]}) == 9 for entry in entries)
