import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fedtune.cli import main as cli
from fedtune.config import DataConfig
from fedtune.contracts.rows import RowSet
from fedtune.data import encode
from fedtune.errors import ConfigError, FedtuneError, ModelError
from fedtune.export import export_hf
from fedtune.inference import generate_text
from fedtune.inference.generate import StrippedWriter, wrap
from fedtune.models import load_backbone
from fedtune.models.evaluation import generate_answers
from tests.export.test_huggingface import ASK, CLASSES, make_run
from tests.models.build import checkpoint, hub

TEMPLATE = DataConfig(source="local", path="x", prompt="set {q} to", answer=" {a}")


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), ASK, data=TEMPLATE)
    return export_hf(run, run / "merged")


def test_a_bare_request_is_wrapped_and_only_the_continuation_is_returned(merged: Path) -> None:
    backbone = load_backbone(hub(merged), ASK)
    ids = backbone.tokenizer("set lamp to").input_ids
    want: list[int] = []
    for _ in range(6):  # greedy by hand; the run's max_new_tokens is 6
        best = int(backbone.model(torch.tensor([ids + want])).logits[0, -1].argmax())
        if best == backbone.tokenizer.eos_token_id:
            break
        want.append(best)
    text = backbone.tokenizer.decode(want, skip_special_tokens=True)
    assert text and generate_text(merged, "lamp") == text
    assert generate_text(merged, "set lamp to") == text  # a complete prompt stays unchanged
    assert generate_text(merged, "lamp", max_new_tokens=1) == backbone.tokenizer.decode(want[:1], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("template", "prompt", "want"),
    [(None, "hi", "hi"), ("Request: {r}\nAction:", "hi", "Request: hi\nAction:"), ("Request: {r}", "Request: hi", "Request: hi"),
     ("{a} {b}", "hi", "hi"), ("{r}!", "hi", "hi!"), ("{{x}} {r}", "a {b} c", "{x} a {b} c")],
)  # fmt: skip
def test_a_prompt_is_wrapped_in_its_template(template: str | None, prompt: str, want: str) -> None:
    assert wrap(prompt, template) == want


def test_sampling_follows_the_seed_and_does_not_change_the_global_generator(merged: Path) -> None:
    state = torch.get_rng_state()
    a, b = (generate_text(merged, "lamp", temperature=2.0, seed=1) for _ in range(2))
    others = {generate_text(merged, "lamp", temperature=2.0, seed=s) for s in range(2, 6)}
    assert a == b and others - {a} and torch.equal(torch.get_rng_state(), state)


def test_a_foreign_folder_generates_without_a_template(tmp_path: Path) -> None:
    assert isinstance(generate_text(checkpoint(tmp_path / "m"), "turn on", max_new_tokens=3), str)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "ptuning_v2"])
def test_an_encoder_decoder_answers_as_its_run_evaluated_it(tmp_path: Path, method: str) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", "t5", seed=3)), ASK, data=TEMPLATE, method=method, std=1.0)
    rows = RowSet({"prompt": [f"set {q} to" for q in ("lamp", "heat the room", "light")], "answer": ["on"] * 3})
    examples = encode(rows, np.arange(3), live.backbone.tokenizer, ASK, seq2seq=True)
    want = generate_answers(live.model, live.backbone.tokenizer, examples, ASK, batch_size=1)
    out = export_hf(run, run / "merged")
    assert any(want) and [generate_text(out, q).strip() for q in ("lamp", "heat the room", "light")] == want
    assert generate_text(out, "lamp", temperature=2.0, seed=1) == generate_text(out, "lamp", temperature=2.0, seed=1)


def test_a_foreign_encoder_decoder_answers(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "t5")
    loaded = load_backbone(hub(folder), ASK)
    model, tokenizer = cast(Any, loaded.model), loaded.tokenizer
    ids = torch.tensor([[*tokenizer("turn on").input_ids, tokenizer.eos_token_id]])
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert generate_text(folder, "turn on", max_new_tokens=5) == tokenizer.decode(expected[0, 1:], skip_special_tokens=True)


