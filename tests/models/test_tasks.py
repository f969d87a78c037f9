import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.task import task_of
from fedtune.data.examples import Example, collate
from fedtune.errors import DataError
from fedtune.models import Backbone, LiveAdapter, evaluate, load_backbone, loss_sum
from fedtune.models.evaluation import generate_answers
from fedtune.models.tasks._answers import verdict
from fedtune.models.tasks.classification import macro_f1
from tests.models.build import checkpoint, hub, llama_config, token_ids

CAUSAL = TaskConfig(kind="causal_lm", max_length=32)
INSTRUCTION = TaskConfig(kind="instruction", max_length=32, max_new_tokens=6)
CLASSES = TaskConfig(kind="classification", max_length=32)


def load(folder: Path, kind: str, task: TaskConfig) -> Backbone:
    return load_backbone(hub(checkpoint(folder, kind)), task, num_labels=3)


def texts(*lengths: int) -> list[Example]:
    rows = [token_ids(1, n, seed=n)[0].numpy().astype(np.int32) for n in lengths]
    return [Example(r, r) for r in rows]


def prompt_example(prompt: torch.Tensor, answer: torch.Tensor, text: str) -> Example:
    ids = torch.cat([prompt, answer]).numpy().astype(np.int32)
    labels = ids.copy()
    labels[: len(prompt)] = -100
    return Example(ids, labels, len(prompt), text)


def pairs(*lengths: tuple[int, int]) -> list[Example]:
    """For an encoder-decoder: a prompt and an answer of these lengths."""
    drawn = [(token_ids(1, n, seed=n)[0].tolist(), token_ids(1, m, seed=m + 50)[0].tolist()) for n, m in lengths]
    return [Example(np.array(p, np.int32), np.array([-100, *a], np.int32), len(p), "on") for p, a in drawn]


