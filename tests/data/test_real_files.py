"""Real data sets in their original form: stray quotes, Latin-1, gzip, one file per client. Skipped if they are absent."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedtune.config import from_dict
from fedtune.data import Federation, encode, load_federation


def load(real: Path, path: str, task: str, test: str | None = None, partition: dict[str, Any] | None = None, **data: Any) -> Federation:
    data |= {"source": "local", "path": str(real / path)} | ({"test_path": str(real / test)} if test else {})
    return load_federation(from_dict({"data": data, "task": {"kind": task}, "partition": partition or {"kind": "iid", "clients": 10}}))


def test_shakespeare_s_speakers(real: Path) -> None:
    pattern = r"(?s)^(?P<client>[^\n:]+):\n(?P<text>.+?)(?=\n\n|\Z)"
    natural = {"kind": "natural", "min_examples": 10}
    federation = load(real, "fed/tinyshakespeare/input.txt", "causal_lm", partition=natural, record_pattern=pattern)
    assert len(federation.clients) == 145
    assert "ROMEO" in federation.clients


def test_trec_is_latin_1(real: Path) -> None:
    pattern = r"^(?P<label>[A-Z]+):\S+ (?P<text>.+)$"
    folder, prior = "cls/sentconv_raw", {"kind": "prior", "clients": 20, "alpha": 0.1}
    trec = {"encoding": "latin-1", "record_pattern": pattern}
    federation = load(real, f"{folder}/TREC.train", "classification", f"{folder}/TREC.test", prior, **trec)
    assert (len(federation.rows), len(federation.test), federation.labels) == (5452, 500, ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"))
    assert {len(c.train) + len(c.held_out) for c in federation.clients.values()} == {272, 273}  # 5452 = 20 * 272.6


def test_rte_has_sentence_pairs_and_stray_quotes(real: Path) -> None:
    federation = load(real, "cls/glue/rte/train.tsv", "classification", "cls/glue/rte/dev.tsv", columns={"text": "{sentence1} {sentence2}"})
    assert (len(federation.rows), len(federation.test), federation.labels) == (2490, 277, ("entailment", "not_entailment"))


@pytest.mark.slow
def test_sst2(real: Path) -> None:
    federation = load(real, "cls/glue/sst-2/train.tsv", "classification", "cls/glue/sst-2/dev.tsv", columns={"text": "sentence"})
    assert (len(federation.rows), len(federation.test), federation.labels) == (67349, 872, ("0", "1"))


def test_banking77_by_dirichlet(real: Path) -> None:
    folder, dirichlet = "cls/banking77", {"kind": "dirichlet", "clients": 10, "alpha": 0.1}
    federation = load(real, f"{folder}/train.csv", "classification", f"{folder}/test.csv", dirichlet, columns={"label": "category"})
    assert (len(federation.rows), len(federation.test), len(federation.labels)) == (10003, 3080, 77)
    assert sum(sum(client["histogram"]) for client in federation.summary()["clients"]) == 10003


def test_20news_is_gzipped(real: Path) -> None:
    federation = load(real, "cls/20news/train.jsonl.gz", "classification", limit=500)
    assert (len(federation.rows), len(federation.test), len(federation.labels)) == (500, 1131, 20)


def test_dolly_has_one_file_per_client_and_a_test_file(real: Path) -> None:
    folder = "fed/dolly15k_10clients"
    templates = {"prompt": "{context}\n{instruction}\n", "answer": "{response}", "columns": {"label": "category"}}
    federation = load(real, folder, "instruction", f"{folder}/global_test.json", {"kind": "natural"}, client_from_file=True, **templates)
    assert list(federation.clients) == [f"local_training_{i}" for i in range(10)]
    assert (len(federation.test), len(federation.labels)) == (80, 8)


def test_gsm8k(real: Path) -> None:
    federation = load(real, "fed/gsm8k/train.jsonl", "instruction", prompt="{question}\n", answer="{answer}")
    assert len(federation.rows) + len(federation.test) == 7473


def test_a_real_tokenizer_without_a_pad_token(real: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real / "models/stories260k/hf")
    config = from_dict({"task": {"kind": "instruction", "max_length": 64}})
    federation = load_federation(config)
    rows = next(iter(federation.clients.values())).train
    for row, example in zip(rows.tolist(), encode(federation.rows, rows, tokenizer, config.task), strict=True):
        assert example.input_ids[0] == tokenizer.bos_token_id or len(example.input_ids) == 64
        assert example.input_ids[-1] == tokenizer.eos_token_id
        learned = example.input_ids[example.prompt_length : -1]
        assert tokenizer.decode(learned).strip() == federation.rows[row]["answer"].strip()
        np.testing.assert_array_equal(example.labels[example.prompt_length :], example.input_ids[example.prompt_length :])
