"""The process of one backend: loads a model, then executes the orders on stdin, one line of JSON each.

It runs by path in the interpreter that has the backend (`python worker.py BACKEND MODEL ...`), so it imports fedtune only if that is the
backend. Answers are lines of JSON on stdout: `{"seconds": ...}`, `{"peak_mb": ...}` or `{"error": ...}`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Backend(Protocol):
    """A model and one sequence."""

    def prefill(self, ids: list[int]) -> int:
        """Start a new sequence with these tokens. Returns the greedy next token."""
        ...

    def step(self, token: int) -> int:
        """Append a token. Returns the greedy next token."""
        ...

    def verify(self, ids: list[int]) -> None:
        """Compute the logits of these tokens after the sequence, then remove them from the cache."""
        ...


class Fedtune:
    """fedtune's engine."""

    def __init__(self, model: Path, kind: str, threads: int, context: int) -> None:
        from fedtune.inference.engine.caches.base import Span
        from fedtune.inference.engine.load import load_engine
        from fedtune.inference.engine.threads import set_threads

        set_threads(threads)
        self.span = Span
        self.engine, self.context = load_engine(model, None if kind == "package" else kind), context

    def prefill(self, ids: list[int]) -> int:
        self.cache = self.engine.cache(limit=self.context)
        return self._run(ids)

    def step(self, token: int) -> int:
        return self._run([token])

    def verify(self, ids: list[int]) -> None:
        length = self.cache.length
        self.engine.decoder.forward(ids, [self.span(self.cache, len(ids), None)])
        self.cache.crop(length)

    def _run(self, ids: list[int]) -> int:
        return int(self.engine.decoder.forward(ids, [self.span(self.cache, len(ids))]).argmax())


class Transformers:
    """Hugging Face transformers: bf16, or bitsandbytes NF4."""

    def __init__(self, model: Path, kind: str, threads: int, context: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.new = torch, DynamicCache
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        extra: dict[str, Any] = {"quantization_config": nf4, "device_map": {"": "cpu"}} if kind == "nf4" else {}
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **extra).eval()

    def prefill(self, ids: list[int]) -> int:
        self.cache = self.new(config=self.model.config)
        return self._run(ids)

    def step(self, token: int) -> int:
        return self._run([token])

    def verify(self, ids: list[int]) -> None:
        self.model(input_ids=self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True)
        self.cache.crop(-len(ids))

    def _run(self, ids: list[int]) -> int:
        out = self.model(input_ids=self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())


class LlamaCpp:
    """llama.cpp through its Python bindings; the model is read into huge pages, not mapped."""

    def __init__(self, model: Path, kind: str, threads: int, context: int) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports] - in the interpreter of --peers
        import numpy

        self.api, self.numpy, self.length = llama_cpp, numpy, 0
        self.model = llama_cpp.Llama(
            str(model), n_ctx=context, n_batch=context, n_ubatch=context, n_threads=threads, n_threads_batch=threads, use_mmap=False,
            verbose=False, flash_attn=kind == "flash",
        )  # fmt: skip
        self.ctx = self.model._ctx.ctx
        self.words = self.model.n_vocab()

    def prefill(self, ids: list[int]) -> int:
        self._forget(0)
        return self._run(ids)

    def step(self, token: int) -> int:
        return self._run([token])

    def verify(self, ids: list[int]) -> None:
        length = self.length
        self._decode(ids, whole=True)
        self._forget(length)

    def _forget(self, length: int) -> None:
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.ctx), 0, length, -1)
        self.length = length

    def _run(self, ids: list[int]) -> int:
        self._decode(ids, whole=False)
        logits = self.api.llama_get_logits_ith(self.ctx, -1)
        return int(self.numpy.ctypeslib.as_array(logits, shape=(self.words,)).argmax())

    def _decode(self, ids: list[int], whole: bool) -> None:
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self.length + i, 1, 0
            batch.logits[i] = whole or i == len(ids) - 1
        code = self.api.llama_decode(self.ctx, batch)
        self.api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        self.length += len(ids)


