"""A task defined only in this file runs: two rounds, evaluation, report, card, export, private and batched training."""

import ast
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedtune.config import Config, DataConfig, EngineConfig, EvalConfig, InferenceConfig, TaskConfig, check, reference
from fedtune.config.registry import TASKS
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import Score, find, higher_is_better, metrics, task_of, tasks
from fedtune.data import Example, load_federation
from fedtune.data.examples import whole_texts
from fedtune.errors import ConfigError, DataError, ModelError
from fedtune.experiment import simulate
from fedtune.inference.generate import read_card
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models import tasks as tasks_folder
from fedtune.models.tasks._rows import RowTask
from fedtune.privacy.samples import hooked, looped, mapped
from fedtune.runs.report import read_metrics
from fedtune.runs.report.summary import primary_metric
from tests.contributing import module
from tests.syntax import nodes
from tests.tiny import texts, tiny_config

Counts: Any = module("fedtune/models/tasks/counts.py", "fedtune.models.tasks.counts").Counts
del sys.modules["fedtune.models.tasks.counts"]


class Tags(RowTask):
    """A set of three possible tags per text, as a list in the source."""

    columns = {"text": "text", "tags": "raw"}
    metrics = {"tags_right": True}

    def outputs(self, labels: int) -> int:
        return 3

    def model_settings(self, outputs: int) -> dict[str, Any]:
        return {"num_labels": outputs, "problem_type": "multi_label_classification"}

    def encode(self, rows: RowSet, tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        coded = whole_texts(rows["text"][:], tokenizer, self.settings.max_length, one_end=encoder_decoder)
        hot = [np.isin(np.arange(3), tags).astype(np.float32) for tags in rows["tags"][:]]
        return [Example(ids, tags) for ids, tags in zip(coded, hot, strict=True)]

    def example_labels(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.eye(3, device=ids.device)[torch.arange(len(ids)) % 3]

    def loss(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        each = binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
        return each.sum() if reduction == "sum" else each

    def score(self, logits: Tensor, targets: Tensor, sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        right = ((logits > 0) == (targets > 0.5)).float().mean(-1)
        each = self.loss(logits, targets, "none")
        return [Score(loss, 1, hit) for loss, hit in zip(each.tolist(), right.tolist(), strict=True)]

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        return {"tags_right": math.fsum(s.detail for s in scores) / len(scores)}


@pytest.fixture(autouse=True)
def register_counts() -> Iterator[None]:
    TASKS.register("counts", Counts)
    yield
    TASKS.remove("counts")


def test_rows_may_hold_lists_and_targets_may_be_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS._registered, "tags", Tags)
    rows = [{**r, "tags": sorted({0, i % 3})} for i, r in enumerate(texts(24))]
    config = tiny_config(tmp_path, rows, task=TaskConfig(kind="tags", max_length=16), eval=EvalConfig(where="none", clients=-1), rounds=1)
    config = check(dataclasses.replace(config, data=dataclasses.replace(config.data, test_path=None)))
    assert load_federation(config).rows["tags"][:3] == [[0], [0, 1], [0, 2]]
    (first, last) = [r for r in read_metrics(simulate(config)) if r.get("client") is None]
    assert {"clients_mean"} <= set(first) and last["counted"] == 4 and 0 < last["clients_mean"] <= 1


def experiment(folder: Path, **changes: Any) -> Config:
    """Texts with their number of words."""
    rows = [{"text": r["text"], "client": r["client"], "words": len(r["text"].split())} for r in texts(24)]
    values: dict[str, Any] = {
        "task": TaskConfig(kind="counts", max_length=16),
        "eval": EvalConfig(where="server", clients=-1),
        **changes,
    }
    config = tiny_config(folder, rows, **values)
    data = {"path": config.data.path, "test_path": None, "test_fraction": 0.2, "columns": {"count": "words"}}
    return check(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))


def test_two_rounds_end_in_a_report_a_card_and_a_model_that_transformers_loads(tmp_path: Path) -> None:
    run = simulate(experiment(tmp_path, inference=InferenceConfig(export="hf")))
    records = read_metrics(run)
    rounds = [r for r in records if r.get("client") is None]
    assert [r["round"] for r in rounds] == [0, 1, 2] and all({"loss", "mae", "clients_mean"} <= set(r) for r in rounds)
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    assert rounds[-1]["clients_worst_decile"] >= rounds[-1]["clients_mean"]  # lower is better
    assert primary_metric(records) == "mae" and not higher_is_better("mae")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "lower is better" in html and "mae" in html
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "task: counts" in card and "mae on the global test" in card and "labels, in the order" not in card
    assert "AutoModelForSequenceClassification" in card and "num_labels=1" in card
    assert json.loads((run / "merged" / "fedtune.json").read_text())["task"] == "counts"
    with pytest.raises(ModelError, match="is a counter: it outputs numbers, not text"):
        read_card(run / "merged")
    # the exported model predicts the same numbers as the trained adapter
    model = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
    tokens = AutoTokenizer.from_pretrained(run / "merged")("lamp kettle door", return_tensors="pt").input_ids
    config = experiment(tmp_path)
    backbone = load_backbone(config.model, config.task, num_labels=1, seed=config.seed)
    live = LiveAdapter(backbone, config.peft, config.task)
    live.load(AdapterState.load(run / "adapter" / "fedtune.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, live.model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_clients_trained_in_a_batch_end_with_the_same_adapters(tmp_path: Path) -> None:
    def adapter(batched: str) -> AdapterState:
        run = simulate(experiment(tmp_path, engine=EngineConfig(threads=1, batched=batched), rounds=1))
        return AdapterState.load(run / "adapter" / "fedtune.safetensors")

    alone, together = adapter("none"), adapter("4")
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)


def test_single_rows_have_the_gradients_of_the_loop(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    live = LiveAdapter(load_backbone(config.model, config.task, num_labels=1), config.peft, config.task)
    names, task = list(live.parameters), task_of(config.task)
    for name in names:
        torch.nn.init.normal_(live.parameters[name], std=0.1, generator=torch.Generator().manual_seed(len(name)))
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [4, 5, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    batch: Mapping[str, Tensor] = {"input_ids": ids, "attention_mask": mask, "labels": task.example_labels(ids, mask)}
    live.model.train()
    results = []
    for way in (looped, hooked, mapped):
        with way(live, names, config.task) as grads:
            results.append(grads(batch))
    for other in results[1:]:
        for name in names:
            torch.testing.assert_close(other[name], results[0][name], rtol=1e-3, atol=1e-5)


def test_a_registered_task_is_a_choice_and_an_unknown_name_is_refused() -> None:
    (choices,) = [text for key, _, text in reference() if key == "task.kind"]
    assert choices.endswith("[causal_lm | chat | classification | counts | instruction | multi_label | preference | regression]")
    with pytest.raises(ConfigError, match=r"task\.kind=ranking is not known: choose one of causal_lm, .*, counts, .*"):
        check(Config(task=TaskConfig(kind="ranking")))
    with pytest.raises(ConfigError, match=r"task\.kind=_rows is not known"):
        find("_rows")


@pytest.mark.parametrize("value", ["many", None, float("inf"), [1]])
def test_a_non_numeric_value_is_refused(tmp_path: Path, value: object) -> None:
    config = tiny_config(tmp_path, [{"text": "lamp", "client": "a", "count": 1}, {"text": "door", "client": "a", "count": value}])
    data = DataConfig(source="local", path=config.data.path)
    with pytest.raises(DataError, match="count"):
        load_federation(dataclasses.replace(config, task=TaskConfig(kind="counts", max_length=8), data=data))


# -- the metrics of all tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*TASKS.names(), "counts"}))
def test_a_report_judges_by_the_task_s_own_primary_metric(name: str) -> None:
    assert set(tasks()) == {"causal_lm", "chat", "classification", "counts", "instruction", "multi_label", "preference", "regression"}
    task = task_of(TaskConfig(kind=name))
    record = {"round": 1, "client": None, "loss": 1.0, **dict.fromkeys(reversed([*task.metrics]), 0.5)}
    assert primary_metric([record]) == task.primary[0] and higher_is_better(task.primary[0]) == task.primary[1]


def test_tasks_that_contradict_each_other_about_a_metric_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counts, "metrics", {"accuracy": False})
    with pytest.raises(ConfigError, match="about whether higher accuracy is better"):
        metrics()
    monkeypatch.setattr(Counts, "metrics", {"macro_f1": True, "accuracy": True})
    with pytest.raises(ConfigError, match="rank the metrics .* in different orders"):
        metrics()


def test_no_file_compares_task_names() -> None:
    """Differences between tasks are attributes or methods of the task: a comparison with a name would exclude new tasks."""
    root, looked, results = Path(__file__).parents[2], 0, []
    for file in (f for folder in ("fedtune", "clients", "simulations", "strategies") for f in (root / folder).rglob("*.py")):
        looked += 1
        for node in nodes(file):
            if isinstance(node, ast.Compare):
                names = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & {*TASKS.names()} - {"regression"}
                results += [f"{file.relative_to(root)}:{node.lineno}"] if names else []
    assert looked > 100 and not results, results


def test_a_task_s_names_need_no_torch() -> None:
    code = (
        "import sys; from fedtune.config import Config, check; from fedtune.contracts.task import metrics; check(Config()); metrics()\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'peft') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0 and process.stdout.strip() == "[]", process.stderr + process.stdout


def test_a_task_s_file_may_define_other_classes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helped.py").write_text(
        "from fedtune.models.tasks.instruction import Instruction\nclass Helper: pass\nclass Helped(Instruction): helper = Helper\n"
    )
    monkeypatch.setattr(tasks_folder, "__path__", folders := [*tasks_folder.__path__, str(tmp_path)])
    monkeypatch.setattr(tasks_folder.__spec__, "submodule_search_locations", folders)
    try:
        assert check(Config(task=TaskConfig(kind="helped"))).task.kind == "helped" and find("helped").__name__ == "Helped"
    finally:
        sys.modules.pop("fedtune.models.tasks.helped", None)
        TASKS._found.pop("helped", None)