def test_models_that_cannot_answer_are_refused(tmp_path: Path, merged: Path) -> None:
    classifier, _ = make_run(tmp_path / "c", hub(tmp_path / "m"), CLASSES)
    export_hf(classifier, tmp_path / "labels")
    cases: list[tuple[Path, dict[str, object], type[FedtuneError], str]] = [
        (tmp_path / "nowhere", {}, ModelError, "there is no folder"),
        (merged.parent, {}, ModelError, "is a run directory: export its model with `fedtune export"),
        (tmp_path / "labels", {}, ModelError, "is a classifier"),
        (merged, {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
        (merged, {"max_new_tokens": 62}, ConfigError, "exceed the model's context of 64"),
        (merged, {"temperature": -1.0}, ConfigError, "temperature=-1.0"),
        (merged, {"temperature": float("nan")}, ConfigError, "temperature=nan"),
    ]
    for folder, options, kind, words in cases:
        with pytest.raises(kind, match=words):
            generate_text(folder, "lamp", **options)  # type: ignore[arg-type]
    (tmp_path / "labels" / "fedtune.json").unlink()  # a classifier that fedtune did not export
    with pytest.raises(ModelError, match="is a classifier"):
        generate_text(tmp_path / "labels", "lamp")
    card = json.loads((merged / "fedtune.json").read_text())
    (merged / "fedtune.json").write_text(json.dumps(card | {"task": "telepathy"}))
    with pytest.raises(ModelError, match="fedtune.json cannot be read"):
        generate_text(merged, "lamp")
    (merged / "fedtune.json").write_text("{}")
    with pytest.raises(ModelError, match="fedtune.json cannot be read"):
        generate_text(merged, "lamp")


def test_the_engine_applies_the_sampling_options(merged: Path) -> None:
    whole = generate_text(merged, "lamp", max_new_tokens=8)
    pieces: list[str] = []
    assert generate_text(merged, "lamp", max_new_tokens=8, write=pieces.append) == whole == "".join(pieces) and len(pieces) > 1
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):  # each leaves only the likeliest token
        assert generate_text(merged, "lamp", max_new_tokens=8, temperature=3.0, **options) == whole  # type: ignore[arg-type]
    for speculate in ("none", "lookup", "early-exit"):
        assert generate_text(merged, "lamp", max_new_tokens=8, speculate=speculate) == whole
    assert generate_text(merged, "lamp", max_new_tokens=8, draft=merged) == whole
    assert generate_text(merged, "lamp", max_new_tokens=8, kind="fp32", kv_budget="1MB") == whole
    assert generate_text(merged, "lamp", max_new_tokens=8, repetition_penalty=50.0) != whole
    stop = whole.split()[1]
    assert generate_text(merged, "lamp", max_new_tokens=8, stop=(stop,)) == whole[: whole.find(stop)]


def test_other_architectures_run_on_transformers_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "m", "gpt2", seed=2)
    capsys.readouterr()
    whole = generate_text(folder, "turn on", max_new_tokens=8)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("fedtune: transformers runs this model: the engine does not support model_type='gpt2'")
    pieces: list[str] = []
    options: dict[str, Any] = {"temperature": 2.0, "top_k": 1, "top_p": 0.9, "min_p": 0.1}
    assert generate_text(folder, "turn on", max_new_tokens=8, write=pieces.append, **options) == whole == "".join(pieces)
    assert generate_text(folder, "turn on", max_new_tokens=8, repetition_penalty=50.0) != whole
    stop = whole.split()[1]
    assert generate_text(folder, "turn on", max_new_tokens=8, stop=(stop,)) == whole[: whole.find(stop)]
    for asked in ({"kind": "int8"}, {"kv_budget": "1MB"}, {"draft": folder}, {"speculate": "lookup"}, {"adapter": "x"}):
        with pytest.raises(ConfigError, match="runs on transformers, which has no --"):
            generate_text(folder, "turn on", **asked)  # type: ignore[arg-type]


def test_a_budget_is_printed_only_with_an_answer(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="exceed the model's context"):
        generate_text(merged, "lamp", max_new_tokens=100_000, kv_budget="1MB")
    assert capsys.readouterr().err == ""
    generate_text(merged, "lamp", max_new_tokens=3, kv_budget="1MB")
    assert capsys.readouterr().err.startswith("fedtune: cache: all keys and values in full precision; ")


