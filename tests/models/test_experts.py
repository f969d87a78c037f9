"""LoRA at the stacked weights of experts (peft.target_parameters): live, exchanged, merged and exported alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedtune.config import Config, PeftConfig, PrivacyConfig, TaskConfig
from fedtune.config.rules import check
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ConfigError, ModelError
from fedtune.export.huggingface import export_hf
from fedtune.models import LiveAdapter, initial_adapter, load_backbone
from fedtune.models.backbone import quiet
from fedtune.models.edits import edits_of
from fedtune.models.merge import merge
from fedtune.models.probe import probe
from fedtune.rounds.find_strategy import check_strategy
from fedtune.simulations.engines import stacked, vmapped
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.flora import FLoRA
from tests.models.build import checkpoint, hub, token_ids
from tests.models.test_architectures import gpt_oss, mixtral, qwen3_moe

CAUSAL = TaskConfig(kind="causal_lm", max_length=16)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "o_proj"]


def live_on(folder: Path, names: list[str] = BOTH, **changes: Any) -> LiveAdapter:
    peft = PeftConfig(rank=2, alpha=6.0, targets=ATTENTION, target_parameters=names, **changes)
    live = LiveAdapter(load_backbone(hub(folder), CAUSAL), peft, CAUSAL)
    draws = torch.Generator().manual_seed(0)
    live.load(live.read(0).replace({n: 0.3 * torch.randn(p.shape, generator=draws) for n, p in live.parameters.items()}))
    live.model.eval()
    return live


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("config", [mixtral, qwen3_moe])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_merged_model_has_the_live_logits(tmp_path: Path, config: Any, method: str) -> None:
    folder = checkpoint(tmp_path / "m", config=config())
    live = live_on(folder, method=method)
    names = {n.rpartition(".")[0] for n in live.parameters if "experts" in n}
    assert {n.rpartition(".")[2] for n in names} == {"gate_up_proj", "down_proj"} and all(n in live.spec.ranks for n in names)
    expected = logits(live.model)
    with live.disabled():
        assert (logits(live.model) - expected).abs().max() > 0.1
    state = live.read(1)
    some = state.replace({n: t for n, t in state.tensors.items() if "experts" not in n},
                         ranks={m: r for m, r in state.spec.ranks.items() if "experts" not in m})  # fmt: skip
    bare, without = load_backbone(hub(folder), CAUSAL).model, load_backbone(hub(folder), CAUSAL).model
    merge(bare, state)
    torch.testing.assert_close(logits(bare), expected, atol=1e-4, rtol=1e-4)
    merge(without, some)
    assert (logits(without) - expected).abs().max() > 0.05  # the experts' part has an effect


def test_each_expert_changes_by_its_own_product(tmp_path: Path) -> None:
    """By hand: A has one expert after the other, B one rank after the other."""
    a, b = torch.arange(12.0).view(6, 2), torch.arange(18.0).view(3, 6)  # 3 experts of rank 2, in 2, out 3
    spec = live_on(checkpoint(tmp_path / "m", config=mixtral())).spec
    state = AdapterState({"x.lora_A": a, "x.lora_B": b}, spec).replace(ranks={"x": 6}, scaling={"x": 0.5})
    (edit,) = edits_of([state], {}, {"x": (3, 3, 2)})["x"]
    zero = torch.zeros(3, 3, 2, dtype=torch.float64)
    whole = edit(zero, 0, 3)
    for e in range(3):
        own_a, own_b = a[2 * e : 2 * e + 2], b[:, [e, 3 + e]]
        assert torch.equal(whole[e], 0.5 * (own_b @ own_a).double())
    assert torch.equal(edit(zero[1:2], 1, 2), whole[1:2])
    with pytest.raises(ModelError, match=r"factors of 'x' are \(6, 2\) and \(3, 6\), which do not divide among the backbone's 4 experts"):
        edits_of([state], {}, {"x": (4, 3, 2)})


@pytest.mark.parametrize("config", [mixtral, qwen3_moe])
def test_the_server_knows_the_names_and_shapes_from_the_config(tmp_path: Path, config: Any) -> None:
    folder, peft = checkpoint(tmp_path / "m", config=config()), PeftConfig(rank=2, targets=ATTENTION, target_parameters=BOTH)
    start = initial_adapter(hub(folder), CAUSAL, peft, num_labels=0, seed=0)
    live = LiveAdapter(load_backbone(hub(folder), CAUSAL), peft, CAUSAL)
    live.load(start)  # names, shapes, ranks and scaling fit
    probe(live, CAUSAL)  # every factor gets a gradient
    assert any("experts" in n for n in start.tensors) and not any(t.any() for n, t in start.tensors.items() if n.endswith("lora_B"))


def test_clients_train_one_after_the_other(tmp_path: Path) -> None:
    live = live_on(checkpoint(tmp_path / "m", config=mixtral()))
    assert "stacked experts, which have no stacked form" in (stacked.why_not(live) or "")
    assert vmapped.why_not(live, CAUSAL)
    assert torch.isfinite(logits(live.model)).all()  # the attempt leaves the model unchanged


def test_exports_hold_the_adapted_experts(tmp_path: Path) -> None:
    from tests.export.test_huggingface import make_run

    folder = checkpoint(tmp_path / "m", config=mixtral())
    run, _ = make_run(tmp_path / "run", hub(folder), CAUSAL)
    live = live_on(folder)
    live.save_peft(run / "adapter")
    live.read(1).save(run / "adapter" / "fedtune.safetensors")
    expected = logits(live.model)
    with quiet():
        exported = AutoModelForCausalLM.from_pretrained(export_hf(run, run / "hf"))
        opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(run / "adapter"))
    torch.testing.assert_close(logits(exported), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(opened), expected, atol=1e-4, rtol=1e-4)
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["target_parameters"]


def test_unsupported_experts_give_a_one_sentence_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="weight of the backbone is called 'w1', it has: experts.gate_up_proj, experts.down_proj$"):
        live_on(checkpoint(tmp_path / "m", config=mixtral()), ["w1"])
    with pytest.raises(ModelError, match="called 'experts.gate_up_proj', it has: none$"):
        live_on(checkpoint(tmp_path / "l"))
    with pytest.raises(ModelError, match=r"is stored as \(experts, in, out\), which is not supported: leave it out$"):
        live_on(checkpoint(tmp_path / "g", config=gpt_oss()))
    private = PrivacyConfig(kind="record", epsilon=3.0)
    for config, message in (
        (Config(peft=PeftConfig(target_parameters=BOTH, method="dora")), "which peft.method=dora does not have: take peft=lora"),
        (Config(peft=PeftConfig(target_parameters=BOTH, dropout=0.1)), "set peft.dropout=0"),
        (Config(peft=PeftConfig(target_parameters=BOTH), privacy=private), "privacy=record has no gradient per row"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(config)
    config = Config(peft=PeftConfig(target_parameters=BOTH))
    check_strategy(FedAvg(), config)
    with pytest.raises(ConfigError, match="FLoRA computes with LoRA's products .*: take strategy=fedavg, or leave out peft"):
        check_strategy(FLoRA(), config)
