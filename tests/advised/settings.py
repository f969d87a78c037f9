"""The advice in errors about settings: of the command line, of scenario files, and of strategies that they do not fit."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedtune.config import Config, DeviceClass, DevicesConfig, check
from fedtune.config.compose import _package_folder, compose
from fedtune.contracts import task as contracts_task
from fedtune.contracts.strategy import ServerState
from fedtune.rounds.find_strategy import make_strategy
from fedtune.strategies._flower import cohort, measured
from tests.advice import ways
from tests.advised.flags import quiet_run, run_folder
from tests.advised.rows import Place, error_of, follows
from tests.strategies.updates import plain, update

EVEN = "devices=none"  # every client has the same rank
AVG = "strategy=fedavg"


def refusal_of(args: Sequence[str], *, multirun: bool = False) -> str:
    """The error of these arguments, before anything is loaded; "" if there is none."""
    return error_of(lambda: [make_strategy(job.config) for job in compose(args, multirun=multirun)])


def change(args: Sequence[str], *settings: str) -> list[str]:
    """The arguments with these settings; a setting replaces an earlier one of the same key, and a group's choice replaces its `kind`."""
    keys = {setting.partition("=")[0] for setting in settings}
    keys |= {f"{key}.{end}" for key in keys for end in ("kind", "method", "_target_")}
    return [*(a for a in args if a.lstrip("+").partition("=")[0] not in keys), *settings]


def setting(says: str, *args: str, given: Sequence[str] = ()) -> None:
    """Add arguments whose error names settings to change.

    Args:
        says: As in `Row`.
        args: The arguments.
        given: Settings that the sentence names without a value, with one; each is followed separately.
    """

    def follow(place: Place) -> Iterator[str]:
        error = refusal_of(args)
        yield error
        assert all(way.partition("=")[0] in error for way in given), error
        found = [*(way.split(" ") for way in ways(error)), *([way] for way in given)]
        assert found, f"nothing to follow in: {error}"
        for way in found:
            yield refusal_of(change(args, *way))

    follows(says)(follow)


def one_of(says: str, key: str, *args: str, after: str = "choose one of ") -> None:
    """Add a setting whose error lists its choices."""

    def follow(place: Place) -> Iterator[str]:
        error = refusal_of([*args, f"{key}=never"])
        yield error
        choices = re.split(r",? or |, ", error.partition(after)[2].strip())
        assert len(choices) > 1
        for choice in choices:
            yield refusal_of([*args, f"{key}={choice.replace('a number of clients from 1', '1')}"])

    follows(says)(follow)


# -- the command line ----------------------------------------------------------------------------------------------------------------------

one_of("{} is not known: choose one of {}", "privacy.accountant", AVG, "privacy=record")
one_of("is not known: choose auto, none, or a number of clients from 1", "engine.batched", after="choose ")
setting("has no effect with privacy=none: add privacy=record or privacy=user", AVG, "privacy.epsilon=3")
setting("privacy.adaptive adapts the clip norm of whole updates: it needs privacy=user", AVG, "privacy=record", "privacy.adaptive=true",
        given=["privacy=user"])  # fmt: skip
setting("privacy.adaptive needs privacy.where=server", AVG, "privacy=user", "privacy.adaptive=true", "privacy.where=client",
        given=["privacy.where=server"])  # fmt: skip
setting("data.prompt and data.answer go together: set both or neither", "data.prompt='{request}'", "data.answer=null",
        given=["data.prompt=null", "data.answer=' {action}'"])  # fmt: skip
