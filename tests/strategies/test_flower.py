"""Conversion to and from Flower's classes."""

import gc

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.strategy import ServerState
from fedtune.errors import UpdateError, UpdateMismatch
from fedtune.strategies import _flower
from tests.strategies.updates import plain, random_adapter, update


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_restored(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.5, -2.25, 0.0]]).T.to(dtype)  # not contiguous, and exact in bfloat16
    scalar = torch.tensor(3.0, dtype=dtype)
    like = AdapterState({"a": values, "b": scalar}, AdapterSpec(method="bitfit"))
    out = _flower.aggregated(flower.FedAvg(), 1, [_flower.reply(like.tensors, 3)], like)
    assert out is not None
    assert all(torch.equal(out[n], like[n]) and out[n].dtype == dtype and out[n].shape == like[n].shape for n in "ab")


def test_memory_reads_back_what_was_written() -> None:
    written = _flower.to_remember("m", {"a": torch.tensor([1.0, 2.0]).numpy()})
    assert list(written) == ["m/a"] and written["m/a"].dtype == torch.float32
    read = _flower.remembered(written, "m", ["a"])
    assert read is not None and read["a"].tolist() == [1.0, 2.0]
    assert _flower.remembered({}, "m", ["a"]) is None


def test_a_cohort_is_in_the_order_of_ids() -> None:
    result = _flower.cohort(ServerState(adapter=plain(0)), iter([update(c, plain(1)) for c in ("b", "c", "a")]))
    assert [u.client for u in result] == ["a", "b", "c"]


def test_another_rank_is_refused_by_name() -> None:
    state = ServerState(adapter=random_adapter(0))
    short = random_adapter(1)
    short = short.replace({**short.tensors, "q.lora_A": short["q.lora_A"][:1]})
    with pytest.raises(UpdateMismatch, match=r"client c7: tensor 'q.lora_A' is \(1, 5\) instead of \(2, 5\)"):
        _flower.cohort(state, [update("c7", short)])
    lacking = random_adapter(1).subset(["q.lora_A"])
    with pytest.raises(UpdateMismatch, match="tensor 'q.lora_B' is missing"):
        _flower.cohort(state, [update("c7", lacking)])


@pytest.mark.parametrize("values", [{}, {"lr_sum": -1.0}])
def test_a_missing_measurement_is_named(values: dict[str, float]) -> None:
    with pytest.raises(UpdateError, match="client c7 sent lr_sum="):
        _flower.measured(update("c7", plain(0)), values, "lr_sum")


def test_flower_s_records_collect_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    collected, frozen = list[int](), gc.get_freeze_count()
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    with _flower.no_collection():
        _flower.arrays({"w": torch.ones(2)}).to_numpy_ndarrays(keep_input=False)
    assert not collected and gc.get_freeze_count() == frozen  # objects that the process has frozen stay frozen
    _flower.arrays({"w": torch.ones(2)}).to_numpy_ndarrays(keep_input=False)
    assert collected