def test_impossible_options_of_the_engine_are_refused(tmp_path: Path, merged: Path) -> None:
    other = checkpoint(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["green"] = vocabulary["model"]["vocab"].pop("blue")
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    cases: list[tuple[dict[str, object], type[FedtuneError], str]] = [
        ({"speculate": "draft"}, ConfigError, "needs a draft model"),
        ({"speculate": "lookup", "draft": merged}, ConfigError, "has no effect with --speculate lookup"),
        ({"speculate": "magic"}, ConfigError, "speculate=magic is unknown"),
        ({"draft": other}, ModelError, "their tokenizers differ"),
        ({"adapter": "nobody"}, ModelError, "has no adapter 'nobody'"),
        ({"kv_budget": "lots"}, ConfigError, "'lots' is not a memory size"),
        ({"top_p": 0.0}, ConfigError, "top_p=0.0"),
        ({"stop": ("",)}, ConfigError, "stop string is empty"),
    ]
    for options, kind, words in cases:
        with pytest.raises(kind, match=words):
            generate_text(merged, "lamp", **options)  # type: ignore[arg-type]


# -- the command ------------------------------------------------------------------------------------------------------------------------


def test_an_exported_model_generates_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), ASK, data=TEMPLATE)
    capfd.readouterr()
    assert cli.main(["export", str(run)]) == 0
    assert capfd.readouterr() == (f"{run / 'merged'}\n", "")
    assert cli.main(["generate", str(run / "merged"), "lamp", "--max-new-tokens", "4"]) == 0
    out, err = capfd.readouterr()
    assert out == generate_text(run / "merged", "lamp", max_new_tokens=4).strip() + "\n" and err == ""
    assert cli.main(["export", str(run)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fedtune: ") and err.count("\n") == 1 and "already exists" in err
    assert cli.main(["export", str(run), "--out", str(tmp_path / "other")]) == 0 and (tmp_path / "other" / "config.json").is_file()


def test_the_text_is_streamed_without_surrounding_spaces() -> None:
    class Log(list[str]):
        write, flush = list.append, lambda self: None

    out: Any = Log()
    stripped = StrippedWriter(out)
    for piece in ["", " \n", " a", " ", "\n", "b c ", "", "d", " \n "]:
        stripped.write(piece)
    assert out == ["a", " \nb c", " d"]


def test_options_on_the_command_line_reach_the_engine(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    given = ["--temperature", "2", "--top-k", "9", "--top-p", ".9", "--min-p", ".01", "--repetition-penalty", "1.1", "--seed", "3"]
    options: dict[str, Any] = {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3}
    more = ["--kind", "fp32", "--kv-budget", "1MB", "--speculate", "lookup", "--stop", "lamp", "--stop", "red", "--max-new-tokens", "9"]
    want = generate_text(merged, "kettle", **options, stop=("lamp", "red"), max_new_tokens=9)
    capfd.readouterr()
    assert cli.main(["generate", str(merged), "kettle", *given, *more]) == 0
    out, err = capfd.readouterr()
    assert out == want.strip() + "\n" and err.startswith("fedtune: cache: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["generate", "NO", "x"], ["chat", "NO"], ["serve", "NO", "--port", "0"], ["bench", "NO"], ["draft", "NO"], ["export", "NO"],
                ["generate", "YES", "x", "--draft", "NO"], ["bench", "YES", "--draft", "NO"]]
)  # fmt: skip
def test_a_missing_folder_is_named_by_all_commands(
    tmp_path: Path, merged: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    folder = tmp_path / "nowhere"
    expected = "a run directory, a PEFT adapter folder or a model" if command[0] == "export" else "a model that `fedtune export` wrote"
    assert cli.main([{"NO": str(folder), "YES": str(merged)}.get(word, word) for word in command]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"fedtune: there is no folder {folder}: give {expected}") and err.count("\n") == 1


@pytest.mark.parametrize("command", [["serve", "RUN", "--port", "0"], ["bench", "RUN"], ["chat", "RUN"]])
def test_a_run_is_not_a_model(merged: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main([str(merged.parent) if word == "RUN" else word for word in command]) == 2
    assert f"{merged.parent} is a run directory: export its model with `fedtune export {merged.parent}`" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "NO", "x"], ["chat", "NO"], ["draft", "NO"]])
def test_a_negative_seed_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--seed", "-1"]) == 2
    assert capsys.readouterr() == ("", "fedtune: --seed -1 is out of range: it must be at least 0\n")


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtune.inference.generate.generate_text", interrupt)
    assert cli.main(["generate", str(tmp_path), "x"]) == 130


def modules_after(code: str) -> set[str]:
    """Top-level modules of a fresh process that ran the code."""
    code += "\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert process.returncode == 0, process.stderr
    return {name.split(".")[0] for name in json.loads(process.stdout.splitlines()[-1])}


def test_imports_stay_light() -> None:
    light = modules_after("import fedtune.inference, fedtune.models, fedtune.cli.main")
    assert not light & {"torch", "transformers", "peft", "flwr", "datasets"}


@pytest.mark.slow
def test_generating_needs_neither_peft_nor_flower() -> None:
    assert not modules_after("import fedtune.inference.generate, fedtune.inference.chat") & {"transformers", "peft", "flwr", "datasets"}


def test_public_names_exist() -> None:
    import fedtune.inference
    import fedtune.models

    for module in (fedtune.inference, fedtune.models):
        assert all(getattr(module, n) is not None for n in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedtune.models.nothing  # type: ignore[attr-defined]  # noqa: B018
