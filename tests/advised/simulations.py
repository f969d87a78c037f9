"""The advice in errors of simulations: clients that train in one batch, Ray, and benchmarks."""

import dataclasses
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import torch

from fedtune.clients.workspace import Workspace
from fedtune.config import EngineConfig, PeftConfig
from fedtune.errors import FedtuneError
from fedtune.simulations.benchmarks import batched as bench
from fedtune.simulations.benchmarks.inference.widen import widen
from fedtune.simulations.engines import batched, ray, ray_grid
from fedtune.simulations.engines.batched import train_together
from fedtune.simulations.engines.client_batch import shared_dropout
from tests.advised.rows import Place, error_of, follows
from tests.clients.test_lower_layers import build_adapter
from tests.export.test_huggingface import ASK
from tests.simulations.benchmarks.test_widen import size, tiny
from tests.simulations.engines.test_ray_grid import ask_all, make_grid
from tests.simulations.engines.turns import turn_inputs_of
from tests.tiny import tiny_config

SGD = {"optimizer": "sgd", "clip_norm": None}


def batch_error(place: Place, lr: float, **plan: Any) -> str:
    """The first error of two clients that train at once; "" if there is none."""
    folder = place.keep("batched", lambda path: (path.mkdir(), tiny_config(path)))
    space = Workspace(tiny_config(folder))
    todo = turn_inputs_of({c: space.examples(c, "train")[:4] for c in ("c0", "c1")}, space.initial, lr=lr, lr_last=lr, **plan)
    results = train_together(space.live, todo, space.config.task, pad_id=space.pad_id)
    return next((str(result) for result in results if isinstance(result, FedtuneError)), "")


@follows("the training loss became {} in {}: lower client.lr", slow=True)
def _(place: Place) -> Iterator[str]:
    yield batch_error(place, 1e30, **SGD)
    yield batch_error(place, 1e-2, **SGD)
    for plan in ({**SGD, "clip_norm": 1.0}, {"clip_norm": 1.0}):  # clipping does not keep a step at this rate short
        assert "lower client.lr" in batch_error(place, 1e30, **plan)
        yield batch_error(place, 1e-2, **plan)


@follows("the gradient's norm became {} in {}: lower client.lr")
def _(place: Place) -> Iterator[str]:
    real = batched._Stack._gradient

    def gradient(stack: Any) -> torch.Tensor:
        return real(stack) * (torch.inf if stack.flat.abs().max() > 1e3 else 1.0)  # such large weights make gradients overflow

    place.patch.setattr(batched._Stack, "_gradient", gradient)
    yield batch_error(place, 1e4)
    yield batch_error(place, 1e-2)


@follows("the backbone draws dropout for the whole batch ({}): set model.dropout=false")
def _(place: Place) -> Iterator[str]:
    config = tiny_config(place.folder)
    stored = place.folder / "model/config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"attention_dropout": 0.1}))
    for dropout in (True, False):
        space = Workspace(dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=dropout)))
        yield shared_dropout(space.live) or ""


@follows("an encoder-decoder draws the adapter's dropout for two lengths: set peft.dropout=0")
def _(place: Place) -> Iterator[str]:
    for name, dropout in (("drawn", 0.1), ("none", 0.0)):
        live, _ = build_adapter(place.folder / name, "t5", PeftConfig(rank=3, dropout=dropout), ASK)
        yield shared_dropout(live) or ""


# -- Ray -----------------------------------------------------------------------------------------------------------------------------------


@follows("engine.ray_address={}: Ray's client mode gives workers no files")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(importlib.util, "find_spec", lambda name: name)
    for address in ("ray://10.0.0.5:10001", "10.0.0.5:6379"):
        yield error_of(lambda address=address: ray.check_ray(EngineConfig(kind="ray", ray_address=address)))


@follows("engine=ray needs Ray: install it with pip install 'fedtune[ray]'")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(importlib.util, "find_spec", lambda name: None)
    error = error_of(lambda: ray.check_ray(EngineConfig(kind="ray")))
    yield error
    extra = error.partition("fedtune[")[2].partition("]")[0]
    required = [w for w in importlib.metadata.requires("fedtune") or () if w.replace("'", '"').endswith(f'extra == "{extra}"')]
    assert any(w.startswith("flwr[simulation]") for w in required)  # Flower's extra that installs Ray
    place.patch.setattr(importlib.util, "find_spec", lambda name: name)
    yield error_of(lambda: ray.check_ray(EngineConfig(kind="ray")))


@follows("there has been no Ray worker for {} s: see `ray status`, then continue with resume=RUN")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(ray_grid, "_PATIENCE_S", 0.0)
    for workers in (0, 1):  # the second time, a machine has joined the cluster
        yield error_of(lambda workers=workers: ask_all(make_grid(workers, 2)[0]))


# -- benchmarks ----------------------------------------------------------------------------------------------------------------------------


@follows("--ray: the baseline on Ray trains LoRA only, leave out --method")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(bench, "backbone", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # stops where the measurement would begin
    for more in (["--method", "ia3"], []):
        place.output.readouterr()
        try:
            bench.main(["--ray", "2", "--models", "nano", *more])
        except (SystemExit, KeyboardInterrupt) as end:
            yield place.output.readouterr().err if isinstance(end, SystemExit) else ""


@follows("{} heads are too few for the {} of {}: take more")
def _(place: Place) -> Iterator[str]:
    folder, _ = tiny(place.folder / "small")
    for heads in (1, 8):
        yield error_of(lambda heads=heads: widen(folder, place.folder / f"wide-{heads}", size(heads=heads, kv_heads=1)))