setting("are both none: set one of them", "client.steps=null", "client.epochs=null", given=["client.steps=3", "client.epochs=1"])
setting("model=hub needs model.name: a hub name or a local folder", "model=hub", given=["model.name=org/name", "model.name=./folder"])
setting("data=hub needs data.name: the name of a hub data set", "data=hub", given=["data.name=org/name"])
setting("partition.kind=one needs data.client", "partition.kind=one", given=["data.client=home-000"])
setting("data.client='{}' {}: give the client another id", "data.client='a\tb'", "partition.kind=one", given=["data.client=ab"])
setting("late=use has no effect", EVEN, AVG, "late=use", given=["round_timeout_s=9", "devices.deadline_s=9"])
setting("late=use cannot be combined with privacy=user", EVEN, AVG, "late=use", "privacy=user", "round_timeout_s=9")
setting("has neither an epsilon nor a noise level", AVG, "privacy=record", "privacy.epsilon=null", "privacy.noise=null",
        given=["privacy.epsilon=8", "privacy.noise=1"])  # fmt: skip
setting("privacy.where=client is for privacy=user", AVG, "privacy=record", "privacy.where=client", given=["privacy=user"])
setting("traffic.stochastic=true has no effect with fp32", "traffic.stochastic=true",
        given=[f"traffic.{way}={name}" for way in ("up", "down") for name in ("fp16", "bf16", "int8", "nf4")])  # fmt: skip
setting("traffic.error_feedback=true has no effect", EVEN, AVG, "traffic.error_feedback=true",
        given=["traffic.topk=0.1", "traffic.up=fp16"])  # fmt: skip
setting("peft.from is empty", "peft.from=", given=["peft.from=outputs/NAME/RUN"])

LOCAL = ["conf=base", "data=local", "data.path=x"]
setting("{}: set task.packing=false", *LOCAL, "task=classification", "task.packing=true")
setting("task.packing=true trains one client at a time", *LOCAL, "task=causal_lm", "task.packing=true", "engine.batched=auto")
EXPERTS = [EVEN, AVG, "peft.target_parameters=[w]"]
setting("{} adapts experts with LoRA factors, which peft.method={} does not have: take peft=lora", *EXPERTS, "peft=ia3")
setting("{} changes the experts' weights and not their inputs, which dropout needs", *EXPERTS, "peft.dropout=0.1")
setting("{} has no peft.init={}, because experts are not quantized", *EXPERTS, "peft.init=loftq", "model.precision=nf4",
        "model.compute=bf16")  # fmt: skip
setting("{} mixes the rows of a batch, so privacy=record has no gradient per row", *EXPERTS, "privacy=record")
LOFTQ = [EVEN, AVG, "peft.init=loftq", "model.compute=bf16", "model.precision=nf4"]
setting("peft.init=loftq initializes LoRA factors, which peft.method={} does not have", *LOFTQ, "peft=ia3")
setting("peft.init=loftq needs a quantized backbone", *LOFTQ[:-1])
setting("peft.init=loftq needs the same model.compute on every machine", *LOFTQ[:3], LOFTQ[4], "model.compute=auto")
setting("peft.init=loftq fits one precision, but device classes may choose another", *LOFTQ[1:])


def _leave_out_row(says: str, *args: str) -> None:
    """Add arguments whose error advises to leave one of them out."""

    def follow(place: Place) -> Iterator[str]:
        quiet_run(place)
        run = run_folder(place.folder / "run")
        given = [a.replace("RUN", str(run)) for a in args]
        error = place.run("fedtune.sim", *given)
        yield error
        class_error = error.rpartition("leave out ")[2].strip() or error
        kept = [a for a in given if not a.startswith(class_error if class_error in " ".join(given) else "strategy._target_=")]
        assert len(kept) == len(given) - 1
        yield place.run("fedtune.sim", *kept)

    follows(says)(follow)


_leave_out_row("in which only rounds can change: leave out {}", "resume=RUN", "peft.rank=4")
_leave_out_row("not strategy._target_={}: leave that setting out", "resume=RUN", "strategy._target_=fedtune.strategies.fedavg.FedAvg")


@follows("resume= is empty: give the run directory to continue, such as resume=outputs/NAME/RUN")
def _(place: Place) -> Iterator[str]:
    quiet_run(place)
    (place.folder / "outputs/NAME").mkdir(parents=True)
    run_folder(place.folder / "outputs/NAME/RUN")
    place.patch.chdir(place.folder)
    error = place.run("fedtune.sim", "resume=")
    yield error
    yield place.run("fedtune.sim", error.split()[-1])


