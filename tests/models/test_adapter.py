import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, initial_adapter, load_backbone
from fedtune.models.backbone import quiet
from tests.models.build import checkpoint, hub, llama_config, token_ids

CAUSAL, CLASSES = TaskConfig(kind="causal_lm", max_length=32), TaskConfig(kind="classification", max_length=32)
PEFT = PeftConfig(rank=3, alpha=12.0)
CASES = [("llama", CAUSAL), ("gpt2", CAUSAL), ("llama", CLASSES), ("gpt2", CLASSES), ("bert", CLASSES), ("roberta", CLASSES)]
STORIES = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[2] / "../shared/data")) / "models/stories260k/hf"


def make(folder: Path, kind: str = "llama", task: TaskConfig = CAUSAL, peft: PeftConfig = PEFT, **changes: object) -> LiveAdapter:
    folder = folder if (folder / "config.json").is_file() else checkpoint(folder, kind)
    return LiveAdapter(load_backbone(hub(folder, **changes), task, num_labels=3, seed=5), peft, task)


def random_state(live: LiveAdapter, seed: int = 0, std: float = 0.3) -> AdapterState:
    """A state of the adapter with every tensor random, B and head included."""
    generator = torch.Generator().manual_seed(seed)
    zero = live.read(0)
    return zero.replace({n: torch.randn(t.shape, generator=generator) * std for n, t in zero.tensors.items()})


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_the_initial_adapter_fits_the_live_one_and_changes_nothing(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    live = make(tmp_path / "m", kind, task)
    initial = initial_adapter(hub(tmp_path / "m"), task, PEFT, num_labels=3, seed=5)
    assert {n: t.shape for n, t in initial.tensors.items()} == {n: p.shape for n, p in live.parameters.items()}
    assert list(initial.tensors) == list(live.parameters)
    assert initial.spec.ranks == live.spec.ranks and set(live.spec.scaling.values()) == {4.0} and initial.spec.base == ""
    with live.disabled():
        before = live.model(token_ids()).logits
    live.load(initial)
    assert torch.equal(live.model(token_ids()).logits, before)
    assert all(t.any() != n.endswith((".lora_B", "bias")) for n, t in initial.tensors.items())


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_load_and_read_are_inverse_bit_for_bit(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    live = make(tmp_path / "m", kind, task)
    state = random_state(live)
    live.load(state)
    back = live.read(7)
    assert list(back.tensors) == list(state.tensors) and all(torch.equal(back[n], state[n]) for n in state.tensors)
    assert back.spec.version == 7 and back.spec.base == live.backbone.fingerprint
    with torch.no_grad():
        next(iter(live.parameters.values())).zero_()
    assert torch.equal(back[next(iter(back.tensors))], state[next(iter(back.tensors))])  # a copy, not a view
    assert not any(t.requires_grad for t in back.tensors.values())


def test_names_are_those_of_the_untouched_backbone(tmp_path: Path) -> None:
    live = make(tmp_path / "m", "llama", CLASSES)
    bare = load_backbone(hub(tmp_path / "m"), CLASSES, num_labels=3).model
    modules = dict(bare.named_modules())
    assert {n.rpartition(".")[2] for n in live.parameters} == {"lora_A", "lora_B", "weight"}
    for name, p in live.parameters.items():
        if name.endswith(".lora_A"):
            assert p.shape == (3, modules[name.removesuffix(".lora_A")].in_features)
        elif name.endswith(".lora_B"):
            assert p.shape == (modules[name.removesuffix(".lora_B")].out_features, 3)
        else:
            assert p.shape == bare.get_parameter(name).shape and name == "score.weight"


def test_the_initial_adapter_follows_the_seed_and_does_not_use_the_global_generator(tmp_path: Path) -> None:
    config = hub(checkpoint(tmp_path / "m"))
    state = torch.get_rng_state()
    a, b, c = (initial_adapter(config, CLASSES, PEFT, num_labels=3, seed=s) for s in (0, 0, 1))
    make(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[n], b[n]) for n in a.tensors)
    assert all(n.endswith(".lora_B") or not torch.equal(a[n], c[n]) for n in a.tensors)
    # kaiming_uniform(a=√5) over `in` columns: U(-1/√in, 1/√in); down_proj reads 24
    first = a["model.layers.0.mlp.down_proj.lora_A"]
    assert 0.8 / 24**0.5 < first.abs().max() <= 1 / 24**0.5


def test_a_server_needs_only_config_json(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    (tmp_path / "server").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "server")
    a = initial_adapter(hub(folder), CLASSES, PEFT, num_labels=3, seed=0)
    b = initial_adapter(hub(tmp_path / "server"), CLASSES, PEFT, num_labels=3, seed=0)
    assert list(a.tensors) == list(b.tensors) and all(torch.equal(a[n], b[n]) for n in a.tensors)


def test_the_initial_head_is_the_backbones_drawn_or_stored(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    drawn = load_backbone(hub(folder), CLASSES, num_labels=3, seed=5)
    head = drawn.model.get_parameter("score.weight")
    assert torch.equal(initial_adapter(hub(folder), CLASSES, PEFT, num_labels=3, seed=5)["score.weight"], head)
    drawn.model.save_pretrained(tmp_path / "c")
    stored = initial_adapter(hub(tmp_path / "c"), CLASSES, PEFT, num_labels=3, seed=6)["score.weight"]
    assert torch.equal(stored, head)
    assert initial_adapter(hub(tmp_path / "c"), CLASSES, PEFT, num_labels=4, seed=6)["score.weight"].shape[0] == 4


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_the_adapter_folder_opens_with_peft_on_the_untouched_backbone(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    live = make(tmp_path / "m", kind, task)
    live.load(random_state(live))
    live.save_peft(tmp_path / "adapter")
    want = live.model(token_ids()).logits
    with quiet():
        if task is CAUSAL:
            bare = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        else:
            bare = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=3)  # with a different random head
        bare.config.pad_token_id = live.backbone.tokenizer.pad_token_id
        base = bare(token_ids()).logits
        model = PeftModel.from_pretrained(bare, tmp_path / "adapter")
    torch.testing.assert_close(model(token_ids()).logits, want, rtol=0, atol=1e-5)
    assert not torch.allclose(base, want, atol=1e-2)  # the adapter has an effect, so the comparison above means something
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "m")


@pytest.mark.parametrize(("kind", "task"), [("llama", CAUSAL), ("gpt2", CAUSAL), ("llama", CLASSES), ("bert", CLASSES)])
def test_a_bf16_backbone_keeps_float32_adapters_and_trains(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    live = make(tmp_path / "m", kind, task, precision="bf16")
    assert all(p.dtype is torch.float32 for p in live.parameters.values())
    live.load(random_state(live))
    live.model(token_ids()).logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in live.parameters.values())
    assert all(p.grad is None for n, p in live.model.named_parameters() if not p.requires_grad)
    with live.disabled():
        live.model(token_ids())


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_a_disabled_adapter_leaves_the_untouched_backbone_and_its_flags(tmp_path: Path, task: TaskConfig) -> None:
    folder = checkpoint(tmp_path / "m")
    want = load_backbone(hub(folder), task, num_labels=3, seed=5).model(token_ids()).logits
    live = make(folder, "llama", task)
    live.load(random_state(live))
    adapted = live.model(token_ids()).logits
    frozen = next(iter(live.parameters.values()))
    frozen.requires_grad_(False)
    with live.disabled():
        torch.testing.assert_close(live.model(token_ids()).logits, want, rtol=0, atol=0)
    assert torch.equal(live.model(token_ids()).logits, adapted) and not torch.allclose(adapted, want, atol=1e-2)
    assert [p.requires_grad for p in live.parameters.values()] == [False] + [True] * (len(live.parameters) - 1)


def test_only_the_adapters_tensors_are_trained(tmp_path: Path) -> None:
    live = make(tmp_path / "m", "bert", CLASSES)
    trained = {id(p) for p in live.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in live.parameters.values()}


def test_conv1d_is_wrapped_silently(tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    checkpoint(tmp_path / "m", "gpt2")
    capfd.readouterr()
    recwarn.clear()
    make(tmp_path / "m", "gpt2", CLASSES).save_peft(tmp_path / "adapter")
    assert capfd.readouterr() == ("", "") and not len(recwarn)


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 14), ("q_proj", 2), (["q_proj", "v_proj"], 4), ("layers.1.mlp.up_proj", 1), (["q_proj", "q_proj"], 2)],
)
def test_the_targets_get_factors(tmp_path: Path, targets: object, count: int) -> None:
    live = make(tmp_path / "m", peft=PeftConfig(targets=targets))
    assert len(live.spec.ranks) == count and len(live.parameters) == 2 * count


