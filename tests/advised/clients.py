"""The advice of clients: refusals of a device, and turns that fail."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.clients.deployed import Device, _hello_of, _save_hello, own_config
from fedtune.clients.lower_layers import LowerLayers
from fedtune.clients.store import ClientStore
from fedtune.clients.trainer import train
from fedtune.clients.turns import Work, _base, turn_of
from fedtune.clients.turns.apfl import APFL
from fedtune.clients.turns.fedpeptao import layer_scores, spectrum
from fedtune.clients.workspace import Workspace
from fedtune.config import Config, DataConfig, ModelConfig, PeftConfig, TaskConfig
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Scalar
from fedtune.data import collate
from tests.advised.rows import Place, error_of, follows
from tests.clients.test_gradient_score import make as make_adapter
from tests.clients.test_gradient_score import measure
from tests.clients.test_lower_layers import LM, UPPER, build_adapter
from tests.clients.test_pieces import turn, workspace
from tests.clients.test_store import stored_state
from tests.clients.test_trainer import shift_of
from tests.tiny import texts, tiny_config, tiny_llama, write_rows
from tests.working import work_in


def hello_error(config: Config, place: Place, **own: Any) -> str:
    """The error of a device that gets a server's experiment; "" if there is none."""
    return error_of(lambda: own_config(config, Device(client="home-000", state=place.folder, **own), []))


@follows("and a device runs no code from a model repository: set it to false")
def _(place: Place) -> Iterator[str]:
    for trust in (True, False):
        yield hello_error(Config(model=ModelConfig(trust_remote_code=trust)), place)


@follows("(data.source={}): give this device's rows with --data")
def _(place: Place) -> Iterator[str]:
    config = Config(data=DataConfig(source="local", path="theirs.jsonl", prompt="{question}", answer="{reply}"))
    yield hello_error(config, place)
    yield hello_error(config, place, data=str(write_rows(place.folder / "own.jsonl", texts(4))))


@follows("and the device opens no path that only the server names: give the folder of the backbone with --model")
def _(place: Place) -> Iterator[str]:
    config = Config(model=ModelConfig(source="hub", name="/models/llama"))
    yield hello_error(config, place)
    yield hello_error(config, place, model=str(tiny_llama(place.folder / "m")))


@follows("client {} cannot write its tensors to {}: {}; free the disk")
def _(place: Place) -> Iterator[str]:
    (place.folder / "taken").write_text("")
    for name in ("taken", "free"):
        yield error_of(lambda name=name: ClientStore(place.folder / name, rounds=2).write("a", 1, stored_state(1)))


def cache_error(place: Place, layers: float | None, **peft: Any) -> str:
    """The error of caching lower layers for rows; with None, they are not cached."""
    live, _ = build_adapter(place.folder / str(len(list(place.folder.iterdir()))), "llama", PeftConfig(rank=3, **peft), LM)
    return error_of(lambda: LowerLayers(live, layers) if layers else None)


@follows("so no layer lies below: see peft.targets, or set it to 0", slow=True)
def _(place: Place) -> Iterator[str]:
    yield cache_error(place, 1e9)
    yield cache_error(place, 1e9, targets=UPPER["llama"])
    yield cache_error(place, 0)


@follows("'{}' is trained and changes the lower layers: set it to 0", slow=True)
def _(place: Place) -> Iterator[str]:
    for layers in (1e9, 0):
        yield cache_error(place, layers, method="full")


@follows("the gradient of '{}' is not finite: the loss overflows on this client's rows, set model.precision=fp32", slow=True)
def _(place: Place) -> Iterator[str]:
    whole = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return [g * torch.inf for g in whole(*args, **kwargs)]

    live = make_adapter(place.folder / "m", precision="bf16")
    with place.patch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        yield error_of(lambda: measure(live))
    yield error_of(lambda: measure(make_adapter(place.folder / "m2")))


