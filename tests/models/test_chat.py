"""task=chat: which turns of a conversation are learned, what is cut, and how answers are graded."""

import copy
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.clients.workspace import Workspace
from fedtune.config import Config, EvalConfig, InferenceConfig, TaskConfig
from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import IGNORED, Example, task_of
from fedtune.errors import ConfigError, DataError
from fedtune.experiment import simulate
from fedtune.inference.generate import encode_request
from fedtune.models import Backbone, evaluate, load_backbone
from fedtune.models.chat_template import Conversation, encode_conversation, encode_start
from fedtune.models.evaluation import generate_answers, score_examples
from fedtune.models.tasks._answers import rouge_l, token_f1
from fedtune.runs.report import read_metrics
from tests.export.test_capitals import QUESTIONS, chatml
from tests.tiny import tiny_config

CHAT = TaskConfig(kind="chat", max_length=64, max_new_tokens=6)
ASKED = [*QUESTIONS]


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(chatml(tmp_path_factory.mktemp("chatml")), CHAT)


def encode(backbone: Backbone, *chats: list[dict[str, Any]], keep_short: bool = False, **changes: Any) -> list[Example]:
    rows = RowSet({"messages": [json.dumps(chat) for chat in chats]})
    task = task_of(dataclasses.replace(CHAT, **changes))
    return task.encode(rows, backbone.tokenizer, encoder_decoder=False, keep_short=keep_short)


def targets(backbone: Backbone, example: Example) -> str:
    return backbone.tokenizer.decode(example.labels[example.labels != IGNORED].tolist())


LONG = turns("Hello?", "Rome.", "And?", "Lima.", "And?", "Cairo.")


def test_every_answer_is_a_target_and_the_last_is_the_graded_one(backbone: Backbone) -> None:
    (example,) = encode(backbone, LONG)
    assert targets(backbone, example) == "Rome.<|im_end|>Lima.<|im_end|>Cairo.<|im_end|>"
    assert example.answer == "Cairo."
    text = backbone.tokenizer.decode(example.input_ids[: example.prompt_length].tolist())
    assert text.endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_in_training_is_the_prompt_of_generate(backbone: Backbone, tmp_path: Path) -> None:
    from fedtune.inference.engine.text import read_text

    backbone.tokenizer.save_pretrained(tmp_path)
    (example,) = encode(backbone, turns(ASKED[0], "Paris."))
    ids = encode_request(read_text(tmp_path), ASKED[0], {"task": "chat", "prompt": None})
    assert ids == example.input_ids[: example.prompt_length].tolist()


