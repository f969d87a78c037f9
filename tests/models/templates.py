"""Chat templates that render the public formats, each with a tiny tokenizer that has the family's special tokens.

`«` and `»` enclose what the assistant says: nothing, or the template's own marks {% generation %} and {% endgeneration %}.
"""

import functools
import json
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_ALTERNATE = "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
_SYSTEM_APART = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set chat = messages[1:] %}"
    "{%- else %}{%- set chat = messages %}{%- endif %}"
)
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' %}«{{- m.content + '<|im_end|>' }}»{{- '\\n' }}{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_TOOL_CALL = (
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}"
)
_TOOL_ANSWER = (  # consecutive tool answers share one user turn
    "{%- elif m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}"
)
QWEN2 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role in ('user', 'system') %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' and not m.tool_calls %}{{- '<|im_start|>assistant\\n' }}«{{- m.content + '<|im_end|>' }}»{{- '\\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}"
    "{%- for call in m.tool_calls %}{{- '\\n' }}«" + _TOOL_CALL + "{%- if loop.last %}{{- '<|im_end|>' }}{%- endif %}»{%- endfor %}"
    "{{- '\\n' }}" + _TOOL_ANSWER + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)  # fmt: skip
_QWEN3 = (  # thoughts are shown only after the last question, and the last message always has a think block
    "{%- set ns = namespace(last=messages | length - 1, search=true) %}"
    "{%- for m in messages[::-1] %}{%- if ns.search and m.role == 'user' %}{%- set ns.search = false %}"
    "{%- set ns.last = messages | length - 1 - loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role in ('user', 'system') %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}{%- set content, thoughts = m.content, m.reasoning_content or '' %}"
    "{%- if not thoughts and '</think>' in m.content %}{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- set thoughts = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}«{%- if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}{%- else %}{{- content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}" + _TOOL_CALL + "{%- endfor %}"
    "{{- '<|im_end|>' }}»{{- '\\n' }}" + _TOOL_ANSWER + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
)  # fmt: skip
QWEN3 = _QWEN3 + "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
QWEN3_OFF = _QWEN3 + "{%- if not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
QWEN3_ALWAYS = _QWEN3 + "{{- '<think>\\n' }}{%- endif %}"
LLAMA2 = (
    _SYSTEM_APART + "{%- for m in chat %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}" + _ALTERNATE + "{%- endif %}"
    "{%- if m.role == 'user' %}{%- set content = m.content %}{%- if loop.first and system is defined %}"
    "{%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}{%- endif %}"
    "{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{%- else %}«{{- ' ' + m.content.strip() + ' ' + eos_token }}»{%- endif %}{%- endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}"
    "{%- if m.role != 'assistant' %}{{- m.content | trim + '<|eot_id|>' }}"
    "{%- elif m.tool_calls %}{%- set call = m.tool_calls[0].function %}"
    "«{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}<|eot_id|>' }}»"
    "{%- else %}«{{- m.content | trim + '<|eot_id|>' }}»{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MISTRAL1 = (  # Mistral 7B Instruct v0.1: a blank after each answer; [INST] is text
    "{{- bos_token }}{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}" + _ALTERNATE + "{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}«{{- m.content + eos_token }}»{{- ' ' }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
MISTRAL2 = MISTRAL1.replace("{{- ' ' }}", "")  # v0.2, and the first release of v0.3, where [INST] is a token
MISTRAL3 = (  # the system message goes into the last question
    _SYSTEM_APART + "{%- set questions = chat | selectattr('role', 'equalto', 'user') | list %}{%- set ns = namespace(index=0) %}"
    "{%- for m in chat %}{%- if m.role != 'tool' and not m.tool_calls %}"
    "{%- if (m.role == 'user') != (ns.index % 2 == 0) %}" + _ALTERNATE + "{%- endif %}"
    "{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}"
    "{{- bos_token }}{%- for m in chat %}{%- if m.role == 'user' %}"
    "{{- '[INST] ' + (system + '\\n\\n' if m == questions[-1] and system is defined else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}«{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
    "{{- (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}{%- endfor %}{{- eos_token }}»"
    "{%- elif m.role == 'assistant' %}«{{- ' ' + m.content | trim + eos_token }}»"
    "{%- else %}{{- '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- endif %}{%- endfor %}"
)
MISTRAL7 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m.role == 'assistant' %}«{{- m.content + eos_token }}»"
    "{%- else %}{{- raise_exception('Only user, system and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}"
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}" + _ALTERNATE + "{%- endif %}"
    "{%- if m.role == 'assistant' %}{{- '<start_of_turn>model\\n' }}«{{- m.content | trim + '<end_of_turn>' }}»{{- '\\n' }}"
    "{%- else %}{{- '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)