@follows("which is not part of fedtune: read its code, then allow it with strategy._target_={}")
def _(place: Place) -> Iterator[str]:
    quiet_run(place)
    (place.folder / "theirs.py").write_text("from fedtune.strategies.fedavg import FedAvg\n\n\nclass Theirs(FedAvg):\n    pass\n")
    place.patch.chdir(place.folder)
    run = run_folder(place.folder / "run", EVEN, AVG)
    stored = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(stored.replace("fedtune.strategies.fedavg.FedAvg", "theirs.Theirs"))
    error = place.run("fedtune.sim", f"resume={run}")
    yield error
    yield place.run("fedtune.sim", f"resume={run}", error.split()[-1])


@follows("conf= is given {} times: name one scenario")
def _(place: Place) -> Iterator[str]:
    both = ["conf=dolly", "conf=shakespeare"]
    yield refusal_of(both)
    for conf in both:
        yield refusal_of([conf])


@follows("{} has no effect here: fedtune creates run directories and logs itself (see output_dir and name)")
def _(place: Place) -> Iterator[str]:
    error = refusal_of(["hydra.run.dir=x"])
    yield error
    for key in re.findall(r"see (\w+) and (\w+)", error)[0]:
        yield refusal_of([f"{key}=x"])


@follows("'{}' is a sweep over several values: add --multirun, or quote the comma")
def _(place: Place) -> Iterator[str]:
    yield refusal_of(["name=a,b"])
    yield refusal_of(["name=a,b"], multirun=True)
    yield refusal_of(["name='a,b'"])


def _typo_row(says: str, wrong: str, right: str) -> None:
    """Add a misspelled argument whose error asks whether another was meant."""

    def follow(place: Place) -> Iterator[str]:
        error = refusal_of([wrong])
        yield error if "{}" in says else re.findall(r"did you mean.*", error)[0]
        meant = re.findall(r"did you mean ([^?, ]+)", error)[0]
        yield refusal_of([right.format(meant)])

    follows(says)(follow)


_typo_row("did you mean {}?", "client.lrr=1", "{}=1")
_typo_row("did you mean {}, of ", "conf=hetero", "conf={}")

# -- scenario files ------------------------------------------------------------------------------------------------------------------------


def _scenario(name: str) -> str:
    """The error of a scenario; "" if it only lacks a package: another row follows that advice."""
    error = refusal_of([f"conf={name}"])
    return "" if "pip install" in error else error


@follows("there is no scenario '{}': {}{}; or give the path of a YAML file", slow=True)
def _(place: Place) -> Iterator[str]:
    error = refusal_of(["conf=hetero"])
    yield error
    for name in re.findall(r", of (.*);", error)[0].split(", "):
        yield _scenario(name)
    (place.folder / "mine.yaml").write_text("defaults: [base, _self_]\n")
    yield refusal_of([f"conf={place.folder}/mine.yaml"])


@follows("there is no scenario file {}: give the path of a file that ends in .yaml, or one of {}")
def _(place: Place) -> Iterator[str]:
    path = place.folder / "mine.yml"
    path.write_text("defaults: [base, _self_]\n")
    error = refusal_of([f"conf={path}"])
    yield error
    for name in error.rpartition("or one of ")[2].split(", "):
        yield _scenario(name)
    yield refusal_of([f"conf={path.rename(path.with_suffix('.yaml'))}"])


@follows("{}.yaml does not start from fedtune's schema: open it with `defaults: [{}, _self_]`")
def _(place: Place) -> Iterator[str]:
    path = place.folder / "mine.yaml"
    path.write_text("rounds: 2\n")
    error = refusal_of([f"conf={path}"])
    yield error
    path.write_text(f"{error.split('`')[1]}\nrounds: 2\n")
    yield refusal_of([f"conf={path}"])


