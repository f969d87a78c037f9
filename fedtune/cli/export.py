"""`fedtune export`: write a run's merged model for other programs or for fedtune's engine."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fedtune.cli._shared import TRUST
from fedtune.errors import ConfigError

FOR = {  # flag → the formats that have it
    "requantize": ("hf",),
    "trust_remote_code": ("hf", "vllm"),
    "quantize": ("edge",),
    "method": ("edge",),
    "head": ("edge",),
    "calibrate": ("edge", "gptq", "awq"),
    "separate": ("edge", "vllm"),
    "gguf_type": ("gguf", "ollama"),
}


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Merge a run's adapter into its backbone and write the model for other programs or for fedtune's engine."
    export = commands.add_parser("export", help="write a run's merged model, or a model for a device", description=about)
    export.add_argument(
        "source",
        type=Path,
        metavar="RUN|RUN/clients/ID|ADAPTER|MODEL",
        help="run directory, a client's folder in it (its personal model), PEFT adapter folder, or complete model",
    )
    export.add_argument("--client", metavar="ID", help="export this client's personal model, as for RUN/clients/ID")
    export.add_argument(
        "--to",
        choices=["hf", "edge", "gguf", "ollama", "vllm", "gptq", "awq"],
        default="hf",
        help="format: hf, a Hugging Face folder; edge, a package for fedtune's engine; gguf, a file for llama.cpp; ollama, such a file with"
        " a Modelfile; vllm, a Hugging Face folder for vLLM; gptq, awq, such a folder in 4 bits (default: %(default)s)",
    )
    export.add_argument(
        "--out", type=Path, metavar="PATH", help="folder or file to write (default: in the source folder, named after the format)"
    )
    export.add_argument(
        "--requantize", action="store_true", help="hf: quantize the merged model like the run's backbone, and report the error"
    )
    export.add_argument("--trust-remote-code", action="store_true", help=f"hf, vllm: {TRUST}")
    export.add_argument("--quantize", choices=["int8", "int4"], help="edge: weight format (default: as in the checkpoint)")
    export.add_argument("--head", choices=["int8", "int4"], help="edge: format of a quantized model's output head (default: int8)")
    export.add_argument("--method", choices=["rtn", "gptq", "awq", "smoothquant"], help="edge: quantization method (default: rtn)")
    export.add_argument(
        "--calibrate", type=Path, metavar="DATA", help="edge, gptq, awq: text for the quantization and perplexity: a RUN, .txt or .jsonl"
    )
    export.add_argument("--separate", action="store_true", help="edge, vllm: keep the LoRA adapter unmerged, selectable per request")
    export.add_argument("--gguf-type", metavar="TYPE", help="gguf, ollama: weight format f16, q8_0 or q4_0 (default: f16)")
    export.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str:
    if odd := [name for name, to in FOR.items() if getattr(args, name) and args.to not in to]:
        raise ConfigError(f"--{odd[0].replace('_', '-')} is for --to {' or '.join(FOR[odd[0]])}, not for --to {args.to}: leave it out")
    if args.method and not args.quantize:
        raise ConfigError(f"--method {args.method} needs --quantize int8 or int4")
    if args.head and not args.quantize:
        raise ConfigError(f"--head {args.head} needs --quantize int8 or int4")
    if args.method in ("gptq", "awq", "smoothquant") and not args.calibrate:
        raise ConfigError(f"--method {args.method} needs text: give --calibrate RUN, a .txt file or rows of JSON")
    if args.client is not None:
        from fedtune.export.personal import client_folder

        args.source = client_folder(args.source, args.client)
    if args.to == "gguf":
        from fedtune.export.gguf import describe_gguf, export_gguf

        kind = args.gguf_type or "f16"
        out = args.out or args.source / f"model-{kind}.gguf"
        export_gguf(args.source, out, kind=kind)
        note = describe_gguf(out)
    elif args.to == "ollama":
        from fedtune.export.ollama import describe_ollama, export_ollama

        out = args.out or args.source / "ollama"
        export_ollama(args.source, out, kind=args.gguf_type or "f16")
        note = describe_ollama(out)
    elif args.to in ("gptq", "awq"):
        from fedtune.export.edge import describe_package
        from fedtune.export.int4_checkpoint import export_int4_checkpoint

        out = args.out or args.source / args.to
        export_int4_checkpoint(args.source, out, to=args.to, calibrate=args.calibrate)
        note = describe_package(out)
    elif args.to == "edge":
        from fedtune.export.edge import describe_package, export_edge

        out = args.out or args.source / (f"edge-{args.quantize}" if args.quantize else "edge")
        how = {"quantize": args.quantize, "method": args.method, "head": args.head}
        export_edge(args.source, out, calibrate=args.calibrate, separate=args.separate, **how)
        note = describe_package(out)
    elif args.to == "vllm":
        from fedtune.export.vllm import describe_vllm, export_vllm

        out = args.out or args.source / ("vllm-lora" if args.separate else "vllm")
        export_vllm(args.source, out, separate=args.separate, trust_remote_code=args.trust_remote_code)
        note = describe_vllm(out)
    else:
        from fedtune.export.huggingface import describe_folder, export_hf

        out = args.out or args.source / ("requantized" if args.requantize else "merged")
        export_hf(args.source, out, requantize=args.requantize, trust_remote_code=args.trust_remote_code)
        note = describe_folder(out)
    if note:
        print(f"fedtune: {note}", file=sys.stderr)
    return str(out)
