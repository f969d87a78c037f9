"""A small draft model for speculative decoding, distilled from its target model.

The draft has a subset of the target's layers. Training minimizes the Kullback-Leibler divergence KL(p || q) of every next token, where p
are the target's and q the draft's probabilities (white-box: full distributions, not samples). The training texts are given or sampled from
the target, and for a share of the steps (on-policy) sampled from the draft, as in drafting. The result is measured by the acceptance rate
of the draft's most likely tokens, the expectation of p(argmax q).

Sources: Zhou et al. 2023, DistillSpec, arXiv:2310.08461; Agarwal et al. 2023, GKD, arXiv:2306.13649; acceptance: Leviathan et al. 2022,
Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, corollary 3.6, with deterministic drafts.
"""

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.config import ModelConfig, TaskConfig
from fedtune.config.bounds import require
from fedtune.contracts.seeds import derive_seed
from fedtune.data.messages import read_row
from fedtune.errors import ConfigError, DataError, ModelError
from fedtune.export.huggingface import CARD, check_out, export_folder, write_tokenizer
from fedtune.inference.engine.text import wrap
from fedtune.inference.generate import is_chat, read_card
from fedtune.models.backbone import Backbone, load_backbone, quiet
from fedtune.models.chat_template import encode_conversation, located
from fedtune.storage.parsing import parse_json
from fedtune.storage.parsing import read_text as text_of