@follows("{}: choose one of {}", slow=True)
def _(place: Place) -> Iterator[str]:
    path, text = place.folder / "mine.yaml", "defaults: [base, override traffic: {}, _self_]\n"
    path.write_text(text.format("nothing"))
    error = refusal_of([f"conf={path}"])
    yield error
    for choice in error.rpartition("choose one of ")[2].split(", "):
        path.write_text(text.format(choice))
        yield refusal_of([f"conf={path}"])


@follows("is {}: reduce its nesting", slow=True)
def _(place: Place) -> Iterator[str]:
    for depth in (1000, 1):
        yield refusal_of([f"peft.targets={'[' * depth}q_proj{']' * depth}"])


@follows("there is no device class '{}' here: add classes in a YAML file, as conf/devices/mixed.yaml does", slow=True)
def _(place: Place) -> Iterator[str]:
    yield refusal_of(["+devices.classes.tablet={share: 1}"])
    (place.folder / "mine.yaml").write_text("defaults: [base, override devices: mine, _self_]\n")
    (place.folder / "devices").mkdir()
    (place.folder / "devices/mine.yaml").write_text("classes:\n  tablet:\n    share: 1\n")
    yield refusal_of([f"conf={place.folder}/mine.yaml"])
    yield refusal_of([f"conf={place.folder}/mine.yaml", "devices.classes.tablet.share=1"])


@follows("the package {} is not installed: run pip install 'fedtune[studies]'", slow=True)
def _(place: Place) -> Iterator[str]:
    with place.patch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        error = refusal_of(["conf=sst2"])
    yield error
    package, extra = error.split()[2], re.findall(r"fedtune\[(\w+)\]", error)[0]
    required = [w for w in importlib.metadata.requires("fedtune") or () if f'extra == "{extra}"' in w.replace("'", '"')]
    assert any(w.replace("-", "_").startswith(package) for w in required), f"the extra {extra} brings {required}"
    (place.folder / package / "model").mkdir(parents=True)  # as after pip has installed it
    (place.folder / package / "__init__.py").touch()
    place.patch.syspath_prepend(place.folder)
    yield error_of(lambda: _package_folder(f"{package}/model"))


@follows("the name of the device class '{}' is too long or not printable: use at most {} printable characters")
def _(place: Place) -> Iterator[str]:
    def class_error(name: str) -> str:
        return error_of(lambda: check(Config(devices=DevicesConfig(classes={name: DeviceClass(share=1.0)}))))

    error = class_error("x" * 1000)
    yield error
    yield class_error("x" * int(re.findall(r"at most (\d+)", error)[0]))
    yield class_error("a phone")


@follows("strategy needs a _target_: pick one with strategy=NAME")
def _(place: Place) -> Iterator[str]:
    yield error_of(lambda: check(Config(strategy={})))
    yield refusal_of([AVG])


# -- strategies ----------------------------------------------------------------------------------------------------------------------------

setting("computes gradients from the clients' steps, which needs plain SGD without clipping", EVEN, "strategy=scaffold",
        "client.optimizer=adamw", "client.clip_norm=1")  # fmt: skip
setting("strategy={} needs {} = {} good updates in every round that counts", EVEN, "strategy=krum", "clients_per_round=4", "min_clients=1")
setting("computes control variates from the clients' updates, which must be uncompressed", EVEN, "strategy=scaffold", "traffic=topk",
        "client.optimizer=sgd", "client.clip_norm=null")  # fmt: skip
setting("strategy={} does not work with peft.method={}: {}; take peft={}, or strategy=fedavg", EVEN, "strategy=flora", "peft=ia3")
setting("fedpeptao exchanges one prompt a layer, peft.method={} has none", EVEN, "strategy=fedpeptao", "rounds=30")
PROMPTS = [EVEN, "strategy=fedpeptao", "peft=ptuning_v2", "rounds=30"]
one_of("strategy.order={} is not known: choose redundant or diverse", "strategy.order", *PROMPTS, after="choose ")
one_of("strategy.variant={} is not known: choose scaled, paper or code", "strategy.variant", *PROMPTS, after="choose ")
setting("fedpeptao selects layers after {} rounds of warm-up and scoring", *PROMPTS[:3], "rounds=11", "strategy.warmup_rounds=10",
        given=["rounds=12", "strategy.warmup_rounds=9"])  # fmt: skip
