"""One experiment from its config to its run directory, on any engine: the ServerApp that every door runs."""

import dataclasses
import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedtune import flower
from fedtune.bridge import Bridge
from fedtune.clients.app import make_client_app
from fedtune.clients.workspace import Workspace, workspace
from fedtune.compose import make_strategy
from fedtune.config import Config, to_dict
from fedtune.errors import CheckpointError, ConfigError, Stopped
from fedtune.inference.export import export_hf, prompt_template
from fedtune.models import initial_adapter, load_backbone, primary
from fedtune.models.tasks import generate_answers
from fedtune.report import MetricsWriter, Progress, print_partition, print_results, read_metrics, write_card, write_report
from fedtune.run import RunDirectory
from fedtune.seeds import derive_seed
from fedtune.simulations.ray import check_ray, run_on_ray
from fedtune.state import AdapterState
from fedtune.strategy import ServerState, Strategy


def simulate(config: Config) -> Path:
    """Run the experiment with virtual clients, or go on with one, and return its run directory."""
    flower.quiet()
    strategy = make_strategy(config)
    if config.engine.kind == "ray":
        check_ray(config.engine)
    space = workspace(json.dumps(to_dict(config)))
    initial = starting_adapter(config, space)
    run = RunDirectory.open(Path(config.resume), rounds=config.rounds) if config.resume else RunDirectory.create(config)
    try:
        run.write_json("partition.json", space.federation.summary())
        state = _run(config, space, strategy, initial, run)
        _hand_over(config, space, initial, state.adapter, run)
    except BaseException as bad:
        if (run.path / "metrics.jsonl").exists():  # what there is can be looked at, whatever stopped the run
            write_report(run.path)
        if isinstance(bad, KeyboardInterrupt):
            raise Stopped(f"stopped; go on with resume={run.path}") from None
        raise
    finally:
        run.close()
    return run.path


def starting_adapter(config: Config, space: Workspace) -> AdapterState:
    """The adapter before round 1: drawn from the run's seed, bound to the backbone that the workspace loaded."""
    adapter = initial_adapter(config.model, config.task, config.peft, num_labels=space.labels, seed=config.seed)
    return adapter.replace(base=space.backbone.fingerprint)


