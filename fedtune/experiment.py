"""One experiment from its config to its run directory, on any engine: the ServerApp that every door runs."""

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid
from rich.console import Console

from fedtune.clients.app import make_client_app
from fedtune.clients.host import ClientHost
from fedtune.clients.store import Storage
from fedtune.clients.workspace import Workspace, workspace
from fedtune.config import Config, to_dict
from fedtune.contracts import flower
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.contracts.task import task_of
from fedtune.errors import CheckpointError, FedtuneError, RunError, Stopped, disk_trouble
from fedtune.exchange import Exchange, make_exchange
from fedtune.export.huggingface import beside, export_hf
from fedtune.export.origin import prompt_template
from fedtune.export.personal import global_note
from fedtune.models import load_backbone
from fedtune.models.combined import fold_shifts
from fedtune.models.evaluation import generate_answers
from fedtune.models.methods import mergeable
from fedtune.rounds.bridge import Bridge
from fedtune.rounds.find_strategy import check_strategy, make_strategy
from fedtune.rounds.membership import Welcome
from fedtune.runs.directory import RunDirectory
from fedtune.runs.observer import Watch
from fedtune.runs.report import print_partition, print_results, read_metrics, write_card, write_report
from fedtune.simulations.engines.ray import check_ray, ray_grid


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What an engine plays on.

    Args:
        config: The experiment.
        space: What the server's process holds of it.
        run: Its directory.
        watch: Who is told.
        serve: Runs all rounds that are left on a grid; called again, it goes on from the newest checkpoint.
    """

    config: Config
    space: Workspace
    run: RunDirectory
    watch: Watch
    serve: Callable[[Grid, Welcome], None]


Engine = Callable[[Stage], None]


def simulate(config: Config, strategy: Strategy | None = None) -> Path:
    """Run the experiment with virtual clients, or go on with one, and return its run directory; `strategy` stands for the config's."""
    if config.engine.kind == "ray":
        check_ray(config.engine)
    return conduct(config, _virtual_clients, strategy=strategy)


def conduct(
    config: Config,
    engine: Engine,
    *,
    at: Path | None = None,
    space: Workspace | None = None,
    clients: int | None = None,
    live: bool = False,
    strategy: Strategy | None = None,
) -> Path:
    """Run the experiment, or go on with one, on a grid of any kind, and return its run directory.

    Args:
        config: The experiment.
        engine: Finds a grid and serves on it.
        at: Where a new run's directory is made; None finds a name for it.
        space: What this process holds of the experiment; None is what every virtual client needs.
        clients: How many clients there are, which user-level privacy counts on; None is as many as the data has.
        live: Whether the report is made anew after each round, to be watched in a browser.
        strategy: How updates become a state; None is the config's.
    """
    flower.quiet()
    if strategy is None:
        strategy = make_strategy(config)
    else:
        check_strategy(strategy, config)
    space = space or workspace(json.dumps(to_dict(config)))
    run = RunDirectory.open(Path(config.resume), rounds=config.rounds) if config.resume else RunDirectory.create(config, at)
    try:
        run.write_json("partition.json", space.federation.summary())
        exchange = make_exchange(config, len(space.client_ids) if clients is None else clients, run.path / "privacy")
        space.rebase((), ())  # another run of this process may have left its shifts in, under the same rounds' numbers
        state = _run(config, space, strategy, exchange, run, engine, live)
        _hand_over(config, space, state, run)
    except BaseException as bad:
        if (run.path / "metrics.jsonl").exists():  # what there is can be looked at, whatever stopped the run
            with contextlib.suppress(FedtuneError, OSError):  # and where it cannot, the first cause is told all the same
                write_report(run.path)
        if isinstance(bad, KeyboardInterrupt):
            raise Stopped(f"stopped; go on with resume={run.path}") from None
        if (why := disk_trouble(bad)) is not None:
            raise RunError(f"{why}: free the disk and go on with resume={run.path}") from None
        raise
    finally:
        run.close()
    return run.path


def _virtual_clients(stage: Stage) -> None:
    config, nodes = stage.config, len(stage.space.client_ids)
    if config.engine.kind == "ray":
        with ray_grid(config, stage.run.path, nodes, stage.watch.note) as grid:
            stage.serve(grid, Welcome())
        return
    from fedtune.simulations.engines.grid import InProcessGrid
    from fedtune.simulations.engines.together import Together

    host = host_of(stage)
    together = None if config.engine.batched == "none" else Together(host, config.engine.batched)
    stage.serve(InProcessGrid(make_client_app(host), nodes, together), Welcome())


def host_of(stage: Stage) -> ClientHost:
    """The host of a run's virtual clients in this process, with what the run has loaded."""
    return ClientHost(stage.config, Storage.in_folder(stage.run.path / "clients", stage.config), loaded=stage.space)


