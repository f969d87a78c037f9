"""Serving on transformers: same behavior as the engine, but one request at a time."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fedtune.cli.main import main
from fedtune.errors import ConfigError, ModelError
from fedtune.export import export_hf
from fedtune.inference import generate_text
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.text import Stream, read_text
from fedtune.inference.generate import read_card
from fedtune.inference.generate_transformers import HubModel, load_model
from fedtune.inference.sequential import CONTEXT, SequentialScheduler
from fedtune.inference.serve.limits import Limits
from fedtune.inference.serve.served_model import ServedModel
from fedtune.inference.serve.server import Server
from tests.export.test_huggingface import ASK, make_run
from tests.inference.serve.chromium import open_page
from tests.inference.serve.servers import continuation, run_server, text_of
from tests.inference.serve.soak import server as process
from tests.inference.serve.test_page import ask, ready
from tests.inference.test_generate import TEMPLATE
from tests.models.build import checkpoint, hub
from tests.quick import quick

PROMPT = "turn on the light in a room"
ASKED = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}


@dataclass
class Here:
    url: str
    scheduler: SequentialScheduler
    server: Server

    def post(self, payload: Any, path: str = "completions") -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=payload, timeout=20)


@dataclass(frozen=True, kw_only=True)
class Slow(HubModel):
    """A model with a delay per token."""

    pace: float

    def write(self, ids: Any, most: int, choose: Callable[[np.ndarray], int | None]) -> None:
        def slowly(logits: np.ndarray) -> int | None:
            time.sleep(self.pace)
            return choose(logits)

        super().write(ids, most, slowly)


@contextlib.contextmanager
def serve_model(
    model: HubModel, *, queue: int = 8, pace: float = 0.0, limits: Limits | None = None, prompt: str | None = None
) -> Iterator[Here]:
    model = Slow(**vars(model), pace=pace) if pace else model
    scheduler = SequentialScheduler(model, max_waiting=queue)
    with run_server(scheduler, ServedModel(name="tiny", text=model.text, prompt=prompt), limits) as (where, server):
        yield Here(where, scheduler, server)


def endless(folder: Path) -> Path:
    """A checkpoint without an end token."""
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token_id"}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "eos_token"} | {"pad_token": "<unk>"})
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(checkpoint(tmp_path_factory.mktemp("gpt2") / "tiny", "gpt2", seed=2))


@pytest.fixture(scope="module")
def gpt2(folder: Path) -> HubModel:
    return load_model(folder, {})


@pytest.fixture(scope="module")
def here(gpt2: HubModel) -> Iterator[Here]:
    with serve_model(gpt2) as server:
        yield server


def by_hand(folder: Path, ids: list[int], count: int, kind: Any = AutoModelForCausalLM) -> list[int]:
    """The greedy answer of `model.generate`."""
    model, inputs = kind.from_pretrained(folder), torch.tensor([ids])
    out = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False)[0].tolist()
    return out[1:] if kind is AutoModelForSeq2SeqLM else out[len(ids) :]


def wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def answer_alone(model: HubModel, ids: list[int], sampling: Sampling, count: int, **request: Any) -> list[Output]:
    outputs: list[Output] = []
    scheduler = SequentialScheduler(model)
    scheduler.submit(GenerationRequest(ids=ids, sampling=sampling, max_new_tokens=count, deliver=outputs.append, **request))
    assert scheduler.step() and not scheduler.step()
    return outputs


def test_greedy_equals_generate(here: Here, folder: Path) -> None:
    text = read_text(folder)
    ids = text.encode(PROMPT)
    tokens = by_hand(folder, ids, 12)
    answer = here.post(ASKED).json()
    assert answer["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "text": continuation(text, ids, tokens)}]
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 12,
        "total_tokens": len(ids) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert here.post(ASKED | {"prompt": ids}).json()["choices"] == answer["choices"]
    assert generate_text(folder, PROMPT, max_new_tokens=12) == text.decode(tokens)


def test_the_openai_client_works_with_transformers(here: Here, gpt2: HubModel) -> None:
    client = openai.OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    ask: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 1.0, "seed": 3, "max_tokens": 20, "top_p": 0.9}
    whole = client.completions.create(**ask, logprobs=2)
    wanted = answer_alone(gpt2, gpt2.text.encode(PROMPT), Sampling(temperature=1.0, seed=3, top_p=0.9), 20, joins=True, rivals=2)
    assert whole.choices[0].text == text_of(wanted) and whole.choices[0].text.startswith(" ")
    assert whole.choices[0].logprobs and whole.choices[0].logprobs.token_logprobs == pytest.approx([out.logprob for out in wanted])
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(parts) == whole.choices[0].text and len(parts) > 5
    assert chunks[-1].usage == whole.usage
    stop = text_of(wanted).split()[4]
    choice = client.completions.create(**ask, stop=[stop, "~~"]).choices[0]
    assert (choice.text, choice.finish_reason) == (text_of(wanted)[: text_of(wanted).index(stop)], "stop")
    with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])


def test_log_probabilities_are_the_models_own(gpt2: HubModel, folder: Path) -> None:
    ids = gpt2.text.encode(PROMPT)
    outputs = answer_alone(gpt2, ids, Sampling(temperature=0.5, seed=1, repetition_penalty=1.3), 9, rivals=3)
    tokens = [out.token for out in outputs]
    with torch.no_grad():
        logs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    for out, row in zip(outputs, logs, strict=True):
        assert out.logprob == pytest.approx(float(row[out.token]), abs=1e-4)
        assert [token for token, _ in out.rivals] == row.topk(3).indices.tolist()


def test_a_chat_in_the_runs_template(gpt2: HubModel, folder: Path) -> None:
    with serve_model(gpt2, prompt="set {q} to") as server:
        chat = {"model": "tiny", "temperature": 0, "max_tokens": 6, "messages": [{"role": "user", "content": "lamp"}]}
        answer = server.post(chat, "chat/completions").json()["choices"][0]["message"]["content"]
        assert answer == generate_text(folder, "set lamp to", max_new_tokens=6)
        assert httpx.get(server.url).status_code == 200
        assert httpx.get(f"{server.url}/v1/models/tiny").json()["context"] == 64


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"max_tokens": 60}, "exceed the model's context of 64"),
        ({"prompt": "turn " * 80}, "fill the model's context of 64"),
        ({"prompt": [5, 2000]}, "token id 2000 in the prompt is out of range"),
        ({"prompt": "turn", "max_tokens": 2000}, "exceed this server's limit of 1024"),
    ],
)
def test_requests_beyond_the_limits_are_refused(here: Here, change: dict[str, Any], why: str) -> None:
    refused = here.post(ASKED | change)
    assert (refused.status_code, why in refused.json()["error"]["message"]) == (400, True)


@pytest.mark.slow
def test_one_request_runs_while_others_wait_and_more_are_told_to_retry(gpt2: HubModel) -> None:
    with serve_model(gpt2, queue=1, pace=0.005) as server:
        got: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: got.append(server.post(ASKED | {"max_tokens": 40}))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.scheduler.load == (1, 1))
        refused = server.post(ASKED)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        for thread in threads:
            thread.join()
        texts = [answer.json()["choices"][0]["text"] for answer in got]
        assert texts[0] == texts[1] and server.post(ASKED).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_ends_the_work(gpt2: HubModel, stream: bool) -> None:
    with serve_model(gpt2, pace=0.01) as server:
        body = json.dumps(ASKED | {"max_tokens": 50, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as line:
            line.sendall(head.encode() + body)
            wait_for(lambda: server.scheduler.passes > 1)
        wait_for(lambda: server.scheduler.load == (0, 0))
        assert server.scheduler.passes < 50


def test_running_and_waiting_requests_time_out(gpt2: HubModel) -> None:
    with serve_model(gpt2, limits=Limits(timeout=0.2, grace=1), pace=0.02) as server:
        got: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: got.append(server.post(ASKED | {"max_tokens": 50}))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in got] == [(504, "timeout")] * 2
        assert server.scheduler.load == (0, 0) and server.scheduler.passes < 50


@pytest.mark.parametrize(("grace", "status"), [(5.0, 200), (0.05, 503)])
def test_a_stop_completes_an_answer_within_the_grace_period(gpt2: HubModel, grace: float, status: int) -> None:
    with serve_model(gpt2, limits=Limits(grace=grace), pace=0.01) as server:
        got: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: got.append(server.post(ASKED | {"max_tokens": 40})))
        thread.start()
        wait_for(lambda: server.scheduler.load == (1, 0))
        server.server.stop()
        if grace > 1:  # else the server has closed the stream
            assert server.post(ASKED).status_code == 503
        thread.join()
        assert got[0].status_code == status


def test_a_failing_request_does_not_affect_others(
    gpt2: HubModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serve_model(gpt2) as server:
        with monkeypatch.context() as patch:
            patch.setattr(gpt2.model.lm_head, "forward", lambda hidden: torch.full((*hidden.shape[:2], gpt2.vocabulary), torch.nan))
            assert server.post(ASKED).status_code == 500
            assert "logits are not finite" in caplog.text
            with pytest.raises(ModelError, match="transformers failed on this model: the model's logits are not finite"):
                list(SequentialScheduler(gpt2).write([3, 4], Sampling(), 5))
        assert server.post(ASKED).status_code == 200 and server.scheduler.load == (0, 0)


def test_an_answer_may_be_abandoned_for_another(gpt2: HubModel) -> None:
    one = SequentialScheduler(gpt2)
    first = one.write([3, 4], Sampling(), 40)
    next(first)
    first.close()
    assert one.load == (0, 0) and one.passes < 40
    assert "".join(one.write([3, 4], Sampling(), 8)) == text_of(answer_alone(gpt2, [3, 4], Sampling(), 8))
    with pytest.raises(ConfigError, match="exceed the model's context of 64"):
        list(one.write([3] * 60, Sampling(), 5))


def test_an_encoder_decoder_is_served(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "tiny", "t5", seed=1)
    model = load_model(folder, {})
    assert SequentialScheduler(model).limit == CONTEXT  # T5's config has no context length
    with serve_model(model) as server:
        ids = [*read_text(folder).encode("turn on"), 1]
        tokens = by_hand(folder, ids, 7, AutoModelForSeq2SeqLM)
        answer = server.post(ASKED | {"prompt": "turn on", "max_tokens": 7}).json()
        assert answer["choices"][0]["text"] == model.text.decode(tokens) == generate_text(folder, "turn on", max_new_tokens=7)
        assert answer["usage"]["prompt_tokens"] == len(ids) and answer["choices"][0]["text"]
        way: dict[str, Any] = {"temperature": 1.5, "seed": 4, "repetition_penalty": 1.4}
        wanted = generate_text(folder, "turn on", max_new_tokens=7, **way)
        assert server.post(ASKED | {"prompt": "turn on", "max_tokens": 7, **way}).json()["choices"][0]["text"] == wanted


@pytest.mark.parametrize(
    ("kind", "method"),
    quick(
        [("llama", "prefix"), ("llama", "adapter"), ("gpt2", "prompt"), ("t5", "ptuning_v2")],
        ("llama", "adapter"),
        ("t5", "ptuning_v2"),
    ),
)
def test_an_adapter_beside_its_model_is_served(tmp_path: Path, kind: str, method: str) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", kind, seed=3)), ASK, data=TEMPLATE, method=method, std=1.0)
    out = export_hf(run, run / "merged")
    card = read_card(out)
    model = load_model(out, card)
    live.model.eval()
    ids = torch.tensor([model.text.encode("set lamp to")])
    with torch.no_grad():
        tokens = live.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    tokens = tokens[0, 1 if kind == "t5" else ids.shape[1] :].tolist()
    with serve_model(model, prompt=card["prompt"]) as server:
        chat = {"model": "tiny", "temperature": 0, "max_tokens": 6, "messages": [{"role": "user", "content": "lamp"}]}
        assert server.post(chat, "chat/completions").json()["choices"][0]["message"]["content"] == model.text.decode(tokens).lstrip()
    assert server.scheduler.limit == (CONTEXT if kind == "t5" else 64 - (0 if method == "adapter" else card["peft"]["tokens"]))


def test_a_chat_template_of_transformers_is_used(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "tiny", "gpt2")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}{{ bos_token }}")
    model = load_model(folder, {})
    messages = [{"role": "user", "content": "turn"}, {"role": "assistant", "content": "on"}, {"role": "user", "content": "the"}]
    assert model.text.chat(messages) == "turn on the <s>"
    with serve_model(model) as server:
        chat = {"model": "tiny", "temperature": 0, "max_tokens": 5, "messages": messages}
        answer = server.post(chat, "chat/completions").json()
        assert answer["usage"]["prompt_tokens"] == 4
        assert answer["choices"][0]["message"]["content"] == text_of(answer_alone(model, [3, 4, 6, 0], Sampling(), 5))


def test_a_tokenizer_without_tokenizer_json_is_served(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=260, n_embd=8, n_layer=1, n_head=2, n_positions=40, bos_token_id=257, eos_token_id=257)
    folder = checkpoint(tmp_path / "tiny", "gpt2", config=config)
    for file in folder.glob("*token*"):
        file.unlink()
    letters = bytes_to_unicode()
    vocabulary = {letters[byte]: byte for byte in range(256)} | {"\u0120t": 256, "<|endoftext|>": 257}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n\u0120 t\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')
    model = load_model(folder, {})
    assert model.text.encode("a té") == [97, 256, *"é".encode()]
    assert model.text.ends == {257} == model.text.special
    stream = Stream(model.text)
    parts = [stream.push(token) for token in [*"né".encode(), 256, *"€".encode(), 65]]
    assert parts == ["n", "", "é", " t", "", "", "€", "A"]
    with serve_model(model) as server:
        answer = server.post(ASKED | {"prompt": "a té"}).json()
        assert answer["usage"]["prompt_tokens"] == 4 and answer["choices"][0]["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize(
    "options",
    [["--kind", "int8"], ["--kv-budget", "64MB"], ["--adapters", "a=b"], ["--max-concurrent", "4"]],
)
def test_options_of_the_engine_are_refused(folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), "--port", "0", *options]) == 2
    err = capsys.readouterr().err
    assert f"runs on transformers, which has no {options[0]}: leave it out" in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_page_works_with_transformers(gpt2: HubModel, folder: Path) -> None:
    with serve_model(gpt2, prompt="set {q} to") as server, open_page(server.url) as page:
        ready(page)
        ask(page, "lamp", temperature="0", tokens="7")  # a chat: the run's template is there
        page.wait("/7 tokens .* stopped at max tokens/.test(document.querySelector('.figures')?.textContent)")
        wanted = generate_text(folder, "set lamp to", max_new_tokens=7)
        assert page.run("[...document.querySelectorAll('.turn')].map((turn) => turn.textContent)") == ["lamp", wanted]
        page.run("document.getElementById('complete').click()")
        ask(page, "turn on")
        page.wait("document.querySelectorAll('.figures').length === 2 && !document.querySelector('.busy')")
        wanted = text_of(answer_alone(gpt2, gpt2.text.encode("turn on"), Sampling(), 7, joins=True))
        assert page.run("[...document.querySelectorAll('.turn')].at(-1).textContent") == "turn on" + wanted
        assert not page.complaints


@pytest.mark.slow
def test_the_serve_command_uses_transformers(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with process(folder) as (address, running):
        answer = httpx.post(f"{address}/v1/completions", json=ASKED, timeout=60).json()
        assert answer["choices"][0]["finish_reason"] == "length"
    assert running.returncode == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("fedtune: transformers runs this model: the engine does not support model_type='gpt2'")
    assert lines[1:] == ["fedtune: tiny: one request at a time, 64 waiting, up to 64 tokens each"]
