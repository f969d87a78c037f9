"""Per-row gradients equal a loop of backward passes over single rows, for every PEFT method."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from transformers import Qwen2Config

from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.task import IGNORED
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.backbone import quiet
from fedtune.privacy import samples
from tests.models.build import VOCABULARY, checkpoint, hub, llama_config
from tests.quick import quick

LM = TaskConfig(kind="causal_lm", max_length=12)
ANSWERS = TaskConfig(kind="instruction", max_length=12, max_new_tokens=4)
CLASSES = TaskConfig(kind="classification", max_length=12)


def perturbed_adapter(folder: Path, kind: str, method: str, task: TaskConfig, **changes: Any) -> LiveAdapter:
    """An adapter with every tensor perturbed: with LoRA's B at zero, half of the gradients would be zero too."""
    with quiet():
        backbone = load_backbone(hub(checkpoint(folder, kind)), task, num_labels=3 if task is CLASSES else 0)
        live = LiveAdapter(backbone, PeftConfig(**{"method": method, "rank": 3, "tokens": 3, "bottleneck": 5, **changes}), task)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in live.parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    live.model.train()
    return live


def rows(task: TaskConfig, seq2seq: bool = False) -> dict[str, torch.Tensor]:
    """Four rows of 9, 4, 6 and 7 tokens, each ending in the end token."""
    sizes = torch.tensor([9, 4, 6, 7])
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(4), sizes - 1] = 1
    mask = (torch.arange(9) < sizes[:, None]).long()
    ids = ids.masked_fill(mask == 0, 1 if not seq2seq else 2)
    if task.kind == "classification":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 2])}
    labels = ids.masked_fill(mask == 0, IGNORED)
    if task.kind == "instruction":
        labels = torch.tensor([[-100, 5, 6, 1], [-100, 7, 1, -100], [-100, 9, 8, 1], [-100, 1, -100, -100]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def one_by_one(live: LiveAdapter, batch: dict[str, torch.Tensor], task: TaskConfig) -> dict[str, torch.Tensor]:
    """By hand, without the code under test: the loss of a single row, `backward`, `.grad`."""
    out: dict[str, list[torch.Tensor]] = {n: [] for n in live.parameters}
    for i in range(len(batch["labels"])):
        row = {n: t[i : i + 1] for n, t in batch.items()}
        inputs = {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]}
        if task.kind == "classification":
            loss = F.cross_entropy(live.model(**inputs).logits, row["labels"])
        elif live.backbone.seq2seq:
            labels = row["labels"][:, 1:]
            loss = live.model(**inputs, labels=labels).loss
        else:
            logits = live.model(**inputs, use_cache=False).logits[:, -9:][:, :-1]
            loss = F.cross_entropy(logits[0], row["labels"][0, 1:], ignore_index=IGNORED)
        loss.backward()
        for n, p in live.parameters.items():
            out[n].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
            p.grad = None
    return {n: torch.stack(g) for n, g in out.items()}


def largest_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest error of a row's joint gradient, relative to its norm."""
    errors = sum((actual[n] - g).double().flatten(1).square().sum(1) for n, g in expected.items())
    sizes = sum(g.double().flatten(1).square().sum(1) for g in expected.values())
    assert isinstance(errors, torch.Tensor) and isinstance(sizes, torch.Tensor)
    return float((errors / sizes).sqrt().max())


CASES = [
    *((m, "llama", LM, "hooked") for m in ("lora", "rslora", "prefix")),
    *((m, "llama", LM, "mapped") for m in ("dora", "ia3", "prompt", "adapter", "ptuning_v2", "full", "ravan", "fedsb")),
    ("lora", "gpt2", LM, "hooked"),
    ("lora", "opt", CLASSES, "mapped"),  # its feed-forward layers flatten all rows into one
    *((m, "roberta", CLASSES, "mapped") for m in ("dora", "ia3", "prompt", "adapter", "ptuning_v2", "full", "ravan", "fedsb")),
    *((m, "roberta", CLASSES, "hooked") for m in ("lora", "rslora", "bitfit")),
    ("prefix", "llama", CLASSES, None),  # encoders take no past keys and values
    ("bitfit", "qwen2", LM, None),
    ("lora", "albert", CLASSES, "hooked"),
    ("lora", "distilbert", CLASSES, "hooked"),
    ("prompt", "llama", CLASSES, None),
    ("lora", "t5", ANSWERS, "hooked"),
    ("adapter", "t5", ANSWERS, "mapped"),
    ("lora", "t5", CLASSES, "hooked"),
    ("adapter", "t5", CLASSES, "looped"),  # transformers counts each row's end tokens, which vmap cannot trace
]


def hooks(live: LiveAdapter) -> dict[str, tuple[int, int, int]]:
    """Module → its hooks, by kind."""
    return {n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for n, m in live.model.named_modules()}


QUICK = [case for case in CASES if (case[1] == "llama" and case[2] is LM) or case[:2] in (("lora", "albert"), ("bitfit", "qwen2"))]


@pytest.mark.parametrize(("method", "kind", "task", "way"), quick(CASES, *QUICK), ids=[f"{m}-{k}-{t.kind}" for m, k, t, _ in CASES])
def test_the_gradients_of_each_method(tmp_path: Path, method: str, kind: str, task: TaskConfig, way: str | None) -> None:
    live = perturbed_adapter(tmp_path / "m", kind, method, task)
    names, batch, before = list(live.parameters), rows(task, live.backbone.seq2seq), hooks(live)
    chosen = samples.find_way(live, names, task)
    if way is not None:
        assert chosen.__name__ == way
    expected = one_by_one(live, batch, task)
    with chosen(live, names, task) as grads:
        actual = grads(batch)
        again = grads(batch)
    assert {n: g.shape for n, g in actual.items()} == {n: (4, *p.shape) for n, p in live.parameters.items()}
    assert largest_error(actual, expected) <= 1e-6 and largest_error(again, expected) <= 1e-6
    # no hook is left
    assert all(p.grad is None and getattr(p, "grad_sample", None) is None for p in live.parameters.values())
    assert hooks(live) == before and len(before) > 10


def test_a_row_with_a_single_target_counts_as_any_other(tmp_path: Path) -> None:
    live, batch = perturbed_adapter(tmp_path / "m", "llama", "ia3", LM), rows(LM)
    batch["labels"][1, :3] = IGNORED  # three of four tokens
    assert (batch["labels"][:, 1:] != IGNORED).sum(1).tolist() == [8, 1, 5, 6]
    with samples.mapped(live, list(live.parameters), LM) as grads:
        assert largest_error(grads(batch), one_by_one(live, batch, LM)) <= 1e-6
    probe = samples._probe(live, LM)
    assert probe["attention_mask"].sum(1).tolist() == [5, 3, 4] and len(probe["input_ids"].unique()) > 9


def test_the_loop_matches_single_backward_passes(tmp_path: Path) -> None:
    live = perturbed_adapter(tmp_path / "m", "llama", "lora", LM)
    with samples.looped(live, list(live.parameters), LM) as grads:
        assert largest_error(grads(rows(LM)), one_by_one(live, rows(LM), LM)) <= 1e-6


@pytest.mark.slow
def test_gradients_of_a_part_of_the_tensors(tmp_path: Path) -> None:
    live = perturbed_adapter(tmp_path / "m", "llama", "dora", LM)
    names = [n for n in live.parameters if n.endswith(".lora_B")]
    for n, p in live.parameters.items():
        p.requires_grad_(n in names)
    with samples.find_way(live, names, LM)(live, names, LM) as grads:
        actual = grads(rows(LM))
    assert list(actual) == names and largest_error(actual, {n: one_by_one(live, rows(LM), LM)[n] for n in names}) <= 1e-6


def test_a_summed_gradient_is_refused(tmp_path: Path) -> None:
    live = perturbed_adapter(tmp_path / "m", "llama", "prompt", LM)
    # the prompt's embedding is looked up once for all rows: Opacus gives (1, tokens, width), whose norm is not any row's
    with (
        pytest.raises(ModelError, match="one gradient per row: 4 rows, 1 gradients"),
        samples.hooked(live, ["prompt"], LM) as grads,
    ):
        grads(rows(LM))


@pytest.mark.parametrize("wrong", ["scaled", "shared"])
def test_an_incorrect_method_is_not_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    live, right = perturbed_adapter(tmp_path / "m", "llama", "lora", LM), GradSampleModule.capture_backprops_hook

    def damage(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        right(self, module, *args, **kwargs)
        for p in module.parameters():
            mean = p.grad_sample.mean(0, keepdim=True).expand_as(p.grad_sample)
            p.grad_sample = p.grad_sample * 1.01 if wrong == "scaled" else mean

    monkeypatch.setattr(GradSampleModule, "capture_backprops_hook", damage)
    assert samples.find_way(live, list(live.parameters), LM) is samples.mapped


def test_selecting_a_method_has_no_side_effects(tmp_path: Path) -> None:
    live = perturbed_adapter(tmp_path / "m", "llama", "lora", LM, dropout=0.5)
    before, state = {n: p.detach().clone() for n, p in live.parameters.items()}, torch.random.get_rng_state()
    assert samples.find_way(live, list(live.parameters), LM) is samples.hooked
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[n], p) for n, p in live.parameters.items())
    assert {m.p for m in live.model.modules() if isinstance(m, torch.nn.Dropout)} >= {0.5}


