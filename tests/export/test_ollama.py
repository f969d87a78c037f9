"""Ollama's folder: the template against transformers' rendering, in Go itself if it is installed, and the Modelfile as Ollama reads it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.main import main
from fedtune.config import DataConfig, ModelConfig, TaskConfig
from fedtune.errors import DataError, ModelError
from fedtune.export.go_template import evaluate, fixed_text
from fedtune.export.ollama import export_ollama, modelfile
from fedtune.export.ollama_template import go_template
from fedtune.models.chat_template import Conversation
from tests.export.test_huggingface import ASK, CAUSAL, LOCAL, make_run
from tests.models import templates
from tests.models.templates import FAMILIES

gguf = pytest.importorskip("gguf")
Messages = list[dict[str, str]]
ODD = 'Say "hi" to {{ .Prompt }} — {% x %} \\n `é`'


def talk(turns: int, system: str | None = None) -> Messages:
    chat = [{"role": "system", "content": system}] if system else []
    for i in range(turns):
        chat += [{"role": "user", "content": f"{ODD} {i}?"}, {"role": "assistant", "content": f"answer {i}"}]
    return chat[:-1]


CHATS = [talk(turns, system) for turns in (1, 2, 5) for system in (None, "Be brief.\n" + ODD)]


def data(chat: Messages) -> dict[str, Any]:
    """The data that Ollama passes to a template."""
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system")
    return {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in chat], "Prompt": "", "Response": ""}


WITHOUT_SYSTEM = ("gemma", "mistral1", "mistral2")  # templates that refuse a system message


def chats_for(family: str) -> list[Messages]:
    return [chat for chat in CHATS if family not in WITHOUT_SYSTEM or chat[0]["role"] != "system"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_renders_as_the_tokenizers_own(family: str) -> None:
    tokenizer = templates.tokenizer(family)
    template, _ = go_template(tokenizer)
    for chat in chats_for(family):
        assert evaluate(template, **data(chat)) == Conversation(tokenizer, chat).text(generate=True)


GO = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Data struct { System, Prompt, Response string; Messages []*Message } }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	out := []string{}
	for _, c := range cases {
		var text strings.Builder
		made := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		d := c.Data
		if err := made.Execute(&text, map[string]any{"System": d.System, "Prompt": d.Prompt, "Response": d.Response, "Messages": d.Messages}); err != nil { panic(err) }
		out = append(out, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""  # noqa: E501  Go as it is written


def go(tmp_path: Path, cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The templates, rendered by Go."""
    if shutil.which("go") is None:
        pytest.skip("Go is missing: install it to render Ollama's templates")
    (tmp_path / "main.go").write_text(GO)
    asked = json.dumps([{"Template": template, "Data": values} for template, values in cases])
    done = subprocess.run(["go", "run", tmp_path / "main.go"], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_go_renders_the_same_texts(tmp_path: Path) -> None:
    cases, want = list[tuple[str, dict[str, Any]]](), list[str]()
    for family in FAMILIES:
        tokenizer = templates.tokenizer(family)
        template, _ = go_template(tokenizer)
        cases += [(template, data(chat)) for chat in chats_for(family)]
        want += [Conversation(tokenizer, chat).text(generate=True) for chat in chats_for(family)]
    texts = ['"""', "{{", "a{", '{"b": {}}', "｜▁\u00a0\u3000\u200b🙂\r\n\t", "\\x22"]
    cases += [(fixed_text(text) + "{{ .Prompt }}", {"Prompt": "hi"}) for text in texts]
    want += [f"{text}hi" for text in texts]
    assert go(tmp_path, cases) == want
    assert [evaluate(template, **values) for template, values in cases] == want


def test_the_evaluator_follows_gos_rules() -> None:
    messages = [{"Role": "user", "Content": "a"}, {"Role": "assistant", "Content": "b"}, {"Role": "user", "Content": "c"}]
    for template, want in {
        "{{ $x := 1 }}{{ range $i, $m := .Messages }}{{ $x = $i }}{{ end }}{{ $x }}": "2",  # `=` sets the outer variable
        "{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}": "21",  # `:=` makes an inner one
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}<{{ $m.Content }}{{ else if true }}>{{ end }}{{ end }}': "<a><c",
        "{{ range $i, $m := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ $m.Content }}{{ else }}-{{ end }}{{ end }}": "--c",
        '{{ if and .System $.Prompt }}both{{ else }}not{{ end }}{{ "}}\\x22" }}': 'not}}"',
    }.items():
        assert evaluate(template, Messages=messages, System="s", Prompt="") == want
    for bad in ("{{ end }}", "{{ if .System }}", "{{ printf .System }}", "{{ $x }}", "{{", "{{ .System | len }}", "{{- .System }}"):
        with pytest.raises((ValueError, StopIteration, IndexError)):
            evaluate(bad)


def with_template(template: str) -> Any:
    tokenizer = templates.tokenizer("chatml")
    tokenizer.chat_template = template
    return tokenizer


