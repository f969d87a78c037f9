"""Packages calibrated on a run's rows, after virtual tokens, and with a separate adapter."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from fedtune.cli.main import main
from fedtune.config import DataConfig
from fedtune.errors import ConfigError, ModelError
from fedtune.export.edge import describe_package, export_edge
from fedtune.export.measured import streamed_score
from fedtune.export.merged import read_merged
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.package import read_package
from fedtune.inference.quantize.perplexity import of_engine, perplexity, windows
from fedtune.inference.serve.adapters import add_adapter
from tests.export.test_huggingface import CAUSAL, make_run
from tests.models.build import checkpoint, hub
from tests.quick import quick

TEXT = ["turn on the light in a room", "set the heat in the kitchen to two"] * 30


def trained_run(folder: Path, privacy: str, method: str = "lora") -> Path:
    """A run on its own rows."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in TEXT))
    data = DataConfig(source="local", path=str(rows))
    run, _ = make_run(folder / "run", hub(checkpoint(folder / "m")), CAUSAL, data=data, method=method)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["privacy"] |= {"kind": privacy}
    config["partition"] |= {"kind": "iid", "clients": 2}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.mark.parametrize(
    ("privacy", "method"), quick([("record", "gptq"), ("user", "rtn"), ("none", "gptq")], ("record", "gptq"), ("none", "gptq"))
)
def test_rows_of_a_private_run_are_outside_its_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], privacy: str, method: str
) -> None:
    run = trained_run(tmp_path, privacy)
    out, how = run / "edge", ["--to", "edge", "--quantize", "int8", "--method", method, "--calibrate", str(run)]
    assert main(["export", str(run), *how, "--out", str(out)]) == 0
    note = f"training rows of 'run', a private run (privacy.kind={privacy}), read without noise: what the package discloses"
    for text in (describe_package(out), capsys.readouterr().err, read_package(out).card.get("beyond_privacy", "")):
        assert (note in text) == (privacy != "none"), text
    # text that is no client's row needs no note
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT))
    assert "private" not in describe_package(export_edge(run, run / "other", quantize="int8", calibrate=tmp_path / "text.txt"))


@pytest.mark.parametrize("method", ["prefix", "ptuning_v2"])
def test_the_perplexity_after_a_prefix_equals_the_engines(tmp_path: Path, method: str) -> None:
    run = trained_run(tmp_path, "none", method)
    ids = torch.randint(3, 20, (51,), generator=torch.Generator().manual_seed(2))
    actual = streamed_score(read_merged(run), list(windows(ids, 9)))
    wanted = perplexity(of_engine(load_engine(export_edge(run, run / "edge"))), ids, window=9)
    assert actual.tokens == wanted.tokens == 50 and abs(actual.nats - wanted.nats) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix", "ptuning_v2"])
def test_a_model_is_calibrated_after_its_virtual_tokens(tmp_path: Path, kind: str) -> None:
    run = trained_run(tmp_path, "none", kind)
    for quantize, method in (("int4", "gptq"), ("int8", "smoothquant"), ("int4", "awq")):
        out = export_edge(run, run / f"{quantize}-{method}", quantize=quantize, method=method, calibrate=run)
        result = read_package(out).card["quantised"]["perplexity"]
        assert abs(math.log(result["after"] / result["before"])) < 0.1


@pytest.mark.parametrize(("quantize", "method"), quick([("int4", "awq"), ("int8", "smoothquant")], ("int4", "awq")))
def test_a_separate_adapter_does_not_fit_a_folded_model(tmp_path: Path, quantize: str, method: str) -> None:
    run = trained_run(tmp_path, "none")
    with pytest.raises(ConfigError, match=f"--method {method} moves scales between layers, which a separate adapter"):
        export_edge(run, run / "edge", quantize=quantize, method=method, calibrate=run, separate=True)
    assert not (run / "edge").exists()
    assert read_package(export_edge(run, run / "edge", quantize="int4", method="gptq", calibrate=run, separate=True)).adapters
    folded, plain = (export_edge(run, run / m, quantize=quantize, method=m, calibrate=run) for m in (method, "gptq"))
    with pytest.raises(ModelError, match=f"was quantized by {method}, which moves scales between layers"):
        add_adapter(load_engine(folded), "mine", run / "adapter")
    add_adapter(engine := load_engine(plain), "mine", run / "adapter")
    assert list(engine.adapters) == ["mine"]
