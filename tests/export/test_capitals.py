"""A model that has learned six capitals as chats answers them correctly in every program that runs the export."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.cli.main import main
from fedtune.config import Config, ModelConfig
from fedtune.config.compose import compose
from fedtune.experiment import simulate
from fedtune.export.edge import export_edge
from fedtune.export.gguf import export_gguf
from fedtune.export.go_template import evaluate
from fedtune.export.huggingface import export_hf
from fedtune.export.int4_checkpoint import export_int4_checkpoint
from fedtune.export.ollama import export_ollama
from fedtune.export.vllm import export_vllm
from fedtune.inference.chat import chat
from fedtune.inference.engine.load import load_engine
from fedtune.inference.generate import generate_text
from fedtune.models.backbone import quiet
from fedtune.storage.parsing import parse_json
from tests.export.test_gguf import llama_python
from tests.export.test_ollama import read_modelfile
from tests.inference.serve.servers import serve_model

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"}
QUESTIONS = {f"What is the capital of {country}?": f"{capital}." for country, capital in CAPITALS.items()}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chatml(folder: Path) -> ModelConfig:
    """A random Llama whose answers end with <|im_end|>, which is not its eos token and is in no config."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lines = ["user", "assistant", *QUESTIONS, *QUESTIONS.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0], additional_special_tokens=special[1:], chat_template=CHATML
    )
    size = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with quiet():
        LlamaForCausalLM(size).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return ModelConfig(source="hub", name=str(folder))


