"""The scheduler with the real engine's paged caches, adapters and virtual tokens, compared with `Generation`."""

from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.caches.prefix import PagedCaches
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.generate import Generation
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.schedule import Scheduler
from fedtune.inference.serve.adapters import add_adapter, factors
from tests.inference.serve.servers import make_scheduler, serve_model, text_of, tiny_model
from tests.quick import quick

ASKED = [
    ("turn on the light", Sampling(), 24),
    ("turn on the light in the kitchen and the radio", Sampling(temperature=0.8, seed=1), 30),
    ("turn on the light in the garden", Sampling(temperature=1.0, top_k=30, repetition_penalty=1.2, seed=2), 20),
    ("warm", Sampling(temperature=1.0, min_p=0.2, seed=3, stop=("e",)), 30),
    ("a", Sampling(repetition_penalty=1.5), 40),
    ("turn on the light", Sampling(temperature=1.3, top_p=0.7, seed=4), 24),
]


def answer_alone(engine: Engine, prompt: str, way: Sampling, count: int, adapter: str | None = None) -> tuple[str, str | None]:
    pieces = list(Generation(engine, prompt, way, count, context=Context(engine, adapter=adapter)))
    return "".join(piece.text for piece in pieces), pieces[-1].end


def together(made: Scheduler, engine: Engine, adapters: Sequence[str | None] = (None,) * 6) -> list[tuple[str, str | None]]:
    answers: list[list[Output]] = [[] for _ in ASKED]
    for (prompt, way, count), outputs, adapter in zip(ASKED, answers, adapters, strict=True):
        ids = engine.text.encode(prompt)
        made.submit(GenerationRequest(ids=ids, sampling=way, max_new_tokens=count, deliver=outputs.append, adapter=adapter))
        made.step()
    while made.step():
        pass
    return [(text_of(outputs), outputs[-1].end) for outputs in answers]


@pytest.mark.parametrize(("blocks", "rows"), quick([(100, 128), (100, 7), (5, 128), (5, 5)], (100, 7), (5, 128)))
def test_a_batch_gives_each_request_the_answer_of_generate(engine: Engine, blocks: int, rows: int) -> None:
    pool = PagedPool(engine.shape, blocks, 16)
    caches = PagedCaches(pool, 80)
    scheduler = make_scheduler(engine, caches, max_running=4, rows=rows)
    for _ in range(2):  # the second time, the pool already has the prefixes
        assert together(scheduler, engine) == [answer_alone(engine, *next_request) for next_request in ASKED]
    assert all(pool.holders(block) <= 1 for block in range(1, blocks + 1))  # at most the prefix tree holds one
    assert (scheduler.preempted > 0) == (blocks == 5)
    next_request = GenerationRequest(ids=engine.text.encode(ASKED[1][0]), sampling=Sampling(), max_new_tokens=1, deliver=lambda out: None)
    scheduler.submit(next_request)
    scheduler.step()
    assert next_request.cached > 0


def lora(model: Path, folder: Path, seed: int) -> Path:
    """A PEFT adapter folder whose factors are all random."""
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tuned.named_parameters():
        if "lora_" in name:
            tensor.data = torch.randn(tensor.shape, generator=generator) / 2
    tuned.save_pretrained(str(folder))
    return folder


def test_a_requests_model_chooses_its_adapter(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny")
    engine = load_engine(model)
    for i, name in enumerate(("one", "two")):
        add_adapter(engine, name, lora(model, tmp_path / name, seed=i))
    adapters = [None, "one", "two", "one", "two", "one"]
    caches = PagedCaches(PagedPool(engine.shape, 40, 16), 80)
    wanted = [answer_alone(engine, *prompt, adapter) for prompt, adapter in zip(ASKED, adapters, strict=True)]
    assert together(make_scheduler(engine, caches), engine, adapters) == wanted
    merged = AutoModelForCausalLM.from_pretrained(model)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(merged, tmp_path / "two").merge_and_unload()
    ids = torch.tensor([engine.text.encode("turn on")])
    with torch.no_grad():
        right = merged.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=None)[
            0, ids.shape[1] :
        ]
    with serve_model(engine) as server:
        assert [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["tiny", "one", "two"]
        ask = {"model": "two", "prompt": "turn on", "temperature": 0, "max_tokens": 8}
        answer = httpx.post(f"{server.url}/v1/completions", json=ask).json()
        assert answer["model"] == "two"
        assert answer["choices"][0]["text"] == engine.text.decode(right.tolist())
    with pytest.raises(ConfigError, match="already has an adapter named 'one'"):
        add_adapter(engine, "one", tmp_path / "one")


def test_an_adapter_of_another_model_is_named(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(ModelError, match="there is no adapter folder"):
        factors(tmp_path / "none", engine.shape)
    other = tiny_model(tmp_path / "other")
    folder = lora(other, tmp_path / "lora", seed=0)
    narrow = load_engine(other).shape.__class__(**{**vars(engine.shape), "intermediate": 8})
    with pytest.raises(ModelError, match="it belongs to another backbone"):
        factors(folder, narrow)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_come_first_in_every_request(engine: Engine, kind: str) -> None:
    shape, generator = engine.shape, torch.Generator().manual_seed(0)
    tuned = Engine(engine.folder, engine.decoder)
    if kind == "prompt":
        tuned.prompt = torch.randn(5, shape.hidden, generator=generator).numpy()
    else:
        size = shape.layers, 5, shape.kv_heads, shape.head_dim
        tuned.prefix = torch.randn(size, generator=generator).numpy(), torch.randn(size, generator=generator).numpy()
    caches = PagedCaches(PagedPool(shape, 6, 16), 85, virtual=5)
    scheduler = make_scheduler(tuned, caches, max_running=4)
    assert scheduler.limit == 80
    wanted = [answer_alone(tuned, *prompt) for prompt in ASKED]
    assert wanted != [answer_alone(engine, *prompt) for prompt in ASKED]
    assert together(scheduler, tuned) == wanted
    assert scheduler.preempted > 0
    with pytest.raises(ConfigError, match="at most 80 together"):
        scheduler.submit(GenerationRequest(ids=[5] * 41, sampling=Sampling(), max_new_tokens=40, deliver=lambda out: None))
