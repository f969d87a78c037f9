"""The advice in errors of the server's rounds: strategies, members, plans, messages and privacy."""

import errno
import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fedtune
from fedtune.clients import turns
from fedtune.config import Config, DeviceClass, DevicesConfig, EngineConfig, PeftConfig, PrivacyConfig, TrafficConfig
from fedtune.config.registry import Registry
from fedtune.contracts.plan import Plan
from fedtune.contracts.privacy_terms import check_terms, terms
from fedtune.data import Example
from fedtune.errors import user_message
from fedtune.experiment import simulate
from fedtune.privacy import samples
from fedtune.privacy.accounting import Spend, solve_noise
from fedtune.privacy.floor import Floor
from fedtune.privacy.ledger import Ledger, ledger_file
from fedtune.privacy.turn import TurnPrivacy
from fedtune.privacy.user import Tracker
from fedtune.rounds.find_strategy import check_strategy, make_strategy
from fedtune.rounds.membership import JoinPolicy, Membership
from fedtune.traffic import Codec, decode_broadcast, encode_broadcast
from tests.advised.rows import Place, error_of, follows
from tests.advised.runs import one_round_run, setting_of
from tests.faults.test_membership import Answers, Nodes, Notes, hello_of
from tests.privacy.test_dpsgd import Chosen, examples, private_gradient
from tests.test_library import Halved, Uniform
from tests.tiny import tiny_config
from tests.traffic.test_broadcast import FIRST, adapter

AVERAGE = {"_target_": "fedtune.strategies.fedavg.FedAvg"}


def check_error(target: str, **config: Any) -> str:
    """The error of a strategy's requirements with these settings; "" if there is none."""
    strategy = make_strategy(Config(strategy={"_target_": f"fedtune.strategies.{target}"}, min_clients=5))
    return error_of(lambda: check_strategy(strategy, Config(**config)))


# -- strategies ---------------------------------------------------------------------------------------------------------------------------


@follows("leave out devices.classes.*.rank, or take a strategy that mixes ranks, such as flexlora")
def _(place: Place) -> Iterator[str]:
    mixed = DevicesConfig(classes={"phone": DeviceClass(rank=2)})
    yield check_error("fedavg.FedAvg", devices=mixed)
    yield check_error("fedavg.FedAvg", devices=DevicesConfig(classes={"phone": DeviceClass()}))
    yield check_error("flexlora.FlexLoRA", devices=mixed)


@follows("so a client cannot add the residual of an older update: set traffic.error_feedback=false")
def _(place: Place) -> Iterator[str]:
    for feedback in (True, False):
        yield check_error("flexlora.FlexLoRA", traffic=TrafficConfig(up="int8", error_feedback=feedback))


@follows("assumes B·A = 0 before round 1, but peft.init=loftq starts elsewhere: set peft.init=default")
def _(place: Place) -> Iterator[str]:
    for init in ("loftq", "default"):
        yield check_error("fedsa.FedSA", peft=PeftConfig(init=init))


@follows("which stacked experts do not have in that form: take strategy=fedavg, or leave out peft.target_parameters")
def _(place: Place) -> Iterator[str]:
    experts = PeftConfig(target_parameters=["experts.down_proj"])
    yield check_error("flexlora.FlexLoRA", peft=experts)
    yield check_error("fedavg.FedAvg", peft=experts)
    yield check_error("flexlora.FlexLoRA", peft=PeftConfig())


@follows("cannot use late updates: set late=drop, or take strategy=fedavg")
def _(place: Place) -> Iterator[str]:
    yield check_error("flexlora.FlexLoRA", late="use")
    yield check_error("flexlora.FlexLoRA", late="drop")
    yield check_error("fedavg.FedAvg", late="use")


@follows("which privacy={} does not cover: take strategy=fedavg")
def _(place: Place) -> Iterator[str]:
    private = PrivacyConfig(kind="record")
    for target in ("qfedavg.QFedAvg", "fedavg.FedAvg"):
        yield check_error(target, privacy=private)


