"""Measures what trains, exports and serves: `python -m tests.architectures --write` rewrites the table of docs/architectures.md.

Each row is a random model of a few thousand parameters. One federated round of LoRA trains it; the exports are compared with the trained
model, logit by logit or token by token. What is not supported must be refused in one sentence.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fedtune
from fedtune.config import ClientConfig, ModelConfig, PeftConfig, TaskConfig
from fedtune.errors import FedtuneError
from fedtune.export.edge import export_edge
from fedtune.export.gguf import export_gguf
from fedtune.export.huggingface import export_hf
from fedtune.inference.engine.generate import Generation
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.generate import read_card, why_not_engine
from fedtune.inference.serve.start import engine_scheduler, transformers_scheduler
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.quiet import quiet
from tests.inference.serve.servers import run_server
from tests.tiny import texts, tiny_config, write_rows

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
BEGIN, END = "<!-- begin: python -m tests.architectures --write -->\n", "<!-- end -->\n"
COLUMNS = ("trains", "hf", "edge", "gguf", "serves")
VOCABULARY = 264
PROMPT = "lamp kettle door"
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
TOKENS: dict[str, Any] = {n: SIZES[n] for n in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 3.0], "long_factor": [1.0, 5.0, 20.0]}
ENCODER: dict[str, Any] = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 6}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@dataclass(frozen=True, kw_only=True)
class Row:
    """An architecture: a config, its task and its targets.

    Args:
        config: Makes the config.
        task: Task of the run.
        peft: Changes of the PEFT config.
    """

    config: Callable[[], Any]
    task: str = "causal_lm"
    peft: Mapping[str, Any] = field(default_factory=dict)


def _row(of: str, task: str = "causal_lm", peft: Mapping[str, Any] | None = None, base: Mapping[str, Any] = SIZES, **changes: Any) -> Row:
    return Row(config=lambda: getattr(t, of)(**{**base, **changes}), task=task, peft=peft or {})


ROWS: dict[str, Row] = {
    "Llama 2": _row("LlamaConfig", num_key_value_heads=4),
    "Llama 3": _row("LlamaConfig", rope_parameters=LLAMA3),
    "Qwen2, 2.5": _row("Qwen2Config"),
    "Qwen3": _row("Qwen3Config", head_dim=16),
    "Mistral": _row("MistralConfig", sliding_window=6),
    "Gemma 2": _row("Gemma2Config", **GEMMA),
    "Gemma 3": _row("Gemma3TextConfig", **GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "Phi-3": _row("Phi3Config"),
    "Phi-4-mini": _row(
        "Phi3Config", num_attention_heads=6, head_dim=8, partial_rotary_factor=0.75, rope_parameters=LONGROPE,
        max_position_embeddings=128, original_max_position_embeddings=64, tie_word_embeddings=True,
    ),
    "SmolLM3": _row("SmolLM3Config", no_rope_layers=[1, 0]),
    "OLMo 2": _row("Olmo2Config"),
    "GPT-NeoX": _row("GPTNeoXConfig", base={n: v for n, v in SIZES.items() if n != "num_key_value_heads"}),
    "Mixtral": _row("MixtralConfig", peft=EXPERTS, num_local_experts=4, sliding_window=None),
    "Qwen3-MoE": _row("Qwen3MoeConfig", peft=EXPERTS, **MOE),
    "Mamba": _row("MambaConfig", peft={"targets": ["in_proj", "x_proj"]}, base=TOKENS, hidden_size=48, num_hidden_layers=2, state_size=4),
    "T5": _row(
        "T5Config", "instruction", base=TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=1,
    ),
    "BERT": _row("BertConfig", "classification", base=ENCODER),
    "ModernBERT": _row("ModernBertConfig", "classification", cls_token_id=0, sep_token_id=1, local_attention=8,
                       max_position_embeddings=64),
    "DeBERTa": _row("DebertaV2Config", "classification", base=ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """The entry of a row in a column: `yes`, a required setting, `engine`, `transformers` or `no`, with the sentence of a refusal."""

    says: str
    why: str = ""


def checkpoint(folder: Path, row: Row) -> Path:
    """A random checkpoint of the row, with a byte-level tokenizer that llama.cpp knows; norms and biases are random too."""
    config, kinds = row.config(), {"classification": t.AutoModel, "instruction": t.AutoModelForSeq2SeqLM}
    kind: Any = kinds.get(row.task, t.AutoModelForCausalLM)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    return folder


def measure(row: Row, folder: Path) -> dict[str, Cell]:
    """Run every column in an empty folder.

    Raises:
        AssertionError: An export does not compute the trained model's results.
    """
    task = TaskConfig(kind=row.task, max_length=40, stride_texts=False, max_new_tokens=8)
    rows = [{**r, "prompt": r["question"], "answer": r["reply"]} for r in texts(24)]
    for name, part in (("rows", rows), ("test", rows[:4])):
        write_rows(folder / f"{name}.jsonl", part)
    model = ModelConfig(source="hub", name=str(checkpoint(folder / "model", row)), device="cpu")
    config = tiny_config(folder, rounds=1, clients_per_round=2, model=model, task=task, peft=PeftConfig(rank=2, alpha=4.0, **row.peft),
                         client=ClientConfig(steps=1, epochs=None, batch_size=4, lr=3e-2, schedule="constant"))  # fmt: skip
    try:
        result = fedtune.run(config)
    except FedtuneError as bad:
        return {"trains": Cell("no", _sentence(bad, folder))} | dict.fromkeys(COLUMNS[1:], Cell("no", "it is not trained"))
    live = LiveAdapter(load_backbone(model, task, num_labels=3, seed=config.seed), config.peft, task)
    state = result.adapter
    moved = [n for n, tensor in state.tensors.items() if n.endswith(".lora_B") and bool(tensor.any())]
    assert moved, "one round of LoRA has changed no factor"
    live.load(state)
    live.model.eval()
    ids = torch.tensor([live.backbone.tokenizer(PROMPT).input_ids])
    cells = {"trains": Cell(", ".join(f"`peft.{n}=[{','.join(v)}]`" for n, v in row.peft.items()) or "yes")}
    asked = row.peft.get("target_parameters", [])
    assert all(any(f".{name}.lora_B" in n for n in moved) for name in asked), "one round of LoRA has not changed all experts"
    with _refusable(cells, "hf", folder):
        out = export_hf(result.path, result.path / "hf")
        with quiet():
            kind: Any = type(live.backbone.model)
            merged = kind.from_pretrained(out).eval()
        torch.testing.assert_close(_logits(merged, ids), _logits(live.model, ids), atol=1e-4, rtol=1e-4)
        with live.disabled():
            assert not torch.allclose(_logits(live.model, ids), _logits(merged, ids), atol=1e-4), "the adapter changes nothing"
        cells["hf"] = Cell("yes")
    with _refusable(cells, "edge", folder):
        card = read_card(out)
        if why := why_not_engine(out, card):
            assert _answer(transformers_scheduler(out, card, 4)) == _expected_answer(merged, live.backbone.tokenizer, ids)
            cells["edge"] = Cell("transformers", why)
        else:
            engine = load_engine(export_edge(result.path, result.path / "edge"))
            want = merged.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
            actual = [p.token for p in Generation(engine, ids[0].tolist(), Sampling(), 8) if p.token is not None]
            assert actual == want, (actual, want)
            cells["edge"] = Cell("engine")
    with _refusable(cells, "gguf", folder):
        export_gguf(result.path, result.path / "m.gguf")
        cells["gguf"] = Cell("yes")
    with _refusable(cells, "serves", folder):
        package = result.path / "edge"
        made = engine_scheduler(package, None, None, 4, 4, {}) if package.is_dir() else transformers_scheduler(out, read_card(out), 4)
        assert _answer(made) == _expected_answer(merged, live.backbone.tokenizer, ids)
        cells["serves"] = Cell("yes")
    return cells


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs).logits


def _expected_answer(model: Any, tokenizer: Any, ids: torch.Tensor) -> str:
    """The text of transformers' greedy answer."""
    if model.config.is_encoder_decoder:
        ids = torch.tensor([[*ids[0].tolist(), tokenizer.eos_token_id]])  # as in training
    out = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))[0].tolist()
    before = tokenizer.decode(ids[0]) if not model.config.is_encoder_decoder else ""
    return tokenizer.decode(out, skip_special_tokens=True).removeprefix(before)


