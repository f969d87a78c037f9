"""The targets of a conversation, written out by hand for the chat templates of the public model families."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from fedtune.contracts.task import IGNORED
from fedtune.errors import DataError, ModelError
from fedtune.models.chat_template import Conversation, answer_end, encode_conversation, ensure_template
from tests.models import templates
from tests.models.templates import FAMILIES

Messages = list[dict[str, Any]]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "id": "abcdef123", "function": {"name": "capital", "arguments": {"of": "Italy"}}}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS: dict[str, Messages] = {
    "one": [user("What is the capital of France?"), reply("Paris.")],
    "three": [user("France?"), reply("Paris."), user("Italy?"), reply("Rome"), user("Spain?"), reply("Madrid.")],
    "system": [SYSTEM, user("France?"), reply("Paris."), user("Italy?"), reply("Rome")],
    "blanks": [user(" France? "), reply(" Paris \n"), user("Italy?\n"), reply("\nRome ")],
    "unicode": [user("Où?"), reply("À Zürich 東京 🙂"), user("?"), reply("é")],
    "tools": [
        user("Italy?"), reply("", tool_calls=[CALL]), {"role": "tool", "content": "Rome", "tool_call_id": "abcdef123"},
        reply("It is Rome."), user("Sure?"), reply("Yes."),
    ],
    "system, tools": [
        SYSTEM, user("Italy?"), reply("", tool_calls=[CALL]), {"role": "tool", "content": "Rome", "tool_call_id": "abcdef123"},
        reply("It is Rome."), user("Sure?"), reply("Yes."),
    ],
    "thoughts": [user("France?"), reply("Paris", reasoning_content="Hm."), user("Italy?"), reply("Rome", reasoning_content="Easy.")],
    "inline": [user("France?"), reply("<think>\nHm.\n</think>\n\nParis"), user("Italy?"), reply("<think>\nEasy.\n</think>\n\nRome")],
    "empty": [user("France?"), reply(""), user("Italy?"), reply("")],
    "greeting": [reply("Hello"), user("Italy?"), reply("Rome")],
}  # fmt: skip
ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."
Expected = dict[str, "list[str] | str"]  # case → the targets (· is the family's end token), or the template's reason for a refusal

_VERBATIM: Expected = {
    "one": ["Paris.·"],
    "three": ["Paris.·", "Rome·", "Madrid.·"],
    "system": ["Paris.·", "Rome·"],
    "blanks": [" Paris \n·", "\nRome ·"],
    "unicode": ["À Zürich 東京 🙂·", "é·"],
    "thoughts": ["Paris·", "Rome·"],
    "empty": ["·", "·"],
    "greeting": ["Hello·", "Rome·"],
}
_TRIMMED: Expected = {**_VERBATIM, "blanks": ["Paris·", "Rome·"]}
_SPACED: Expected = {  # with a blank before the answer, which the model also writes
    "one": [" Paris.·"],
    "three": [" Paris.·", " Rome·", " Madrid.·"],
    "system": [" Paris.·", " Rome·"],
    "blanks": [" Paris·", " Rome·"],
    "unicode": [" À Zürich 東京 🙂·", " é·"],
    "thoughts": [" Paris·", " Rome·"],
    "empty": [" ·", " ·"],
    "greeting": ALTERNATE,
}
_CALL = '<tool_call>\n{"name": "capital", "arguments": {"of": "Italy"}}\n</tool_call>·'
_TOOLS: Expected = {"tools": [_CALL, "It is Rome.·", "Yes.·"], "system, tools": [_CALL, "It is Rome.·", "Yes.·"]}
_MISTRAL_CALL = '[TOOL_CALLS] [{"name": "capital", "arguments": {"of": "Italy"}, "id": "abcdef123"}]·'
_LLAMA_CALL = '{"name": "capital", "parameters": {"of": "Italy"}}·'
_THINKING: Expected = {  # thoughts only in the last answer, which always has a think block
    "one": ["<think>\n\n</think>\n\nParis.·"],
    "three": ["Paris.·", "Rome·", "<think>\n\n</think>\n\nMadrid.·"],
    "system": ["Paris.·", "<think>\n\n</think>\n\nRome·"],
    "blanks": [" Paris \n·", "<think>\n\n</think>\n\nRome ·"],
    "unicode": ["À Zürich 東京 🙂·", "<think>\n\n</think>\n\né·"],
    "tools": [_CALL, "It is Rome.·", "<think>\n\n</think>\n\nYes.·"],
    "thoughts": ["Paris·", "<think>\nEasy.\n</think>\n\nRome·"],
    "inline": ["Paris·", "<think>\nEasy.\n</think>\n\nRome·"],
    "empty": ["·", "<think>\n\n</think>\n\n·"],
    "greeting": ["Hello·", "<think>\n\n</think>\n\nRome·"],
}
EXPECTED: dict[str, Expected] = {
    "chatml": _VERBATIM,
    "qwen2": {**_VERBATIM, **_TOOLS},
    "qwen3": _THINKING,
    "qwen3 off": {  # the prompt has an empty think block
        **_VERBATIM,
        **_TOOLS,
        "blanks": [" Paris \n·", "Rome ·"],
        "inline": ["Paris·", "Easy.\n</think>\n\nRome·"],
    },
    "qwen3 always": {  # the prompt opens the think block
        "one": ["\n</think>\n\nParis.·"],
        "three": ["Paris.·", "Rome·", "\n</think>\n\nMadrid.·"],
        "tools": [_CALL, "It is Rome.·", "\n</think>\n\nYes.·"],
        "thoughts": ["Paris·", "Easy.\n</think>\n\nRome·"],
        "inline": ["Paris·", "Easy.\n</think>\n\nRome·"],
    },
    "llama2": {
        "one": [" Paris. ·"],
        "three": [" Paris. ·", " Rome ·", " Madrid. ·"],
        "system": [" Paris. ·", " Rome ·"],
        "blanks": [" Paris ·", " Rome ·"],
        "unicode": [" À Zürich 東京 🙂 ·", " é ·"],
        "empty": ["  ·", "  ·"],
        "tools": ALTERNATE,
        "greeting": ALTERNATE,
    },
    "llama3": {**_TRIMMED, "tools": [_LLAMA_CALL, "It is Rome.·", "Yes.·"], "system, tools": [_LLAMA_CALL, "It is Rome.·", "Yes.·"]},
    "mistral1": {
        "one": ["Paris.·"],
        "three": ["Paris.·", "Rome·", "Madrid.·"],
        "system": ALTERNATE,
        "blanks": [" Paris \n·", "\nRome ·"],
        "unicode": ["À Zürich 東京 🙂·", "é·"],
        "empty": ["·", "·"],
        "tools": ALTERNATE,
        "greeting": ALTERNATE,
    },
    "mistral2": {"three": ["Paris.·", "Rome·", "Madrid.·"], "blanks": [" Paris \n·", "\nRome ·"], "empty": ["·", "·"], "tools": ALTERNATE},
    "mistral3": {
        **_SPACED,
        "tools": [_MISTRAL_CALL, " It is Rome.·", " Yes.·"],
        "system, tools": [_MISTRAL_CALL, " It is Rome.·", " Yes.·"],
    },
    "mistral7": {**_VERBATIM, "tools": "Only user, system and assistant roles are supported!"},
    "gemma": {**_TRIMMED, "system": "System role not supported", "tools": ALTERNATE, "greeting": ALTERNATE},
    "phi3": {  # its tokenizer puts a blank before every text that follows a special token
        "one": [" Paris.·"],
        "three": [" Paris.·", " Rome·", " Madrid.·"],
        "system": [" Paris.·", " Rome·"],
        "blanks": ["  Paris \n·", " \nRome ·"],
        "unicode": [" À Zürich 東京 🙂·", " é·"],
        "empty": ["·", "·"],
        "greeting": [" Hello·", " Rome·"],
    },
    "phi4": _VERBATIM,
}
MARKED = {"qwen3 off": {**_THINKING, **_TOOLS}, "qwen3 always": _THINKING}  # templates whose marks begin before the prompt ends
del MARKED["qwen3 off"]["system, tools"], MARKED["qwen3 off"]["tools"]
OTHER_PROMPT = {  # templates whose tokens before the last answer differ from the prompt's
    ("qwen3 off", "thoughts"): "the row's answer has thoughts, the prompt an empty think block",
    ("qwen3 off", "inline"): "likewise",
    ("phi3", "blanks"): "the role's token takes the white space after it, so that the earlier answer is split from it",
}


def render(tokenizer: Any, messages: Messages, *, generate: bool = False) -> str:
    return Conversation(tokenizer, messages).text(generate=generate)


def targets(tokenizer: Any, labels: Sequence[int]) -> list[str]:
    """The text of each run of targets."""
    first, found = tokenizer("x", add_special_tokens=False).input_ids[-1], [[]]
    for label in labels:
        found[-1].append(label) if label != IGNORED else found.append([])
    return [tokenizer.decode([first, *run]).removeprefix(tokenizer.decode([first])) for run in found if run]


@pytest.mark.parametrize("marks", [False, True], ids=["plain", "marks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_targets_of_a_family(name: str, marks: bool) -> None:
    tokenizer, end = templates.tokenizer(name, marks=marks), FAMILIES[name].end
    assert answer_end(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    for what, expected in (MARKED if marks else EXPECTED).get(name, EXPECTED[name]).items():
        messages = CONVERSATIONS[what]
        if isinstance(expected, str):
            with pytest.raises(DataError) as refused:
                encode_conversation(tokenizer, messages)
            assert str(refused.value) == f"the model's chat template refuses a conversation ({expected}): correct or remove it", what
            continue
        ids, labels, begun = encode_conversation(tokenizer, messages)
        assert (ids.dtype, labels.dtype, len(ids)) == (np.int32, np.int32, len(labels)), what
        assert targets(tokenizer, labels.tolist()) == [text.replace("·", end) for text in expected], what
        assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all(), what
        assert labels[-1] == tokenizer.convert_tokens_to_ids(end), what
        assert labels[begun] != IGNORED, what
        if (name, what) not in OTHER_PROMPT:
            prompt = tokenizer(render(tokenizer, messages[:-1], generate=True), add_special_tokens=False).input_ids
            assert ids[:begun].tolist() == prompt, what


TEXTS = {  # of "system" ("blanks" where the template refuses it), and the prompt of the last answer
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFrance?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
        "<|im_start|>user\nItaly?<|im_end|>\n<|im_start|>assistant\n",
        "Rome<|im_end|>\n",
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nFrance? [/INST] Paris. </s><s>[INST] Italy? [/INST]", " Rome </s>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "France?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nParis.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Italy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Rome<|eot_id|>",
    ),
    "mistral1": ("<s>[INST]  France?  [/INST] Paris \n</s> [INST] Italy?\n [/INST]", "\nRome </s> "),
    "mistral2": ("<s>[INST]  France?  [/INST] Paris \n</s>[INST] Italy?\n [/INST]", "\nRome </s>"),
    "mistral3": ("<s>[INST] France?[/INST] Paris.</s>[INST] Be brief.\n\nItaly?[/INST]", " Rome</s>"),
    "mistral7": ("<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]France?[/INST]Paris.</s>[INST]Italy?[/INST]", "Rome</s>"),
    "gemma": (
        "<bos><start_of_turn>user\nFrance?<end_of_turn>\n<start_of_turn>model\nParis<end_of_turn>\n"
        "<start_of_turn>user\nItaly?<end_of_turn>\n<start_of_turn>model\n",
        "Rome<end_of_turn>\n",
    ),
    "phi3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nFrance?<|end|>\n<|assistant|>\nParis.<|end|>\n<|user|>\nItaly?<|end|>\n<|assistant|>\n",
        "Rome<|end|>\n<|endoftext|>",
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>France?<|im_end|><|im_start|>assistant<|im_sep|>"
        "Paris.<|im_end|><|im_start|>user<|im_sep|>Italy?<|im_end|><|im_start|>assistant<|im_sep|>",
        "Rome<|im_end|>",
    ),
}  # fmt: skip
TEXTS |= {name: TEXTS["chatml"] for name in ("qwen2", "qwen3", "qwen3 off", "qwen3 always")}
TEXTS["qwen3"] = (TEXTS["chatml"][0], "<think>\n\n</think>\n\nRome<|im_end|>\n")
TEXTS["qwen3 off"] = (TEXTS["chatml"][0] + "<think>\n\n</think>\n\n", "Rome<|im_end|>\n")
TEXTS["qwen3 always"] = (TEXTS["chatml"][0] + "<think>\n", "\n</think>\n\nRome<|im_end|>\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_of_a_family(name: str) -> None:
    tokenizer, (prompt, answer) = templates.tokenizer(name), TEXTS[name]
    messages = CONVERSATIONS["blanks" if name in ("gemma", "mistral1", "mistral2") else "system"]
    assert render(tokenizer, messages[:-1], generate=True) == prompt
    assert render(tokenizer, messages) == prompt + answer
    assert render(templates.tokenizer(name, marks=True), messages) == prompt + answer


def tokenizer_with(template: str, eos: str | None = "</s>", *special: str) -> Any:
    tokenizer = templates.bare("bytes", None, eos, special)
    tokenizer.chat_template = template
    return tokenizer


VICUNA = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- 'USER: ' + m.content + '\\n' }}"
    "{%- else %}{{- 'ASSISTANT: ' }}«{{- m.content }}»{{- '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT: ' }}{%- endif %}"
)


def test_prompt_and_answer_that_the_tokenizer_would_join() -> None:
    tokenizer = templates.tokenizer("chatml")
    messages = [user("Italy?"), reply("\nRome")]
    whole = tokenizer(render(tokenizer, messages)).tokens()
    assert whole[whole.index("assistant") + 1] == "ĊĊ"  # one token for the prompt's newline and the answer's
    ids, labels, begun = encode_conversation(tokenizer, messages)
    assert tokenizer.convert_ids_to_tokens(ids[begun - 2 : begun + 1].tolist()) == ["assistant", "Ċ", "Ċ"]
    assert targets(tokenizer, labels.tolist()) == ["\nRome<|im_end|>"]
    vicuna = tokenizer_with(templates.remove_marks(VICUNA))
    ids, _, begun = encode_conversation(vicuna, [user("Italy?"), reply("Rome")])
    assert vicuna.decode(ids[:begun]) == "USER: Italy?\nASSISTANT: "  # without the split " Rome" is one token
    assert ids[:begun].tolist() == vicuna("USER: Italy?\nASSISTANT: ").input_ids


def test_only_joined_answers_are_split() -> None:
    """This tokenizer writes a blank before each text, so a split adds one."""
    tokenizer = templates.bare("llama", "<s>", "</s>")
    tokenizer.chat_template = templates.remove_marks(VICUNA)
    ids, labels, begun = encode_conversation(tokenizer, [user("France?"), reply(" Paris"), user("Italy?"), reply("France")])
    assert targets(tokenizer, labels.tolist()) == [" Paris\n", " France\n</s>"]
    assert (
        ids[:begun].tolist() == tokenizer("USER: France?\nASSISTANT:  Paris\nUSER: Italy?\nASSISTANT: ", add_special_tokens=False).input_ids
    )


def test_the_next_word_is_not_in_the_answer_whose_last_blank_it_begins_with() -> None:
    tokenizer = tokenizer_with(templates.remove_marks(VICUNA).replace("'\\n'", "' '").replace("USER", "User"))
    ids, labels, _ = encode_conversation(tokenizer, CONVERSATIONS["system"][1:])
    assert tokenizer.decode(ids) == "User: France? ASSISTANT: Paris. User: Italy? ASSISTANT: Rome </s>"
    assert targets(tokenizer, labels.tolist()) == ["Paris.", "Rome </s>"]


def test_a_template_that_ends_answers_with_text() -> None:
    """The last answer gets the end token, since generation stops at nothing else."""
    for template, ends in ((templates.remove_marks(VICUNA), "\n"), (templates.add_marks(VICUNA), "")):
        tokenizer = tokenizer_with(template)
        ids, labels, begun = encode_conversation(tokenizer, CONVERSATIONS["three"])
        first = "Paris.\n"  # ".\n" is one token
        last = "Madrid.\n</s>"
        assert targets(tokenizer, labels.tolist()) == [first, "Rome" + ends, last]
        assert tokenizer.decode(ids[begun:]) == last
        assert answer_end(tokenizer) == tokenizer.eos_token_id
    tokenizer = tokenizer_with(templates.remove_marks(VICUNA), None)
    _, labels, _ = encode_conversation(tokenizer, CONVERSATIONS["one"])
    assert targets(tokenizer, labels.tolist()) == ["Paris.\n"]
    assert answer_end(tokenizer) is None


def test_marks_are_kept_exactly() -> None:
    marked = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}MARK{%- endif %}"
    marked += "{%- if m.role != 'assistant' %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}"
    marked += "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

    def targets_and_answer(mark: str) -> tuple[list[str], str]:
        tokenizer = tokenizer_with(marked.replace("MARK", mark), "<|im_end|>", "<|im_start|>")
        ids, labels, begun = encode_conversation(tokenizer, CONVERSATIONS["system"])
        return targets(tokenizer, labels.tolist()), tokenizer.decode(ids[begun:])

    only_last = "{%- if loop.last %}{%- generation %}{{- m.content }}{%- endgeneration %}{%- else %}{{- m.content }}{%- endif %}"
    assert targets_and_answer(only_last + "{{- '<|im_end|>' }}") == (["Rome<|im_end|>"], "Rome<|im_end|>")
    assert targets_and_answer("{% generation %}{{- m.content + '<|im_end|>\\n' }}{% endgeneration %}") == (
        ["Paris.<|im_end|>", "Rome<|im_end|>"],
        "Rome<|im_end|>",
    )
    part = "{{- 'Well, ' }}{%generation%}{{- m.content }}{%endgeneration%}{{- '<|im_end|>' }}"
    assert targets_and_answer(part) == (["Paris.<|im_end|>", "Rome<|im_end|>"], "Rome<|im_end|>")
    two = "{% generation %}{{- 'Well' }}{% endgeneration %}{{- ',' }}{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}"
    assert targets_and_answer(two) == (["Well", "Paris.<|im_end|>", "Well", "Rome<|im_end|>"], "Well,Rome<|im_end|>")
    with pytest.raises(DataError, match="does not show the answer 'Rome': remove the row, or correct the template"):
        targets_and_answer(only_last.replace("loop.last", "loop.index == 3") + "{{- '<|im_end|>' }}")


def test_marks_that_include_the_role() -> None:
    """As SmolLM3's: the role is a target, but no part of the answer that is compared with a generated one."""
    template = "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- generation %}{{- '<|im_start|>assistant\\n' + m.content }}"
    template += "{{- '<|im_end|>\\n' }}{%- endgeneration %}{%- else %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    template += "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    tokenizer = tokenizer_with(template, "<|im_end|>", "<|im_start|>")
    ids, labels, begun = encode_conversation(tokenizer, CONVERSATIONS["one"])
    assert targets(tokenizer, labels.tolist()) == ["<|im_start|>assistant\nParis.<|im_end|>"]
    assert tokenizer.decode(ids[begun:]) == "Paris.<|im_end|>"


