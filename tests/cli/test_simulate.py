"""The simulation command: composed configs, and errors before anything is loaded."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import fedtune.experiment
from fedtune.cli.simulate import main
from fedtune.config import Config, to_dict
from fedtune.config.compose import compose
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.errors import ConfigError, RunError
from fedtune.rounds.find_strategy import make_strategy

ROOT = Path(__file__).parents[2]
HEAD = "defaults: [base, _self_]\n"

REFUSED = [
    # arguments → parts of the error
    (["client.lrr=1"], "unknown config key client.lrr: did you mean client.lr?"),
    (["lr=1"], "unknown config key lr: did you mean client.lr?"),
    (["+client.lrr=1"], "unknown config key client.lrr: did you mean client.lr?"),
    (["client={lrr: 1}"], "unknown config key client.lrr: did you mean client.lr?"),
    (["devices.classes.phone.shar=1"], "unknown config key devices.classes.phone.shar: did you mean devices.classes.phone.share?"),
    (["strategy.mu=1"], "unknown config key strategy.mu"),
    (["client.lr=abc"], "client.lr=abc has the wrong type: wanted a number"),
    (["rounds=1.5"], "rounds=1.5 has the wrong type: wanted a whole number"),
    (["rounds=true"], "rounds=True has the wrong type: wanted a whole number"),
    (["client.steps=none"], "client.steps=none has the wrong type: wanted a whole number (null for none)"),
    (["task.generate=7.5"], "task.generate=7.5 has the wrong type: wanted true or false"),
    (["client.lr=-1"], "client.lr=-1.0 is out of range: it must be greater than 0"),
    (["client.lr=nan"], "client.lr=nan is out of range"),
    (["devices.classes.phone.offline=2"], "devices.classes.phone.offline=2.0 is out of range: it must be at most 1"),
    (["model.precision=fp8"], "model.precision=fp8 is not known: choose one of fp32, bf16"),
    (["strategy=floraa"], "strategy=floraa is not known: choose one of apfl"),
    (["model=null"], "model=null is not known: choose one of hub, nano"),
    (["engine=7"], "engine=7 is not known: choose one of inprocess, ray"),
    (["conf=hetero"], "there is no scenario 'hetero': did you mean heterogeneous, of assistant, banking77, dolly,"),
    (["conf="], "there is no scenario ''"),
    (["conf=nope.yaml"], "there is no scenario file nope.yaml"),
    (["conf=dolly", "conf=shakespeare"], "conf= is given 2 times"),
    (["model=hub"], "model=hub needs model.name"),
    (["task=causal_lm"], "task.kind=causal_lm does not fit data=demo"),
    (["min_clients=20"], "min_clients=20 is more than clients_per_round="),
    (["name=a/b"], "name='a/b' must be a plain folder name"),
    (["rounds"], "cannot read 'rounds': settings are written KEY=VALUE"),
    (["=3"], "cannot read '=3'"),
    (["client=["], "cannot read 'client=['"),
    (["peft.rank=4,8"], "'peft.rank=4,8' is a sweep over several values: add --multirun"),
    (["peft.rank=4,x", "-m"], "peft.rank=x has the wrong type: wanted a whole number"),
    (["hydra.run.dir=x"], "hydra.run.dir has no effect here"),
    (["--verbose"], "unknown flag --verbose: see --help"),
    (["client.lr=${client.lrr}"], "client.lr: "),
    (["+devices.classes.tablet={share: 1}"], "there is no device class 'tablet' here"),
    (["resume=/no/such/run"], "there is no run directory /no/such/run"),
    (["resume=x", "peft.rank=4"], "resume uses the run's own config, in which only rounds can change: leave out peft.rank"),
    (["resume=x", "conf=dolly"], "leave out conf=dolly"),
    (["resume="], "resume= is empty: give the run directory to continue"),
    (["strategy._target_=subprocess.Popen"], "strategy._target_=subprocess.Popen is not a strategy"),
    (["strategy._target_=os.system"], "strategy._target_=os.system is not a strategy"),
    (["strategy._target_=fedtune.strategies.fedavg.FedAvgg"], "strategy._target_=fedtune.strategies.fedavg.FedAvgg cannot be imported"),
    (["strategy._target_=nowhere.to.be.Found"], "cannot be imported: pick one of strategy=apfl"),
    (["+strategy.mu=1"], "strategy FlexLoRA: got an unexpected keyword argument 'mu'"),
]


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded or run."""
    monkeypatch.setattr(fedtune.experiment, "simulate", lambda config: pytest.fail(f"{config.name} was run"))