def test_later_turns_that_do_not_fit_are_left_out_whole_and_counted(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    (whole,) = encode(backbone, LONG)
    with caplog.at_level(logging.WARNING):
        (cut,) = encode(backbone, LONG, max_length=len(whole.input_ids) - 1)
    assert targets(backbone, cut) == "Rome.<|im_end|>Lima.<|im_end|>" and cut.answer == "Lima."
    assert cut.input_ids.tolist() == whole.input_ids[: len(cut.input_ids)].tolist()
    assert "later turns of 1 of 1 conversations are left out, and 0 conversations whose first answer does not fit" in caplog.text


def test_a_conversation_without_a_fitting_answer_is_left_out(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    short = turns("?", "!")
    with caplog.at_level(logging.WARNING):
        (kept,) = encode(backbone, turns(" ".join(ASKED), "Rome."), short, max_length=16)
    assert kept.answer == "!" and "and 1 conversations whose first answer does not fit" in caplog.text
    silent, other = encode(backbone, turns(" ".join(ASKED), "Rome."), short, max_length=16, keep_short=True)
    assert (silent.labels == IGNORED).all() and task_of(CHAT).count(silent) == 0 and other.answer == "!"


CALL = {"type": "function", "function": {"name": "capital", "arguments": {"of": "Italy"}}}
CALLS = [*turns("?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "Rome"}, turns("?", "!")[1]]


def test_conversations_whose_tool_calls_are_not_shown_are_left_out(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (kept,) = encode(backbone, CALLS, turns("?", "!"))
    assert kept.answer == "!" and "turns" not in caplog.text
    assert "1 of 2 conversations are left out, because the model's chat template does not show their tool calls" in caplog.text
    silent, other = encode(backbone, CALLS, turns("?", "!"), keep_short=True)
    assert task_of(CHAT).count(silent) == 0 and other.answer == "!"


def test_tools_of_a_row_are_in_its_prompt(backbone: Backbone) -> None:
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = "{% for tool in tools or [] %}<{{ tool.name }}>{% endfor %}" + tokenizer.chat_template
    rows = RowSet({"messages": [json.dumps(turns("?", "!"))] * 2, "tools": [json.dumps([{"name": "capital"}]), ""]})
    with_tools, without = task_of(CHAT).encode(rows, tokenizer, encoder_decoder=False, keep_short=False)
    assert tokenizer.decode(with_tools.input_ids[: with_tools.prompt_length].tolist()).startswith("<capital><|im_start|>")
    assert tokenizer.decode(without.input_ids.tolist()).startswith("<|im_start|>") and with_tools.answer == without.answer == "!"


def test_a_row_that_the_template_refuses_is_named(backbone: Backbone) -> None:
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = "{% if messages[0].content == 'b' %}{{ raise_exception('no b here') }}{% endif %}" + tokenizer.chat_template
    chats = {"messages": [json.dumps(turns(text, "!")) for text in "abc"]}
    rows = RowSet({**chats, "row": [f"training row {n}" for n in (3, 5, 8)]})
    sentence = "the model's chat template refuses a conversation (no b here): correct or remove it"
    for table, where in ((rows, "training row 5"), (RowSet(chats), "row 2")):
        with pytest.raises(DataError) as refused:
            task_of(CHAT).encode(table, tokenizer, encoder_decoder=False, keep_short=False)
        assert str(refused.value) == f"{where}: {sentence}"


def test_the_date_of_a_template_is_fixed(backbone: Backbone) -> None:
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = "{{- strftime_now('%d %m %Y') }}" + tokenizer.chat_template
    rows = RowSet({"messages": [json.dumps(turns("?", "!"))]})
    for changes, date in (({}, "01 01 2026"), ({"date": "2024-02-29"}, "29 02 2024")):
        (example,) = task_of(dataclasses.replace(CHAT, **changes)).encode(rows, tokenizer, encoder_decoder=False, keep_short=False)
        assert tokenizer.decode(example.input_ids.tolist()).startswith(date)


def chat_config(folder: Path, rows: list[list[dict[str, Any]]], **task: Any) -> Config:
    named = [{"messages": messages, "client": f"c{i % 4}"} for i, messages in enumerate(rows)]
    config = tiny_config(folder, named, rounds=1)
    data = dataclasses.replace(config.data, test_path=None, held_out=0.0, test_fraction=0.0)
    return dataclasses.replace(config, model=chatml(folder / "chat"), data=data, task=dataclasses.replace(CHAT, **task))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [turns(" ".join(ASKED), "Rome."), turns(ASKED[0] + ASKED[1], "Rome.")] * 4,
            r"none of 8 conversations fits into task.max_length=16; the shortest needs (\d+) tokens: raise task.max_length",
        ),
        (
            [CALLS] * 8,
            "the model's chat template does not show the tool calls of 8 conversations: give rows without tool calls, or a model whose "
            "template shows them",
        ),
    ],
    ids=["too long", "tool calls"],
)
def test_a_run_without_a_usable_conversation_is_refused_before_it_begins(tmp_path: Path, rows: list[Any], sentence: str) -> None:
    config = chat_config(tmp_path, rows, max_length=16)
    with pytest.raises(DataError) as refused:
        simulate(config)
    found = re.fullmatch("no client has a training row that it can use: " + sentence, str(refused.value))
    assert found and not Path(config.output_dir).exists()
    if found.groups():  # exactly the stated number of tokens is enough for two rows
        longer = dataclasses.replace(config, task=dataclasses.replace(config.task, max_length=int(found[1])))
        Workspace(longer).check_examples()
        with pytest.raises(DataError, match="no client"):
            Workspace(dataclasses.replace(longer, task=dataclasses.replace(longer.task, max_length=int(found[1]) - 1))).check_examples()


def test_a_global_test_without_a_usable_conversation_is_refused(tmp_path: Path) -> None:
    config = chat_config(tmp_path, [turns("?", "!")] * 8, max_length=16)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"messages": turns(" ".join(ASKED), "Rome.")}) + "\n")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_path=str(path)))
    Workspace(config).check_examples()  # a test that no client scores
    with pytest.raises(DataError, match="^the global test has no row that can be scored: none of 1 conversations fits into task"):
        Workspace(dataclasses.replace(config, eval=EvalConfig(where="server", clients=0))).check_examples()


