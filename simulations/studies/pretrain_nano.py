"""Pretrain the embedded backbone: ``fedtune/models/nano``, a small Llama that needs no download.

    python -m fedtune.simulations.studies.pretrain_nano --seed 0 --steps 2200

Trains on the endless text of ``fedtune.data.demo.pretraining_text``, which has no example of the demo task. The same seed,
steps, machine and thread count give the same weights. With ``--minutes``, the clock ends the run, so the weights differ.
"""

from __future__ import annotations

import argparse
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.data.demo import pretraining_text

CONTEXT = 256  # tokens
TOKENIZER_DOCUMENTS = 6000  # about 2 MB, more than enough to fill the vocabulary
WARM_UP = 0.03  # share of the run
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(documents: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: every string can be encoded and decodes to itself. Encoding adds no special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,  # the clean-up would turn " ." into "." and break the round trip
        model_max_length=CONTEXT,
        padding_side="left",  # as generation needs: the prompt's last token is at the right end
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """A randomly initialized fp32 Llama with grouped-query attention and tied embeddings."""
    pad, bos, eos = (tokenizer.get_vocab()[token] for token in (PAD, BOS, EOS))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,  # the usual 0.02 is for widths in the thousands
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return LlamaForCausalLM(config)


def blocks(tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], batch: int) -> Iterator[torch.Tensor]:
    """Yield concatenated documents, cut into ``(batch, CONTEXT)`` token ids.

    Every other document starts with BOS, so that the backbone works with and without it.
    """
    bos, eos = (tokenizer.get_vocab()[token] for token in (BOS, EOS))
    stream: list[int] = []
    while True:
        for turn, ids in enumerate(tokenizer(list(islice(documents, 512)), add_special_tokens=False)["input_ids"]):
            stream += [bos, *ids, eos] if turn % 2 else [*ids, eos]
        while len(stream) >= batch * CONTEXT:
            yield torch.tensor(stream[: batch * CONTEXT]).view(batch, CONTEXT)
            del stream[: batch * CONTEXT]


def pretrain(
    model: LlamaForCausalLM,
    data: Iterator[torch.Tensor],
    *,
    lr: float,
    steps: int | None,
    minutes: float | None,
    every: int = 50,
) -> list[tuple[int, float, float]]:
    """Train with AdamW, linear warm-up, and cosine decay to 1 % of ``lr``.

    Returns:
        ``(step, mean loss since the previous entry in nats per token, seconds so far)`` every ``every`` steps.
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    model.train()
    log: list[tuple[int, float, float]] = []
    start, step, total = time.perf_counter(), 0, 0.0
    while True:
        seconds = time.perf_counter() - start
        done = step / steps if steps is not None else seconds / (60 * minutes) if minutes else 1.0
        if done >= 1:
            return log
        scale = min(1.0, (done + 1e-3) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        ids = next(data)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, total = step + 1, total + loss.item()
        if step % every == 0:
            log.append((step, total / every, time.perf_counter() - start))
            print(f"step {step:5d}  loss {total / every:.4f}  {log[-1][2]:6.0f} s", flush=True)
            total = 0.0


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, data: Iterator[torch.Tensor], batches: int = 8) -> float:
    """Mean loss on unseen text, in nats per token."""
    model.eval()
    return sum(model(input_ids=ids, labels=ids).loss.item() for ids in islice(data, batches)) / batches


def write_log(
    folder: Path,
    command: str,
    model: LlamaForCausalLM,
    held_out: float,
    log: list[tuple[int, float, float]],
    args: argparse.Namespace,
) -> None:
    """Write ``PRETRAINING.md``: command, settings, machine and training loss."""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name != "PRETRAINING.md")
    steps, _, seconds = log[-1] if log else (0, 0.0, 0.0)
    shape = model.config
    facts = {
        "text": f"`fedtune.data.demo.pretraining_text(seed={args.seed})`: no prompts or actions of the demo task",
        "seed": args.seed,
        "parameters": f"{model.num_parameters():,} (fp32, tied embeddings)",
        "layers": shape.num_hidden_layers,
        "hidden, feed-forward": f"{shape.hidden_size}, {shape.intermediate_size}",
        "heads": f"{shape.num_attention_heads} over {shape.num_key_value_heads} key/value heads",
        "vocabulary, context": f"{shape.vocab_size}, {CONTEXT} tokens",
        "optimizer": f"AdamW, peak lr {args.lr}, warm-up {WARM_UP:.0%}, cosine to 1 %",
        "batch": f"{args.batch} x {CONTEXT} tokens",
        "steps, tokens": f"{steps}, {steps * args.batch * CONTEXT:,}",
        "seconds": f"{seconds:.0f}",
        "loss on unseen text": f"{held_out:.4f} nats a token",
        "size": f"{size / 2**20:.2f} MiB",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python, torch": f"{platform.python_version()}, {torch.__version__}",
        "transformers": transformers.__version__,
    }
    lines = ["# How this checkpoint was made", "", "```", command, "```", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "| step | loss (mean since the line above) | seconds |", "|---|---|---|"]
    lines += [f"| {step} | {loss:.4f} | {clock:.0f} |" for step, loss, clock in log]
    (folder / "PRETRAINING.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Train tokenizer and model, and write the folder."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded backbone (a small Llama) on generated text.")
    parser.add_argument("--out", type=Path, default=Path("fedtune/models/nano"), help="folder to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text and the initial weights (%(default)s)")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--steps", type=int, default=None, help="optimizer steps; reproducible (default: 2200)")
    ends.add_argument("--minutes", type=float, default=None, help="train for this time instead; not reproducible")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 64 (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="vocabulary size, with special tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    args = parser.parse_args(arguments)
    if args.steps is None and args.minutes is None:
        args.steps = 2200

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(islice(pretraining_text(args.seed), TOKENIZER_DOCUMENTS), args.vocabulary)
    model = build_model(tokenizer, args.hidden, args.layers)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    data = blocks(tokenizer, pretraining_text(args.seed), args.batch)
    log = pretrain(model, data, lr=args.lr, steps=args.steps, minutes=args.minutes)
    held_out = held_out_loss(model, data)  # the stream is endless, so the next text is unseen

    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)  # written as 0600, and a wheel would keep that mode for other users
    tokenizer.save_pretrained(args.out)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "fedtune.simulations.studies.pretrain_nano", *given])
    write_log(args.out, command, model, held_out, log, args)
    print(f"loss on unseen text {held_out:.4f}; wrote {args.out}")


if __name__ == "__main__":
    main()