def refusal(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> str:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedtune: ") and err.count("\n") == 1 and "HYDRA_FULL_ERROR" not in err and "hydra.cc" not in err
    return err.removeprefix("fedtune: ").rstrip("\n")


@pytest.mark.parametrize(("args", "sentence"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
@pytest.mark.usefixtures("never")
def test_bad_arguments_give_a_one_sentence_error(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refusal(capsys, args)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rounds: 2\n", "mine.yaml does not start from fedtune's schema: open it with `defaults: [base, _self_]`"),
        ("", "mine.yaml does not start from fedtune's schema"),
        ("rounds: [2\nname: x\n", "mine.yaml, line 2, is not YAML"),
        (HEAD + "client:\n  lrr: 2\n", "unknown config key client.lrr: did you mean client.lr?"),
        (HEAD + "client:\n  lr: fast\n", "client.lr=fast has the wrong type: wanted a number"),
        (HEAD + "name: ${nope}\n", "name: Interpolation key 'nope' not found"),
        ("defaults:\n  - base\n  - override strategy: nope\n  - _self_\n", "Could not find 'strategy/nope': choose one of apfl"),
        ("defaults: base\n", "defaults must be a list"),
        ("- a\n- b\n", "must be a DictConfig"),
        (HEAD + "name: ${package:no_such_package/model}\n", "the package no_such_package is not installed"),
        ("name: caf\udce9\n", "cannot read the scenario file"),
    ],
)
@pytest.mark.usefixtures("never")
def test_bad_scenario_files_give_a_one_sentence_error(text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert sentence in refusal(capsys, [f"conf={tmp_path}/mine.yaml"])


def test_a_user_s_scenario_file_can_have_its_own_groups(tmp_path: Path) -> None:
    (tmp_path / "dolly.yaml").write_text(HEAD + "name: mine\nrounds: 2\n")  # the user's file, not fedtune's of the same name
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "slow.yaml").write_text("lr: 1.0e-5\n")
    config = compose([f"conf={tmp_path}/dolly.yaml", "client=slow", "devices=mixed"])[0].config
    assert (config.name, config.rounds, config.client.lr, len(config.devices.classes)) == ("mine", 2, 1e-5, 4)


@pytest.mark.parametrize("how", [["data.columns={text: story, label: mood}"], ["data.columns.text=story", "data.columns.label=mood"]])
def test_columns_are_set_without_a_plus(how: list[str]) -> None:
    config = compose(["conf=base", "data=local", "data.path=my.csv", "task=classification", *how])[0].config
    assert config.data.columns == {"text": "story", "label": "mood"} and config.devices.classes == {}


def test_overrides_beat_the_scenario() -> None:
    args = ["rounds=0", "client.steps=3", "client.epochs=null", "data.columns.label=stars", "peft.targets=[q_proj,v_proj]"]
    config = compose(args)[0].config
    assert (config.rounds, config.client.steps, config.client.epochs) == (0, 3, None)
    assert config.data.columns == {"label": "stars"}
    assert config.peft.targets == ["q_proj", "v_proj"]


def test_a_sweep_runs_every_combination() -> None:
    jobs = compose(["rounds=1,2", "peft.rank=range(4,9,4)", "seed=3"], multirun=True)
    assert [(j.label, j.config.rounds, j.config.peft.rank, j.config.seed) for j in jobs] == [
        ("rounds=1 peft.rank=4", 1, 4, 3),
        ("rounds=1 peft.rank=8", 1, 8, 3),
        ("rounds=2 peft.rank=4", 2, 4, 3),
        ("rounds=2 peft.rank=8", 2, 8, 3),
    ]


def finish(config: Config, path: Path, value: float) -> Path:
    """The parts of a finished run's directory that a sweep reads."""
    (path / "adapter").mkdir(parents=True)
    (path / "adapter" / "README.md").write_text("")
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    lines = [f'{{"round": {r}, "client": null, "exact_match": {value * r / config.rounds}}}' for r in range(config.rounds + 1)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_a_sweep_continues_after_a_failed_job_and_skips_finished_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[int, int]] = []

    def simulate(config: Config) -> Path:
        ran.append((config.rounds, config.seed))
        if config.rounds == 1 and len(ran) == 1:
            raise RunError("nobody came")
        return finish(config, tmp_path / config.name / f"run-{len(ran)}", config.rounds / 4 + config.seed / 10)

    monkeypatch.setattr(fedtune.experiment, "simulate", simulate)
    sweep = ["rounds=1,2", "seed=0,1", "eval.clients=0", "inference=none", "model.trust_remote_code=true", f"output_dir={tmp_path}", "-m"]
    assert main(sweep) == 2
    out, err = capsys.readouterr()
    assert "fedtune: job 1: nobody came\n" in err and "failed   job 1 (rounds=1 seed=0): nobody came" in out
    assert ran == [(1, 0), (1, 1), (2, 0), (2, 1)]
    # rounds=2: .5 and .6, so .55 ± .071; only seed 1 is common: .6 - .35 = .25
    assert "0.550 ± 0.071" in out and "+0.250 (1)" in out and "eval.clients=0 inference=none" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines() if "±" in line)
    assert main(sweep) == 0  # finished jobs are not run again
    assert ran[4:] == [(1, 0)] and "job 2 has already finished, in" in capsys.readouterr().out
    (result,) = [p for p in (tmp_path / "heterogeneous").glob("sweep-*") if "rounds=1,0," in (p / "compare.csv").read_text()]
    assert sorted(p.name for p in result.iterdir()) == ["compare.csv", "compare.md", "compare.png"]


def test_an_unfinished_run_is_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Path] = []

    def simulate(config: Config) -> Path:
        ran.append(finish(config, tmp_path / config.name / f"run-{len(ran)}", 0.5))
        return ran[-1]

    monkeypatch.setattr(fedtune.experiment, "simulate", simulate)
    sweep = ["rounds=2", "seed=0,1", "inference=none", f"output_dir={tmp_path}", "--multirun"]
    assert main(sweep) == 0 and len(ran) == 2
    (ran[0] / "metrics.jsonl").write_text('{"round": 1, "client": null, "exact_match": 0.1}\n')  # stopped in round 2
    (ran[1] / "adapter" / "README.md").unlink()  # stopped while it wrote its adapter
    assert main(sweep) == 0 and len(ran) == 4


