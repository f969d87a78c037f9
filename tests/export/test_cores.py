"""RAVAN and Fed-SB in exported weights: the bases are drawn again from the seed in the adapter's spec."""

from pathlib import Path

import pytest
import torch

from fedtune.export.edge import export_edge
from fedtune.export.gguf import export_gguf
from fedtune.models.methods.ravan import bases
from tests.export.test_edge_architectures import folder_of, live_logits
from tests.export.test_huggingface import CAUSAL, make_run
from tests.inference.packages import engine_logits
from tests.models.build import hub, token_ids


@pytest.mark.parametrize("name", ["ravan", "fedsb"])
def test_a_gguf_file_has_the_change_by_hand(tmp_path: Path, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    from tests.export.test_gguf import shaped_checkpoint

    run, live = make_run(tmp_path / "run", hub(shaped_checkpoint(tmp_path / "m", "llama")), CAUSAL, method=name, std=1.0)
    reader = gguf.GGUFReader(export_gguf(run, run / "m.gguf"))
    found = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    module = "model.layers.1.mlp.down_proj"
    weight, core = (live.backbone.model.get_parameter(f"{module}.{x}").detach() for x in ("weight", "core"))
    scale = live.parameters.get(f"{module}.core_scale", torch.ones(1)).detach()
    a, b = bases(live.spec.basis, module, tuple(core.shape), *weight.shape)
    heads = [x.split(core.shape[1]) for x in (a, b)]
    delta = sum((s * b.T @ h @ a for s, h, a, b in zip(scale, core, *heads, strict=True)), torch.zeros(()))
    torch.testing.assert_close(found["blk.1.ffn_down.weight"], weight + delta, rtol=2**-10, atol=1e-4)
    assert not torch.allclose(found["blk.1.ffn_down.weight"], weight, atol=1e-1)


def test_a_composite_models_decoder_has_the_same_bases_on_its_own(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(folder_of(tmp_path / "m", "gemma3_composite")), CAUSAL, method="fedsb", std=0.3)
    assert any("language_model" in n for n in live.parameters)  # the package has other names
    ids = token_ids(1)[0]
    torch.testing.assert_close(engine_logits(export_edge(run, run / "edge"), ids), live_logits(live, ids), rtol=0, atol=1e-3)
    with live.disabled():
        assert not torch.allclose(engine_logits(run / "edge", ids), live_logits(live, ids), atol=1e-1)