HELD_OUT = 0.1  # share of the given texts (at least one) held out for measurement
WARMUP = 0.1  # share of the steps in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Size and training of a draft.

    Args:
        layers: Layers of the draft; None uses a quarter of the target's.
        steps: AdamW steps.
        batch_size: Texts per step.
        length: Longest text, in tokens.
        lr: Peak learning rate; warm-up, then a cosine to zero.
        on_policy: Share of the steps whose texts are sampled from the draft.
        seed: Seed of the texts' order and of all sampling.
    """

    layers: int | None = None
    steps: int = 400
    batch_size: int = 16
    length: int = 128
    lr: float = 1e-3
    on_policy: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("steps", 1), ("batch_size", 1), ("length", 8)):
            require(name, getattr(self, name), ge=least)
        require("on_policy", self.on_policy, ge=0, le=1)
        require("lr", self.lr, gt=0, lt=1)


def distill(
    folder: Path,
    out: Path,
    *,
    text: Path | None = None,
    how: Distillation = Distillation(),  # noqa: B008 - frozen
    trust_remote_code: bool = False,
    report: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Distill a draft and write it as a Hugging Face folder for `fedtune generate --draft`.

    Args:
        folder: The target: a folder of `fedtune export`, or any causal model's Hugging Face folder.
        out: The folder to write; it appears complete or not at all.
        text: Training texts, one per line, or JSON rows with `text`, `messages`, or `prompt` and `response`; None samples them from the
            target.
        how: Size and training of the draft.
        trust_remote_code: Whether code in the target's folder may run.
        report: Called with each step's number and divergence in nats per token.

    Returns:
        `acceptance_before` and `acceptance` on held-out text (shares), `divergence` (nats per token), `parameters` of the draft, `of`:
        those of the target.

    Raises:
        ModelError: The target cannot be loaded, generates no text, or has an unmerged adapter.
        DataError: The texts cannot be read or are too few.
        ConfigError: The draft would not have fewer layers than the target.
    """
    check_out(out)
    card = read_card(folder)
    if "peft" in card:
        raise ModelError(f"{folder} has an unmerged adapter: a draft needs a merged model")
    model = ModelConfig(source="hub", name=str(folder), trust_remote_code=trust_remote_code)
    teacher = load_backbone(model, TaskConfig(kind="causal_lm", max_length=2))
    if teacher.seq2seq:
        raise ModelError(f"{folder} is an encoder-decoder model: a draft needs a causal model")
    context = getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None) or how.length
    how = dataclasses.replace(how, length=min(how.length, context))
    student = fewer_layers(teacher.model, how.layers or max(1, teacher.model.config.get_text_config().num_hidden_layers // 4))
    rows = read_texts(text, teacher.tokenizer, card.get("prompt"), how.length, chat=is_chat(card)) if text else None
    generator = random.Random(derive_seed(how.seed, "distil"))
    if rows is not None:
        generator.shuffle(rows)
        held, rows = split(rows, text)
        measured = [pad(held[: how.batch_size * 8], teacher.tokenizer.pad_token_id)]
    else:
        measured = [write(teacher.model, None, how, derive_seed(how.seed, "held out"), teacher.tokenizer)]
    before = acceptance(teacher.model, student, measured)
    student.train()
    divergence = train(teacher, student, rows, how, generator, report)
    student.eval()
    figures = {
        "acceptance_before": before,
        "acceptance": acceptance(teacher.model, student, measured),
        "divergence": divergence,
        "parameters": count(student),
        "of": count(teacher.model),
    }
    kept = (
        {k: card.get(k) for k in ("task", "prompt", "max_new_tokens", "base")}
        if card
        else {"task": "causal_lm", "prompt": None, "max_new_tokens": None}
    )
    kept |= {"draft_of": teacher.fingerprint, "distilled": {**figures, **dataclasses.asdict(how), "text": text.name if text else None}}

    with export_folder(out) as to:
        with quiet():
            student.to(stored(teacher)).save_pretrained(to)
        write_tokenizer(teacher.tokenizer, teacher.folder, to, TaskConfig(kind="causal_lm", max_length=2))
        (to / CARD).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return figures


def fewer_layers(model: Any, layers: int) -> Any:
    """Return a copy with `layers` of the model's layers, evenly spaced from the first to the last; all other weights are copied.

    Raises:
        ConfigError: The model does not have more layers than that.
        ModelError: The model's stack of layers cannot be identified.
    """
    depth = model.config.get_text_config().num_hidden_layers
    if layers >= depth:
        raise ConfigError(f"layers={layers} is too many for a draft of a model of {depth} layers: use fewer")
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(stacks) != 1:
        raise ModelError(f"{type(model).__name__} has {len(stacks)} stacks of {depth} layers, wanted one: no draft can be made of it")
    kept = [round(i * (depth - 1) / max(1, layers - 1)) for i in range(layers)]
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers"):  # which have an entry for each layer
        if entries := getattr(text, name, None):
            setattr(text, name, [entries[i] for i in kept])
    small = type(model)(config)
    renamed = {f"{stacks[0]}.{old}.": f"{stacks[0]}.{new}." for new, old in enumerate(kept)}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{stacks[0]}."):
            tensors[name] = tensor
        elif (own := name[: name.index(".", len(stacks[0]) + 1) + 1]) in renamed:
            tensors[renamed[own] + name[len(own) :]] = tensor
    small.load_state_dict(tensors)
    return small.to(device=model.device, dtype=torch.float32)


def train(
    teacher: Backbone,
    student: Any,
    rows: list[list[int]] | None,
    how: Distillation,
    order: random.Random,
    report: Callable[[int, float], None] | None,
) -> float:
    """Train the draft in place. Returns the mean divergence of the last tenth of the steps, in nats per token."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=how.lr, weight_decay=0.0)
    warm = max(1, round(WARMUP * how.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * s / how.steps))
    )
    texts = batches(rows, how.batch_size, order) if rows else None
    last: list[float] = []
    for step in range(how.steps):
        own, seed = order.random() < how.on_policy, derive_seed(how.seed, "step", step)
        given = next(texts) if texts else None
        if own:
            student.eval()
            ids, counted = write(student, given, how, seed, teacher.tokenizer)
            student.train()
        elif given is not None:
            ids, counted = pad(given, teacher.tokenizer.pad_token_id)
        else:
            ids, counted = write(teacher.model, None, how, seed, teacher.tokenizer)
        with torch.no_grad():
            wanted = teacher.model(input_ids=ids, attention_mask=counted.long()).logits[:, :-1].float().log_softmax(-1)
        found = student(input_ids=ids, attention_mask=counted.long()).logits[:, :-1].float().log_softmax(-1)
        mask = counted[:, 1:]
        loss = F.kl_div(found[mask], wanted[mask], log_target=True, reduction="sum") / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not math.isfinite(value := loss.item()):
            raise ModelError(f"the divergence is {value} at step {step + 1}: lower --lr")
        last = [*last, value][-max(1, how.steps // 10) :]
        if report:
            report(step + 1, value)
    return sum(last) / len(last)


@torch.no_grad()
def acceptance(model: Any, draft: Any, texts: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean over all tokens of p(argmax q): how often the target, sampled at temperature 1, gives the draft's most likely token."""
    total, tokens = 0.0, 0
    for ids, counted in texts:
        p, q = (m(input_ids=ids, attention_mask=counted.long()).logits[:, :-1].float().softmax(-1) for m in (model, draft))
        both = p.gather(-1, q.argmax(-1, keepdim=True))[..., 0][counted[:, 1:]]
        total, tokens = total + both.sum().item(), tokens + both.numel()
    return total / tokens


@torch.no_grad()
def write(model: Any, given: list[list[int]] | None, how: Distillation, seed: int, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Sample texts from the model at temperature 1. Returns `(ids, mask)`, each [n, T]; the mask selects the tokens up to the end of the
    text.

    The prompts are prefixes of the given texts, else the BOS token.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if given:
        cut = max(1, random.Random(seed).randint(1, max(1, min(len(row) for row in given) * 3 // 4)))
        heads = [row[:cut] for row in given]
    elif begin is None:
        raise DataError("the tokenizer has no BOS or EOS token to start a text with: give texts with --text")
    else:
        heads = [[begin]] * how.batch_size
    start = torch.tensor(heads, device=model.device)
    if start.shape[1] >= how.length:
        return start, torch.ones_like(start, dtype=torch.bool)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=how.length - start.shape[1], do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    ended = (
        (ids[:, start.shape[1] :] == tokenizer.eos_token_id)
        if tokenizer.eos_token_id is not None
        else torch.zeros_like(ids[:, start.shape[1] :])
    )
    after = torch.cat([torch.zeros_like(start), (ended.cumsum(1) - ended.long() > 0).long()], dim=1)
    return ids, after == 0


def pad(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Pad rows to equal length. Returns `(ids, mask)`, each [n, longest row]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.bool)


def batches(rows: list[list[int]], size: int, order: random.Random) -> Iterator[list[list[int]]]:
    """Endless batches, reshuffled in each pass."""
    while True:
        order.shuffle(rows := list(rows))
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def split(rows: list[list[int]], text: Path | None) -> tuple[list[list[int]], list[list[int]]]:
    """Return the held-out rows and the others."""
    if len(rows) < 2:
        raise DataError(f"{text} holds {len(rows)} texts: give at least two, one for training and one for measurement")
    held = max(1, round(HELD_OUT * len(rows)))
    return rows[:held], rows[held:]


def read_texts(path: Path, tokenizer: Any, template: str | None, length: int, *, chat: bool = False) -> list[list[int]]:
    """Encode each line, or each JSON row, as token rows of at most `length`; a longer text gives several rows.

    Messages are a conversation in the tokenizer's chat template, as in training, and so are a prompt and its response with `chat`.

    Raises:
        DataError: The file cannot be read, or a row lacks its fields.
    """
    try:
        lines = [line for line in text_of(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as bad:
        raise DataError(f"cannot read {path}: {getattr(bad, 'strerror', None) or 'it is not UTF-8 text'}") from None
    begun = tokenizer("").input_ids
    lead = [tokenizer.bos_token_id] if begun and begun[0] == tokenizer.bos_token_id else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    rows = []
    for number, line in enumerate(lines, 1):
        content = _of_json(line, template, path, number, chat) if path.suffix in (".jsonl", ".json") else line
        if isinstance(content, str):
            ids = lead + tokenizer(content, add_special_tokens=False).input_ids + end
        elif tokenizer.chat_template is None:
            raise DataError(f"{path}:{number} has messages, but the model has no chat template: give rows with `text`")
        else:
            messages, tools = content
            with located(f"{path}:{number}"):
                ids = encode_conversation(tokenizer, messages, tools=tools)[0].tolist()
        rows += [ids[i : i + length] for i in range(0, len(ids), length) if len(ids[i : i + length]) > 1]
    return rows


def _of_json(
    line: str, template: str | None, path: Path, number: int, chat: bool
) -> str | tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """A row's text, or its messages and tools."""
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        row = {}
    if isinstance(row.get("text"), str):
        return row["text"]
    if (found := read_row(row, str(path), number)) is not None:
        return parse_json(found[0]), parse_json(found[1]) if found[1] else None
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        if chat:
            return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}], None
        return wrap(row["prompt"], template) + row["response"]
    raise DataError(f"{path}:{number}: a row must be a JSON object with `text`, with `messages`, or with `prompt` and `response`")


def count(model: Any) -> int:
    """Number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def stored(backbone: Backbone) -> torch.dtype:
    """The dtype of the model's parameters."""
    return cast(torch.dtype, next(backbone.model.parameters()).dtype)