@follows("the curvature of the prompts is not finite: lower client.lr")
def _(place: Place) -> Iterator[str]:
    for weight in (torch.inf, 1.0):  # prompts that diverged, then finite ones
        yield error_of(lambda weight=weight: spectrum(lambda v: v * weight, torch.ones(5), 3))


@follows("the server's hello is empty: run the same version of fedtune on server and client")
def _(place: Place) -> Iterator[str]:
    flower.identify_process(1)
    for sent in ({}, {"hello": ConfigRecord({"json": "{}"})}):
        yield error_of(lambda sent=sent: _hello_of(Message(RecordDict(sent), 1, "query", group_id="0")))  # type: ignore[arg-type]


@follows("cannot write to {}: {}; free the disk or give another --state")
def _(place: Place) -> Iterator[str]:
    (place.folder / "another").mkdir()

    def save_error(name: str) -> str:
        return error_of(lambda: _save_hello(Device(client="a", state=place.folder / name), "{}"))

    yield save_error("gone")  # a folder whose volume is missing
    yield save_error("another")
    (place.folder / "gone").mkdir()
    yield save_error("gone")


def _config_row(says: str, **config: Any) -> None:
    """A backbone whose config has these values."""

    def follow(place: Place) -> Iterator[str]:
        live, _ = build_adapter(place.folder, "llama", PeftConfig(rank=3, targets=UPPER["llama"]), LM)
        for name, value in config.items():
            setattr(live.backbone.model.config, name, value)
        for layers in (1e9, 0):
            yield error_of(lambda layers=layers: LowerLayers(live, layers) if layers else None)

    follows(says, slow=True)(follow)


_config_row("has no single stack of layers: set it to 0", num_hidden_layers=99)
_config_row("so no row can be cached: set it to 0", attention_dropout=0.1)


def _prompt_space(place: Place, name: str) -> Workspace:
    folder = place.folder / name
    folder.mkdir()
    return Workspace(tiny_config(folder, peft=PeftConfig(method=name, rank=2, tokens=3)))


@follows("but the adapter has {} prompts: set peft=ptuning_v2", slow=True)
def _(place: Place) -> Iterator[str]:
    for name in ("lora", "ptuning_v2"):
        space = _prompt_space(place, name)
        batch = collate(space.examples("c0", "train")[:2], space.pad_id)
        yield error_of(lambda space=space, batch=batch: layer_scores(space.live, batch, space.config.task))


def _sparse_row(says: str, turn: str, params: dict[str, Scalar], name: str) -> None:
    """A turn that measures, while the client holds the sparse stage's tensors."""

    def follow(place: Place) -> Iterator[str]:
        space = _prompt_space(place, name)
        plan = Plan(round=1, client="c0", base_version=0, turn=turn, params=params, batch_size=2)
        right = work_in(space, plan)
        yield error_of(lambda: turn_of(plan).observe(dataclasses.replace(right, live=cast(Any, object()))))
        yield error_of(lambda: turn_of(plan).observe(right))

    follows(says, slow=True)(follow)


_sparse_row("the turn 'fedpeptao' measures prompts, but the adapter has method 'sparse': set peft=ptuning_v2 on the server",
        "fedpeptao", {"share": False}, "ptuning_v2")  # fmt: skip
_sparse_row("the turn 'slora' measures gradients with a LoRA adapter, but the adapter has method 'sparse': set peft=lora",
        "slora", {"stage": "gradient"}, "lora")  # fmt: skip


@follows("is neither merged on this client nor in the message: restart the client", slow=True)
def _(place: Place) -> Iterator[str]:
    space = _prompt_space(place, "lora")
    yield error_of(lambda: space.rebase((1, 2), [shift_of(space, 1)]))
    started_again = Workspace(space.config)  # it reports no shifts, so the server sends all of them
    yield error_of(lambda: started_again.rebase((1, 2), [shift_of(started_again, 1), shift_of(started_again, 2)]))


