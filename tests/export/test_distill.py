"""A draft model: its layers, its training texts and the measurement of its acceptance."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedtune.cli.main import main
from fedtune.errors import ConfigError, DataError, ModelError
from fedtune.export.distill import Distillation, acceptance, distill, fewer_layers, pad, read_texts, split, write
from fedtune.inference.engine.load import load_engine
from fedtune.models.checkpoint import NANO
from tests.export.test_capitals import chatml
from tests.inference.engine.tiny import SIZES

WIDE = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
QUICK = Distillation(steps=12, batch_size=4, length=16, layers=1)


def llama(layers: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 37,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, max_position_embeddings=64, **shape)).eval()


def silence(model: Any, layer: int) -> None:
    """Make a layer add zero."""
    torch.nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
    torch.nn.init.zeros_(model.model.layers[layer].mlp.down_proj.weight)


def test_a_draft_without_zero_layers_equals_the_model() -> None:
    model = llama(5)
    silence(model, 1)
    silence(model, 3)
    ids = torch.randint(0, 37, (3, 11))
    draft = fewer_layers(model, 3)  # evenly from first to last: 0, 2, 4
    with torch.no_grad():
        torch.testing.assert_close(draft(ids).logits, model(ids).logits)
    text = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    own = acceptance(model, model, text)  # the model accepts its own most likely tokens
    assert acceptance(model, draft, text) == pytest.approx(own, abs=1e-6)
    silence(model, 2)  # now the model differs from its draft
    assert acceptance(model, draft, text) < 0.999 * acceptance(model, model, text)


@pytest.mark.parametrize("kind", ["smollm3", "gemma3"])
def test_a_kept_layer_keeps_its_windows_and_positions(kind: str, tmp_path: Path) -> None:
    """Only the layers that are left out are without rotation, or with a window."""
    own = {"no_rope_layers": [1, 0, 1, 0, 1]} if kind == "smollm3" else {"sliding_window": 4, "layer_types": [*WIDE, "full_attention"]}
    config: Any = AutoConfig.for_model("gemma3_text" if kind == "gemma3" else kind, **SIZES | own | {"num_hidden_layers": 5})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    silence(model, 1)
    silence(model, 3)
    ids = torch.randint(0, 37, (3, 11))
    draft = fewer_layers(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(draft(ids).logits, model(ids).logits)
    draft.save_pretrained(tmp_path)
    assert load_engine(tmp_path).shape.layers == 3


@pytest.mark.parametrize(("layers", "kept"), [(1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (6, [0, 1, 2, 4, 5, 6])])
def test_which_layers_are_kept(layers: int, kept: list[int]) -> None:
    model = llama(7)
    draft = fewer_layers(model, layers)
    for new, old in enumerate(kept):
        for mine, its in zip(draft.model.layers[new].parameters(), model.model.layers[old].parameters(), strict=True):
            assert torch.equal(mine, its) and mine.data_ptr() != its.data_ptr()


def test_acceptance_by_hand() -> None:
    def stub(probabilities: list[float]) -> Any:
        def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return SimpleNamespace(logits=torch.tensor(probabilities).log().expand(*input_ids.shape, -1))

        return run

    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    # the draft's most likely token has .3 in the model, at every token
    assert acceptance(stub([0.5, 0.3, 0.2]), stub([0.1, 0.9, 1e-30]), [(ids, mask)]) == pytest.approx(0.3)


def test_tokens_after_the_end_do_not_count() -> None:
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[5, 2, 0], [7, 8, 9]])], dim=1)

    ids, counted = write(SimpleNamespace(device="cpu", generate=generate), None, Distillation(batch_size=2, length=8), 0, tokenizer)
    assert ids.tolist() == [[1, 5, 2, 0], [1, 7, 8, 9]]
    assert counted.tolist() == [[True, True, True, False], [True] * 4]


def test_texts_are_padded_and_split() -> None:
    ids, mask = pad([[3, 4], [5]], 0)
    assert ids.tolist() == [[3, 4], [5, 0]] and mask.tolist() == [[True, True], [True, False]]
    held, rows = split([[i] for i in range(20)], None)
    assert len(held) == 2 and len(rows) == 18
    with pytest.raises(DataError, match="at least two"):
        split([[1]], Path("a.txt"))


@pytest.mark.slow
@pytest.mark.parametrize("on_policy", [0.0, 1.0])
@pytest.mark.parametrize("given", [True, False], ids=["texts", "its own"])
def test_a_draft_learns_and_the_same_seed_gives_the_same(tmp_path: Path, on_policy: float, given: bool) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"turn {w} the light in the {r}"}) + "\n" for w in ("on", "off") for r in ("hall", "den", "attic"))
    )
    how = Distillation(steps=12, batch_size=4, length=16, layers=1, on_policy=on_policy)
    seen: list[tuple[int, float]] = []
    figures = distill(NANO, tmp_path / "a", text=text if given else None, how=how, report=lambda step, value: seen.append((step, value)))
    again = distill(NANO, tmp_path / "b", text=text if given else None, how=how)
    assert figures == again and figures["acceptance"] > figures["acceptance_before"]
    assert [step for step, _ in seen] == list(range(1, 13)) and seen[-1][1] < seen[0][1]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    card = json.loads((tmp_path / "a" / "fedtune.json").read_text())
    assert card["distilled"]["layers"] == 1 and card["draft_of"] and figures["parameters"] < figures["of"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": 0}, "layers=0"), ({"steps": 0}, "steps=0"), ({"length": 7}, "length=7"), ({"on_policy": 1.5}, "on_policy=1.5"),
        ({"lr": float("nan")}, "lr=nan"), ({"batch_size": 0}, "batch_size=0"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(**setting)


def test_a_draft_is_smaller_than_its_model() -> None:
    with pytest.raises(ConfigError, match="layers=3 is too many for a draft of a model of 3 layers"):
        fewer_layers(llama(3), 3)


def test_a_chat_model_reads_its_texts_in_its_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatml(tmp_path / "model").name)
    (tmp_path / "a.jsonl").write_text('{"prompt": "Peru?", "response": "Lima."}\n')
    ((*ids,),) = read_texts(tmp_path / "a.jsonl", tokenizer, None, 64, chat=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\nPeru?<|im_end|>\n<|im_start|>assistant\nLima.<|im_end|>"
    assert tokenizer.decode(read_texts(tmp_path / "a.jsonl", tokenizer, None, 64)[0]) == "Peru?Lima.<|endoftext|>"


def test_messages_are_texts_in_the_chat_template_as_in_training(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatml(tmp_path / "m").name)
    tokenizer.chat_template = "{% for tool in tools or [] %}<{{ tool.name }}>{% endfor %}" + tokenizer.chat_template
    chat = [{"role": "user", "content": "Peru?"}, {"role": "assistant", "content": "Lima."}]
    file = tmp_path / "a.jsonl"
    given = [{"from": "human", "value": "Peru?"}, {"from": "gpt", "value": "Lima."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"messages": chat, "tools": [{"name": "f"}]}, {"conversations": given}]))
    wanted = "<|im_start|>user\nPeru?<|im_end|>\n<|im_start|>assistant\nLima.<|im_end|>"
    assert [tokenizer.decode(row) for row in read_texts(file, tokenizer, None, 64)] == [f"<f>{wanted}", wanted]
    file.write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": chat[:1]}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl row 2 is not a conversation: no message has the role 'assistant'"):
        read_texts(file, tokenizer, None, 64)
    file.write_text(json.dumps({"messages": chat}) + "\n")
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the model's chat template refuses a conversation \(not today\)"):
        read_texts(file, tokenizer, None, 64)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"a\.jsonl:1 has messages, but the model has no chat template: give rows with `text`"):
        read_texts(file, tokenizer, None, 64)


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    with pytest.raises(DataError, match="cannot read"):
        read_texts(tmp_path / "none.txt", SimpleNamespace(), None, 8)
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: a row must be"):
        read_texts(
            tmp_path / "a.jsonl", type("T", (), {**vars(tokenizer), "__call__": lambda *_: SimpleNamespace(input_ids=[])})(), None, 8
        )


def test_a_classifier_cannot_be_a_draft(tmp_path: Path) -> None:
    (tmp_path / "fedtune.json").write_text(json.dumps({"task": "classification", "prompt": None, "max_new_tokens": None}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="classifier"):
        distill(tmp_path, tmp_path / "out", how=QUICK)


def test_the_draft_command_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "draft",
        str(NANO),
        "--out",
        str(tmp_path / "draft"),
        "--steps",
        "3",
        "--layers",
        "1",
        "--batch-size",
        "2",
        "--length",
        "12",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.out.strip() == str(tmp_path / "draft")
    assert [line[:9] for line in output.err.split("\n")] == ["fedtune: ", ""]  # one sentence, and no empty line before it
    assert main(arguments) == 2  # the output exists already
    assert "already exists" in capsys.readouterr().err