@pytest.mark.slow
def test_a_client_whose_conversations_do_not_fit_reports_it(tmp_path: Path) -> None:
    config = chat_config(tmp_path, [turns(" ".join(ASKED), "Rome.") if i % 4 == 1 else turns("?", "!") for i in range(8)], max_length=16)
    (row,) = [row for row in read_metrics(simulate(config)) if row["client"] == "c1" and row.get("dropped")]
    why = "none of 2 conversations fits into task.max_length=16; the shortest needs "
    assert row["dropped"].startswith(f"failed: client c1 has no training row that it can use: {why}")


def test_exact_match_is_that_of_the_generated_answers(backbone: Backbone) -> None:
    examples = encode(backbone, *[turns("Hello?", "Rome.", q, a) for q, a in QUESTIONS.items()], max_new_tokens=4)
    task = dataclasses.replace(CHAT, max_new_tokens=4)
    answers = generate_answers(backbone.model, backbone.tokenizer, examples, task, batch_size=4)
    right = [dataclasses.replace(e, answer=text) if i % 2 else e for i, (e, text) in enumerate(zip(examples, answers, strict=True))]
    assert evaluate(backbone.model, backbone.tokenizer, right, task, batch_size=4)["exact_match"] == 0.5
    silent = Example(np.full(2, 5, np.int32), np.full(2, IGNORED, np.int32))
    assert evaluate(backbone.model, backbone.tokenizer, [*right, silent], task, batch_size=4)["exact_match"] == 0.5


def test_a_first_answer_is_learned_without_what_comes_before_it(backbone: Backbone) -> None:
    first = [{"role": "assistant", "content": "Rome."}]
    examples = encode(backbone, first, [*first, *turns("And?", "Lima.")])
    assert [targets(backbone, e) for e in examples] == ["Rome.<|im_end|>", "Rome.<|im_end|>Lima.<|im_end|>"]
    assert backbone.tokenizer.decode(examples[0].input_ids[: examples[0].prompt_length].tolist()) == "<|im_start|>assistant\n"


def test_a_template_that_starts_with_the_answer_is_refused(backbone: Backbone) -> None:
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DataError, match="template does not show the answer 'Rome.': remove the row"):
        encode_conversation(tokenizer, turns("And?", "Rome."))