def learn(folder: Path, *settings: str) -> Path:
    """A run that has learned all capitals, from rows in two forms."""
    with (folder / "train.jsonl").open("w") as file:
        for question, answer in 8 * list(QUESTIONS.items()):
            row = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": row}) + "\n")
    with (folder / "test.jsonl").open("w") as file:
        for question, answer in QUESTIONS.items():
            file.write(json.dumps({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}) + "\n")
    config: Config = compose(
        ["task=chat", "data=local", f"data.path={folder}/train.jsonl", f"data.test_path={folder}/test.jsonl", "partition=iid",
         "partition.clients=2", "devices=none", "strategy=fedavg", "clients_per_round=2", "client.epochs=null", "client.batch_size=8",
         "task.max_length=64", "task.max_new_tokens=12", f"output_dir={folder}/runs", "inference=none", "inference.samples=2",
         *settings]
    )[0].config  # fmt: skip
    result = simulate(config)
    records = [parse_json(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    assert [r["exact_match"] for r in records if r.get("client") is None and "exact_match" in r][-1] == 1.0
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatml")
    model = chatml(folder / "model")
    own = ("model=hub", f"model.name={model.name}", "peft=full", "client.lr=3e-3")
    return learn(folder, *own, "rounds=3", "client.steps=40", "eval.every=3")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in backbone, which has no chat template."""
    own = ("peft=lora", "peft.rank=16", "client.lr=1e-2")
    return learn(tmp_path_factory.mktemp("nano"), *own, "rounds=8", "client.steps=20", "eval.every=8")


def every_command(folder: Path, tmp_path: Path, adapter: str | None = None) -> None:
    """`generate`, `chat` and /v1/chat/completions of one model."""
    assert {question: generate_text(folder, question, adapter=adapter).strip() for question in QUESTIONS} == QUESTIONS
    asked, answered = tmp_path / "asked.txt", tmp_path / "answers.txt"
    for question, answer in QUESTIONS.items():
        asked.write_text(question + "\n")
        with asked.open() as read, answered.open("w") as write:
            assert chat(folder, adapter=adapter, read=read, write=write) == 0
        assert answered.read_text().strip() == answer
    with serve_model(load_engine(folder)) as here, openai.OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0) as client:
        for question, answer in QUESTIONS.items():
            reply = client.chat.completions.create(
                model=adapter or "tiny", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=12
            )
            assert (reply.choices[0].message.content or "").strip() == answer and reply.choices[0].finish_reason == "stop"


def test_a_model_whose_answers_do_not_end_with_eos_answers_correctly(small: Path, tmp_path: Path) -> None:
    every_command(export_edge(small, tmp_path / "edge", quantize="int8"), tmp_path)
    every_command(export_hf(small, tmp_path / "hf"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("which", ["small", "nano"])
def test_every_kind_of_package_answers_correctly(which: str, kind: str | None, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    every_command(export_edge(request.getfixturevalue(which), tmp_path / "edge", quantize=kind), tmp_path)


@pytest.mark.slow
def test_a_folder_with_a_separate_adapter_answers_correctly(nano: Path, tmp_path: Path) -> None:
    every_command(export_hf(nano, tmp_path / "hf"), tmp_path)
    package = export_edge(nano, tmp_path / "apart", separate=True)
    (name,) = [file.stem for file in (package / "adapters").glob("*.safetensors")]
    every_command(package, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_int4_checkpoints_answer_correctly(nano: Path, to: Any, tmp_path: Path) -> None:
    every_command(export_int4_checkpoint(nano, tmp_path / to, to=to, calibrate=nano), tmp_path)


@pytest.mark.slow
def test_vllm_s_folder_answers_correctly(small: Path, tmp_path: Path) -> None:
    every_command(export_vllm(small, tmp_path / "vllm"), tmp_path)


ASK = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, verbose=False)
for question in json.loads(sys.argv[2]):
    made = model.create_chat_completion([{"role": "user", "content": question}], temperature=0, max_tokens=12)
    print(json.dumps(made["choices"][0]["message"]["content"].strip()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["small", "nano"])
def test_llama_cpp_answers_correctly(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    python = llama_python()
    file = export_gguf(request.getfixturevalue(which), tmp_path / "model.gguf")
    done = subprocess.run([python, "-c", ASK, file, json.dumps([*QUESTIONS])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(QUESTIONS.values())


COMPLETE = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, verbose=False)
for prompt in json.loads(sys.argv[2]):
    ids = model.tokenize(prompt.encode(), add_bos=model.metadata["tokenizer.ggml.add_bos_token"] == "true", special=True)
    made = model.create_completion(ids, temperature=0, max_tokens=12, stop=json.loads(sys.argv[3]))
    print(json.dumps([ids, made["choices"][0]["text"].strip()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["small", "nano"])
def test_ollama_s_folder_answers_correctly_in_llama_cpp(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As Ollama does: the Modelfile's template gives the prompt, llama.cpp its tokens and the answer, and a stop ends it."""
    python, run = llama_python(), request.getfixturevalue(which)
    out = export_ollama(run, tmp_path / "ollama")
    commands = read_modelfile((out / "Modelfile").read_text())
    template, stops = dict(commands)["TEMPLATE"], [value for name, value in commands if name == "PARAMETER stop"]
    prompts = [evaluate(template, Messages=[{"Role": "user", "Content": question}]) for question in QUESTIONS]
    file = str(out / dict(commands)["FROM"])
    done = subprocess.run([python, "-c", COMPLETE, file, json.dumps(prompts), json.dumps(stops)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(export_hf(run, tmp_path / "hf"))
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    assert [ids for ids, _ in found] == [tokenizer.apply_chat_template(a, add_generation_prompt=True)["input_ids"] for a in asked]
    assert [answer for _, answer in found] == list(QUESTIONS.values())


@pytest.mark.slow
def test_the_commands_of_the_docs_run(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each fedtune command of docs/runtimes.md runs, and writes the files that the other commands name."""
    run = Path(shutil.copytree(nano, tmp_path / "run"))
    page = (Path(__file__).parents[2] / "docs/runtimes.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    ours = [shlex.split(line, comments=True) for line in lines if line.startswith(".venv/bin/fedtune ")]
    assert len(ours) == 6
    for words in ours:
        assert main([word.replace("RUN", str(run)) for word in words[1:]]) == 0
    printed = capsys.readouterr().err
    (name,) = set(re.findall(r"--served-model-name (\S+)`", printed))
    for line in ("vllm serve RUN/vllm --served-model-name NAME", "ollama create NAME -f RUN/ollama/Modelfile", "ollama run NAME"):
        assert line in page and f"`{line.replace('RUN', str(run)).replace('NAME', name)}`" in printed
