import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.config import TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter
from fedtune.models.backbone import quiet
from fedtune.models.combined import fold_shifts
from fedtune.models.shift import FrozenWeights
from tests.export.test_huggingface import CAUSAL, CLASSES, make_run, shift
from tests.models.build import checkpoint, hub, token_ids

_A = "base_model.model.{}.lora_A.weight"


def folded_adapter(
    folder: Path, kind: str, task: TaskConfig, ranks: tuple[int, ...], method: str = "lora"
) -> tuple[LiveAdapter, PeftModel]:
    """The run's model with a shift of each rank, its shifts, and PEFT's model of the untouched backbone with the folded adapter."""
    source = checkpoint(folder / "m", kind)
    run, live = make_run(folder / "run", hub(source), task, method=method)
    shifts = [shift(live, version, rank) for version, rank in enumerate(ranks, 1)]
    frozen = FrozenWeights(live.backbone.model)
    for state in shifts:
        frozen.add(state)
    fold_shifts(run / "adapter", live.read(1), shifts)
    auto = AutoModelForCausalLM if task is CAUSAL else AutoModelForSequenceClassification
    more = {} if task is CAUSAL else {"num_labels": 3, "pad_token_id": live.backbone.tokenizer.pad_token_id}
    with quiet():
        return live, PeftModel.from_pretrained(auto.from_pretrained(source, **more), str(run / "adapter")).eval()


def logit_error(live: LiveAdapter, opened: PeftModel) -> float:
    """Largest difference of the logits, as a share of the largest logit."""
    live.model.eval()
    with torch.no_grad():
        want, actual = live.model(token_ids()).logits, opened(token_ids()).logits
    return float((actual - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize(("kind", "task"), [("llama", CAUSAL), ("gpt2", CAUSAL), ("llama", CLASSES), ("bert", CLASSES)])
# modules at odd positions have ranks 3 + 2, at even positions 3 + 5; layers are 8 to 64 wide, so 3 + 40 exceeds most of them
@pytest.mark.parametrize("ranks", [(2, 5), (40, 5, 30)])
def test_peft_opens_the_fold_on_the_untouched_backbone(
    tmp_path: Path, kind: str, task: TaskConfig, ranks: tuple[int, ...], method: str
) -> None:
    live, opened = folded_adapter(tmp_path, kind, task, ranks, method)
    assert logit_error(live, opened) < 1e-5
    with live.disabled():
        assert logit_error(live, opened) > 1e-3  # the adapter has an effect
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"]) == set(config["alpha_pattern"]) == {m.replace(".", r"\.") for m in live.spec.ranks}
    for module in live.spec.ranks:
        a, b = (live.parameters[f"{module}.lora_{x}"] for x in "AB")
        own = [ranks[v - 1] for v in range(1, len(ranks) + 1) if module in list(live.spec.ranks)[v % 2 :: 2]]
        assert len(stored[_A.format(module)]) == min(3 + sum(own), a.shape[1], len(b))  # stacked, but never more rows than the layer has


def test_without_shifts_the_fold_is_the_adapter(tmp_path: Path) -> None:
    live, opened = folded_adapter(tmp_path, "llama", CAUSAL, ())
    assert logit_error(live, opened) < 1e-5


def test_a_module_that_no_shift_names_stays_as_it_is(tmp_path: Path) -> None:
    live, _ = folded_adapter(tmp_path, "gpt2", CAUSAL, (2,))
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    module = list(live.spec.ranks)[0]  # the first shift is at modules 1, 3, …
    s, a, b = live.spec.scaling[module], *(live.parameters[f"{module}.lora_{x}"].detach() for x in "AB")
    torch.testing.assert_close(stored[_A.format(module)], s * a)
    torch.testing.assert_close(stored[_A.format(module).replace("lora_A", "lora_B")], b)


@pytest.mark.parametrize("wrong", ["dropped", "scaling", "swapped"])
def test_a_wrong_stack_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    from fedtune.models import combined

    right = combined.stack

    def stack(parts: list[tuple[float, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        if wrong == "dropped":
            return right(parts[:1])
        if wrong == "scaling":
            return right([(1.0, a, b) for _, a, b in parts])
        a, b = right(parts)
        return a.flip(0), b

    monkeypatch.setattr(combined, "stack", stack)
    live, opened = folded_adapter(tmp_path, "gpt2", CAUSAL, (2, 5))
    assert logit_error(live, opened) > 1e-3


def test_a_shift_at_a_module_without_an_adapter_is_refused(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    extra = shift(live, 2, 2)
    module = next(iter(extra.spec.ranks))
    less = live.read(1)
    rest = {m: r for m, r in less.spec.ranks.items() if m != module}
    small = AdapterState({n: t for n, t in less.tensors.items() if n.rpartition(".")[0] != module}, less.spec).replace(ranks=rest)
    with pytest.raises(ModelError, match=f"changes '{module}', which the adapter in .* does not adapt"):
        fold_shifts(run / "adapter", small, [extra])