# -- refused adapters -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "words"),
    [("q_prj", r"called 'q_prj', choose from q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj$"), (["q_proj", "k"], "'k'"),
     ("lm_head", "called 'lm_head'"), ("embed_tokens", "called 'embed_tokens'"), ([], "must be all-linear"), (3, "must be all-linear"),
     (["q_proj", 3], "must be all-linear")],
)  # fmt: skip
def test_targets_that_match_nothing_are_refused(tmp_path: Path, targets: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make(tmp_path / "m", peft=PeftConfig(targets=targets))
    with pytest.raises(ModelError, match=words):
        initial_adapter(hub(tmp_path / "m"), CAUSAL, PeftConfig(targets=targets), num_labels=0, seed=0)


def test_a_backbone_has_one_adapter(tmp_path: Path) -> None:
    live = make(tmp_path / "m")
    with pytest.raises(ModelError, match="already has an adapter"):
        LiveAdapter(live.backbone, PEFT, CAUSAL)


def test_an_adapter_of_another_backbone_is_refused_and_the_live_one_is_unchanged(tmp_path: Path) -> None:
    live, other = make(tmp_path / "a"), make(checkpoint(tmp_path / "b", seed=1))
    before = live.read(0)
    mine, its = live.backbone.fingerprint, other.backbone.fingerprint
    with pytest.raises(ModelError, match=f"belongs to the backbone {its}, but {mine} is loaded: load the same"):
        live.load(random_state(other))
    assert all(torch.equal(before[n], p) for n, p in live.parameters.items())


def test_mismatched_adapters_are_refused_with_the_difference(tmp_path: Path) -> None:
    live = make(tmp_path / "m")
    state = random_state(live)
    names = list(state.tensors)
    wide = checkpoint(tmp_path / "w", config=llama_config(intermediate_size=32))
    cases = [
        (state.subset(names[1:]), f"lacks '{names[0]}'"),
        (state.replace({**state.tensors, "score.weight": torch.zeros(1)}), "has 'score.weight'"),
        (
            make(tmp_path / "m", peft=PeftConfig(rank=4, alpha=16.0)).read(0),
            "rank at '.*layers.0.self_attn.q_proj' is 4, but the model allows 1 to 3",
        ),
        (state.replace(scaling={}), "scaling at .* is missing"),
        (state.replace(ranks=dict.fromkeys(state.spec.ranks, 2)), r"'.*q_proj.lora_A' is \(3, 16\), but the model's is \(2, 16\)"),
        (state.replace(ranks={}), "rank at .* is missing"),
        (state.replace(method="ia3"), "method is 'ia3'"),
        (make(wide).read(0).replace(base=""), r"is \(32, 3\), but the model's is \(24, 3\)"),
    ]
    for bad, words in cases:
        with pytest.raises(ModelError, match=words):
            live.load(bad)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k")
def test_real_weights_train_an_adapter() -> None:
    live = LiveAdapter(load_backbone(hub(STORIES), CAUSAL), PEFT, CAUSAL)
    assert len(live.parameters) == 2 * 7 * 5  # A and B of 7 linear layers in 5 blocks
    state = random_state(live, std=0.05)
    live.load(state)
    assert all(torch.equal(live.read(1)[n], t) for n, t in state.tensors.items())