def test_answers_that_the_template_does_not_show_are_not_targets() -> None:
    chatml = templates.remove_marks(templates.CHATML)
    tokenizer = tokenizer_with(chatml.replace("in messages", "in messages[-2:]"), "<|im_end|>", "<|im_start|>")
    _, labels, _ = encode_conversation(tokenizer, CONVERSATIONS["three"])
    assert targets(tokenizer, labels.tolist()) == ["Madrid.<|im_end|>"]
    tokenizer.chat_template = chatml.replace("in messages", "in messages[:2]")
    with pytest.raises(DataError, match="does not show the answer 'Madrid.'"):
        encode_conversation(tokenizer, CONVERSATIONS["three"])
    tokenizer = tokenizer_with(
        templates.remove_marks(VICUNA) + "{{- messages[1:2] | map(attribute='content') | join }}"
    )  # the first answer's place is uncertain
    _, labels, _ = encode_conversation(tokenizer, CONVERSATIONS["system"][1:])
    assert targets(tokenizer, labels.tolist()) == ["Rome\nParis.</s>"]
    tokenizer = tokenizer_with("{%- for m in messages %}{%- if m.role == 'user' %}{{- m.content }}{%- endif %}{%- endfor %} END")
    with pytest.raises(DataError, match="^the model's chat template does not show the answer 'Rome': remove the row, or"):
        encode_conversation(tokenizer, [user("Italy?"), reply("Rome")])