def test_a_long_conversation_is_not_encoded_whole(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []  # an exact encoding takes time quadratic in the number of messages

    def count_messages(conversation: Conversation, count: int) -> Any:
        lengths.append(count)
        return encode_start(conversation, count)

    monkeypatch.setattr("fedtune.models.chat_template.encode_start", count_messages)
    (cut,) = encode(backbone, turns(*["And?", "Rome."] * 2000))
    assert len(lengths) < 20 and max(lengths) < 40
    assert cut.input_ids.tolist() == encode(backbone, turns(*["And?", "Rome."] * 4))[0].input_ids.tolist()
    assert 0 <= 64 - len(cut.input_ids) < len(encode(backbone, turns("And?", "Rome."))[0].input_ids)


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "rouge"),
    [
        ("the red lamp", "red lamp on", 2 / 3, 2 / 3),
        ("lamp red", "Red lamp!", 1.0, 0.5),
        ("a a b", "a b b", 2 / 3, 2 / 3),
        ("Österreich grüßt", "österreich", 2 / 3, 2 / 3),
        ("東京", "東京", 1.0, 1.0),
        ("", "red", 0.0, 0.0),
        ("", "!", 1.0, 1.0),
    ],
)
def test_overlap_by_hand(answer: str, reference: str, f1: float, rouge: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert rouge_l(answer, reference) == pytest.approx(rouge)


def test_overlap_is_that_of_the_generated_answers(backbone: Backbone) -> None:
    task = dataclasses.replace(CHAT, overlap=True)
    examples = encode(backbone, *[turns(q, a) for q, a in QUESTIONS.items()])
    answers = generate_answers(backbone.model, backbone.tokenizer, examples, task, batch_size=4)
    half = [dataclasses.replace(e, answer=f"{text} lamp") for e, text in zip(examples, answers, strict=True)]
    found = evaluate(backbone.model, backbone.tokenizer, half, task, batch_size=4)
    pairs = list(zip(answers, half, strict=True))
    assert found["token_f1"] == pytest.approx(sum(token_f1(text, e.answer) for text, e in pairs) / len(half))
    assert found["rouge_l"] == pytest.approx(sum(rouge_l(text, e.answer) for text, e in pairs) / len(half))
    assert found["exact_match"] == 0 and found["rouge_l"] > 0
    plain = score_examples(backbone.model, backbone.tokenizer, examples, CHAT, batch_size=4)
    assert all(score.detail.f1 is None for score in plain)


def test_a_template_that_is_not_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": q, "answer": a, "client": c} for c in "abcd" for q, a in QUESTIONS.items()]
    config = tiny_config(tmp_path, rows, rounds=1)
    config = dataclasses.replace(
        config,
        model=chatml(tmp_path / "chat"),
        task=TaskConfig(kind="instruction", max_length=32, max_new_tokens=4),
        data=dataclasses.replace(config.data, test_path=None),
    )
    simulate(config)
    sentence = "the model has a chat template, which task.kind=instruction does not use: for a model that was tuned to chat, take task=chat"
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    rows = [{"messages": turns(row["prompt"], row["answer"]), "client": row["client"]} for row in rows]
    path = Path(config.data.path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"eval": EvalConfig(where="server", clients=0), "inference": InferenceConfig(samples=2)}
    run = simulate(dataclasses.replace(config, task=dataclasses.replace(config.task, kind="chat"), **asked))
    assert "chat template, which" not in capsys.readouterr().err
    assert (run / "adapter/chat_template.jinja").read_text() == (tmp_path / "chat/chat_template.jinja").read_text()
    by_round = {r["round"]: r["answers"] for r in read_metrics(run) if r["client"] is None}
    final = [sample["after"] for sample in json.loads((run / "answers.json").read_text())]
    assert by_round.keys() == {0, 1} and by_round[1] == final and len(final) == 2
    assert "answers after 2 rounds" in (run / "report.html").read_text()
    assert "conversations in the chat template of chat_template.jinja" in (run / "adapter/README.md").read_text()


def test_answers_need_space_in_the_context(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^task.date=soon is not a date: write YYYY-MM-DD, such as 2026-01-01$"):
        task_of(dataclasses.replace(CHAT, date="soon")).check(Config())
    with pytest.raises(ConfigError, match=r"task\.max_new_tokens=6 leaves no room for a prompt in task\.max_length=6"):
        task_of(dataclasses.replace(CHAT, max_length=6)).check(Config())
