"""Methods that PEFT lacks, on tiny random models of every supported architecture."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap  # pyright: ignore[reportPrivateImportUsage]
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.backbone import quiet
from fedtune.models.methods import Attached, method

CAUSAL, CLASSES = TaskConfig(kind="causal_lm", max_length=16), TaskConfig(kind="classification", max_length=16)
ANSWERS = TaskConfig(kind="instruction", max_length=16, max_new_tokens=4)
SIZES: dict[str, Any] = {"vocab_size": 32, "initializer_range": 0.3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
DEEP: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
}
BERT: dict[str, Any] = {**SIZES, **DEEP, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, **DEEP, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, **DEEP, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, **DEEP, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**SIZES, **DEEP, num_key_value_heads=2, head_dim=6),
    "gpt2": lambda: GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt": lambda: OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, max_position_embeddings=64, dropout=0.0,
        word_embed_proj_dim=16, init_std=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    ),
    "bert": lambda: BertConfig(**BERT),
    "roberta": lambda: RobertaConfig(**BERT),
    "xlm-roberta": lambda: XLMRobertaConfig(**BERT),
    "distilbert": lambda: DistilBertConfig(
        **SIZES, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "albert": lambda: AlbertConfig(**{**BERT, "num_hidden_layers": 3}, embedding_size=8),
    "t5": lambda: T5Config(
        vocab_size=32, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=2, eos_token_id=1,
        decoder_start_token_id=2, initializer_factor=2.0, classifier_dropout=0.0,  # pyright: ignore[reportCallIssue]
    ),
}  # fmt: skip
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "opt"]
ENCODERS = ["bert", "roberta", "xlm-roberta", "distilbert", "albert"]
CASES = [(k, CAUSAL) for k in DECODERS] + [(k, CLASSES) for k in (*DECODERS, *ENCODERS, "t5")] + [("t5", ANSWERS)]
HOULSBY = PeftConfig(method="adapter", bottleneck=3, placement="houlsby")
PFEIFFER = PeftConfig(method="adapter", bottleneck=3)
PROMPTS, BIASES, FULL = PeftConfig(method="ptuning_v2", tokens=3), PeftConfig(method="bitfit"), PeftConfig(method="full")
METHODS = [HOULSBY, PFEIFFER, PROMPTS, BIASES, FULL]
BARE = ("llama", "mistral", "qwen3", "t5")  # no bias anywhere in the backbone


def build(kind: str, task: TaskConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    config = CONFIGS[kind]()
    auto: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    if task.kind == "classification":
        config.num_labels, auto = 3, AutoModelForSequenceClassification
    with quiet(), torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if device == "cpu" and name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def attach(model: PreTrainedModel, peft: PeftConfig, task: TaskConfig) -> Attached:
    return method(peft.method).attach(model, peft, task)


def batch(task: TaskConfig, kind: str = "llama", seed: int = 1) -> dict[str, Tensor]:
    """Three rows of 8, 6 and 3 tokens, padded on the right."""
    ids = torch.randint(3, 32, (3, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(8) < torch.tensor([[8], [6], [3]])
    if kind == "t5" and task.kind == "classification":
        ids[torch.arange(3), mask.sum(1) - 1] = 1  # T5 classifies at the end token
    out = {"input_ids": torch.where(mask, ids, 2 if kind == "t5" else 1), "attention_mask": mask.long()}
    return out | ({"decoder_input_ids": ids[:, :4]} if kind == "t5" and task.kind != "classification" else {})


def logits(model: nn.Module, task: TaskConfig, kind: str = "llama", **more: Any) -> Tensor:
    """Logits of the real tokens only."""
    inputs = batch(task, kind)
    out = model(**inputs, **more).logits
    return out if task.kind == "classification" or kind == "t5" else out[inputs["attention_mask"].bool()]


def shake(live: Attached, std: float = 0.3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters.values():
            parameter += torch.randn(parameter.shape, generator=generator) * std


def expect_sentence(kind: str, peft: PeftConfig, task: TaskConfig) -> bool:
    if not (peft is BIASES and kind in BARE):
        return False
    with pytest.raises(ModelError, match=f"but this '{kind}' has none: take peft=lora") as bad:
        attach(build(kind, task), peft, task)
    assert "\n" not in str(bad.value)
    return True


# -- every method on every architecture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", METHODS, ids=lambda p: f"{p.method}-{p.placement}")
@pytest.mark.parametrize(("kind", "task"), CASES, ids=lambda c: c if isinstance(c, str) else c.kind)
def test_a_step_reaches_every_trained_tensor_and_nothing_else(kind: str, task: TaskConfig, peft: PeftConfig) -> None:
    if expect_sentence(kind, peft, task):
        return
    model = build(kind, task)
    before = logits(model, task, kind)
    backbone = {n: p.clone() for n, p in model.named_parameters()}
    live = attach(model, peft, task)
    if peft is not PROMPTS:
        # version 0 equals the backbone; not bit for bit for T5, whose trainable position biases make SDPA choose another kernel
        torch.testing.assert_close(logits(live.model, task, kind), before, rtol=0, atol=1e-4 if kind == "t5" else 0)
    shake(live, 0.05)
    own = dict(live.model.named_parameters())
    assert all(own[live.names[n]] is p and p.dtype is torch.float32 for n, p in live.parameters.items())
    assert {id(p) for p in own.values() if p.requires_grad} == {id(p) for p in live.parameters.values()}
    loss = logits(live.model, task, kind).log_softmax(-1)[..., 2].sum()
    loss.backward()
    # padding rows of embedding tables, and positions and segments that the batch lacks, have a gradient of zeros
    assert all(p.grad is not None and p.grad.isfinite().all() for p in live.parameters.values())
    silent = {n for n, p in live.parameters.items() if p.grad is not None and not p.grad.any()}
    assert all(n.endswith(("k_proj.bias", "key.bias", "k_lin.bias")) for n in silent)  # softmax does not depend on a key's bias
    torch.optim.SGD(live.parameters.values(), lr=0.1).step()
    after = dict(live.model.named_parameters())
    trained = {live.names[n] for n in live.parameters}
    assert all(torch.equal(after[n], p) for n, p in backbone.items() if n in after and n not in trained)
    with live.disabled():
        torch.testing.assert_close(logits(live.model, task, kind), before, rtol=0, atol=1e-4 if kind == "t5" else 0)
    assert not torch.allclose(logits(live.model, task, kind), before, atol=1e-3)


@pytest.mark.parametrize("peft", METHODS, ids=lambda p: f"{p.method}-{p.placement}")
@pytest.mark.parametrize("kind", [*DECODERS, "t5"])
def test_generation_with_and_without_a_cache_agree(kind: str, peft: PeftConfig) -> None:
    task = ANSWERS if kind == "t5" else CAUSAL
    if expect_sentence(kind, peft, task):
        return
    live = attach(build(kind, task), peft, task)
    shake(live, 0.5 if peft is PROMPTS else 0.05)
    model: Any = live.model
    ids = batch(task)["input_ids"][:2, :5]
    model.generation_config.eos_token_id = None
    cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    slow = torch.full((2, 1), 2) if kind == "t5" else ids  # T5 begins its answer with the padding token
    for _ in range(4):
        out = model(input_ids=ids, decoder_input_ids=slow) if kind == "t5" else model(input_ids=slow)
        slow = torch.cat([slow, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, slow)
    with live.disabled():
        other = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert peft is not PROMPTS or not torch.equal(cached, other)


@pytest.mark.parametrize("peft", METHODS, ids=lambda p: f"{p.method}-{p.placement}")
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "bert", "albert"])
def test_a_server_learns_names_and_shapes_on_the_meta_device(kind: str, peft: PeftConfig) -> None:
    live = attach(build(kind, CLASSES), peft, CLASSES)
    server = attach(build(kind, CLASSES, device="meta", dtype=torch.bfloat16), peft, CLASSES)
    assert {n: p.shape for n, p in live.parameters.items()} == {n: p.shape for n, p in server.parameters.items()}
    assert list(live.parameters) == list(server.parameters) and set(live.origin) == set(server.origin)


@pytest.mark.parametrize("peft", [HOULSBY, PROMPTS, BIASES], ids=lambda p: p.method)
@pytest.mark.parametrize(("kind", "task"), [("qwen2", CAUSAL), ("gpt2", CAUSAL), ("bert", CLASSES), ("albert", CLASSES)])
def test_over_bf16_the_trained_tensors_are_float32(kind: str, task: TaskConfig, peft: PeftConfig) -> None:
    model = build(kind, task, dtype=torch.bfloat16)
    for head in (n for n in ("classifier", "score") if hasattr(model, n)):  # as after load_backbone
        model.get_submodule(head).float().register_forward_pre_hook(lambda m, a: (a[0].float(),))
    before = logits(model, task)
    live = attach(model, peft, task)
    assert all(p.dtype is torch.float32 for p in live.parameters.values())
    assert peft is PROMPTS or torch.equal(logits(live.model, task), before)
    logits(live.model, task).float().log_softmax(-1)[..., 2].sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in live.parameters.values())
    with torch.no_grad():  # steps far below bf16's resolution add up
        name, bias = next(iter(live.parameters.items()))
        start = bias.clone()
        for _ in range(100):
            bias += 1e-5
    torch.testing.assert_close(bias - start, torch.full_like(bias, 1e-3), rtol=1e-2, atol=0)
    with live.disabled():
        assert torch.equal(logits(live.model, task), before)


@pytest.mark.parametrize("peft", [HOULSBY, PROMPTS, BIASES, FULL], ids=lambda p: p.method)
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "albert"])
def test_vmap_over_clients_equals_sequential_training(kind: str, peft: PeftConfig) -> None:
    live = attach(build(kind, CLASSES), peft, CLASSES)
    shake(live)
    live.model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]  # vmap would warn of SDPA, which it loops over
    inputs = batch(CLASSES)["input_ids"][:2]  # without a mask: making one reads values, which vmap does not allow
    stacks = {}
    for name, parameter in live.parameters.items():
        generator = torch.Generator().manual_seed(7)
        stacks[live.names[name]] = torch.stack(
            [parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator) for _ in "ab"]
        )

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        return functional_call(live.model, values, (), {"inputs_embeds": embed(ids)[None], "attention_mask": None}).logits.square().sum()

    table = copy.deepcopy(live.model.get_input_embeddings())  # pyright: ignore[reportCallIssue]
    embed = lambda ids: nn.functional.embedding(ids, table.weight.detach())  # noqa: E731
    together = vmap(grad(loss))(stacks, inputs)
    for k in range(2):
        alone = grad(loss)({n: s[k] for n, s in stacks.items()}, inputs[k])
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name][k], gradient, rtol=1e-3, atol=1e-4)