def _answer(made: tuple[Any, Any, str]) -> str:
    """The answer of a server over HTTP."""
    scheduler, offer, _ = made
    with run_server(scheduler, replace(offer, name="tiny", prompt=None)) as (url, _):
        asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
        reply = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


@contextmanager
def _refusable(cells: dict[str, Cell], column: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except FedtuneError as bad:
        cells[column] = Cell("no", _sentence(bad, folder))


def _sentence(bad: FedtuneError, folder: Path) -> str:
    text = str(bad)
    assert "\n" not in text and len(text) < 600, f"not one sentence: {text}"
    for place in sorted((str(p) for p in folder.rglob("*") if p.is_dir()), key=len, reverse=True):
        text = text.replace(f"{place}: ", "").replace(place, "the model")
    return text


def table(found: Mapping[str, Mapping[str, Cell]]) -> str:
    """The page's table, and the reasons for everything that is not supported."""
    lines = ["| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {name} | " + " | ".join(cells[c].says for c in COLUMNS) + " |" for name, cells in found.items()]
    reasons = dict[tuple[str, str], list[str]]()
    for name, cells in found.items():
        for column in COLUMNS:
            if cells[column].why:
                reasons.setdefault((column, cells[column].why), []).append(name)
    lines += ["", "Why not, in fedtune's words:", ""]
    lines += [f"- `{column}`, {'; '.join(names)}: {why}." for (column, why), names in reasons.items()]
    return "\n".join(lines) + "\n"


def read_table(text: str) -> dict[str, dict[str, Cell]]:
    """The inverse of `table`."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    found = {name: {c: Cell(says) for c, says in zip(COLUMNS, cells, strict=True)} for name, *cells in rows}
    for column, names, why in re.findall(r"^- `(\w+)`, (.+?): (.+)\.$", text, re.MULTILINE):
        for name in names.split("; "):
            found[name][column] = replace(found[name][column], why=why)
    return found


def generated_part() -> str:
    """The generated part of the page."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    found = {}
    for name, row in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(row, Path(folder))
        print(name, {c: cell.says for c, cell in found[name].items()}, file=sys.stderr, flush=True)
    if "--write" not in sys.argv[1:]:
        print(table(found))
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
