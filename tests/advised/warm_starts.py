"""The advice about `peft.from`."""

import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fedtune.config import Config, ModelConfig, PeftConfig, from_dict, to_dict
from fedtune.warm_start import Source, fit
from tests.advised.rows import Place, compose_once, error_of, follows
from tests.advised.runs import one_round_run, setting_of, simulate
from tests.tiny import tiny_llama
from tests.warm_start.test_fit import DRAWN, EARLIER, source


def warm(place: Place, path: Path, *settings: str) -> str:
    return simulate(place, f"peft.from={path}", "rounds=0", *settings)


def settings_in(output: str) -> list[str]:
    """The settings after the last `set`, `on` or `with`."""
    return re.findall(r"[a-z]+(?:\.[a-z_]+)*=(?:\[[^\]]*\]|[^\s,:]*)", output.rpartition(": ")[2])


@follows("there is no such folder; give the directory of a finished run, or an adapter folder", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    yield warm(place, place.folder / "gone")
    yield warm(place, run)
    yield warm(place, Path(shutil.copytree(run / "adapter", place.folder / "bare")))


@follows("the run has no adapter yet, because it has not ended; continue it with resume={}", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    shutil.rmtree(run / "adapter")
    output = warm(place, run)
    yield output
    assert not place.run("fedtune.sim", setting_of(output))
    yield warm(place, run)


@follows("is a whole model, not an adapter: leave peft.from out and start on it with model=hub model.name={}", slow=True)
def _(place: Place) -> Iterator[str]:
    output = warm(place, one_round_run(place) / "merged")
    yield output
    yield simulate(place, "rounds=0", *settings_in(output))


@follows("has peft.method={}, but this run has {}: set peft={}")
def _(place: Place) -> Iterator[str]:
    given = source(EARLIER.replace(method="dora"))
    output = fit_error(given, Config())
    yield output
    (job,) = compose_once(["conf=heterogeneous", *settings_in(output)])
    yield fit_error(given, job.config, method=job.config.peft.method)


@follows("belongs to the backbone {}, but this run has {}: use the checkpoint that the adapter was trained on{}", slow=True)
def _(place: Place) -> Iterator[str]:
    run, other = one_round_run(place), tiny_llama(place.folder / "other", seed=1)
    output = warm(place, run, f"model.name={other}")
    yield output
    yield warm(place, run, f"model.name={other}", *re.findall(r"model\.\w+=\S+", output))


@follows("set peft.targets=[{}], or take the backbone and the task that the adapter was trained for", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    bare = Path(shutil.copytree(run / "adapter", place.folder / "bare"))
    output = warm(place, bare, "peft.targets=[q_proj]")
    yield output
    yield warm(place, bare, *(s for s in settings_in(output) if s.startswith("peft.targets")))
    output = warm(place, run, "peft.targets=[q_proj]")  # the error can name the settings, because the source is a run
    assert output.endswith("set peft.targets=all-linear, as its run did\n"), output
    yield warm(place, run, *settings_in(output))


@follows("and a smaller rank would change the model: set peft.rank={}{}", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    output = warm(place, run, "peft.rank=1")
    yield output
    yield warm(place, run, *settings_in(output))


@follows("what it began with, cannot be read ({}): restore the folder, or start a new run", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    assert not warm(place, run, "name=damaged")
    (begun,) = (place.folder / "damaged").iterdir()
    shutil.move(begun / "start", place.folder / "kept")
    yield place.run("fedtune.sim", f"resume={begun}", "rounds=1")
    yield warm(place, run)
    shutil.move(place.folder / "kept", begun / "start")
    yield place.run("fedtune.sim", f"resume={begun}", "rounds=1")


def fit_error(given: Source, config: Config, labels: Sequence[str] = (), *, needs_zero: bool = False, method: str = "lora") -> str:
    return error_of(lambda: fit(given, DRAWN.replace(method=method), config, labels, needs_zero=needs_zero))


@follows("was trained over quantized weights that it corrects: set peft.init=loftq model.precision={} model.compute={}")
def _(place: Place) -> Iterator[str]:
    given = source(EARLIER, over={"precision": "nf4", "compute": "bf16"})
    output = fit_error(given, Config())
    yield output
    values = dict(s.split("=") for s in settings_in(output))
    model = ModelConfig(precision=values["model.precision"], compute=values["model.compute"])
    yield fit_error(given, Config(peft=PeftConfig(init=values["peft.init"]), model=model))


@follows("peft.init={} computes a start of its own, so {} cannot be one: set peft.init=default")
def _(place: Place) -> Iterator[str]:
    yield fit_error(source(EARLIER), Config(peft=PeftConfig(init="loftq")))
    yield fit_error(source(EARLIER), Config(peft=PeftConfig(init="default")))


@follows("cannot be merged into the frozen weights: take strategy=fedavg")
def _(place: Place) -> Iterator[str]:
    from fedtune.strategies.fedavg import FedAvg

    dora, config = source(EARLIER.replace(method="dora")), Config(peft=PeftConfig(method="dora"))
    yield fit_error(dora, config, needs_zero=True, method="dora")
    yield fit_error(dora, config, needs_zero=FedAvg.requirements.assumes_zero_init, method="dora")


@follows("set data.labels to the earlier classes in their order")
def _(place: Place) -> Iterator[str]:
    given = source(EARLIER, labels=("a", "b", "c", "d"))
    yield fit_error(given, Config(), ("d", "c", "b", "a"))
    values = to_dict(Config())
    values["data"]["labels"] = list(given.labels)
    yield fit_error(given, from_dict(values), from_dict(values).data.labels)


@follows("has values that are not finite numbers: take an adapter of an earlier round")
def _(place: Place) -> Iterator[str]:
    bad = EARLIER.replace({**EARLIER.tensors, "q.lora_B": torch.full((3, 2), float("inf"))})
    yield fit_error(source(bad), Config())
    yield fit_error(source(dataclasses.replace(EARLIER)), Config())