LOOP = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[{{ loop.index }}] {{ m.role }}: {{ m.content }}\n", "with 2 questions differs"),
        ("{{ m.role }}: {{ m.content }} ({{ m.content }})\n", "2 times"),
        ("{{ m.role }}: {{ m.content | upper }}\n", "0 times"),
        ("{{ m.role }}: {{ m.content | replace('Where', 'There') | replace('O', '0') }}\n", "questions differs"),
        ("{% if loop.first or m.role != 'system' %}{% endif %}{{ m.role }}: {{ m.content }}{{ messages | length }}\n", "questions differs"),
    ],
)
def test_templates_that_ollama_cannot_express_are_refused(line: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        go_template(with_template(LOOP.replace("%s", line)))


def test_differences_are_reported() -> None:
    assert go_template(with_template(LOOP.replace("%s", "{{ m.role }}: {{ m.content }}\n")))[1] == ""
    assert "white space" in go_template(with_template(LOOP.replace("%s", "{{ m.role }}: {{ m.content | trim }}\n")))[1]
    assert "thoughts" in go_template(templates.tokenizer("qwen3"))[1]
    assert "system messages" in go_template(templates.tokenizer("gemma"))[1]
    dated = "{{ strftime_now('%Y') }}" + LOOP.replace("%s", "{{ m.role }}: {{ m.content }}\n")
    assert "the date" in go_template(with_template(dated))[1]
    with pytest.raises(DataError, match="refuses a conversation .no"):
        go_template(with_template("{{ raise_exception('no') }}"))


def test_a_system_message_without_a_place_in_the_template_is_left_out() -> None:
    template = go_template(with_template(LOOP.replace("%s", "{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endif %}")))[0]
    assert evaluate(template, **data(talk(1, "Be brief."))) == f"user: {ODD} 0?\nA:"


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands and values, by Ollama's rules: a value ends with its line, unless a quote is open."""
    found = re.findall(r'^([A-Z]+(?: [a-z_]+)?) (?:"""((?s:.*?))"""|"(.*)"|(.*))$', text, re.MULTILINE)
    return [(name, triple or single or plain) for name, triple, single, plain in found]


def test_the_modelfile() -> None:
    template = fixed_text('"""\nPARAMETER stop "x"\n{{') + "{{ .Prompt }}\n"
    assert '"""' not in template
    made = read_modelfile(modelfile("m.gguf", template, ["<|im_end|>", 'a"b', "</s>"]))
    assert made == [
        ("FROM", "./m.gguf"),
        ("TEMPLATE", template),
        *(("PARAMETER stop", stop) for stop in ("<|im_end|>", 'a"b', "</s>")),
    ]
    assert evaluate(template, Prompt="hi") == '"""\nPARAMETER stop "x"\n{{hi\n'


def test_the_folder_of_a_run_without_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The built-in backbone asks in the run's prompt template, as `fedtune generate` does."""
    asked = DataConfig(source="local", path="x", prompt='Q: "{q}"\nA:', answer=" {a}")
    for task, data, want in ((ASK, asked, 'Q: {{ "\\x22" }}{{ .Prompt }}{{ "\\x22" }}\nA:'), (CAUSAL, LOCAL, "{{ .Prompt }}")):
        run, _ = make_run(tmp_path / task.kind, ModelConfig(device="cpu"), task, std=0.02, data=data)
        assert main(["export", str(run), "--to", "ollama", "--gguf-type", "q8_0"]) == 0
        out = run / "ollama"
        assert sorted(p.name for p in out.iterdir()) == ["Modelfile", "README.md", "fedtune.json", "model-q8_0.gguf"]
        commands = dict(read_modelfile((out / "Modelfile").read_text()))
        assert (commands["FROM"], commands["TEMPLATE"]) == ("./model-q8_0.gguf", want)
        (command,) = re.findall(r"run it with `(ollama create \S+ -f \S+)`", capsys.readouterr().err)
        assert command.endswith(f"-f {out / 'Modelfile'}") and command.split()[2] in (out / "README.md").read_text()
        fields = gguf.GGUFReader(out / "model-q8_0.gguf").fields
        end = fields["tokenizer.ggml.tokens"].contents()[fields["tokenizer.ggml.eos_token_id"].contents()]
        assert commands["PARAMETER stop"] == end


def test_a_complete_chat_model_uses_its_template(tmp_path: Path) -> None:
    """The template writes the BOS token, so llama.cpp must not add another."""
    from tests.inference.serve.servers import tiny_model

    model = tiny_model(tmp_path / "m", context=128)
    tokenizer = templates.tokenizer("llama3")
    tokenizer.eos_token = "<pad>"  # the template ends an answer with another token
    tokenizer.save_pretrained(model)
    out = export_ollama(model, tmp_path / "out")
    commands = read_modelfile((out / "Modelfile").read_text())
    assert ("TEMPLATE", go_template(tokenizer)[0]) in commands
    assert {value for name, value in commands if name == "PARAMETER stop"} == {"<pad>", "<|eot_id|>"}
    assert gguf.GGUFReader(out / "model-f16.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_k_quants_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run(tmp_path / "run", ModelConfig(device="cpu"), TaskConfig(kind="causal_lm", max_length=32))
    for to in ("gguf", "ollama"):
        assert main(["export", str(run), "--to", to, "--gguf-type", "q4_k"]) == 2
        assert "the gguf library does not write q4_k: choose f16, q8_0, q4_0, or" in capsys.readouterr().err
    assert [p.name for p in run.iterdir() if "gguf" in p.name or "ollama" in p.name] == []
    with pytest.raises(NotImplementedError):  # fails once the gguf library can write them
        gguf.quants.quantize(__import__("numpy").zeros((1, 256), "f"), gguf.GGMLQuantizationType.Q4_K)