@follows("but privacy=user reveals only a noised mean: take strategy=fedavg")
def _(place: Place) -> Iterator[str]:
    private = PrivacyConfig(kind="user")
    for target in ("krum.Krum", "fedavg.FedAvg"):
        yield check_error(target, privacy=private)


@follows("or name a class of an installed package or of a module in the working directory ({})")
def _(place: Place) -> Iterator[str]:
    def refusal(target: str) -> str:
        return error_of(lambda: make_strategy(Config(strategy={"_target_": target})))

    place.patch.chdir(place.folder)
    place.patch.setattr(sys, "path", [*sys.path])
    error = refusal("mine_of_advice.Mine")
    yield error
    assert "fedavg" in re.findall(r"strategy=(\S+),", error)[0].split("|")
    yield refusal(AVERAGE["_target_"])
    (place.folder / "mine_of_advice.py").write_text("from fedtune.strategies.fedavg import FedAvg\n\n\nclass Mine(FedAvg): ...\n")
    yield refusal("mine_of_advice.Mine")


@follows("names code inside the run directory {}: keep the module outside of it")
def _(place: Place) -> Iterator[str]:
    place.patch.chdir(place.folder)
    place.patch.setattr(sys, "path", [*sys.path])
    (place.folder / "run_of_advice").mkdir()
    code = "from fedtune.strategies.fedavg import FedAvg\n\n\nclass Mine(FedAvg): ...\n"
    for target, file in (("run_of_advice.code", "run_of_advice/code.py"), ("outside_of_advice", "outside_of_advice.py")):
        (place.folder / file).write_text(code)
        config = Config(strategy={"_target_": f"{target}.Mine"})
        config.resume = "run_of_advice"
        yield error_of(lambda config=config: make_strategy(config))


@follows("Ray's workers cannot import turns that are defined in this process: set engine=inprocess", slow=True)
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(turns, "TURNS", Registry("fedtune.clients.turns", "fedtune.clients.turns._base.Turn"))
    for kind in ("ray", "inprocess"):
        config = tiny_config(place.folder, rounds=1, engine=EngineConfig(kind=kind, threads=1, batched="none"))
        yield error_of(lambda config=config: fedtune.run(config, strategy=Uniform(), turns={"halved": Halved}))


