"""The error of quantization on real text: two pretrained checkpoints, each number format and each rounding method.

    FEDTUNE_DATA=path/to/data python -m fedtune.simulations.studies.quantize --out docs

Every row is an edge package, written to disk, loaded by the engine and run with its format's own arithmetic. Calibration and held-out text
are different parts of the same text. KL is the mean over held-out tokens of KL(p ‖ q), where p is the float32 model's next-token
distribution and q the row's. KL is never negative; on text unlike the training data, perplexity can by chance be lower than the float32
model's.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedtune.errors import FedtuneError
from fedtune.export.calibrate import Calibration, make_calibration, read_calibration_texts
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.package import StoredLinear
from fedtune.inference.engine.package_writer import PackageWriter
from fedtune.inference.engine.shape import read_shape
from fedtune.inference.quantize.model import QuantizeSettings, quantize_model
from fedtune.inference.quantize.perplexity import of_engine, windows
from fedtune.inference.quantize.rtn import QuantizedLinear
from fedtune.simulations.studies.real import hardware

MODELS = ("stories260k", "babyllama_tok105")
TEXTS = {"wikitext-2": "lm/wikitext-2/valid.txt", "Shakespeare": "fed/tinyshakespeare/input.txt"}
WHOLE = "fp32"
FLOATS = (WHOLE, "bf16")
ROWS: Mapping[str, QuantizeSettings] = {
    "int8, activations too (a8w8), RTN": QuantizeSettings(kind="int8", group=0),
    "int8, activations too, SmoothQuant": QuantizeSettings(kind="int8", group=0, method="smoothquant"),
    "int8, activations too, GPTQ": QuantizeSettings(kind="int8", group=0, method="gptq"),
    "int4 in groups of 32, RTN": QuantizeSettings(),
    "int4 in groups of 32, AWQ": QuantizeSettings(method="awq"),
    "int4 in groups of 32, GPTQ": QuantizeSettings(method="gptq"),
    "int4 in groups of 128, RTN": QuantizeSettings(group=128),
    "int4 in groups of 128, AWQ": QuantizeSettings(group=128, method="awq"),
    "int4 in groups of 128, GPTQ": QuantizeSettings(group=128, method="gptq"),
}
WINDOW, SEQUENCES = 256, 32
COLUMNS = ("weights", "bits per weight", "perplexity", "KL, 1e-3 nats")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement: means of `nats` and `kl` over the held-out tokens, and bits per quantized weight."""

    nats: float
    kl: float
    bits: float


def write_package(folder: Path, model: Path, recipe: QuantizeSettings, text: Sequence[Tensor]) -> float:
    """Quantize a Hugging Face folder to an edge package. Returns the bits per weight of its quantized linears."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    shape, stored = read_shape(config), load_file(model / "model.safetensors")
    tensors = dict(quantize_model(shape, lambda name, first, last: stored[name][first:last], recipe, text))
    quantized = {n.removesuffix(".weight"): q for n, q in tensors.items() if isinstance(q, QuantizedLinear)}
    plain = {n: t for n, t in tensors.items() if isinstance(t, Tensor)} | {"model.embed_tokens.weight": stored["model.embed_tokens.weight"]}
    sizes = {n: (q.tensors["packed"].shape[0], q.columns) for n, q in quantized.items()}
    linears = {n: StoredLinear(kind="int4" if q.kind == "int4" else "int8", group=q.group, shape=sizes[n]) for n, q in quantized.items()}
    writer = PackageWriter(folder, {n: (t.dtype, tuple(t.shape)) for n, t in plain.items()}, linears)
    for name, tensor in plain.items():
        writer.put(name, tensor)
    for name, one in quantized.items():
        writer.put_linear(name, one.tensors)
    writer.close({**config, "tie_word_embeddings": False}, {"task": "causal_lm", "prompt": None, "max_new_tokens": None, "base": "study"})
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears.values())
    return 8 * sum(t.nbytes for q in quantized.values() for t in q.tensors.values()) / weights


def logs(engine: Engine, held: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities [n, V] and the actual tokens [n], in the windows of `perplexity`."""
    model = of_engine(engine)
    for piece, new in windows(held, WINDOW):
        yield model(piece)[-new - 1 : -1].log_softmax(1), piece[-new:]