def apfl_error(place: Place, damage: Callable[[AdapterState], AdapterState] | None) -> str:
    """The error of an APFL turn whose stored state is damaged, or was deleted (None)."""
    folder = place.folder / str(len(list(place.folder.iterdir())))
    folder.mkdir()
    space, turned, stored = workspace(folder), APFL(alpha=0.5, alpha_lr=0.0), list[AdapterState]()
    for kept in (lambda: None, lambda: damage(stored[0]) if damage else None):
        space.live.load(space.initial)
        plan = Plan(round=1, client="c0", base_version=0, steps=1, epochs=None, batch_size=4)
        work = work_in(space, plan, start=space.initial, recall=kept, keep=stored.append)

        def take(work: Work = work) -> AdapterState:
            return turned.finish(dataclasses.replace(work, memory=train(work, turned).memory), space.live.read(version=0))

        if error := error_of(take):
            return error
    return ""


@follows("the client's stored state lacks '{}': delete the state that the client stored for this turn")
def _(place: Place) -> Iterator[str]:
    yield apfl_error(place, lambda kept: kept.replace({n: t for n, t in kept.tensors.items() if n != "apfl.alpha"}))
    yield apfl_error(place, None)


@follows("the gradient of the personal adapter became {} in step {}: delete the state that the client stored for this turn")
def _(place: Place) -> Iterator[str]:
    yield apfl_error(place, lambda kept: kept.replace({n: t if n == "apfl.alpha" else 1e30 * t.sign() for n, t in kept.tensors.items()}))
    yield apfl_error(place, None)


# -- training that fails ------------------------------------------------------------------------------------------------------------------


def train_error(place: Place, *, longest: int = 99, **plan: Any) -> str:
    """The error of a turn on a device whose memory holds rows of this many tokens."""
    real = _base.loss_sum

    def limit(model: Any, batch: Any, task: Any) -> Any:
        if batch["input_ids"].shape[1] > longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, task)

    folder = place.folder / str(len(list(place.folder.iterdir())))
    folder.mkdir()
    with place.patch.context() as patch:
        patch.setattr(_base, "loss_sum", limit)
        return error_of(lambda: turn(workspace(folder), None, **plan))


@follows("out of memory with a single row of {} tokens: lower task.max_length, or take a smaller backbone", slow=True)
def _(place: Place) -> Iterator[str]:
    yield train_error(place, longest=12)
    with place.patch.context() as patch:
        patch.setattr("tests.clients.test_pieces.TaskConfig", lambda **task: TaskConfig(**{**task, "max_length": 8}))
        yield train_error(place, longest=12)
    yield train_error(place)  # a smaller backbone leaves enough memory


@follows("the training loss became {} in step {} of {}: lower client.lr", slow=True)
def _(place: Place) -> Iterator[str]:
    def at(lr: float, **plan: Any) -> str:
        return train_error(place, lr=lr, lr_last=lr, **plan)

    free: Any = {"optimizer": "sgd", "clip_norm": None}
    yield at(1e30, **free)
    yield at(1e-2, **free)
    for plan in ({"optimizer": "sgd", "clip_norm": 1.0}, {"clip_norm": 1.0}):  # clipping does not keep a step at this rate short
        assert "lower client.lr" in at(1e30, **plan)
        yield at(1e-2, **plan)


@follows("the gradient's norm became {} in step {} of {}: lower client.lr", slow=True)
def _(place: Place) -> Iterator[str]:
    real = torch.nn.utils.get_total_norm

    def norm(gradients: Any, *args: Any) -> torch.Tensor:
        return torch.tensor(torch.inf) if largest_weight() > 1e3 else real(gradients, *args)  # such large weights make gradients overflow

    def largest_weight() -> float:
        return max(float(p.detach().abs().max()) for space in opened for p in space.live.parameters.values())

    opened: list[Workspace] = []
    place.patch.setattr(
        "tests.clients.test_pieces.work_in", lambda space, *args, **more: opened.append(space) or work_in(space, *args, **more)
    )
    place.patch.setattr(torch.nn.utils, "get_total_norm", norm)
    for lr in (1e4, 1e-2):
        opened.clear()
        yield train_error(place, lr=lr, lr_last=lr)