@follows("{} has no adapter yet: continue the run with resume={}", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    shutil.rmtree(run / "adapter")
    error = error_of(lambda: fedtune.load_run(run).adapter)
    yield error
    yield place.run("fedtune.sim", setting_of(error))
    yield error_of(lambda: fedtune.load_run(run).adapter)


# -- members ------------------------------------------------------------------------------------------------------------------------------


def join_error(answers: Answers, limit: int = 1000, **policy: Any) -> str:
    """The reason why the only connected node cannot take part."""
    join = JoinPolicy(**{"patience_s": 0.1, "retry_s": 60.0, **policy})
    members = Membership(Nodes(answers, {1: 0.0}), "b", 1, join, Notes(), limit)  # type: ignore[arg-type]
    return error_of(lambda: members.gather(1))


@follows("{}: its client id '{}' {}: give it another")
def _(place: Place) -> Iterator[str]:
    for client in ("a\tb", "ab"):
        yield join_error(lambda node, client=client: {"client": client})


@follows("has the key of '{}' but the id '{}': correct its --client-id or its key")
def _(place: Place) -> Iterator[str]:
    yield join_error(hello_of, names=lambda: {1: "mallory"})
    yield join_error(lambda node: {"client": "mallory"}, names=lambda: {1: "mallory"})
    yield join_error(hello_of, names=lambda: {1: "c1"})


@follows("more than weights.max_examples={}: raise that on the server if the number is right")
def _(place: Place) -> Iterator[str]:
    for limit in (1000, 2000):
        yield join_error(lambda node: {"client": "c1", "examples": 2000}, limit)


@follows("raise it, send less (traffic=int8, nf4 or topk), or train less (peft.rank, peft.targets)", slow=True)
def _(place: Place) -> Iterator[str]:
    wide = PeftConfig(rank=16)

    def run_error(peft: PeftConfig = wide, limit: float = 0.09, **traffic: Any) -> str:
        shutil.rmtree(place.folder / "outputs", ignore_errors=True)
        sent = TrafficConfig(max_mb_per_round=limit, **traffic)
        return error_of(lambda: simulate(tiny_config(place.folder, rounds=1, peft=peft, traffic=sent)))

    error = run_error()
    yield error
    assert [float(mb) for mb in re.findall(r"([\d.]+) MB", error)]
    yield run_error(limit=10.0)
    for values in ("int8", "nf4"):
        yield run_error(up=values, down=values)
    yield run_error(topk=0.05)
    for less in (PeftConfig(rank=2), PeftConfig(rank=16, targets="q_proj")):
        yield run_error(less)


# -- plans --------------------------------------------------------------------------------------------------------------------------------

PLAN = Plan(round=1, client="a", base_version=0)


def _plan_row(says: str, wrong: Plan, *right: Plan) -> None:
    """Add a row: the error of reading the wrong plan, and of reading each plan that follows the advice."""

    def follow(place: Place) -> Iterator[str]:
        for plan in (wrong, *right):
            yield error_of(lambda plan=plan: Plan.from_json(plan.to_json()))

    follows(says)(follow)


def _plan(**values: Any) -> Plan:
    return Plan(round=1, client="a", base_version=0, **values)


_plan_row("sets neither dp_noise nor dp_epsilon: set one of them", _plan(privacy="record"),
      _plan(privacy="record", dp_noise=1.0), _plan(privacy="record", dp_epsilon=3.0))  # fmt: skip
_plan_row("the plan sets neither steps nor epochs: set one of them", _plan(epochs=None), _plan(epochs=None, steps=3), _plan(epochs=1.0))


@follows("but the config sets the turn '{}': leave client.prox at 0")
def _(place: Place) -> Iterator[str]:
    for turn in ("fedprox", PLAN.turn):
        yield error_of(lambda turn=turn: _plan(turn=turn).with_turn("scaffold"))


@follows("but this client's config has {}: set the same privacy on both ends")
def _(place: Place) -> Iterator[str]:
    private = Config(privacy=PrivacyConfig(kind="record"))
    asked = _plan(**terms(private))
    yield error_of(lambda: check_terms(asked, Config()))
    yield error_of(lambda: check_terms(asked, private))


@follows("a turn cannot be called '{}', because fedtune has a turn of that name: choose another name")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(turns, "TURNS", Registry("fedtune.clients.turns", "fedtune.clients.turns._base.Turn"))
    for name in ("fedprox", "halved"):
        yield error_of(lambda name=name: turns.register(name, Halved))


@follows("the plan asks for the turn '{}', which this client does not have: update fedtune on the client")
def _(place: Place) -> Iterator[str]:
    for name in ("newest", "fedprox"):  # then a turn that this client has
        yield error_of(lambda name=name: turns.find(name))


# -- messages ------------------------------------------------------------------------------------------------------------------------------


@follows("but this client knows {}: update fedtune on the client")
def _(place: Place) -> Iterator[str]:
    for name in ("int3", "int8"):  # then a codec that this version knows
        yield error_of(lambda name=name: Codec.from_name(name))


@follows("but this client's first adapter does not have it: use the same model and adapter settings on both ends")
def _(place: Place) -> Iterator[str]:
    tensors, header = encode_broadcast(Codec(values="int8"), adapter(), FIRST, 0)
    for first in ({}, FIRST):
        yield error_of(lambda first=first: decode_broadcast(header, tensors, first))


@follows("but the largest fp16 value is {}: use bf16 or int8 (traffic.up, traffic.down)")
def _(place: Place) -> Iterator[str]:
    tensors = {"v": torch.tensor([1e5, 1.0])}
    for values in ("fp16", "bf16", "int8"):
        yield error_of(lambda values=values: Codec(values=values).encode(tensors))


# -- privacy ------------------------------------------------------------------------------------------------------------------------------


@follows("no noise keeps privacy.epsilon={} at privacy.delta={} over {} steps ({}): raise privacy.epsilon or privacy.delta", slow=True)
def _(place: Place) -> Iterator[str]:
    for epsilon, delta in ((1e-9, 1e-5), (1.0, 1e-5), (1e-9, 0.5)):
        yield error_of(lambda epsilon=epsilon, delta=delta: solve_noise(epsilon, delta, 1.0, 100_000, "rdp"))


@follows("so nothing bounds the ε of all its rows together: start it with --min-privacy record")
def _(place: Place) -> Iterator[str]:
    turn = TurnPrivacy(clip=1.0, noise=2.0, cost=Spend(noise=2.0, rate=1.0, steps=1))
    Ledger(ledger_file(place.folder / "first" / "privacy", "a")).spend(1, turn.cost, "record")
    for kind in ("user", "record"):
        floor = Floor(kind=kind, epsilon=50.0, delta=1e-5, client="a", runs=place.folder)
        yield error_of(lambda floor=floor: floor.check_budget(turn))


@follows("needs more than {} of noise on its bits: raise privacy.bit_noise or clients_per_round")
def _(place: Place) -> Iterator[str]:
    for noise, cohort in ((0.05, 4), (0.5, 4), (0.05, 40)):
        yield error_of(lambda noise=noise, cohort=cohort: Tracker(noise=noise).tensor_noise(1.0, cohort))


@follows("the privacy ledger {} cannot be written ({}); free disk space")
def _(place: Place) -> Iterator[str]:
    ledger = Ledger(place.folder / "a/ledger.jsonl")

    def spend_error() -> str:
        return error_of(lambda: ledger.spend(1, Spend(noise=1.0, rate=0.1, steps=3), "record"))

    with place.patch.context() as patch:
        patch.setattr("fedtune.privacy.ledger.flush", _full)
        yield spend_error()
    yield spend_error()


@follows("out of memory with a single row in a private turn: lower task.max_length, or take a smaller backbone")
def _(place: Place) -> Iterator[str]:
    real, most = samples._losses, [4]

    def losses(live: Any, batch: Any, task: Any) -> torch.Tensor:
        if batch["input_ids"].shape[1] > most[0]:  # more tokens than fit the memory
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(live, batch, task)

    place.patch.setattr(samples, "_losses", losses)
    long = examples(6)
    short = [Example(row.input_ids[:3], row.labels[:3]) for row in long]
    for number, (rows, holds) in enumerate(((long, 4), (short, 4), (long, 99))):
        most[0] = holds
        with private_gradient(place.folder / str(number), rows, way=samples.hooked, source=Chosen(*range(6))) as made:
            yield error_of(made.step)


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# -- the machine --------------------------------------------------------------------------------------------------------------------------


def command_error(call: Callable[[], Any]) -> str:
    """The error that a command prints for an OSError or ImportError of this call; "" if there is none."""
    try:
        call()
    except (OSError, ImportError) as bad:
        return user_message(bad)
    return ""


@follows("this needs {}, which is not installed: pip install 'fedtune[train]'")
def _(place: Place) -> Iterator[str]:
    with place.patch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        yield command_error(lambda: importlib.import_module("peft"))
    yield command_error(lambda: importlib.import_module("peft"))  # the extra is installed again


@follows("{}: free disk space and start again")
def _(place: Place) -> Iterator[str]:
    for folder in (Path("/dev/full"), place.folder / "report.html"):
        yield command_error(lambda folder=folder: folder.write_text("a report"))