def test_dropout_differs_from_row_to_row(tmp_path: Path) -> None:
    live = perturbed_adapter(tmp_path / "m", "llama", "dora", LM, dropout=0.5)
    same = {n: t[:1].expand(4, *t.shape[1:]) for n, t in rows(LM).items()}
    with samples.mapped(live, list(live.parameters), LM) as grads:
        actual = next(iter(grads(same).values()))
    assert not torch.allclose(actual[0], actual[1])


def test_a_prompt_on_a_quantized_backbone_uses_the_loop(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    live = perturbed_adapter(tmp_path / "m", "llama", "prompt", LM)
    for layer in live.backbone.model.model.layers:
        old = layer.mlp.down_proj
        layer.mlp.down_proj = bnb.nn.Linear4bit(24, 16, bias=False, quant_type="nf4", compute_dtype=torch.float32).requires_grad_(False)
        layer.mlp.down_proj.load_state_dict(old.state_dict())
        layer.mlp.down_proj.to("cpu")
    live.model.train()
    names = list(live.parameters)
    assert samples.find_way(live, names, LM) is samples.looped
    with samples.looped(live, names, LM) as grads:
        assert largest_error(grads(rows(LM)), one_by_one(live, rows(LM), LM)) <= 1e-6


def test_products_in_bf16_are_hooked_too(tmp_path: Path) -> None:
    live = LiveAdapter(load_backbone(hub(checkpoint(tmp_path / "m"), precision="bf16"), LM), PeftConfig(rank=3), LM)
    with torch.no_grad():
        for p in live.parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    live.model.train()
    names, batch = list(live.parameters), rows(LM)
    assert samples.find_way(live, names, LM) is samples.hooked
    with samples.looped(live, names, LM) as grads:
        expected = grads(batch)
    with samples.hooked(live, names, LM) as grads:
        assert largest_error(grads(batch), expected) < 0.03


def quantized_adapter(folder: Path, method: str, task: TaskConfig, precision: str) -> LiveAdapter:
    """Like `perturbed_adapter`, with biases and a backbone whose weight rows are multiples of 64."""
    config = llama_config(Qwen2Config, tie_word_embeddings=False, hidden_size=64, intermediate_size=128)
    settings = hub(checkpoint(folder, "qwen2", config=config), precision=precision, compute="fp32")
    with quiet():
        backbone = load_backbone(settings, task, num_labels=3 if task is CLASSES else 0)
        live = LiveAdapter(backbone, PeftConfig(method=method, rank=3, tokens=3, bottleneck=5), task)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in live.parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    live.model.train()
    return live


QUANTIZED = [  # without `full`, which freezes nothing
    (m, p) for p in ("nf4", "int8") for m in ("lora", "dora", "rslora", "adapter", "prefix", "prompt", "ptuning_v2", "ia3", "bitfit")
]


@pytest.mark.slow
@pytest.mark.parametrize("task", [LM, CLASSES], ids=lambda t: t.kind)
@pytest.mark.parametrize(("method", "precision"), QUANTIZED)
def test_each_method_over_a_quantized_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, precision: str, task: TaskConfig
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    live, batch = quantized_adapter(tmp_path / "m", method, task, precision), rows(task)
    names = list(live.parameters)
    expected = one_by_one(live, batch, task)
    with samples.find_way(live, names, task)(live, names, task) as grads:
        actual = grads(batch)
    assert largest_error(actual, expected) <= 1e-5


def test_the_loop_is_used_if_int8_depends_on_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = pytest.importorskip("bitsandbytes").autograd._functions
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    live = quantized_adapter(tmp_path / "m", "lora", LM, "int8")
    names = list(live.parameters)
    assert samples.find_way(live, names, LM) is samples.hooked  # on a CPU rows do not affect each other
    layer = next(m for n, m in live.model.named_modules() if n.endswith("down_proj.base_layer"))
    given = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    given[0, 5] = 20.0  # an outlier of the first row, beyond bitsandbytes' threshold of 6

    def on_cuda(x: torch.Tensor) -> torch.Tensor:
        return functions.MatMul8bitLt.apply(x, layer.weight, None, None, layer.state)

    # on CUDA it changes the other rows, so removing it removes more than its own gradient
    assert not torch.equal(on_cuda(given)[1:], on_cuda(given[1:]))
    samples._chosen.clear()
    object.__setattr__(live.backbone, "device", torch.device("cuda"))
    assert samples._mixes_rows(live)
    monkeypatch.setattr(samples, "_is_correct", lambda *args: True)
    assert samples.find_way(live, names, LM) is samples.looped


def test_a_tensor_that_a_row_does_not_use_has_a_gradient_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    used, idle = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    live: Any = SimpleNamespace(parameters={"used": used, "idle": idle})
    monkeypatch.setattr(samples, "_losses", lambda live, batch, task: (live.parameters["used"] * batch["labels"]).sum())
    with samples.looped(live, ["used", "idle"], LM) as grads:
        result = grads({"labels": torch.tensor([3.0, 5.0])})
    assert result["used"].tolist() == [[3, 3], [5, 5]] and result["idle"].tolist() == [[0, 0, 0]] * 2
