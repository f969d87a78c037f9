"""Preference tuning: rows of each form, losses by hand and by transformers, the reference model, and runs."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedtune.clients.loaded_model import LoadedModel
from fedtune.clients.tokens import TokenStore
from fedtune.clients.trainer import train
from fedtune.clients.workspace import Workspace
from fedtune.config import (
    METHODS,
    ClientConfig,
    Config,
    DataConfig,
    DeviceClass,
    DevicesConfig,
    EngineConfig,
    EvalConfig,
    InferenceConfig,
    PartitionConfig,
    PeftConfig,
    PrivacyConfig,
    TaskConfig,
    check,
)
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import ServerState
from fedtune.contracts.task import IGNORED, task_of
from fedtune.contracts.warm_start import WarmStart
from fedtune.data import Example, collate, encode, load_federation
from fedtune.errors import ConfigError, DataError, Decline, ModelError
from fedtune.experiment import simulate
from fedtune.export import edge
from fedtune.export.calibrate import read_calibration_texts
from fedtune.export.edge import export_edge
from fedtune.inference.generate import generate_text
from fedtune.models import initial_adapter, lean, load_backbone, loss_sum
from fedtune.models.evaluation import sequence_log_probs
from fedtune.models.tasks.preference import Preference
from fedtune.rounds.bridge import Bridge
from fedtune.rounds.snapshot import Snapshots
from fedtune.runs.report import read_metrics
from fedtune.simulations.engines import stacked, vmapped
from fedtune.simulations.engines.batched import way_of
from tests.quick import quick
from tests.simulations.engines.turns import check as check_stack
from tests.simulations.engines.turns import turn_inputs_of
from tests.tiny import WORDS, texts, tiny_config
from tests.working import host_for, work

DPO = TaskConfig(kind="preference", max_length=96, max_new_tokens=8)
ORPO = dataclasses.replace(DPO, loss="orpo", beta=0.3)
LN2 = math.log(2)


def pairs(count: int = 24, *, seed: int = 0) -> list[dict[str, Any]]:
    rows = texts(count, seed=seed)
    return [{"client": r["client"], "prompt": r["text"], "chosen": r["question"], "rejected": f"the {r['reply']}"} for r in rows]


def local(path: Path, task: TaskConfig = DPO, **data: Any) -> Config:
    source = DataConfig(source="local", path=str(path), test_fraction=0.0, **data)
    return check(Config(task=task, data=source, partition=PartitionConfig(kind="iid", clients=1)))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def say(*contents: str, first: int = 0) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[(first + i) % 2], "content": c} for i, c in enumerate(contents)]


# -- rows ---------------------------------------------------------------------------------------------------------------------------------

WHOLE = [say("q", "a"), say("q", "b")], [say("q", "x", "r", "[1]"), say("q", "x", "r", "no")]


def test_pairs_come_as_text_messages_and_whole_conversations(tmp_path: Path) -> None:
    (two, three) = say("q"), say("q", "x", "r")
    forms: dict[str, list[dict[str, Any]]] = {
        "texts.jsonl": [{"prompt": "q", "chosen": "a", "rejected": "b"}],
        "answers.jsonl": [
            {"prompt": p, "chosen": [c[-1]], "rejected": [r[-1]]} for p, (c, r) in zip((two, three), WHOLE, strict=True)
        ],
        "whole.jsonl": [{"chosen": c, "rejected": r} for c, r in WHOLE],
        "doubled.jsonl": [{"prompt": "q", "chosen": c, "rejected": r} for c, r in WHOLE],  # the conversations repeat the prompt
        "sharegpt.jsonl": [
            {n: [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in c]
             for n, c in zip(("chosen", "rejected"), both, strict=True)} for both in WHOLE
        ],
        "mixed.jsonl": [{"prompt": json.dumps(three), "chosen": "[1]", "rejected": "no"}],
    }  # fmt: skip
    for name, rows in forms.items():
        found = load_federation(local(written(tmp_path / name, rows))).rows
        wanted = {"texts.jsonl": WHOLE[:1], "mixed.jsonl": WHOLE[1:]}.get(name, [*WHOLE])
        read = [[*map(json.loads, found[column][:])] for column in ("chosen", "rejected")]
        assert read == [[pair[i] for pair in wanted] for i in (0, 1)], name
    (tmp_path / "a.csv").write_text("question,good,bad\nq,a,b\n")
    columns = {"prompt": "{question}", "chosen": "good", "rejected": "bad"}
    pq.write_table(pa.Table.from_pylist(forms["whole.jsonl"][:1]), tmp_path / "a.parquet")
    for config in (local(tmp_path / "a.csv", columns=columns), local(tmp_path / "a.parquet")):
        assert json.loads(load_federation(config).rows["rejected"][0]) == WHOLE[0][1]


def test_the_demo_s_pairs_have_an_action_of_another_home() -> None:
    rows = load_federation(check(Config(task=DPO))).rows
    for chosen, rejected in zip(rows["chosen"][:], rows["rejected"][:], strict=True):
        a, b = json.loads(chosen), json.loads(rejected)
        assert a[:-1] == b[:-1] and a[-1] != b[-1] and [m["role"] for m in a] == ["user", "assistant"]


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"rejected": None}, r"training row 2 has no 'rejected': fill it or remove the row$"),
        ({"rejected": "a"}, r"training row 2 is not a pair of answers: chosen and rejected are the same; remove the row$"),
        ({"prompt": None}, r"training row 2 is not a pair of answers: it has no prompt; set data\.columns\.prompt, or give whole"),
        ({"chosen": json.dumps(say("q", "a")), "rejected": json.dumps(say("other", "b"))}, r"row 2 .*differ before their last message"),
        ({"chosen": json.dumps(say("q", "a", "r"))}, r"its last message has the role 'user', but an answer has the role 'assistant'"),
        ({"chosen": json.dumps([{"role": "robot", "content": "a"}])}, r"row 2 .*message 1 has the role 'robot'; choose system, user"),
    ],
)  # fmt: skip
def test_a_bad_pair_is_one_sentence(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        load_federation(local(written(tmp_path / "rows.jsonl", [GOOD, {**GOOD, **row}])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["rejected", "prompt"])
def test_a_missing_column_is_one_sentence(tmp_path: Path, missing: str) -> None:
    path = written(tmp_path / "rows.jsonl", [{n: v for n, v in GOOD.items() if n != missing}])
    says = r"task\.kind=preference needs 'rejected', but the .* set data\.columns\.rejected$" if missing == "rejected" else "has no prompt"
    with pytest.raises(DataError, match=says):
        load_federation(local(path))
    with pytest.raises(DataError, match=rf"no column 'x' \(data\.columns\.{missing}\)"):
        load_federation(local(path, columns={missing: "x"}))


def test_what_the_task_cannot_do_is_one_sentence() -> None:
    for changes, sentence in (
        ({"privacy": PrivacyConfig(kind="record", noise=1.0)}, "with task.kind=preference a row is a pair of sequences: take privacy=user"),
        ({"peft": PeftConfig(init="loftq")}, "peft.init=loftq begins with an adapter that changes the model, but task.loss=dpo compares"),
        ({"task": dataclasses.replace(DPO, packing=True)}, "the rows of task.kind=preference cannot be joined"),
        ({"task": dataclasses.replace(DPO, loss="ppo")}, "task.loss=ppo is not known: choose one of dpo, orpo"),
        ({"task": dataclasses.replace(DPO, beta=0.0)}, "task.beta=0"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            check(Config(**{"task": DPO, **changes}))  # type: ignore[arg-type]


# -- encoding -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    """A model with an adapter that changes it."""
    config = tiny_config(tmp_path, pairs(), task=DPO)
    config.data = dataclasses.replace(config.data, test_path=None)
    loaded = LoadedModel(check(config), 0)
    loaded.live.load(disturbed(loaded))
    return loaded


def disturbed(loaded: LoadedModel, seed: int = 0, std: float = 0.3) -> AdapterState:
    config, draw = loaded.config, torch.Generator().manual_seed(seed)
    first = initial_adapter(config.model, config.task, config.peft, num_labels=0, seed=0)
    return first.replace({n: t + std * torch.randn(t.shape, generator=draw) for n, t in first.tensors.items()})


def examples_of(loaded: LoadedModel, task: TaskConfig = DPO, rows: list[dict[str, Any]] | None = None) -> list[Example]:
    config = loaded.config
    if rows is not None:
        config = local(written(Path(config.data.path).with_name("other.jsonl"), rows), task)
    found = load_federation(config).rows
    return encode(found, np.arange(len(found)), loaded.backbone.tokenizer, task)


def split(example: Example) -> list[tuple[Tensor, int]]:
    """Both conversations of an example: ids, and where the answer begins."""
    out = []
    for ids, labels in zip(np.split(example.input_ids, [example.first]), np.split(example.labels, [example.first]), strict=True):
        first = int(np.flatnonzero(labels != IGNORED)[0])
        assert (labels[first:] == ids[first:]).all()
        out.append((torch.tensor(ids.astype(np.int64)), first))
    return out


def test_only_the_last_answer_and_its_end_token_are_targets(model: LoadedModel) -> None:
    words = model.backbone.tokenizer
    row = {name: say("lamp", "door", "cat", last) for name, last in (("chosen", "train"), ("rejected", "oven on"))}
    (example,) = examples_of(model, rows=[row])
    prompt = "User: lamp\nAssistant: door" + words.eos_token + "\nUser: cat\nAssistant:"
    for (ids, first), answer in zip(split(example), (" train", " oven on"), strict=True):
        assert words.decode(ids[:first]) == words.bos_token + prompt or words.decode(ids[:first]) == prompt
        assert words.decode(ids[first:]) == answer + words.eos_token
    assert words.decode(example.input_ids[: example.prompt_length]) == words.decode(split(example)[0][0][: example.prompt_length])
    assert example.answer.strip() == "train" and task_of(DPO).count_terms(example) == 1
    assert example.width == max(len(ids) for ids, _ in split(example))
    (stored,) = TokenStore().add([example])
    assert stored.first == example.first and (stored.labels == example.labels).all() and stored.width == example.width


def test_a_pair_that_does_not_fit_is_left_out_or_has_no_target(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    rows = [GOOD, {**GOOD, "rejected": "lamp " * 40}]
    assert len(examples_of(model, rows=rows)) == 1
    assert "1 of 2 pairs are left out, because a conversation has more than 48 tokens" in caplog.text
    config = local(written(Path(model.config.data.path).with_name("long.jsonl"), rows[1:]))
    found, kind, words = load_federation(config).rows, task_of(DPO), model.backbone.tokenizer
    (silent,) = kind.encode(found, words, encoder_decoder=False, keep_short=True)
    assert kind.count_terms(silent) == kind.count(silent) == 0
    assert kind.terms(collate([silent, *examples_of(model)[:1]], 1)).tolist() == [1]
    needed = 2 * max(len(ids) for ids, _ in split(encode(found, np.arange(1), words, dataclasses.replace(DPO, max_length=1000))[0]))
    assert f"none of 1 pairs fits into task.max_length=96: raise it to {needed} or more" in kind.unusable(found, words)
    assert len(encode(found, np.arange(1), words, dataclasses.replace(DPO, max_length=needed))) == 1
    assert not encode(found, np.arange(1), words, dataclasses.replace(DPO, max_length=needed - 1))


# -- losses -------------------------------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    logprobs, reference = torch.tensor([[-3.0, -5.0], [-4.0, -4.0]]), torch.tensor([[-4.0, -4.5], [-4.0, -4.0]])
    lengths = torch.tensor([[2, 4], [2, 2]])
    # x = 0.1 · ((-3 + 4) - (-5 + 4.5)) = 0.15, and 0
    dpo = Preference(DPO).pair_losses(logprobs, lengths, reference)
    torch.testing.assert_close(dpo, torch.tensor([math.log(1 + math.exp(-0.15)), LN2]))
    # p = exp(-1.5) and exp(-1.25), o = log p/(1 - p); the second pair has equal odds
    a, b = (math.log(math.exp(m) / (1 - math.exp(m))) for m in (-1.5, -1.25))
    orpo = Preference(ORPO).pair_losses(logprobs, lengths, reference)
    torch.testing.assert_close(orpo, torch.tensor([1.5 + 0.3 * math.log(1 + math.exp(b - a)), 2.0 + 0.3 * LN2]))
    assert Preference(ORPO).pair_losses(torch.tensor([[-0.0, -1e-9]]), torch.tensor([[1, 1]]), torch.zeros(1, 2)).isfinite().all()


def test_the_gradient_is_beta_times_sigmoid() -> None:
    logprobs = torch.tensor([[-3.0, -5.0], [-9.0, -2.0]], requires_grad=True)
    Preference(DPO).pair_losses(logprobs, torch.ones(2, 2), torch.zeros(2, 2)).mean().backward()
    x = 0.1 * (logprobs[:, 0] - logprobs[:, 1]).detach()
    wanted = -0.1 * torch.sigmoid(-x) / 2
    torch.testing.assert_close(logprobs.grad, torch.stack([wanted, -wanted], 1))


def by_transformers(model: Any, ids: Tensor, first: int) -> Tensor:
    """log π of the answer: one conversation alone, without padding."""
    scores = F.log_softmax(model(ids[None]).logits[0].double(), -1)
    return sum(scores[i - 1, ids[i]] for i in range(first, len(ids)))  # type: ignore[return-value]


@pytest.mark.parametrize("task", [DPO, ORPO], ids=["dpo", "orpo"])
def test_the_loss_and_the_metrics_are_those_of_transformers_models(model: LoadedModel, task: TaskConfig) -> None:
    rows = examples_of(model, task)[:7]
    base = AutoModelForCausalLM.from_pretrained(model.config.model.name).eval()
    policy, losses, gains, chosen = model.live.model.eval(), [], [], []
    with torch.no_grad():
        for example in rows:
            better, worse = split(example)
            win, lose = by_transformers(policy, *better), by_transformers(policy, *worse)
            if task is DPO:
                gain = (win - by_transformers(base, *better)) - (lose - by_transformers(base, *worse))
                losses.append(-F.logsigmoid(0.1 * gain))
            else:
                mean_w, mean_l = win / (len(better[0]) - better[1]), lose / (len(worse[0]) - worse[1])
                gain = mean_w - mean_l
                odds = gain - (torch.log1p(-torch.exp(mean_w)) - torch.log1p(-torch.exp(mean_l)))
                losses.append(-mean_w - 0.3 * F.logsigmoid(odds))
            gains.append(gain)
            chosen.append(win)
    model.config.task = task
    rows, pad = list(model.with_reference(rows)), model.backbone.tokenizer.pad_token_id
    model.live.load(disturbed(model))
    total, count = loss_sum(model.live.model, collate(rows, pad), task)
    assert count == 7
    torch.testing.assert_close(total.double(), sum(losses), rtol=1e-5, atol=1e-5)
    found = task_of(task).summarize(scores_of(model, rows, task, 3))
    assert found["loss"] == pytest.approx(float(sum(losses)) / 7, rel=1e-5)
    assert found["reward_accuracy"] == pytest.approx(sum(g > 0 for g in gains) / 7) and 0 < found["reward_accuracy"] < 1
    assert found["reward_margin"] == pytest.approx(task.beta * float(sum(gains)) / 7, rel=1e-4)
    assert found["chosen_logprob"] == pytest.approx(float(sum(chosen)) / 7, rel=1e-5)


def scores_of(loaded: LoadedModel, rows: Any, task: TaskConfig, batch_size: int) -> Any:
    from fedtune.models.evaluation import score_examples

    return score_examples(loaded.live.model, loaded.backbone.tokenizer, rows, task, batch_size=batch_size)


def test_without_a_change_the_loss_is_ln_2_and_the_margin_0(model: LoadedModel) -> None:
    first = initial_adapter(model.config.model, DPO, model.config.peft, num_labels=0, seed=0)
    (found,) = model.score(first, examples_of(model))
    assert found["loss"] == pytest.approx(LN2, abs=1e-6) and found["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert found["reward_accuracy"] == 0.5
    (found,) = model.score(disturbed(model), examples_of(model))
    assert abs(found["reward_margin"]) > 1e-3 and found["reward_accuracy"] != 0.5


def test_swapping_a_pair_negates_x(model: LoadedModel) -> None:
    def loss(rows: list[dict[str, Any]]) -> float:
        rows_ = model.with_reference(examples_of(model, rows=rows))
        model.live.load(disturbed(model))
        return loss_sum(model.live.model, collate(rows_, 1), DPO)[0].item()

    row = pairs(1)[0]
    there, back = loss([row]), loss([{**row, "chosen": row["rejected"], "rejected": row["chosen"]}])
    x = math.log(1 / (math.exp(there) - 1))  # from -log σ(x)
    assert abs(x) > 1e-2 and back == pytest.approx(math.log(1 + math.exp(x)), rel=1e-4)


def test_padding_batches_and_layers_of_fedtune_change_nothing(model: LoadedModel) -> None:
    rows = list(model.with_reference(examples_of(model)[:6]))
    lean.disable(model.live)
    results = []
    for way in ("whole", "single", "left", "lean"):
        model.live.load(disturbed(model))
        if way == "lean":
            assert lean.enable(model.live) == ""
        model.live.model.train()
        batches = [collate([r], 1) for r in rows] if way == "single" else [collate(rows, 1, "left" if way == "left" else "right")]
        parts = [loss_sum(model.live.model, b, DPO) for b in batches]
        loss = sum(p[0] for p in parts)
        assert sum(p[1] for p in parts) == 6 and isinstance(loss, Tensor)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.live.parameters.items()}))
        for p in model.live.parameters.values():
            p.grad = None
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-3, atol=1e-5)


def test_micro_batches_train_as_the_whole_batch(model: LoadedModel) -> None:
    rows = model.with_reference(examples_of(model))
    plan = Plan(round=1, client="a", base_version=0, steps=3, batch_size=8, lr=1e-2, seed=1, optimizer="sgd", clip_norm=None)
    results = []
    for micro in (None, 1, 3):
        model.live.load(disturbed(model))
        done = train(work(model.live, rows, plan, DPO, 1), micro=micro)
        results.append((done.loss, model.live.read(version=0)))
    for loss, state in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_16_bit_backbone_has_the_loss_to_its_precision(tmp_path: Path, model: LoadedModel) -> None:
    config = dataclasses.replace(model.config, model=dataclasses.replace(model.config.model, precision="bf16"))
    coarse = LoadedModel(config, 0)
    for other in ("auto", "none"):
        if other == "none":
            lean.disable(coarse.live)
        rows = coarse.with_reference(examples_of(coarse))
        coarse.live.load(disturbed(coarse))
        loss, count = loss_sum(coarse.live.model, collate(rows, 1), DPO)
        exact = model.with_reference(examples_of(model))
        model.live.load(disturbed(model))
        assert loss.item() / count == pytest.approx(loss_sum(model.live.model, collate(exact, 1), DPO)[0].item() / count, rel=0.05)


# -- the reference ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", quick([m for m in METHODS if m != "bitfit"], "lora", "dora", "prompt", "full"))
def test_the_reference_is_the_backbone_with_every_method_off(tmp_path: Path, method: str) -> None:
    config = tiny_config(tmp_path, pairs(), task=DPO, peft=PeftConfig(method=method, rank=2, tokens=3, bottleneck=3))
    loaded = LoadedModel(dataclasses.replace(config, data=dataclasses.replace(config.data, test_path=None)), 0)
    rows = examples_of(loaded)[:5]
    base = AutoModelForCausalLM.from_pretrained(config.model.name).eval()
    state = disturbed(loaded, std=0.1)
    loaded.live.load(state)
    found = [e.reference for e in loaded.with_reference(rows)]
    with torch.no_grad():
        wanted = [[by_transformers(base, ids, first).item() for ids, first in split(e)] for e in rows]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    (scores,) = loaded.score(state, rows)
    assert abs(scores["reward_margin"]) > 1e-4  # on again


def shift(loaded: LoadedModel, version: int) -> AdapterState:
    return disturbed(loaded, seed=version).replace(version=version)


@pytest.mark.parametrize("precision", quick(["fp32", "bf16", "int8"], "fp32"))
def test_shifts_of_later_rounds_are_not_part_of_the_reference(tmp_path: Path, precision: str) -> None:
    config = tiny_config(tmp_path, pairs(), task=DPO)
    data, model = dataclasses.replace(config.data, test_path=None), dataclasses.replace(config.model, precision=precision)
    config = dataclasses.replace(config, data=data, model=model)
    for versions in ((0,), ()):
        wanted, rows = [], examples_of(loaded := LoadedModel(config, 0))[:6]
        shifts = [shift(loaded, v) for v in (*versions, 1, 2)]
        loaded.rebase(versions, shifts[: len(versions)])
        wanted = [e.reference for e in loaded.with_reference(rows)]
        if versions:
            alone = [e.reference for e in LoadedModel(config, 0).with_reference(rows)]
            assert wanted != alone  # not those of the backbone
        late = LoadedModel(config, 0)  # a client that joins in round 3
        late.rebase((*versions, 1, 2), shifts)
        before = logits_of(late)
        assert [e.reference for e in late.with_reference(rows)] == wanted
        assert torch.equal(logits_of(late), before)  # the shifts are back
        assert not torch.equal(before, logits_of(loaded))
        if versions:  # the next run of this process has another start
            loaded.rebase((), ())
            np.testing.assert_allclose([e.reference for e in loaded.with_reference(rows)], alone, rtol=1e-6)


def logits_of(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return loaded.live.model.eval()(torch.arange(3, 20)[None]).logits


def test_a_sum_that_hides_the_start_is_refused(model: LoadedModel) -> None:
    first, second = shift(model, 0), shift(model, 1)
    name = next(iter(first.spec.ranks))
    total = AdapterState({f"{name}.weight": first.product(name) + second.product(name)}, dataclasses.replace(second.spec, method="sum"))
    rest = [s.replace({n: t for n, t in s.tensors.items() if not n.startswith(f"{name}.")},
                      ranks={m: r for m, r in s.spec.ranks.items() if m != name},
                      scaling={m: r for m, r in s.spec.scaling.items() if m != name}) for s in (first, second)]  # fmt: skip
    model.frozen.add(*rest, snapshot=total)
    with pytest.raises(ModelError, match="lacks the model that the run started from: restart it"):
        model.with_reference(examples_of(model))


def test_each_row_is_computed_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(found: Any, examples: Any, *args: Any, **more: Any) -> Any:
        asked.append(len(examples))
        return sequence_log_probs(found, examples, *args, **more)

    monkeypatch.setattr("fedtune.clients.loaded_model.sequence_log_probs", counted)
    rows = examples_of(model)[:6]
    first = model.with_reference(rows)
    assert [e.reference for e in model.with_reference(rows[:4])] == [e.reference for e in first[:4]]
    model.with_reference(examples_of(model)[:8])
    assert asked == [6, 2]
    model.config.task = ORPO
    assert model.with_reference(rows) is rows and asked == [6, 2]


# -- runs ---------------------------------------------------------------------------------------------------------------------------------


def experiment(folder: Path, task: TaskConfig = DPO, **changes: Any) -> Config:
    config = tiny_config(folder, pairs(), task=task, **{"eval": EvalConfig(where="server", clients=-1), **changes})
    data = {"path": config.data.path, "test_path": None, "test_fraction": 0.2}
    return check(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run) if r.get("client") is None]


@pytest.mark.parametrize("task", quick([DPO, ORPO], DPO), ids=["dpo", "orpo"])
def test_a_run_ends_in_a_report_and_a_chat_model(tmp_path: Path, task: TaskConfig) -> None:
    run = simulate(experiment(tmp_path, task, inference=InferenceConfig(export="hf", samples=1)))
    first, _, last = rounds_of(run)
    assert last["loss"] < first["loss"]
    assert last["counted"] == 4 and {"clients_mean", "clients_worst_decile"} <= set(last)
    if task is DPO:
        assert first["loss"] == pytest.approx(LN2, abs=1e-6) and first["clients_mean"] == 0.5
        assert last["reward_margin"] > first["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert "reward_accuracy" in (run / "report.html").read_text(encoding="utf-8")
    card = json.loads((run / "merged" / "fedtune.json").read_text())
    assert card["task"] == "preference" and card["prompt"] is None
    assert (run / "merged" / "chat_template.jinja").read_text() == (run / "adapter" / "chat_template.jinja").read_text()
    assert isinstance(generate_text(run / "merged", "lamp", max_new_tokens=4), str)
    (answer,) = json.loads((run / "answers.json").read_text())
    assert answer["wanted"] in {r["question"] for r in texts(24)}


def test_clients_train_with_the_reference(tmp_path: Path) -> None:
    client = ClientConfig(steps=1, epochs=None, batch_size=4, lr=1e-2, schedule="constant")
    for batched in ("none", "4"):
        run = simulate(experiment(tmp_path, client=client, engine=EngineConfig(threads=1, batched=batched), rounds=1))
        losses = [r["train_loss"] for r in read_metrics(run) if r.get("client") is not None and r["round"] == 1]
        assert losses == pytest.approx([LN2] * 4, abs=1e-6)  # a pair counts once, and the first margin is 0


def margin(policy: Path, reference: Path, rows: list[Example]) -> float:
    """The mean reward margin of one exported model over another."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (policy, reference)]
    with torch.no_grad():
        each = [[by_transformers(m, *better) - by_transformers(m, *worse) for m in models] for better, worse in map(split, rows)]
    return 0.1 * float(sum(a - b for a, b in each)) / len(rows)