def measure(engine: Engine, held: Tensor, reference: Sequence[Tensor], bits: float) -> Measurement:
    nats = kl = 0.0
    with torch.inference_mode():
        for (own, wanted), whole in zip(logs(engine, held), reference, strict=True):
            nats -= float(own.gather(1, wanted[:, None]).sum())
            kl += float((whole.exp() * (whole - own)).sum())
    return Measurement(nats=nats / (len(held) - 1), kl=kl / (len(held) - 1), bits=bits)


def cut(model: Path, text: Path, seed: int, tokens: int) -> tuple[Engine, Calibration]:
    engine = load_engine(model, WHOLE)
    texts = read_calibration_texts(text)
    return engine, make_calibration(texts, engine.text.encode, length=WINDOW, count=SEQUENCES, held=tokens, seed=seed)


def study(
    model: Path, text: Path, seeds: Sequence[int], tokens: int, rows: Mapping[str, QuantizeSettings] = ROWS
) -> dict[str, list[Measurement]]:
    """Return row → one measurement per calibration seed; only one if the row needs no calibration."""
    engine, first = cut(model, text, seeds[0], tokens)
    reference = [own for own, _ in logs(engine, first.held)]
    out = {kind: [measure(load_engine(model, kind), first.held, reference, 32 if kind == WHOLE else 16)] for kind in FLOATS}
    for name, recipe in rows.items():
        for seed in seeds[:1] if recipe.method == "rtn" else seeds:
            sequences = cut(model, text, seed, tokens)[1].sequences
            with tempfile.TemporaryDirectory() as folder:
                bits = write_package(Path(folder), model, recipe, sequences)
                found = measure(load_engine(Path(folder), keep=False), first.held, reference, bits)
            out.setdefault(name, []).append(found)
    return out


def table(found: Mapping[str, Sequence[Measurement]]) -> str:
    """A Markdown table: means over the seeds, ± standard deviation if there are several."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, several in found.items():
        perplexities = [float(torch.tensor(f.nats).exp()) for f in several]
        cells = [name, f"{several[0].bits:.2f}", spread(perplexities, 3), spread([1e3 * f.kl for f in several], 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the calibration text (default: 0 1)")
    parser.add_argument("--tokens", type=int, default=8192, help="maximum number of held-out tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for study-quantize.md")
    args = parser.parse_args()
    data = Path(os.environ.get("FEDTUNE_DATA", "data"))
    parts = []
    try:
        for name in MODELS:
            model = data / "models" / name / "hf"
            for text, file in TEXTS.items():
                _, used = cut(model, data / file, args.seeds[0], args.tokens)
                size = f"{len(used.sequences)} sequences of {len(used.sequences[0])} tokens to calibrate, {len(used.held)} tokens held out"
                parts.append(f"## {name} on {text}\n\n{size}.\n\n{table(study(model, data / file, args.seeds, args.tokens))}\n")
                print(parts[-1], flush=True)
    except FedtuneError as bad:
        sys.exit(f"study_quantize: {bad}")
    command = "FEDTUNE_DATA=path/to/data python -m fedtune.simulations.studies.quantize"
    command += f" --seeds {' '.join(map(str, args.seeds))} --tokens {args.tokens} --out docs"
    if args.out:
        about = (__doc__ or "").split("\n\n", 2)[2].strip().replace("\n", " ")
        head = f"# Quantization: perplexity and distance from float32\n\n```\n{command}\n```\n\n{about}\n\n"
        head += f"{hardware()}; one calibration draw a seed. Means over the seeds, ± standard deviation.\n\n"
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "study-quantize.md").write_text(head + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
