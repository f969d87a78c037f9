"""One matrix over every method and architecture, and tests of single methods."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from fedtune.config import METHODS, PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.data.examples import Example
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, initial_adapter, load_backbone, loss_sum
from fedtune.models.backbone import Backbone, quiet
from fedtune.models.evaluation import generate_answers
from fedtune.models.losses import counted_logits
from fedtune.models.methods import mergeable, method
from tests.models.build import ENCODERS, checkpoint, hub, token_ids, tokenizer
from tests.quick import quick

CAUSAL, CLASSES = TaskConfig(kind="causal_lm", max_length=16), TaskConfig(kind="classification", max_length=16)
ASK = TaskConfig(kind="instruction", max_length=16, max_new_tokens=6)
DECODERS = ("llama", "qwen2", "qwen3", "gpt2", "opt")
PAIRS = [(kind, CAUSAL) for kind in DECODERS] + [(kind, CLASSES) for kind in (*DECODERS, *ENCODERS, "t5")] + [("t5", ASK)]
QUICK = (("gpt2", CAUSAL), ("bert", CLASSES))  # the quick suite tries every method on these, and LoRA on all
ACTS_AT_ONCE = ("prompt", "prefix", "ptuning_v2")  # virtual tokens change the output from the start; version 0 of any other method does not
PEFT_KNOWS = ("lora", "dora", "rslora", "ia3", "prompt", "prefix", "ptuning_v2")
NO_BIAS = ("llama", "qwen3", "t5")
REFUSED = {("prefix", k, CLASSES.kind) for k in (*ENCODERS, "t5")} | {("prompt", "t5", CLASSES.kind)}
REFUSED |= {("bitfit", k, t.kind) for k in NO_BIAS for t in (CAUSAL, CLASSES, ASK)}


def config(name: str, **changes: object) -> PeftConfig:
    return PeftConfig(**{"method": name, "rank": 3, "alpha": 6.0, "tokens": 4, "bottleneck": 5, **changes})  # type: ignore[arg-type]


def make(folder: Path, kind: str, task: TaskConfig, name: str, precision: str = "fp32", **changes: object) -> LiveAdapter:
    folder = folder if (folder / "config.json").is_file() else checkpoint(folder, kind)
    return LiveAdapter(load_backbone(hub(folder, precision=precision), task, num_labels=3, seed=5), config(name, **changes), task)


def start(folder: Path, task: TaskConfig, name: str, **changes: object) -> AdapterState:
    return initial_adapter(hub(folder), task, config(name, **changes), num_labels=3, seed=5)


def perturb(state: AdapterState, std: float = 0.1, seed: int = 0) -> AdapterState:
    """The state with random changes of every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return state.replace({n: t + std * torch.randn(t.shape, generator=generator) for n, t in state.tensors.items()})


def batch(task: TaskConfig, pad: int = 1) -> dict[str, torch.Tensor]:
    """Three rows with an end token, the second padded on the right."""
    ids, mask = token_ids(), torch.ones(3, 10, dtype=torch.long)
    ids[:, -1] = ids[1, 5] = 1
    mask[1, 6:] = 0
    ids[1, 6:] = pad
    labels = {"classification": torch.tensor([0, 1, 2]), "causal_lm": ids.masked_fill(mask == 0, -100)}
    # T5's labels: the answers after the start token
    labels["instruction"] = torch.tensor([[-100, 5, 6, 1], [-100, 7, 1, -100], [-100, 9, 8, 1]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels[task.kind]}


def logits(live: LiveAdapter | Backbone, task: TaskConfig) -> torch.Tensor:
    """Logits (3, 3) of the classes, or those of all counted tokens."""
    return counted_logits(live.model, batch(task, pad_of(live)), task)[0]


def pad_of(live: LiveAdapter | Backbone) -> int:
    return (live if isinstance(live, Backbone) else live.backbone).tokenizer.pad_token_id


CASES = [
    pytest.param(n, k, t, id=f"{n}-{k}-{t.kind}", marks=[] if n == "lora" or (k, t) in QUICK else [pytest.mark.slow])
    for n in METHODS for k, t in PAIRS if (n, k, t.kind) not in REFUSED
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "task"), CASES)
def test_every_method_on_every_architecture(tmp_path: Path, name: str, kind: str, task: TaskConfig) -> None:
    live, initial = make(tmp_path / "m", kind, task, name), start(tmp_path / "m", task, name)
    # the state fits the live model
    assert list(initial.tensors) == list(live.parameters) == list(live.names)
    assert {n: t.shape for n, t in initial.tensors.items()} == {n: p.shape for n, p in live.parameters.items()}
    dotted = dict(live.model.named_parameters())
    assert all(dotted[live.names[n]] is p and p.dtype is torch.float32 and p.requires_grad for n, p in live.parameters.items())
    trained = {id(p) for p in live.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in live.parameters.values()}
    assert (task is CLASSES) == any(n.startswith(("score.", "classifier.", "classification_head.")) for n in live.parameters)
    # version 0 equals the backbone, if the method allows it
    live.load(initial)
    bare = logits(load_backbone(hub(tmp_path / "m"), task, num_labels=3, seed=5), task)
    if name not in ACTS_AT_ONCE:
        torch.testing.assert_close(logits(live, task), bare, rtol=0, atol=2e-5)
    # load and read are inverse, up to rounding for tensors with an origin
    state = perturb(initial)
    live.load(state)
    for n, tensor in live.read(3).tensors.items():
        torch.testing.assert_close(tensor, state[n], rtol=0, atol=2e-6)
    # the adapter has an effect, can be disabled, and is enabled again
    adapted = logits(live, task)
    assert not torch.allclose(adapted, bare, atol=1e-2)
    with live.disabled():
        torch.testing.assert_close(logits(live, task), bare, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(live, task), adapted, rtol=0, atol=1e-6)
    assert all(p.requires_grad for p in live.parameters.values())
    # gradients reach every trainable tensor, and nothing else
    live.model.train()
    loss_sum(live.model, batch(task, pad_of(live)), task)[0].backward()
    assert [n for n, p in live.parameters.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in live.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("kind", "task"), [("gpt2", CAUSAL), ("llama", CLASSES), ("roberta", CLASSES)])