def make_server_app(serve: Callable[[Grid], None]) -> ServerApp:
    """The ServerApp: hands Flower's grid to the bridge."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid)

    return app


def _run(config: Config, space: Workspace, strategy: Strategy, initial: AdapterState, run: RunDirectory) -> ServerState:
    found, damaged = run.newest()
    if found and found.round > config.rounds:
        raise ConfigError(
            f"rounds={config.rounds} is less than the {found.round} rounds that {run.path} has done: leave it out or ask for more"
        )
    if found is None and damaged:
        raise CheckpointError(f"no checkpoint of {run.path} can be read, so there is nothing to go on from: {damaged[0]}")
    resumed = found.round if found else -1 if config.resume else None  # -1: it was stopped before round 0 was kept, and starts over
    ended: list[ServerState] = []
    with Watch(run, resumed) as watch:
        watch.note(f"run {run.path}")
        for sentence in damaged:
            watch.note(f"passed over: {sentence}")
        if found and found.round == config.rounds:
            watch.note(f"all {found.round} rounds are done already: rounds=N with a larger N goes on")
        print_partition(space.federation.summary(), Console(stderr=True))

        def serve(grid: Grid) -> None:
            bridge = Bridge(
                grid=grid,
                strategy=strategy,
                config=config,
                run=run,
                initial=initial,
                found=found,
                metric=primary(config.task),
                evaluate=(lambda a: space.score(a, space.test_examples())[0]) if config.eval.where == "door" else None,
                watcher=watch,
            )
            ended.append(bridge.loop())

        nodes = len(space.client_ids)
        if config.engine.kind == "ray":
            run_on_ray(make_server_app(serve), make_client_app(config), nodes, config.engine)
        else:
            from fedtune.simulations.grid import InProcessGrid
            from fedtune.simulations.together import Together

            together = None if config.engine.batched == "none" else Together(space, config.engine.batched)
            serve(InProcessGrid(make_client_app(config), nodes, together))
    return ended[0]


class Watch:
    """Everybody who is told how a run goes: the terminal, metrics.jsonl, TensorBoard."""

    def __init__(self, run: RunDirectory, resumed: int | None) -> None:
        self._writer = MetricsWriter(run.path, resumed)
        self._progress = Progress()

    def __enter__(self) -> "Watch":
        self._progress.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.__exit__(*exc)
        self._writer.close()

    def round_started(self, round: int, rounds: int, cohort: int) -> None:
        self._progress.round_started(round, rounds, cohort)

    def client_done(self, client: str, dropped: str | None) -> None:
        self._progress.client_done(client, dropped)

    def round_done(self, record: dict[str, Any], clients: list[dict[str, Any]]) -> None:
        for line in (*clients, record):
            self._writer.write(line)
        self._progress.round_done(record)

    def note(self, text: str) -> None:
        logging.getLogger("fedtune").info(text)
        self._progress.note(text)


def _hand_over(config: Config, space: Workspace, initial: AdapterState, final: AdapterState, run: RunDirectory) -> None:
    """Write what comes out of a run, and show it."""
    space.live.load(final)
    space.live.save_peft(run.path / "adapter")
    final.save(run.path / "adapter" / "fedtune.safetensors")
    labels, spec = list(space.federation.labels), dataclasses.asdict(final.spec)
    write_card(run.path, to_dict(config), spec, prompt_template(config), labels, read_metrics(run.path))
    merged = None
    if config.inference.export == "hf":
        merged = export_hf(run.path, run.path / "merged", replace=True)
    asked = min(config.inference.samples, len(space.federation.test)) if config.task.kind == "instruction" else 0
    answers = _answers(config, space, initial, final, run, merged, asked) if asked else []
    write_report(run.path)
    wide = Console() if sys.stdout.isatty() else Console(width=120)  # in a log, Rich's 80 columns would break the tables
    print_results(read_metrics(run.path), wide, space.federation.summary())
    for a in answers:
        print(f"\n{a['request']}\n  before  {a['before']}\n  after   {a['after']}\n  wanted  {a['wanted']}")
    print(f"\nadapter  {run.path / 'adapter'}")
    if merged:
        classes = config.task.kind == "classification"
        how = f"AutoModelForSequenceClassification.from_pretrained('{merged}')" if classes else f'fedtune generate {merged} "..."'
        print(f"model    {merged}    (use it: {how})")
    print(f"report   {run.path / 'report.html'}")


def _answers(
    config: Config, space: Workspace, initial: AdapterState, final: AdapterState, run: RunDirectory, merged: Path | None, count: int
) -> list[dict[str, str]]:
    """A few requests of the global test with what the model says before and after the run; after, the merged model where there is one."""
    examples = space.test_examples()
    chosen = sorted(random.Random(derive_seed(config.seed, "samples")).sample(range(len(examples)), count))
    picked = [examples[i] for i in chosen]
    space.live.load(initial)
    before = generate_answers(space.live.model, space.backbone.tokenizer, picked, config.task, batch_size=count)
    space.live.load(final)
    model, tokenizer = space.live.model, space.backbone.tokenizer
    if merged:
        loaded = load_backbone(dataclasses.replace(config.model, source="hub", name=str(merged), init="pretrained"), config.task)
        model, tokenizer = loaded.model, loaded.tokenizer
    after = generate_answers(model, tokenizer, picked, config.task, batch_size=count)
    rows = zip(chosen, picked, before, after, strict=True)
    prompts = space.federation.test["prompt"]
    answers = [{"request": prompts[i].strip(), "wanted": e.answer.strip(), "before": b, "after": a} for i, e, b, a in rows]
    run.write_json("answers.json", answers)
    return answers