def by_hand(model: nn.Module, prompt: torch.Tensor, eos: int, longest: int) -> list[int]:
    """Greedy decoding one prompt at a time, without cache or padding."""
    ids = prompt.tolist()
    for _ in range(longest):
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == eos:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_sum_over_count_is_the_mean_loss_of_transformers(tmp_path: Path, kind: str) -> None:
    model = load(tmp_path / "m", kind, CAUSAL).model
    batch = collate(texts(5, 9, 2), 1)
    total, count = loss_sum(model, batch, CAUSAL)
    assert count == 4 + 8 + 1  # each text predicts all but its first token
    torch.testing.assert_close(total / count, model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_loss_sum_of_instructions_counts_the_answer_only(tmp_path: Path) -> None:
    model = load(tmp_path / "m", "llama", INSTRUCTION).model
    ids = token_ids(1, 7)[0]
    total, count = loss_sum(model, collate([prompt_example(ids[:4], ids[4:], "")], 1), INSTRUCTION)
    logs = model(ids[None]).logits[0].log_softmax(-1)
    # by hand: tokens 4, 5, 6 are predicted at positions 3, 4, 5
    assert count == 3
    torch.testing.assert_close(total, -(logs[3, ids[4]] + logs[4, ids[5]] + logs[5, ids[6]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_loss_sum_of_classes_is_the_mean_loss_of_transformers(tmp_path: Path, kind: str) -> None:
    model = load(tmp_path / "m", kind, CLASSES).model
    end = [1] if kind == "t5" else []
    rows = [np.append(e.input_ids, end).astype(np.int32) for e in texts(4, 7, 3)]
    batch = collate([Example(r, np.array([i], np.int32)) for i, r in enumerate(rows)], 2 if kind == "t5" else 1)
    total, count = loss_sum(model, batch, CLASSES)
    assert count == 3
    torch.testing.assert_close(total / count, model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_loss_sum_of_an_encoder_decoder_is_the_mean_loss_of_transformers(tmp_path: Path) -> None:
    backbone = load(tmp_path / "m", "t5", INSTRUCTION)
    batch = collate(pairs((5, 3), (2, 4), (7, 1)), backbone.tokenizer.pad_token_id)
    total, count = loss_sum(backbone.model, batch, INSTRUCTION)
    assert count == 3 + 4 + 1  # the first token of an answer is predicted too, from the decoder's start token
    whole = {**batch, "labels": batch["labels"][:, 1:].contiguous()}
    torch.testing.assert_close(total / count, backbone.model(**whole).loss, rtol=1e-5, atol=1e-6)


def test_micro_batches_accumulate_to_the_whole_batch(tmp_path: Path) -> None:
    model = load(tmp_path / "m", "llama", CAUSAL).model
    rows = texts(5, 9, 2, 6)
    whole, count = loss_sum(model, collate(rows, 1), CAUSAL)
    parts = [loss_sum(model, collate(p, 1), CAUSAL) for p in (rows[:1], rows[1:])]
    torch.testing.assert_close(sum(p[0] for p in parts), whole, rtol=1e-5, atol=1e-5)
    assert sum(p[1] for p in parts) == count


def test_a_batch_without_a_counted_token_sums_to_zero(tmp_path: Path) -> None:
    model = load(tmp_path / "m", "llama", CAUSAL).model
    batch = collate(texts(4), 1)
    total, count = loss_sum(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}, CAUSAL)
    assert (total.item(), count) == (0.0, 0)


def test_evaluate_causal_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    backbone = load(tmp_path / "m", "llama", CAUSAL)
    rows = texts(5, 9, 2, 6, 3)
    one, all_ = (evaluate(backbone.model, backbone.tokenizer, rows, CAUSAL, batch_size=n) for n in (1, 8))
    assert one == pytest.approx(all_, rel=1e-5) and set(one) == {"loss", "perplexity", "tokens"}
    assert one["tokens"] == 4 + 8 + 1 + 5 + 2 and one["perplexity"] == pytest.approx(math.exp(one["loss"]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_exact_match_agrees_with_greedy_decoding_by_hand(tmp_path: Path, kind: str) -> None:
    backbone = load(tmp_path / "m", kind, INSTRUCTION)
    model, words = backbone.model, backbone.tokenizer
    prompts = [token_ids(1, n, seed=n)[0] for n in (3, 7, 4, 9, 5, 2)]
    answers = [words.decode(by_hand(model, p, words.eos_token_id, 6), skip_special_tokens=True).strip() for p in prompts]
    assert len(set(answers)) > 1
    # the right answer with white space around it for the first four, a wrong one for the last two
    texts_ = [f" {a}\n" if i < 4 else a + " lamp" for i, a in enumerate(answers)]
    rows = [prompt_example(p, token_ids(1, 2)[0], a) for p, a in zip(prompts, texts_, strict=True)]
    assert generate_answers(model, words, rows, INSTRUCTION, batch_size=4) == answers
    assert evaluate(model, words, rows, INSTRUCTION, batch_size=4)["exact_match"] == pytest.approx(4 / 6)


def test_exact_match_of_an_encoder_decoder_agrees_with_greedy_decoding_by_hand(tmp_path: Path) -> None:
    backbone = load(tmp_path / "m", "t5", INSTRUCTION)
    model, words = backbone.model, backbone.tokenizer
    rows = []
    for i, row in enumerate(pairs((3, 1), (7, 1), (4, 1), (2, 1))):
        decoded = [2]
        for _ in range(6):
            logits = model(torch.tensor([row.input_ids.tolist()]), decoder_input_ids=torch.tensor([decoded])).logits
            decoded.append(int(logits[0, -1].argmax()))
            if decoded[-1] == words.eos_token_id:
                break
        answer = words.decode(decoded[1:], skip_special_tokens=True).strip() + (" lamp" if i == 3 else "")
        rows.append(replace(row, labels=np.array([-100, *decoded[1:]], np.int32), answer=answer))
    generated = generate_answers(model, words, rows, INSTRUCTION, batch_size=3)
    assert generated == [r.answer for r in rows[:3]] + [rows[3].answer.removesuffix(" lamp")]
    scores = evaluate(model, words, rows, INSTRUCTION, batch_size=3)
    assert scores["exact_match"] == 3 / 4 and scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


def test_decisions_of_one_forward_pass_agree_with_generation(tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=False)
    backbone = load_backbone(hub(checkpoint(tmp_path / "m", config=config)), INSTRUCTION)
    model, words = backbone.model, backbone.tokenizer
    eos = words.eos_token_id
    with torch.no_grad():  # so that the model ends some of its answers
        model.get_parameter("lm_head.weight")[eos] *= 2.5
    rows: list[Example] = []
    for i in range(24):
        prompt = token_ids(1, 2 + i % 5, seed=i)[0]
        answer = by_hand(model, prompt, eos, 6)
        # right answers (some of them cut), answers that are right at first, and wrong answers
        wanted = (answer, answer[:-1], [*answer[:-1], 4], [5, *answer])[i % 4]
        rows.append(prompt_example(prompt, torch.tensor([*wanted, eos]), words.decode(wanted, skip_special_tokens=True)))
    generated = generate_answers(model, words, rows, INSTRUCTION, batch_size=5)
    hits = sum(g == e.answer.strip() for g, e in zip(generated, rows, strict=True))
    assert 0 < hits < 24
    assert evaluate(model, words, rows, INSTRUCTION, batch_size=5)["exact_match"] == hits / 24


def test_only_generation_decides_if_other_tokens_may_spell_the_answer() -> None:
    pieces = {0: "", 1: "ab", 2: "c", 3: "a", 4: "x", 5: "\ufffd"}

    class Words:
        eos_token_id = 0

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(pieces[i] for i in ids)

    wanted = [1, 2, 0]  # "abc", as "ab" + "c"
    for answer, longest, expected in (
        ([1, 2, 0], 6, True),
        ([3, 2, 0], 6, None),  # begins with "a": may still become "abc"
        ([1, 5, 0], 6, None),  # half a character
        ([1, 2, 2], 6, False),  # "abcc"
        ([1, 4, 0], 6, False),  # "abx"
        ([1, 0, 0], 6, False),  # ends at "ab"
        ([1, 2, 0], 2, None),  # generation would be cut
    ):
        assert verdict(answer, wanted, " abc", Words(), longest, 0) is expected, answer


def test_generation_stops_at_any_end_token_and_ignores_the_sampling_defaults_of_a_checkpoint(tmp_path: Path) -> None:
    prompt = token_ids(1, 3)[0]
    free = by_hand(load(tmp_path / "m", "llama", INSTRUCTION).model, prompt, -1, 6)
    assert free[2] not in free[:2]
    defaults = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "eos_token_id": [1, free[2]]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(defaults))
    backbone = load_backbone(hub(tmp_path / "m"), INSTRUCTION)
    rows = [prompt_example(prompt, token_ids(1, 1)[0], "")]
    assert generate_answers(backbone.model, backbone.tokenizer, rows, INSTRUCTION, batch_size=1) == [backbone.tokenizer.decode(free[:3])]


def test_an_instruction_task_without_generation_reports_the_answer_loss(tmp_path: Path) -> None:
    task = TaskConfig(kind="instruction", max_length=32, generate=False)
    backbone = load(tmp_path / "m", "llama", task)
    rows = [prompt_example(token_ids(1, 3)[0], token_ids(1, 2)[0], "on off")]
    assert set(evaluate(backbone.model, backbone.tokenizer, rows, task, batch_size=4)) == {"loss", "perplexity"}


def test_evaluate_classification_by_hand(tmp_path: Path) -> None:
    backbone = load(tmp_path / "m", "llama", CLASSES)
    rows = texts(4, 7, 3, 5)
    guesses = [int(backbone.model(torch.tensor(e.input_ids[None].astype(np.int64))).logits.argmax()) for e in rows]
    right = [Example(e.input_ids, np.array([g], np.int32)) for e, g in zip(rows, guesses, strict=True)]
    wrong = Example(rows[3].input_ids, np.array([(guesses[3] + 1) % 3], np.int32))
    scores = evaluate(backbone.model, backbone.tokenizer, [*right[:3], wrong], CLASSES, batch_size=2)
    assert scores["accuracy"] == 0.75 and set(scores) == {"loss", "accuracy", "macro_f1"}


def test_macro_f1_by_hand() -> None:
    # class 0: 1 hit, 2 labeled, 1 guessed; class 1: 1 hit, 2 labeled, 2 guessed; class 4 is guessed only; the rest never occurs
    assert macro_f1([0, 0, 1, 1], [0, 1, 1, 4]) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
    assert macro_f1([2, 2], [2, 2]) == 1.0


def test_perplexity_of_a_hopeless_model_is_finite() -> None:
    class Hopeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 32)
            with torch.no_grad():
                self.head.weight.zero_()
                self.head.bias.zero_()
                self.head.bias[0] = 5000.0  # never right: tokens are 3 and up

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            return type("Out", (), {"logits": self.head(torch.zeros(*input_ids.shape, 1))})

    words = type("Words", (), {"pad_token_id": 1})
    scores = evaluate(Hopeless(), words, texts(4), CAUSAL, batch_size=1)
    assert scores["loss"] == 5000.0 and math.isfinite(scores["perplexity"])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_training_works_after_an_evaluation(tmp_path: Path, training: bool) -> None:
    backbone = load(tmp_path / "m", "llama", INSTRUCTION)
    live = LiveAdapter(backbone, PeftConfig(rank=2), INSTRUCTION)
    live.model.train(training)
    rows = [prompt_example(token_ids(1, 3)[0], token_ids(1, 2)[0], "on")]
    evaluate(live.model, backbone.tokenizer, rows, INSTRUCTION, batch_size=4)
    assert live.model.training is training
    loss_sum(live.model, collate(rows, 1), INSTRUCTION)[0].backward()
    assert any(p.grad is not None and p.grad.any() for p in live.parameters.values())


def test_an_evaluation_without_rows_is_refused(tmp_path: Path) -> None:
    backbone = load(tmp_path / "m", "llama", CAUSAL)
    with pytest.raises(DataError, match="no examples"):
        evaluate(backbone.model, backbone.tokenizer, [], CAUSAL, batch_size=4)
    blank = Example(np.array([3, 4], np.int32), np.array([-100, -100], np.int32))
    with pytest.raises(DataError, match="none of the 1 examples has a token to score"):
        evaluate(backbone.model, backbone.tokenizer, [blank], CAUSAL, batch_size=4)


def test_primary_metrics() -> None:
    assert task_of(CAUSAL).primary == ("perplexity", False)
    assert task_of(INSTRUCTION).primary == ("exact_match", True)
    assert task_of(TaskConfig(kind="instruction", generate=False)).primary == ("perplexity", False)
    assert task_of(CLASSES).primary == ("accuracy", True)
    assert task_of(TaskConfig(kind="multi_label")).primary == ("micro_f1", True)
    assert task_of(TaskConfig(kind="regression")).primary == ("mae", False)
