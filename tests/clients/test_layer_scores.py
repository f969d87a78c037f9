"""FedPepTAO's layer score, on matrices that can be checked by hand and on a real backbone."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from fedtune.clients.turns import turn_of
from fedtune.clients.turns.fedpeptao import redundancy
from fedtune.clients.workspace import Workspace
from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.data import Example
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, load_backbone
from tests.models.build import checkpoint, hub
from tests.quick import quick
from tests.tiny import tiny_config
from tests.working import work, work_in

PLAN = Plan(round=1, client="c0", base_version=0, turn="fedpeptao", params={"share": False}, batch_size=6, seed=3)


def test_the_score_of_orthonormal_rows_is_one_per_row() -> None:
    rows = torch.linalg.qr(torch.randn(40, 7, generator=torch.Generator().manual_seed(0))).Q.T
    # every λ is 1: log(1 + 1e-5) + 1 / (1 + 1e-5) = 1 + 5e-11
    assert redundancy(rows) == pytest.approx(7.0, abs=1e-5)


def test_the_score_of_equal_rows_by_hand() -> None:
    # λ = (5, 0, 0, 0, 0): log 5 + 1/5, and 4 times log 1e-5 + 1e5
    assert redundancy(torch.full((5, 9), 2.0)) == pytest.approx(math.log(5) + 0.2 + 4 * (math.log(1e-5) + 1e5), rel=1e-6)


def test_the_score_of_random_rows_is_slightly_above_that_of_orthogonal_rows() -> None:
    score = redundancy(torch.randn(16, 300, generator=torch.Generator().manual_seed(1)))
    assert 16.0 < score < 18.0


def test_a_row_of_zeros_has_a_finite_score() -> None:
    assert math.isfinite(redundancy(torch.cat([torch.zeros(1, 4), torch.eye(4)])))


def invariant(score: Callable[[torch.Tensor], float], x: torch.Tensor, order: torch.Tensor, scales: torch.Tensor) -> None:
    assert score(x[order] * scales[:, None]) == pytest.approx(score(x), rel=1e-6)


@given(st.integers(2, 9), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_order_and_scale_of_the_rows_do_not_matter(rows: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 31, generator=gen, dtype=torch.float64)
    invariant(redundancy, x, torch.randperm(rows, generator=gen), torch.rand(rows, generator=gen, dtype=torch.float64) + 0.1)


def test_the_check_catches_a_gram_matrix_that_is_not_of_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "normalize", lambda x, dim: x)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(AssertionError):
        invariant(redundancy, x, torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tiny_config(tmp_path_factory.mktemp("layers"), peft=PeftConfig(method="ptuning_v2", tokens=3)))


def measure(space: Workspace, examples: Sequence[Example], **changes: Any) -> AdapterState:
    plan = dataclasses.replace(PLAN, **changes)
    return turn_of(plan).observe(work_in(space, plan, examples=examples))


def by_hand(space: Workspace, rows: Sequence[Example]) -> list[float]:
    """Each row alone through a fresh model, padded by zeros afterward; cosines one by one."""
    model = AutoModel.from_pretrained(space.config.model.name).eval()
    length = max(len(e.input_ids) for e in rows)
    outputs = []
    for row in rows:
        with torch.no_grad():
            hidden = model(torch.tensor(row.input_ids[None].astype(np.int64)), output_hidden_states=True).hidden_states[1:]
        outputs.append([np.pad(h[0].double().numpy(), ((0, length - h.shape[1]), (0, 0))).ravel() for h in hidden])
    scores = []
    for layer in range(len(outputs[0])):
        x = [o[layer] for o in outputs]
        gram = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in x] for a in x]
        values = np.maximum(np.linalg.eigvalsh(gram), 0) + 1e-5
        scores.append(float(np.sum(np.log(values) + 1 / values)))
    return scores


def test_scores_of_a_backbone_are_those_of_the_bare_one(space: Workspace) -> None:
    examples = space.examples("c0", "train")[:6]  # one batch has all rows
    assert len({len(e.input_ids) for e in examples}) > 1
    with torch.no_grad():
        for p in space.live.parameters.values():  # nonzero prompts: scores must not depend on them
            p.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(0))
    space.live.model.train()
    seen = measure(space, examples)
    assert seen["layers"].tolist() == pytest.approx(by_hand(space, examples), rel=1e-4)
    assert (seen.spec.method, seen.spec.base, seen["layers"].dtype) == ("scores", space.live.spec.base, torch.float64)
    assert space.live.model.training and all(p.requires_grad and p.grad is None for p in space.live.parameters.values())
    shuffled = measure(space, examples[::-1], seed=8)
    assert shuffled["layers"].tolist() == pytest.approx(seen["layers"].tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("task", "kind"),
    quick(
        [
            *(("classification", k) for k in ("llama", "qwen3", "gpt2", "opt", "bert", "roberta", "distilbert", "albert", "t5")),
            *(("instruction", k) for k in ("llama", "qwen3", "gpt2", "opt", "t5")),
        ],
        ("classification", "albert"),
        ("instruction", "llama"),
        ("instruction", "t5"),
    ),
)
def test_every_architecture_has_a_score_for_each_prompt(tmp_path: Path, kind: str, task: str) -> None:
    config = TaskConfig(kind=task, max_length=16)
    backbone = load_backbone(hub(checkpoint(tmp_path, kind)), config, num_labels=3)
    live = LiveAdapter(backbone, PeftConfig(method="ptuning_v2", tokens=2), config)
    rows = [[5, 6, 7, 1], [8, 9, 10, 11, 12, 1], [13, 5, 1], [6, 9, 3, 4, 1]]
    if task == "classification":
        examples = [Example(np.array(r, np.int32), np.array([i % 3], np.int32)) for i, r in enumerate(rows)]
    else:
        labels = [r[-2:] if kind == "t5" else [-100] * (len(r) - 2) + r[-2:] for r in rows]
        examples = [Example(np.array(r, np.int32), np.array(y, np.int32), len(r) - 2, "x") for r, y in zip(rows, labels, strict=True)]
    pad = 2 if kind == "t5" else 1  # the end token must not count as padding, because T5 looks for it
    plan = dataclasses.replace(PLAN, params={"share": True})
    seen = turn_of(plan).observe(work(live, examples, plan, config, pad))
    again = turn_of(PLAN).observe(work(live, examples[::-1], PLAN, config, pad))
    prompts = sum(n.endswith(".prompt") for n in live.parameters)
    assert {n: t.shape for n, t in seen.tensors.items()} == {"layers": (prompts,), "ratio": (1,)} and list(again.tensors) == ["layers"]
    assert all(bool(torch.isfinite(t).all()) for t in seen.tensors.values())
    assert again["layers"].tolist() == pytest.approx(seen["layers"].tolist(), rel=1e-3)


def test_a_batch_has_the_plan_s_size_and_seed(space: Workspace) -> None:
    examples = space.examples("c0", "train")

    def scores(**changes: int) -> list[float]:
        return measure(space, examples, **{"batch_size": 3, **changes})["layers"].tolist()

    assert scores() == scores() and scores() != scores(seed=4) and scores() != scores(batch_size=4)


def test_an_adapter_without_one_prompt_per_layer_is_an_error(tmp_path: Path) -> None:
    space = Workspace(tiny_config(tmp_path))
    with pytest.raises(ModelError, match="the outputs of 2 layers, but the adapter has 0 prompts: set peft=ptuning_v2"):
        measure(space, space.examples("c0", "train"))