def test_a_bf16_backbone_trains_float32_tensors(tmp_path: Path, name: str, kind: str, task: TaskConfig) -> None:
    if (name, kind, task.kind) in REFUSED:
        return
    if name == "full":
        with pytest.raises(ModelError, match="take model.precision=fp32"):
            make(tmp_path / "m", kind, task, name, precision="bf16")
        return
    live = make(tmp_path / "m", kind, task, name, precision="bf16")
    live.load(perturb(start(tmp_path / "m", task, name)))
    assert all(p.dtype is torch.float32 for p in live.parameters.values())
    loss_sum(live.model, batch(task), task)[0].backward()
    assert [n for n, p in live.parameters.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("name", "kind"), sorted({(n, k) for n, k, t in REFUSED if t == CLASSES.kind}))
def test_invalid_settings_are_refused_on_server_and_client(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(ModelError, match=f"peft.method={name}"):
        make(tmp_path / "m", kind, CLASSES, name)
    with pytest.raises(ModelError, match=f"peft.method={name}"):
        start(tmp_path / "m", CLASSES, name)


@pytest.mark.parametrize("name", METHODS)
def test_version_0_follows_the_seed_only(tmp_path: Path, name: str) -> None:
    folder = hub(checkpoint(tmp_path / "m", "gpt2"))
    before = torch.get_rng_state()
    a, b, c = (initial_adapter(folder, CLASSES, config(name), num_labels=3, seed=s) for s in (0, 0, 1))
    make(tmp_path / "m", "gpt2", CLASSES, name)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[n], b[n]) for n in a.tensors)
    drawn = [n for n in a.tensors if a[n].unique().numel() > 1]
    assert drawn and all(not torch.equal(a[n], c[n]) for n in drawn)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("kind", "task"),
    quick([("gpt2", CAUSAL), ("distilbert", CLASSES), ("t5", ASK), *(model := [("llama", CAUSAL), ("qwen2", CLASSES)])], *model),
)
def test_the_folder_opens_with_peft(tmp_path: Path, name: str, kind: str, task: TaskConfig) -> None:
    if (name, kind, task.kind) in REFUSED:
        return
    live = make(tmp_path / "m", kind, task, name)
    live.load(perturb(start(tmp_path / "m", task, name)))
    live.save_peft(tmp_path / "adapter")
    if name not in PEFT_KNOWS or (name == "ptuning_v2" and kind in ("distilbert", "t5")):  # transformers 5 passes no past to encoders
        assert not list((tmp_path / "adapter").iterdir())
        return
    with quiet():
        auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM if task is CAUSAL else AutoModelForSequenceClassification
        bare = auto.from_pretrained(tmp_path / "m", **({"num_labels": 3} if task is CLASSES else {}))
        bare.config.pad_token_id = 1
        model = PeftModel.from_pretrained(bare, tmp_path / "adapter")
    ids = token_ids()  # without padding: PEFT's own classifier with a prompt reads the last position
    more = {"decoder_input_ids": token_ids(columns=4, seed=2)} if kind == "t5" else {}
    torch.testing.assert_close(model(ids, **more).logits, live.model(ids, **more).logits, rtol=0, atol=1e-5)
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "m")


# -- LoRA, rsLoRA, DoRA -----------------------------------------------------------------------------------------------------------------


