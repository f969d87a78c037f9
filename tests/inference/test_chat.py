import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main as cli
from fedtune.errors import ConfigError, FedtuneError, ModelError
from fedtune.inference.chat import Conversation, EngineWriter, chat
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.generate import generate
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.generate import generate_text, open_speculation
from tests.models.build import checkpoint
from tests.tiny import tiny_llama

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tokenizer for every byte."""
    return tiny_llama(tmp_path / "m")


def with_template(folder: Path) -> Engine:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_engine(folder)


def answer_text(conversation: Conversation, request: str) -> str:
    return "".join(conversation.answer(request))


def test_turns_go_through_the_chat_template_and_reuse_the_cache(folder: Path) -> None:
    engine = with_template(folder)
    writer = EngineWriter(Context(engine))
    conversation = Conversation(writer, Sampling(), 4, system="be brief")
    first = answer_text(conversation, "hi")
    prompt = "<system>be brief<user>hi<assistant>"
    assert first == generate(engine, engine.text.encode(prompt, begin=False), max_new_tokens=4)
    second = answer_text(conversation, "and")
    prompt += f"{first}<user>and<assistant>"
    assert second == generate(engine, engine.text.encode(prompt, begin=False), max_new_tokens=4)
    assert writer.report.reused >= len(engine.text.encode("<system>be brief<user>hi<assistant>", begin=False)) - 1
    assert [m["content"] for m in conversation.messages] == ["hi", first, "and", second]


def test_without_a_template_the_text_continues(folder: Path) -> None:
    engine = load_engine(folder)
    conversation = Conversation(EngineWriter(Context(engine)), Sampling(), 3, prompt="Q: {q} A:")
    first = answer_text(conversation, "hi")
    assert first == generate(engine, "Q: hi A:", max_new_tokens=3)
    assert answer_text(conversation, "so") == generate(engine, f"Q: hi A:{first}\nQ: so A:", max_new_tokens=3)
    with pytest.raises(ConfigError, match="takes no system message"):
        Conversation(EngineWriter(Context(engine)), Sampling(), 3, system="x")


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(folder: Path) -> None:
    engine = with_template(folder)
    conversation = Conversation(EngineWriter(Context(engine), open_speculation(engine, "auto", None)), Sampling(), 8)
    for i in range(6):
        answer_text(conversation, f"turn {i}")
        assert conversation.messages[-2]["content"] == f"turn {i}"
    assert conversation.forgotten > 0 and len(conversation.messages) < 12
    with pytest.raises(ConfigError, match="exceed the model's context of 64"):
        answer_text(conversation, "long " * 100)


def test_an_interrupted_answer_stays_in_the_conversation(folder: Path) -> None:
    engine = with_template(folder)
    conversation = Conversation(EngineWriter(Context(engine)), Sampling(), 20)
    answer = conversation.answer("hi")
    begun = next(answer) + next(answer)
    answer.close()
    assert conversation.messages[-1]["content"] == begun
    fresh = Conversation(EngineWriter(Context(engine)), Sampling(), 5)
    fresh.messages = list(conversation.messages)
    conversation._length = 5
    assert answer_text(conversation, "go on") == answer_text(fresh, "go on")


# -- the command --------------------------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_an_answer_for_each_line(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = with_template(folder)
    conversation = Conversation(EngineWriter(Context(engine)), Sampling(), 4)
    want = [answer_text(conversation, "hi").strip(), answer_text(conversation, "and").strip()]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n  and\n"))
    assert cli.main(["chat", str(folder), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr() == (f"{want[0]}\n\n{want[1]}\n", "")  # an empty answer for the empty line
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 100 + "\nhi\n"))
    assert cli.main(["chat", str(folder), "--max-new-tokens", "4"]) == 2  # the error names the line, and the chat continues
    out, err = capsys.readouterr()
    assert out == "\n" + want[0] + "\n" and "exceed the model's context" in err and "1 of the requests could not" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("\udcff\nhi\n"))  # bytes that are not UTF-8, as Python reads them
    assert cli.main(["chat", str(folder), "--max-new-tokens", "4"]) == 2
    out, err = capsys.readouterr()
    assert out == "\n" + want[0] + "\n" and "the text is not UTF-8" in err


def test_models_that_cannot_chat_are_refused(tmp_path: Path, folder: Path) -> None:
    cases: list[tuple[Path, dict[str, Any], type[FedtuneError], str]] = [
        (tmp_path / "nowhere", {}, ModelError, "there is no folder"),
        (checkpoint(tmp_path / "gpt2", "gpt2"), {"kind": "int8"}, ConfigError, "has no --kind: leave it out .the engine does not support"),
        (folder, {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
        (folder, {"temperature": -1.0}, ConfigError, "temperature=-1.0"),
        (folder, {"system": "x"}, ConfigError, "no chat template"),
        (folder, {"speculate": "draft"}, ConfigError, "needs a draft model"),
        (folder, {"kv_budget": "3"}, ConfigError, "too small"),
    ]
    for model, options, kind, words in cases:
        with pytest.raises(kind, match=words):
            chat(model, read=io.StringIO("hi\n"), write=io.StringIO(), **options)


def test_transformers_chats_if_the_engine_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "gpt2", "gpt2", seed=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("turn on\nthe\n" + "turn " * 70 + "\nlamp\n"))
    capsys.readouterr()
    assert cli.main(["chat", str(folder), "--max-new-tokens", "6"]) == 2
    out, err = capsys.readouterr()
    texts, answers = ["turn on", "the", "lamp"], [line for line in out.splitlines() if line]
    assert err.count("transformers runs this model: the engine does not support model_type='gpt2'") == 1
    assert "the prompt's 70 tokens and 1 new tokens exceed the model's context of 64" in err and out.splitlines()[2] == ""
    transcript = ""
    for text, answer in zip(texts, answers, strict=True):  # without a template the text continues
        transcript += ("\n" if transcript else "") + text
        whole = generate_text(folder, transcript, max_new_tokens=6)
        assert answer == whole.strip()
        transcript += whole
        if text == "the":
            transcript = ""  # the line that was too long displaced the earlier turns
    monkeypatch.setattr(sys, "stdin", io.StringIO("turn on\n"))
    assert cli.main(["chat", str(folder), "--system", "x"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_an_encoder_decoder_takes_each_request_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = checkpoint(tmp_path / "t5", "t5", seed=3), io.StringIO()
    requests = ["turn on", "the lamp", "turn on"]
    chat(folder, read=io.StringIO("\n".join(requests) + "\n"), write=out, max_new_tokens=5, temperature=2.0, seed=2)
    expected = [generate_text(folder, request, max_new_tokens=5, temperature=2.0, seed=2).strip() for request in requests]
    assert out.getvalue().splitlines() == expected and expected[0] and expected[0] != expected[1]


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_but_not_the_chat(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000, "eos_token_id": None}))
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in tokens.items() if k != "eos_token"}))
    process = subprocess.Popen(
        [sys.executable, "-m", "fedtune.cli.main", "chat", str(folder), "--max-new-tokens", "50000", "--speculate", "none"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    try:
        for _ in range(2):
            process.stdin.write("hi\n")
            process.stdin.flush()
            assert process.stdout.read(1)  # the answer has begun and would take minutes
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            while process.stdout.read(1) != "\n":
                pass
        process.stdin.close()
        assert process.wait(60) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