class OpenVino:
    """OpenVINO: optimum-intel's stateful model, with logits of the last token only, as in OpenVINO GenAI."""

    def __init__(self, model: Path, kind: str, threads: int, context: int) -> None:
        import numpy
        import openvino  # pyright: ignore[reportMissingImports]

        self.ov, self.numpy, self.threads, self.folder = openvino, numpy, threads, model
        self.whole: Any = None
        self.one = self._compile(last=True)

    def prefill(self, ids: list[int]) -> int:
        self.ids = list(ids)
        self.one.reset_state()
        return self._infer(self.one, ids, 0)

    def step(self, token: int) -> int:
        self.ids.append(token)
        return self._infer(self.one, [token], len(self.ids) - 1)

    def verify(self, ids: list[int]) -> None:
        """The state cannot be cropped here, so each pass extends the context; the caller's next prefill resets it."""
        if self.whole is None:
            self.whole = self._compile(last=False)
        if not getattr(self, "held", None):
            self.whole.reset_state()
            self._infer(self.whole, self.ids, 0)
            self.held = len(self.ids)
        self._infer(self.whole, ids, self.held)
        self.held += len(ids)

    def _infer(self, request: Any, ids: list[int], past: int) -> int:
        n = len(ids)
        inputs = {
            "input_ids": self.numpy.array([ids]),
            "attention_mask": self.numpy.ones((1, past + n), dtype=self.numpy.int64),
            "position_ids": self.numpy.arange(past, past + n)[None],
            "beam_idx": self.numpy.zeros(1, dtype=self.numpy.int32),
        }
        known = {name for port in request.model_inputs for name in port.names}
        return int(request.infer({k: v for k, v in inputs.items() if k in known})["logits"][0, -1].argmax())

    def _compile(self, last: bool) -> Any:
        core = self.ov.Core()
        model = core.read_model(self.folder / "openvino_model.xml")
        if last:
            head = next(o for o in model.outputs if "logits" in o.names).get_node().input_value(0).get_node()
            while head.get_type_name() != "MatMul":  # a conversion may follow the head
                head = head.input_value(0).get_node()
            ops = self.ov.opset13
            cut = ops.slice(head.input_value(0), [-1], [2**31 - 1], [1], [1])
            head.input(0).replace_source_output(cut.output(0))
            model.validate_nodes_and_infer_types()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads}
        return core.compile_model(model, "CPU", settings).create_infer_request()


BACKENDS: dict[str, Callable[[Path, str, int, int], Backend]] = {
    "fedtune": Fedtune,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}


def peak_mb() -> float:
    """High-water mark of this process's resident memory, in MB of 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def resident_mb() -> float:
    """Resident memory now, in MB of 10^6 bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def serve(backend: Backend, orders: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """Execute each order and send its answer."""
    for line in orders:
        order = json.loads(line)
        start = time.perf_counter()
        if order["do"] == "prefill":
            token = backend.prefill(order["ids"])
            answer({"seconds": time.perf_counter() - start, "token": token})
        elif order["do"] == "decode":
            tokens = [order["token"]]
            for _ in range(order["n"]):
                tokens.append(backend.step(tokens[-1]))
            answer({"seconds": time.perf_counter() - start, "tokens": tokens[1:]})
        elif order["do"] == "verify":
            backend.verify(order["ids"])
            answer({"seconds": time.perf_counter() - start})
        elif order["do"] == "memory":
            answer({"peak_mb": peak_mb(), "resident_mb": resident_mb()})
        else:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=list(BACKENDS))
    parser.add_argument("model", type=Path)
    parser.add_argument("--kind", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512, help="cache size in tokens")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print on stdout goes to stderr; only answers go to stdout

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=out, flush=True)

    start = time.perf_counter()
    try:
        backend = BACKENDS[args.backend](args.model, args.kind, args.threads, args.context)
        answer({"load_s": time.perf_counter() - start})
        serve(backend, sys.stdin, answer)
    except Exception as error:  # any error of a library becomes a row of the table
        answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


if __name__ == "__main__":
    main()