def truncate(state: AdapterState, ranks: dict[str, int]) -> AdapterState:
    """The leading rows of A and columns of B, with a scaling of the client's own."""
    tensors = dict(state.tensors)
    for module, rank in ranks.items():
        tensors[f"{module}.lora_A"] = tensors[f"{module}.lora_A"][:rank].clone()
        tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, :rank].clone()
    return state.replace(tensors, ranks=ranks, scaling={m: 6.0 / r for m, r in ranks.items()})


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_smaller_rank_in_the_slot_is_exact(tmp_path: Path, name: str, kind: str) -> None:
    live = make(tmp_path / "m", kind, CLASSES, name)
    big = perturb(start(tmp_path / "m", CLASSES, name))
    small = truncate(big, {m: 1 + i % 3 for i, m in enumerate(big.spec.ranks)})
    live.load(big)
    live.load(small)
    own = make(tmp_path / "m", kind, CLASSES, name, rank=6, rank_pattern=dict(small.spec.ranks))  # slots of exactly these ranks
    own.load(small)
    torch.testing.assert_close(logits(live, CLASSES), logits(own, CLASSES), rtol=1e-5, atol=1e-5)
    back = live.read(2)
    assert back.spec.ranks == small.spec.ranks and back.spec.scaling == small.spec.scaling
    assert all(back[n].shape == t.shape and back[n].is_contiguous() for n, t in small.tensors.items())
    # three steps: the padding gets no gradient, and the tensors change as in their own slot
    for slot in (live, own):
        optimizer = torch.optim.AdamW(slot.parameters.values(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_sum(slot.model, batch(CLASSES), CLASSES)[0].backward()
            optimizer.step()
    for n, tensor in own.read(1).tensors.items():
        torch.testing.assert_close(live.read(1)[n], tensor, rtol=0, atol=1e-5)
    for module, rank in small.spec.ranks.items():
        assert not live.parameters[f"{module}.lora_A"][rank:].any() and not live.parameters[f"{module}.lora_B"][:, rank:].any()
    # PEFT opens the saved adapter, scaling included
    live.save_peft(tmp_path / "adapter")
    with quiet():
        bare = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=3)
        bare.config.pad_token_id = 1
        model = PeftModel.from_pretrained(bare, tmp_path / "adapter")
    torch.testing.assert_close(model(token_ids()).logits, live.model(token_ids()).logits, rtol=0, atol=1e-5)
    # the full rank is restored unchanged
    live.load(big)
    assert live.read(0).spec == big.replace(base=live.backbone.fingerprint).spec and torch.equal(live.read(0)[n], big[n])


def test_a_slot_with_nonzero_padding_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: self)
    with pytest.raises(AssertionError):
        test_a_smaller_rank_in_the_slot_is_exact(tmp_path, "lora", "llama")


def test_each_module_has_its_rank_and_each_method_its_scaling(tmp_path: Path) -> None:
    pattern = {"q_proj": 4, "layers.1.self_attn.q_proj": 9, "mlp.up_proj": 2}
    checkpoint(tmp_path / "m")
    for name, scale in {"lora": lambda r: 6 / r, "dora": lambda r: 6 / r, "rslora": lambda r: 6 / r**0.5}.items():
        spec = start(tmp_path / "m", CAUSAL, name, rank_pattern=pattern).spec
        ranks = {m.removeprefix("model.layers."): r for m, r in spec.ranks.items()}
        assert ranks["0.self_attn.q_proj"] == 4 and ranks["1.self_attn.q_proj"] == 9  # the longest matching name counts
        assert ranks["0.mlp.up_proj"] == 2 and ranks["1.self_attn.k_proj"] == 3
        assert spec.scaling == pytest.approx({m: scale(r) for m, r in spec.ranks.items()})
        live = make(tmp_path / "m", "llama", CAUSAL, name, rank_pattern=pattern)
        layers = {n.removeprefix("base_model.model."): m for n, m in live.model.named_modules() if hasattr(m, "lora_A")}
        assert {n: m.scaling["default"] for n, m in layers.items()} == pytest.approx(spec.scaling)
    for bad, words in [({"q_prj": 2}, "peft.rank_pattern: no linear module .* 'q_prj'"), ({"q_proj": 0}, "rank of 'q_proj' is 0")]:
        with pytest.raises(ModelError, match=words):
            start(tmp_path / "m", CAUSAL, "lora", rank_pattern=bad)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_doras_magnitude_is_relative_to_the_norms_of_the_rows(tmp_path: Path, kind: str) -> None:
    live, initial = make(tmp_path / "m", kind, CAUSAL, "dora"), start(tmp_path / "m", CAUSAL, "dora")
    live.load(initial)
    for module, layer in ((n, m) for n, m in live.model.named_modules() if hasattr(m, "lora_A")):
        name = module.removeprefix("base_model.model.") + ".lora_magnitude"
        weight = layer.base_layer.weight if kind == "llama" else layer.base_layer.weight.T
        assert not initial[name].any()
        torch.testing.assert_close(live.parameters[name].detach(), weight.norm(dim=1), rtol=0, atol=1e-6)