def test_resume_uses_the_runs_own_config(tmp_path: Path) -> None:
    ran = compose(["conf=dolly", "seed=7"])[0].config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(ran)))
    config = compose([f"resume={tmp_path}", "rounds=40"])[0].config
    assert (config.name, config.seed, config.rounds, config.resume) == ("dolly", 7, 40, str(tmp_path))
    with pytest.raises(ConfigError, match="rounds=many has the wrong type"):
        compose([f"resume={tmp_path}", "rounds=many"])


@dataclass(frozen=True, kw_only=True)
class Mine(Strategy):
    beta: float = 0.5
    name: str | None = None

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        return state


def test_a_user_s_strategy_gets_typed_arguments() -> None:
    target = {"_target_": f"{__name__}.Mine"}
    sys.modules.setdefault(__name__, sys.modules[Mine.__module__])
    assert make_strategy(Config(strategy={**target, "beta": 1})) == Mine(beta=1.0)
    with pytest.raises(ConfigError, match="strategy.beta='much' has the wrong type: wanted float"):
        make_strategy(Config(strategy={**target, "beta": "much"}))


def test_cfg_prints_the_composed_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rounds=3", "--cfg"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == to_dict(compose(["rounds=3"])[0].config)


def test_help_lists_all_scenarios_groups_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for part in ("conf=NAME", "shakespeare", "partition       dirichlet, iid", "client.lr ", "resume=RUN", "--multirun"):
        assert part in text


def program(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "fedtune.sim", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_the_process_exits_with_2_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ended = program("client.lrr=1", cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "fedtune: unknown config key client.lrr: did you mean client.lr?\n")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_config_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    code = "import sys; from fedtune.cli.simulate import main; rc = main(['rounds=x']); sys.exit(rc + 10 * ('torch' in sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "fedtune: rounds=x has the wrong type: wanted a whole number\n")