MOVING = {"steps": 4, "epochs": None, "batch_size": 4, "lr": 1e-2, "schedule": "constant"}


def strategy(name: str) -> dict[str, Any]:
    return {**compose([f"strategy={name}"])[0].config.strategy}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "flora", "fedex", "fedsa", "flexlora", "ffa"])
def test_after_fine_tuning_the_reference_is_the_fine_tuned_model(tmp_path: Path, name: str) -> None:
    chat = TaskConfig(kind="chat", max_length=48, max_new_tokens=8, generate=False)
    client = ClientConfig(**MOVING)
    config = experiment(tmp_path, chat, client=client, inference=InferenceConfig(export="hf", samples=0))
    earlier = simulate(dataclasses.replace(config, data=dataclasses.replace(config.data, prompt="{prompt}", answer="{chosen}")))
    peft = dataclasses.replace(config.peft, from_=str(earlier), rank=2)
    run = simulate(experiment(tmp_path, client=client, peft=peft, strategy=strategy(name), inference=config.inference, rounds=3))
    first, *_, last = rounds_of(run)
    # with the backbone as the reference, the first margin is that of fine-tuning
    test = Workspace(experiment(tmp_path)).test_examples()
    assert abs(margin(earlier / "merged", tmp_path / "model", list(test))) > 1e-2
    assert first["loss"] == pytest.approx(LN2, abs=1e-5) and first["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert first["clients_mean"] == 0.5 and first["earlier_perplexity"] == pytest.approx(rounds_of(earlier)[-1]["perplexity"], rel=1e-4)
    assert abs(last["reward_margin"]) > 1e-3 or name == "fedsa"  # whose B stays with the clients
    assert last["reward_margin"] == pytest.approx(margin(run / "merged", earlier / "merged", list(test)), rel=1e-2, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "slora", "fedex"])