setting("both set the proximal weight: leave client.prox at 0", EVEN, "strategy=fedprox", "client.prox=1", given=["client.prox=0"])
setting("stack to {} rows, but strategy.max_rank={}: raise it, or lower clients_per_round, peft.rank or the ranks", "strategy=flora",
        "strategy.max_rank=64", "clients_per_round=10", "peft.rank=8", "rounds=1",
        given=["strategy.max_rank=80", "clients_per_round=8", "peft.rank=6"])  # fmt: skip
setting("gives each of two adapters half of", EVEN, "strategy=feddpa", "peft.rank=5", given=["peft.rank=6"])
setting("distills the choice of a class or a token", EVEN, "strategy=feddat", "task=multi_label", given=["strategy=feddpa"])
setting("trains personal adapters with gradients of their own", EVEN, "strategy=ditto", "privacy=record")
setting("is 2 or more, so the inner steps diverge: lower one of", EVEN, "strategy=pfedme", "strategy.mu=20", "strategy.inner_lr=0.1",
        given=["strategy.mu=10", "strategy.inner_lr=0.05"])  # fmt: skip
setting("takes plain steps along random directions", EVEN, "strategy=fedmezo", "client.optimizer=adamw")
setting("replays plain steps with one learning rate and without weight decay", EVEN, "strategy=fedkseed", "client.schedule=cosine")
setting("differ, but the server replays the clients' steps", EVEN, "strategy=fedkseed", "strategy.lr=0.5")
setting("computes slopes of the loss", EVEN, "strategy=fwdllm", "privacy=record")
one_of("strategy.variant={} is not known: choose covered or paper", "strategy.variant", "strategy=hetlora", after="choose ")
setting("ends its sparse stage with round {}, but rounds={}: set more rounds", EVEN, "strategy=slora", "strategy.sparse_share=0.5",
        "strategy.mask=gradient", "rounds=1", given=["rounds=2"])  # fmt: skip
setting("strategy=ravan averages scaled cores, which peft.method={} does not have", EVEN, "strategy=ravan")
setting("strategy.inner={} {}, so the momentum of earlier rounds means nothing", EVEN, "strategy=diloco", "strategy.inner=flora")
setting("and quantized weights cannot be trained: set {}=bf16", EVEN, "strategy=slora", "model.precision=nf4")


@follows("this strategy compares clients coordinate by coordinate, give all clients the same rank")
def _(place: Place) -> Iterator[str]:
    state = ServerState(adapter=plain(1.0, 2.0))
    for own in (plain(1.0), plain(1.0, 3.0)):
        yield error_of(lambda own=own: cohort(state, [update("a", plain(0.0, 0.0)), update("b", own)]))


@follows("client {} sent {}={} instead of a number >= 0: run the same version of fedtune on the client")
def _(place: Place) -> Iterator[str]:
    for sent in (update("a", plain(1.0)), update("a", plain(1.0), steps=3.0)):  # a client of an older version does not measure it
        yield error_of(lambda sent=sent: measured(sent, sent.measurements, "steps"))


@dataclass(frozen=True)
class Scored:
    """A stand-in for a user-defined task, with its metrics only."""

    metrics: dict[str, bool]


def _tasks(says: str, wrong: dict[str, bool], right: dict[str, bool]) -> None:
    """Add a task whose metrics clash with those of the others, and the same task after the metric is renamed."""

    def follow(place: Place) -> Iterator[str]:
        others = contracts_task.tasks()
        for mine in (wrong, right):
            place.patch.setattr(contracts_task, "tasks", lambda mine=mine: others | {"mine": Scored(mine)})
            yield error_of(contracts_task.metrics)

    follows(says)(follow)


_tasks("disagree about whether higher {} is better: rename one metric", {"accuracy": False}, {"inaccuracy": False})
_tasks("tasks rank the metrics {} in different orders: rename one metric", {"loss": False, "accuracy": True}, {"loss": False, "own": True})
