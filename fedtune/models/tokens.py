"""Load a backbone's tokenizer, and check that tokenizer, model and task fit together."""

from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from fedtune.config import ModelConfig, TaskConfig
from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.models.chat_template import answer_end, ensure_template
from fedtune.models.checkpoint import first_line
from fedtune.models.quiet import quiet

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"
)  # fmt: skip


def load_tokenizer(folder: Path, config: ModelConfig, task: TaskConfig) -> Any:
    """The checkpoint's tokenizer; for a conversational task it has a chat template.

    Raises:
        ModelError: Its files are missing or damaged.
    """
    # Checked first, because transformers 5 creates an empty tokenizer if the files are missing
    if not any((folder / n).is_file() for n in _TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        raise ModelError(f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, …): copy the tokenizer's files into it")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as bad:  # the tokenizers' Rust side raises plain Exception
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {first_line(bad)}") from None
    if task_of(task).conversational:
        ensure_template(tokenizer)
    return tokenizer


def end_tokens(tokenizer: Any, task: TaskConfig) -> set[int]:
    """The tokens that end a text, and for a conversational task an answer in the chat template."""
    last = answer_end(tokenizer) if task_of(task).conversational else None
    return {tokenizer.eos_token_id, last} - {None}


def set_tokens(model: PreTrainedModel, tokenizer: Any, folder: Path, task: TaskConfig) -> None:
    """Set the same pad token for tokenizer, config and generation; generation stops at any end token.

    The pad token may be eos, because attention and labels are masked by position, not by id. A config whose model counts positions from the
    pad id keeps its pad id.
    """
    size = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    if len(tokenizer) > size:
        raise ModelError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model only {size}: they do not belong together")
    own_pad = model.config.get_text_config().pad_token_id  # in a composite config, such as Gemma 3's, only the text part has a pad id
    if (
        tokenizer.pad_token_id is None
        and getattr(model.config, "is_encoder_decoder", False)
        and isinstance(own_pad, int)
        and own_pad < len(tokenizer)
    ):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own_pad)  # not eos: T5 classifies at every eos
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer in {folder} has neither a pad nor an eos token: set one in its tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    if not _positions_start_at_padding(model):  # otherwise the pad id is part of the architecture, and a merged model keeps it
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        # Otherwise a checkpoint's repetition penalty and sampling defaults would apply to every generate(), including greedy generation
        own = cast(GenerationConfig, model.generation_config).eos_token_id
        stops = {*end_tokens(tokenizer, task), *(own if isinstance(own, list) else [own])} - {None}
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted(stops) or None,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        )


def _positions_start_at_padding(model: PreTrainedModel) -> bool:
    """Whether the model counts positions from its pad id, as RoBERTa and XLM-R do: another id in the config would shift them."""
    return any(
        getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
        if name.endswith(("position_embeddings", "embed_positions"))
    )


def check_context(model: PreTrainedModel, task: TaskConfig, folder: Path) -> None:
    """Raises ModelError if the task's examples and answers do not fit the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        return  # no limit, such as for ALiBi
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            context -= module.padding_idx + 1  # RoBERTa counts positions from its padding index
    kind = task_of(task)
    if kind.longest_sequence > context:
        raise ModelError(f"{kind.length_text} is more than the context of {folder.name} ({context} tokens): make it smaller")
    if kind.longest_sequence + kind.answer_tokens > context:
        raise ModelError(
            f"{kind.length_text} with task.max_new_tokens={task.max_new_tokens} is more than the context of {folder.name}"
            f" ({context} tokens): make one of them smaller"
        )