def test_the_reference_stays_while_weights_shift(tmp_path: Path, name: str) -> None:
    chosen = strategy(name) | ({"mode": "corrected"} if name == "slora" else {})
    client, inference = ClientConfig(**MOVING), InferenceConfig(export="hf", samples=0)
    config = experiment(tmp_path, client=client, strategy=chosen, rounds=4, clients_per_round=2, inference=inference)
    run = simulate(config)
    last, test = rounds_of(run)[-1], list(Workspace(config).test_examples())
    assert abs(last["reward_margin"]) > 1e-3
    assert last["reward_margin"] == pytest.approx(margin(run / "merged", tmp_path / "model", test), rel=1e-2, abs=1e-4)


def test_an_adapter_that_cannot_be_merged_is_no_start(tmp_path: Path) -> None:
    peft = PeftConfig(method="ia3")
    earlier = simulate(experiment(tmp_path, peft=peft, rounds=1))
    again = dataclasses.replace(peft, from_=str(earlier))
    with pytest.raises(
        ConfigError, match=r"task\.loss=dpo compares with the model before the run, and .* with peft=lora, or set task\.loss=orpo"
    ):
        simulate(experiment(tmp_path, peft=again))
    (first, *_) = rounds_of(simulate(experiment(tmp_path, ORPO, peft=again, rounds=1)))
    assert math.isfinite(first["loss"])