PHI3 = (  # a conversation without a generation prompt also ends with the end token
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|assistant|>\\n' }}«{{- m.content + '<|end|>' }}»{{- '\\n' }}"
    "{%- else %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"
)
PHI4 = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' }}"
    "{%- if m.role == 'assistant' %}«{{- m.content + '<|im_end|>' }}»{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"
)


class Family(NamedTuple):
    template: str
    pieces: str  # bytes, llama (a blank before every text), mistral (before the first text) or gemma (none)
    bos: str | None
    eos: str
    special: tuple[str, ...]
    end: str  # the token that ends an answer


_IM, _INST = ("<|im_start|>", "<|im_end|>"), ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
FAMILIES = {
    "chatml": Family(CHATML, "bytes", None, "<|im_end|>", _IM, "<|im_end|>"),
    "qwen2": Family(QWEN2, "bytes", None, "<|im_end|>", _IM, "<|im_end|>"),
    "qwen3": Family(QWEN3, "bytes", None, "<|im_end|>", _IM, "<|im_end|>"),
    "qwen3 off": Family(QWEN3_OFF, "bytes", None, "<|im_end|>", _IM, "<|im_end|>"),
    "qwen3 always": Family(QWEN3_ALWAYS, "bytes", None, "<|im_end|>", _IM, "<|im_end|>"),
    "llama2": Family(LLAMA2, "llama", "<s>", "</s>", (), "</s>"),
    "llama3": Family(
        LLAMA3, "bytes", "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "mistral1": Family(MISTRAL1, "llama", "<s>", "</s>", (), "</s>"),
    "mistral2": Family(MISTRAL2, "mistral", "<s>", "</s>", _INST, "</s>"),
    "mistral3": Family(MISTRAL3, "mistral", "<s>", "</s>", _INST, "</s>"),
    "mistral7": Family(MISTRAL7, "bytes", "<s>", "</s>", (*_INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>"),
    "gemma": Family(GEMMA, "gemma", "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi3": Family(PHI3, "llama", "<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>"),
    "phi4": Family(PHI4, "bytes", "<|endoftext|>", "<|im_end|>", (*_IM, "<|im_sep|>"), "<|im_end|>"),
}
_LINES = [
    "user system assistant model tool\n\nParis is the capital of France.\n\nRome is the capital of Italy.\nBerlin, Madrid",
    "What is the capital of France? And of Italy? Be brief. Yes. No.\nUSER: ASSISTANT: Assistant: User: System:",
]
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer(name: str, *, marks: bool = False) -> PreTrainedTokenizerFast:
    """The family's tokenizer with its chat template, with or without {% generation %} marks."""
    family = FAMILIES[name]
    made = bare(family.pieces, family.bos, family.eos, family.special)
    if name.startswith("qwen"):
        more: list[Any] = [AddedToken(t, special=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
        made.add_tokens(more)
    made.chat_template = add_marks(family.template) if marks else remove_marks(family.template)
    return made


def add_marks(template: str) -> str:
    return template.replace("«", "{%- generation %}").replace("»", "{%- endgeneration %}")


def remove_marks(template: str) -> str:
    return template.replace("«", "").replace("»", "")


def bare(pieces: str, bos: str | None, eos: str | None, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer without a template; it puts `bos` before a text."""
    made = Tokenizer.from_str(_train_tokenizer(pieces))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token="<pad>")
    blank = "<|end|>" in special  # Phi-3's tokens include the white space after them
    more: list[Any] = [AddedToken(t, rstrip=blank, normalized=False, special=True) for t in special if t not in (bos, eos)]
    wrapped.add_tokens(more)
    if bos is not None:
        start: Any = wrapped.convert_tokens_to_ids(bos)
        backend: Any = wrapped.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, start)])
    return wrapped


@functools.cache
def _train_tokenizer(pieces: str) -> Any:
    """A byte-level BPE, or a BPE over text with ▁ for blanks that spells unknown characters in bytes."""
    made: Any = Tokenizer(models.BPE())
    if pieces == "bytes":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        made.train_from_iterator(_LINES, trainer)
        return made.to_str()
    if pieces == "text":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
        )
        units = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        made.train_from_iterator(_LINES, trainers.BpeTrainer(vocab_size=500, special_tokens=units, show_progress=False))
        state = json.loads(made.to_str())
        return json.dumps(
            {**state, "added_tokens": [], "model": state["model"] | {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}}
        )
    made = Tokenizer.from_str(_train_tokenizer("text"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if pieces != "mistral":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * (pieces == "llama") + [normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split("▁▁▁▁", "isolated")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * (pieces != "gemma")
    )
    return made.to_str()