# -- (IA)³ ------------------------------------------------------------------------------------------------------------------------------


def test_ia3_scales_keys_values_and_the_inner_units(tmp_path: Path) -> None:
    shapes = {n: tuple(t.shape) for n, t in start(checkpoint(tmp_path / "m"), CAUSAL, "ia3").tensors.items()}
    layer = {n.removeprefix("model.layers.0."): s for n, s in shapes.items() if ".0." in n}
    assert layer == {"self_attn.k_proj.ia3": (8, 1), "self_attn.v_proj.ia3": (8, 1), "mlp.down_proj.ia3": (1, 24)}
    chosen = start(tmp_path / "m", CAUSAL, "ia3", targets=["o_proj", "down_proj"])
    assert {n.split(".")[-2]: tuple(t.shape) for n, t in chosen.tensors.items()} == {"o_proj": (16, 1), "down_proj": (1, 24)}


# -- prompts ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt", "prefix", "ptuning_v2"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_classifiers_logits_do_not_depend_on_the_padding(tmp_path: Path, name: str, kind: str) -> None:
    live = make(tmp_path / "m", kind, CLASSES, name)
    live.load(perturb(start(tmp_path / "m", CLASSES, name)))
    data = batch(CLASSES)
    alone = live.model(input_ids=data["input_ids"][1:2, :6], attention_mask=data["attention_mask"][1:2, :6]).logits
    torch.testing.assert_close(logits(live, CLASSES)[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix", "ptuning_v2"])
@pytest.mark.parametrize("kind", [*DECODERS, "t5"])
def test_generation_continues_the_prompt(tmp_path: Path, name: str, kind: str) -> None:
    checkpoint(tmp_path / "m", kind, seed=5 if kind == "t5" else 0)  # with seed 0 T5's answers are empty
    live = make(tmp_path / "m", kind, ASK, name)
    live.load(perturb(start(tmp_path / "m", ASK, name), std=0.5))
    texts = ["turn on the light", "set heat", "red lamp in a kitchen"]
    words = tokenizer(pad_token="<unk>" if kind == "t5" else "</s>")  # transformers misreads our tokenizer beside a T5 or Qwen2
    prompts = [np.array(ids) for ids in words(texts).input_ids]
    rows = [Example(ids, np.full(len(ids), -100), len(ids), "") for ids in prompts]
    want = []
    for row in rows:  # greedy by hand, one token at a time, without a cache
        ids = row.input_ids.tolist()
        for _ in range(6):
            inputs = torch.tensor([row.input_ids.tolist() if kind == "t5" else ids])
            more = {"decoder_input_ids": torch.tensor([[2, *ids[len(row.input_ids) :]]])} if kind == "t5" else {}
            best = int(live.model(input_ids=inputs, attention_mask=torch.ones_like(inputs), **more).logits[0, -1].argmax())
            if best == words.eos_token_id:
                break
            ids.append(best)
        want.append(str(words.decode(ids[len(row.input_ids) :], skip_special_tokens=True)).strip())
    answers = generate_answers(live.model, words, rows, ASK, batch_size=3)
    assert answers == want and len(set(want)) > 1


@pytest.mark.parametrize("name", ["prompt", "prefix", "ptuning_v2"])
def test_virtual_tokens_do_not_count_in_the_loss(tmp_path: Path, name: str) -> None:
    live = make(tmp_path / "m", "llama", CAUSAL, name)
    live.load(perturb(start(tmp_path / "m", CAUSAL, name)))
    data = batch(CAUSAL)
    whole = live.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, -10:]
    labels = data["labels"][:, 1:]
    want = F.cross_entropy(whole[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    loss, count = loss_sum(live.model, data, CAUSAL)
    assert count == 9 + 5 + 9
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_need_space_in_the_context(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="peft.tokens=49 with task.max_length=16 is more than the model's context of 64 tokens"):
        make(tmp_path / "m", "gpt2", CAUSAL, name, tokens=49)
    with pytest.raises(ModelError, match="peft.tokens=43 with task.max_length=16 and task.max_new_tokens=6"):
        start(tmp_path / "m", ASK, name, tokens=43)


def test_methods_that_can_be_merged() -> None:
    assert {n for n in METHODS if not mergeable(n)} == {"adapter", "prompt", "prefix", "ptuning_v2"}
    assert all((method(n).edits is None) == bool(method(n).why_unmergeable) for n in METHODS)