@pytest.mark.slow
def test_clients_with_noise_and_an_edge_package(tmp_path: Path) -> None:
    run = simulate(experiment(tmp_path, rounds=1, privacy=PrivacyConfig(kind="user", noise=1.0)))
    assert rounds_of(run)[-1]["counted"] == 4
    export_edge(run, tmp_path / "edge", quantize="int8")
    assert isinstance(generate_text(tmp_path / "edge", "lamp", max_new_tokens=4), str)
    assert {text.splitlines()[-1] for text in read_calibration_texts(run)} <= {row["chosen"] for row in pairs()}
    assert json.loads((tmp_path / "edge" / "fedtune.json").read_text())["task"] == "preference"


def test_a_device_too_small_for_every_pair_declines(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, [{**row, "prompt": " ".join(WORDS)} for row in pairs()], task=DPO)
    config.data.test_path, config.devices = None, DevicesConfig(classes={"phone": DeviceClass(memory_mb=0.35)})
    host = host_for(config)
    client = host.space.client_ids[0]
    plan = Plan(round=1, client=client, base_version=0, steps=1, batch_size=4, lr=1e-2)
    with pytest.raises(Decline, match="only rows of 48 tokens fit the device's memory, but all its rows are longer"):
        host.devices.fit(plan, host.space.initial, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dropout"), [("ia3", 0.0), ("prefix", 0.0), ("lora", 0.3)])
def test_clients_in_one_batch_train_as_alone(tmp_path: Path, method: str, dropout: float) -> None:
    peft = PeftConfig(method=method, rank=2, tokens=3, dropout=dropout)
    space = Workspace(experiment(tmp_path, dataclasses.replace(DPO, beta=2.0), peft=peft))
    rows = {c: space.own.with_reference(space.examples(c, "train")) for c in space.client_ids}
    way, why = way_of(space.live, space.config.task)
    assert way is not None and way is (stacked.installed if method == "lora" else vmapped.installed), why
    check_stack(space.live, turn_inputs_of(rows, space.initial), space.config.task, space.pad_id, way)


def test_a_client_gets_the_start_apart_from_later_shifts(model: LoadedModel) -> None:
    shifts = [shift(model, version) for version in range(8)]
    state = ServerState(adapter=shifts[0], shifts=tuple(shifts))
    for task, warm, summed in ((DPO, True, False), (ORPO, True, True), (DPO, False, True)):
        start = WarmStart(adapter=shifts[0], shifts=(shifts[0],)) if warm else None
        bridge: Any = SimpleNamespace(warm=start, config=dataclasses.replace(model.config, task=task), snapshots=Snapshots())
        assert (Bridge._snapshot(bridge, state) is not None) == summed


def test_an_edge_package_is_measured_on_the_chosen_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment(tmp_path)
    words = load_backbone(config.model, config.task).tokenizer
    monkeypatch.setattr(edge, "answers", lambda turns, *_: [*turns])
    turns: Any = edge._of_test(config, cast(Any, None), words, 64)
    assert {words.decode(answer).strip() for _, answer in turns} <= {f"{row['chosen']}{words.eos_token}" for row in pairs()}
