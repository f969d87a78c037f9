"""A server that prepares and signs offers, and a device's host without a model."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fedtune.config import DeliverConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.delivery.signing import Signer, make_signing_key
from fedtune.rounds.delivery import Delivery, Offer
from tests.fakes import lora_state


def write_keys(folder: Path, name: str = "signing") -> tuple[Path, Path]:
    """The files of a new signing key and of its public half."""
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for file, data in zip((private, public), make_signing_key(), strict=True):
        file.write_bytes(data)
    return private, public


def delivery(folder: Path, key: Path | None, run: str = "mine", **config: Any) -> Delivery:
    return Delivery(
        folder=folder / "delivery",
        run=run,
        config=DeliverConfig(**config),
        sign=None if key is None else Signer(key).sign,
        offers=True,
        note=lambda _: None,
    )


def prepare(server: Delivery, round: int, state: AdapterState, shifts: Sequence[AdapterState] = (), **plan: Any) -> Offer:
    fields = {"round": round + 1, "client": "anna", "base_version": round, "train": ("*",), "send": ("*",), "seed": 0}
    return server.prepare(round, state, shifts)(Plan(**{**fields, **plan}))


def fake_host() -> Any:
    """Enough of a ClientHost to accept a manifest for `lora_state`."""
    backbone = SimpleNamespace(fingerprint="b" * 64, model=torch.nn.Linear(7, 5))
    return SimpleNamespace(space=SimpleNamespace(backbone=backbone, initial=lora_state(fill=0.0)))