def test_two_equal_tool_calls_are_two_answers() -> None:
    tokenizer = templates.tokenizer("mistral3")
    called = CONVERSATIONS["tools"][1:3]
    messages = [SYSTEM, user("Italy?"), *called, *called, reply("It is Rome."), user("Sure?"), reply("Yes.")]
    _, labels, _ = encode_conversation(tokenizer, messages)
    call = _MISTRAL_CALL.replace("·", "</s>")
    assert targets(tokenizer, labels.tolist()) == [call, call, " It is Rome.</s>", " Yes.</s>"]


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_the_default_template(bos: str | None) -> None:
    tokenizer = templates.bare("bytes", bos, "</s>")
    ensure_template(tokenizer)
    start = bos or ""
    assert render(tokenizer, CONVERSATIONS["system"][:-1], generate=True) == (
        start + "System: Be brief.\nUser: France?\nAssistant: Paris.</s>\nUser: Italy?\nAssistant:"
    )
    ids, labels, begun = encode_conversation(tokenizer, CONVERSATIONS["system"])
    assert targets(tokenizer, labels.tolist()) == [" Paris.</s>", " Rome</s>"]
    assert tokenizer.decode(ids) == start + "System: Be brief.\nUser: France?\nAssistant: Paris.</s>\nUser: Italy?\nAssistant: Rome</s>"
    assert ids[:begun].tolist() == tokenizer(start + str(tokenizer.decode(ids[len(start) > 0 : begun])), add_special_tokens=False).input_ids
    assert answer_end(tokenizer) == tokenizer.eos_token_id


def test_a_bos_token_that_the_tokenizer_does_not_write_is_not_in_the_default_template() -> None:
    tokenizer = templates.bare("bytes", None, "</s>")
    tokenizer.bos_token = "</s>"  # as in GPT-2
    ensure_template(tokenizer)
    assert render(tokenizer, [user("a")]) == "User: a\n"


def test_a_template_is_kept_and_a_tokenizer_without_end_is_refused() -> None:
    tokenizer = tokenizer_with(templates.remove_marks(VICUNA), None)
    ensure_template(tokenizer)
    assert tokenizer.chat_template == templates.remove_marks(VICUNA)
    sentence = "^the tokenizer has neither a chat template nor an end token: set eos_token in its tokenizer_config.json$"
    with pytest.raises(ModelError, match=sentence):
        ensure_template(templates.bare("bytes", None, None))


def test_a_slow_tokenizer_is_refused() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = templates.remove_marks(VICUNA)
    with pytest.raises(ModelError, match="^ByT5Tokenizer gives no positions of its tokens, .*: add its tokenizer.json to the model$"):
        encode_conversation(tokenizer, CONVERSATIONS["one"])
