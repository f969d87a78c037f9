"""Models merged elsewhere or never tuned are packaged unchanged."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.cli.main import main
from fedtune.config import DataConfig
from fedtune.errors import CheckpointError, ModelError
from fedtune.export.edge import describe_package, export_edge
from fedtune.export.huggingface import export_hf
from fedtune.export.origin import read_origin
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.package import read_package
from fedtune.models.backbone import quiet
from fedtune.models.checkpoint import fingerprint
from tests.export.test_huggingface import ASK, CAUSAL, CLASSES, make_run
from tests.inference.packages import tensors_of
from tests.models.build import checkpoint, hub, token_ids


def test_a_model_is_packaged_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint(tmp_path / "m")
    assert main(["export", str(model), "--to", "edge"]) == 0
    assert capsys.readouterr().out.strip() == str(model / "edge")
    engine, ids = load_engine(model / "edge"), token_ids(1)
    with quiet():
        wanted = AutoModelForCausalLM.from_pretrained(model)(ids).logits[0]
    actual = torch.from_numpy(engine.decoder.forward(ids[0].numpy(), [Span(engine.cache(), ids.shape[1], keep=None)]))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert engine.card == {
        "task": "causal_lm", "prompt": None, "max_new_tokens": None, "base": fingerprint(model),
        "provenance": {"model": "m"}, "metric": None, "privacy": None,
    }  # fmt: skip


@pytest.mark.parametrize(("quantize", "method"), [("int8", None), ("int4", "gptq")])
def test_a_model_is_quantized_and_calibrated_like_a_run(tmp_path: Path, quantize: str, method: str | None) -> None:
    model, text = checkpoint(tmp_path / "m"), tmp_path / "text.txt"
    text.write_text("turn on the light in a room\n\nset the heat in the kitchen to two\n\n" * 30)
    out = export_edge(model, tmp_path / "edge", quantize=quantize, method=method, calibrate=text)
    assert {x.kind for n, x in read_package(out).linears.items() if n != "lm_head"} == {quantize}
    assert "held-out tokens" in describe_package(out)
    assert "there is no test data here" in describe_package(export_edge(model, tmp_path / "other", quantize="int8"))


def test_a_package_of_an_exported_run_keeps_its_prompt_template(tmp_path: Path) -> None:
    data = DataConfig(source="local", path="x", prompt="set {q} to", answer=" {a}")
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), ASK, data=data)
    merged, straight = export_hf(run, tmp_path / "merged"), read_package(export_edge(run, tmp_path / "straight"))
    package = read_package(export_edge(merged, tmp_path / "edge"))
    result = {name: package.card[name] for name in ("task", "prompt", "max_new_tokens")}
    assert result == {"task": "instruction", "prompt": "set {q} to", "max_new_tokens": 6} and result.items() <= straight.card.items()
    assert package.card["base"] == fingerprint(merged) != straight.card["base"]  # the backbone's adapters do not fit the merged model
    mine = tensors_of(package)
    assert all(torch.equal(mine[n], t) for n, t in tensors_of(straight).items())


def test_a_model_is_exported_to_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from fedtune.export.gguf import export_gguf
    from tests.export.test_gguf import shaped_checkpoint

    reader = gguf.GGUFReader(export_gguf(shaped_checkpoint(tmp_path / "m", "qwen3"), tmp_path / "m.gguf"))
    metadata = {name: reader.fields[name].contents() for name in ("general.name", "general.description", "fedtune.card")}
    assert (metadata["general.name"], metadata["general.description"]) == ("m", "exported by fedtune")
    assert json.loads(metadata["fedtune.card"])["provenance"] == {"model": "m"}


def quantized_model(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    return folder


def test_a_folder_that_is_not_a_plain_model_is_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m")
    beside, _ = make_run(tmp_path / "beside", hub(model), CAUSAL, method="prompt")
    classes, _ = make_run(tmp_path / "classes", hub(model), CLASSES)
    cases = {
        "already an edge package": export_edge(model, tmp_path / "package"),
        "has an unmerged adapter": export_hf(beside, tmp_path / "apart"),
        "is a classifier": export_hf(classes, tmp_path / "classifier"),
        r"is already quantized \(gptq\)": quantized_model(checkpoint(tmp_path / "quantised")),
    }
    for message, folder in cases.items():
        with pytest.raises(ModelError, match=message):
            export_edge(folder, tmp_path / "out")
    with pytest.raises(ModelError, match="is already a complete model: export it with --to edge or gguf"):
        export_hf(model, tmp_path / "out")
    with pytest.raises(ModelError, match="leave out --separate"):
        export_edge(model, tmp_path / "out", separate=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_or_a_run_is_not_accepted_as_a_model(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    for folder in (run, run / "adapter"):
        (folder / "config.json").write_text("{}")  # some programs write a config.json beside an adapter
        assert read_origin(folder).adapter.state.tensors
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_origin(tmp_path / "none")