def _run(
    config: Config, space: Workspace, strategy: Strategy, exchange: Exchange, run: RunDirectory, engine: Engine, live: bool
) -> ServerState:
    found, damaged = run.newest()
    if found is None and damaged:
        raise CheckpointError(f"no checkpoint of {run.path} can be read, so there is nothing to go on from: {damaged[0]}")
    resumed = found.round if found else -1 if config.resume else None  # -1: it was stopped before round 0 was kept, and starts over
    ended: list[ServerState] = []
    with Watch(run.path, resumed, live=live) as watch:
        watch.note(f"run {run.path}")
        for sentence in damaged:
            watch.note(f"passed over: {sentence}")
        if found and found.round == config.rounds:
            watch.note(f"all {found.round} rounds are done already: rounds=N with a larger N goes on")
        print_partition(space.federation.summary(), Console(stderr=True))

        def test(state: ServerState) -> Mapping[str, float]:
            space.rebase(tuple(s.spec.version for s in state.shifts), state.shifts)
            return space.score(state.adapter, space.test_examples())[0]

        def serve(grid: Grid, welcome: Welcome) -> None:
            bridge = Bridge(
                grid=grid,
                strategy=strategy,
                exchange=exchange,
                config=config,
                run=run,
                initial=space.initial,
                found=run.newest()[0],
                metric=task_of(config.task).primary,
                evaluate=test if config.eval.where == "door" and len(space.federation.test) else None,
                watcher=watch,
                welcome=welcome,
            )
            ended.append(bridge.loop())

        engine(Stage(config=config, space=space, run=run, watch=watch, serve=serve))
    return ended[0]


def _hand_over(config: Config, space: Workspace, state: ServerState, run: RunDirectory) -> None:
    """Write what comes out of a run, and show it."""
    final, folder, task = state.adapter, run.path / "adapter", task_of(config.task)
    if final.spec.method != config.peft.method:  # too many rounds did not count
        raise RunError(
            f"the run ended in its {final.spec.method} stage, with no {config.peft.method} adapter yet: resume={run.path} rounds=N"
        )
    space.rebase(tuple(s.spec.version for s in state.shifts), state.shifts)
    space.slot(final).load(final)
    space.live.save_peft(folder)
    final.save(folder / "fedtune.safetensors")
    for old in folder.glob("shift-*.safetensors"):  # of rounds that a damaged checkpoint took back
        old.unlink()
    for shift in state.shifts:
        shift.save(folder / f"shift-{shift.spec.version:04d}.safetensors")
    if state.shifts:
        fold_shifts(folder, final, state.shifts)
    labels, spec = list(space.federation.labels), dataclasses.asdict(final.spec)
    note = global_note(run.path, final)
    write_card(run.path, to_dict(config), spec, prompt_template(config), labels, read_metrics(run.path), space.backbone, note)
    merged = None
    if config.inference.export == "hf":
        merged = export_hf(run.path, run.path / "merged", replace=True, trust_remote_code=config.model.trust_remote_code)
    asked = min(config.inference.samples, len(space.federation.test)) if task.prompted else 0
    answers = _answers(config, space, state, run, merged, asked) if asked else []
    write_report(run.path)
    print_results(read_metrics(run.path), Console(), space.federation.summary())
    for a in answers:
        print(f"\n{a['request']}\n  before  {a['before']}\n  after   {a['after']}\n  wanted  {a['wanted']}")
    print(f"\nadapter  {run.path / 'adapter'}")
    if merged:
        auto = task.auto_class(space.backbone.seq2seq)
        how = f'fedtune generate {merged} "..."' if task.gives_text else f"{auto}.from_pretrained('{merged}')"
        print(f"model    {merged}    (use it: {how})")
        if said := beside(merged):
            print(f"         {said}")
    print(f"report   {run.path / 'report.html'}")


def _answers(
    config: Config, space: Workspace, state: ServerState, run: RunDirectory, merged: Path | None, count: int
) -> list[dict[str, str]]:
    """A few requests of the global test with what the model says before and after the run; after, the merged model where there is one."""
    examples, tokenizer = space.test_examples(), space.backbone.tokenizer
    chosen = sorted(random.Random(derive_seed(config.seed, "samples")).sample(range(len(examples)), count))
    picked = [examples[i] for i in chosen]
    if merged and mergeable(config.peft.method):
        loaded = load_backbone(
            dataclasses.replace(config.model, source="hub", name=str(merged), init="pretrained", precision="fp32"), config.task
        )
        after = generate_answers(loaded.model, loaded.tokenizer, picked, config.task, batch_size=count)
    else:
        live = space.slot(state.adapter)
        live.load(state.adapter)
        after = generate_answers(live.model, tokenizer, picked, config.task, batch_size=count)
    space.rebase((), ())
    space.live.load(space.initial)
    before = generate_answers(space.live.model, tokenizer, picked, config.task, batch_size=count)
    rows = zip(chosen, picked, before, after, strict=True)
    prompts = space.federation.test["prompt"]
    answers = [{"request": prompts[i].strip(), "wanted": e.answer.strip(), "before": b, "after": a} for i, e, b, a in rows]
    run.write_json("answers.json", answers)
    return answers
