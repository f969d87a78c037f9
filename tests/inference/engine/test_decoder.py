"""Logits compared with transformers in float32, for every supported shape."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Cache, CacheError, Span
from fedtune.inference.engine.caches.full import FIRST, FullCache
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.lora import make_lora
from fedtune.inference.engine.reference.attention import attention, causal_mask
from tests.inference.engine.tiny import SHAPES, VOCAB, tiny_model

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-5}


def both(name: str, folder: Path) -> tuple[Any, Engine]:
    return tiny_model(name, folder), load_engine(folder)


def forward(engine: Engine, ids: Tensor | None, spans: Sequence[Span], **more: Any) -> Tensor:
    return torch.from_numpy(engine.decoder.forward(None if ids is None else ids.numpy(), spans, **more))


def some_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def theirs(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids[None], **more).logits[0]


@pytest.mark.parametrize("name", SHAPES)
def test_a_full_pass_equals_transformers(name: str, tmp_path: Path) -> None:
    model, engine = both(name, tmp_path)
    ids = some_ids(41)
    cache = engine.cache(limit=41)
    actual = forward(engine, ids, [Span(cache, 41, keep=None)])
    assert actual.dtype == torch.float32 and cache.length == 41
    torch.testing.assert_close(actual, theirs(model, ids), **CLOSE)


@pytest.mark.parametrize("name", SHAPES)
def test_single_tokens_and_chunks_equal_transformers(name: str, tmp_path: Path) -> None:
    model, engine = both(name, tmp_path)
    ids = some_ids(30, 1)
    for sizes in ([1] * 30, [11, 1, 7, 2, 9]):
        state, cache, want, results, at = None, engine.cache(limit=30), [], [], 0
        for n in sizes:  # transformers takes the same steps, because dynamic scaling does not rotate old keys again
            with torch.no_grad():
                step = model(ids[None, at : at + n], past_key_values=state, use_cache=True)
            state = step.past_key_values
            want.append(step.logits[0])
            results.append(forward(engine, ids[at : at + n], [Span(cache, n, keep=None)]))
            at += n
        torch.testing.assert_close(torch.cat(results), torch.cat(want), **CLOSE)


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "llama_dynamic"])  # there transformers scales a batch by its longest text
def test_ragged_spans_equal_a_padded_batch(name: str, tmp_path: Path) -> None:
    model, engine = both(name, tmp_path)
    lengths = [13, 1, 22]
    texts = [some_ids(n, seed) for seed, n in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
    caches = [engine.cache(limit=22) for _ in texts]
    actual = forward(engine, torch.cat(texts), [Span(c, len(t), keep=None) for c, t in zip(caches, texts, strict=True)])
    torch.testing.assert_close(actual, torch.cat([row[:n] for row, n in zip(logits, lengths, strict=True)]), **CLOSE)
    # one more pass: one sequence continues by one token, one by nine, and only the requested rows are returned
    more = [some_ids(1, 7), some_ids(9, 8)]
    actual = forward(engine, torch.cat(more), [Span(caches[0], 1), Span(caches[1], 9, keep=2)])
    want = torch.cat([theirs(model, torch.cat([texts[0], more[0]]))[-1:], theirs(model, torch.cat([texts[1], more[1]]))[-2:]])
    torch.testing.assert_close(actual, want, **CLOSE)
    assert [c.length for c in caches] == [14, 10, 22]


def test_a_cache_continues_after_a_crop(tmp_path: Path) -> None:
    model, engine = both("mistral", tmp_path)
    ids, cache = some_ids(40), engine.cache(limit=100)
    forward(engine, ids, [Span(cache, 40)])
    cache.crop(9)
    actual = forward(engine, ids[9:30] + 0, [Span(cache, 21, keep=None)])
    torch.testing.assert_close(actual, theirs(model, ids[:30])[9:], **CLOSE)
    with pytest.raises(CacheError, match="cannot be cropped to 31"):
        cache.crop(31)


def test_buffers_double_up_to_the_limit(tmp_path: Path) -> None:
    model, engine = both("llama", tmp_path)
    shape, cache, ids = engine.shape, engine.cache(limit=150), some_ids(150)
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4
    assert cache.nbytes == 0
    for at, held in ((10, FIRST), (FIRST + 1, 2 * FIRST), (150, 150)):
        actual = forward(engine, ids[cache.length : at], [Span(cache, at - cache.length)])
        assert cache.nbytes == held * token
        torch.testing.assert_close(actual, theirs(model, ids[:at])[-1:], **CLOSE)
    with pytest.raises(CacheError, match="limit of 150"):
        forward(engine, ids[:1], [Span(cache, 1)])
    assert cache.length == 150


def test_a_bfloat16_cache_is_half_as_large_and_close(tmp_path: Path) -> None:
    model, engine = both("qwen3", tmp_path)
    cache, ids = FullCache(engine.shape, 64, "bfloat16"), some_ids(40)
    actual = torch.cat([forward(engine, part, [Span(cache, len(part), keep=None)]) for part in ids.split(23)])
    assert 2 * cache.nbytes == 64 * 2 * 3 * 2 * 12 * 4
    want = theirs(model, ids)
    assert float((actual - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "qwen3_biases"])
def test_an_early_exit_and_its_continuation(name: str, tmp_path: Path) -> None:
    model, engine = both(name, tmp_path)
    decoder, ids, early = engine.decoder, some_ids(20), 2
    shallow = tiny_model(name, tmp_path / "shallow")  # the same weights, but only the first layers
    shallow.model.layers = shallow.model.layers[:early]
    shallow.config.num_hidden_layers = shallow.model.config.num_hidden_layers = early
    cache = engine.cache(limit=30)
    forward(engine, ids[:12], [Span(cache, 12)])
    exits, states = [], []
    for i in range(12, 20):  # token by token, as a draft is written
        hidden = decoder.run(decoder.embed(ids[i : i + 1].numpy()), [Span(cache, 1)], last=early)
        states.append(hidden)
        exits.append(decoder.logits(hidden))
    torch.testing.assert_close(torch.from_numpy(np.concatenate(exits)), theirs(shallow, ids)[12:], **CLOSE)
    cache.crop(12)  # then the other layers, for all drafted tokens at once
    actual = decoder.logits(decoder.run(np.concatenate(states), [Span(cache, 8, keep=None)], first=early))
    torch.testing.assert_close(torch.from_numpy(actual), theirs(model, ids)[12:], **CLOSE)
    assert cache.length == 20
    actual = forward(engine, ids[:3], [Span(cache, 3)], layers=None)
    torch.testing.assert_close(actual, theirs(model, torch.cat([ids, ids[:3]]))[-1:], **CLOSE)


def test_embeddings_give_the_result_of_their_ids(tmp_path: Path) -> None:
    _, engine = both("llama", tmp_path)
    ids = some_ids(6)
    one, other = (engine.cache(limit=6) for _ in range(2))
    result = forward(engine, None, [Span(one, 6)], embeds=engine.decoder.embed(ids.numpy()))
    assert torch.equal(result, forward(engine, ids, [Span(other, 6)]))


def test_only_the_kept_rows_are_returned(tmp_path: Path) -> None:
    _, engine = both("llama", tmp_path)
    ids = some_ids(9)

    def keep_rows(*keep: int | None) -> Tensor:
        return forward(engine, ids, [Span(engine.cache(limit=9), n, keep=k) for n, k in zip((4, 5), keep, strict=True)])

    whole = keep_rows(None, None)
    assert whole.shape == (9, VOCAB)
    for keep, rows in (((1, 1), [3, 8]), ((0, 2), [7, 8]), ((None, 0), [0, 1, 2, 3]), ((9, 1), [0, 1, 2, 3, 8]), ((0, 0), [])):
        torch.testing.assert_close(keep_rows(*keep), whole[rows])


FACTORS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


Factors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def factors(model: Any, seed: int, modules: tuple[str, ...] = FACTORS) -> Factors:
    numbers = np.random.default_rng(seed)
    out = {}
    for layer in range(2):  # not in the last layer
        for i, module in enumerate(modules):
            rows, columns = model.get_submodule(f"model.layers.{layer}.{module}").weight.shape
            a, b = (0.2 * numbers.standard_normal(size) for size in ((1 + i % 3, columns), (rows, 1 + i % 3)))
            out[f"model.layers.{layer}.{module}"] = a.astype(np.float32), b.astype(np.float32)
    return out


def merge_factors(name: str, folder: Path, changes: Factors) -> Any:
    model = tiny_model(name, folder)
    with torch.no_grad():
        for module, (a, b) in changes.items():
            model.get_submodule(module).weight.add_(torch.from_numpy(b @ a))
    return model


@pytest.mark.parametrize("name", ["llama_biases", "qwen3"])
def test_each_span_has_its_own_adapter(name: str, tmp_path: Path) -> None:
    model, engine = both(name, tmp_path)
    changes = {"tall": factors(model, 1), "short": factors(model, 2, FACTORS[1:2])}
    for adapter, change in changes.items():
        engine.add_adapter(adapter, change)
    wanted = {None: model} | {adapter: merge_factors(name, tmp_path / adapter, change) for adapter, change in changes.items()}
    order = ["short", None, "tall", "tall", None]
    texts = [some_ids(3 + i, i) for i in range(5)]
    caches = [engine.cache(limit=40) for _ in texts]
    actual = forward(
        engine, torch.cat(texts), [Span(c, len(t), keep=None, adapter=a) for c, t, a in zip(caches, texts, order, strict=True)]
    )
    want = [theirs(wanted[adapter], text) for adapter, text in zip(order, texts, strict=True)]
    torch.testing.assert_close(actual, torch.cat(want), **CLOSE)
    assert float((want[0] - theirs(model, texts[0])).abs().max()) > 0.01  # the smaller adapter has an effect
    with pytest.raises(ModelError, match="no adapter named 'wide'; it has: tall, short"):
        forward(engine, texts[0], [Span(engine.cache(limit=9), 3, adapter="wide")])


def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model, engine = both("llama", tmp_path)
    good = factors(model, 0)
    a, b = good["model.layers.1.mlp.up_proj"]
    for module, pair, message in (
        ("lm_head", (a, b), "'lm_head'"),
        ("model.layers.3.mlp.up_proj", (a, b), r"layers\.3"),
        ("model.layers.1.mlp.up_proj", (a[:, 1:], b), r"does not fit 'model\.layers\.1\.mlp\.up_proj' of shape \(80, 48\)"),
    ):
        with pytest.raises(ModelError, match=message):
            make_lora(engine.shape, {module: pair}, "mine")


def test_rows_that_belong_to_no_span_and_unknown_tokens_are_refused(tmp_path: Path) -> None:
    _, engine = both("llama", tmp_path)
    decoder, cache = engine.decoder, engine.cache(limit=9)
    with pytest.raises(ModelError, match="5 rows do not match spans of"):
        decoder.forward(range(5), [Span(cache, 3), Span(cache, 1)])
    with pytest.raises(ModelError, match=r"out of range 0\.\.100"):
        decoder.forward([VOCAB], [Span(cache, 1)])
    with pytest.raises(ModelError, match=r"out of range 0\.\.100"):
        decoder.forward([-1], [Span(cache, 1)])
    with pytest.raises(ModelError, match="has 3 layers"):
        decoder.forward([1], [Span(cache, 1)], layers=4)
    with pytest.raises(ModelError, match="needs ids or embeds"):
        decoder.forward(None, [Span(cache, 1)])
    with pytest.raises(CacheError, match="at least 1"):
        engine.cache(limit=-1)
    assert cache.length == 0


def test_the_causal_mask_by_hand() -> None:
    # two queries, at positions 2 and 3 of four keys; a window of two sees itself and the one before
    assert causal_mask(2, 4, None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(2, 4, 2).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_query_heads_share_their_groups_keys() -> None:
    q, k, v = torch.randn(1, 6, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    for head in range(6):
        weights = torch.softmax(k[head // 3] @ q[0, head] / 2, 0)
        torch.testing.assert_close(attention(q, k, v, None)[0, head], weights @ v[head // 3])


def test_caches_of_different_kinds_share_a_pass(tmp_path: Path) -> None:
    class Other(FullCache):
        """The same cache under another name."""

    _, engine = both("llama", tmp_path)
    ids = some_ids(8)

    def run(*caches: Cache) -> Tensor:
        return forward(engine, ids, [Span(cache, 4) for cache in caches])

    a, b = FullCache(engine.shape, 9), FullCache(engine.shape, 9)
    assert torch.equal(run(a, Other(engine.shape, 9)), run(FullCache(engine.shape, 9), b))
