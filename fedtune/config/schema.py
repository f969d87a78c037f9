"""The typed schema of an experiment. Every field has its help text and its range."""

import dataclasses
import re
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fedtune.config.keywords import keyword_keys
from fedtune.config.method_files import METHODS
from fedtune.config.registry import TASKS


def opt(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Collection[str] = (),
) -> Any:
    """A config field with its help text and its valid values."""
    rules = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=rules)
    return field(default=default, metadata=rules)


def template_text(template: str) -> str:
    r"""Replace `\n`, `\t` and `\\`, which a shell passes as two characters, by a line break, a tab and a backslash."""
    marks = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: marks[found[1]], template)


@dataclass(kw_only=True)
class ModelConfig:
    source: str = opt("nano", "nano: the embedded backbone; hub: a hub name or a local folder", choices=("nano", "hub"))
    name: str = opt("", "hub name or local folder (source=hub)")
    revision: str | None = opt(None, "hub revision")
    init: str = opt(
        "pretrained", "pretrained, or random weights of the same architecture drawn from the run's seed", choices=("pretrained", "random")
    )
    precision: str = opt(
        "fp32",
        "precision of the frozen backbone; nf4 (4 bits) and int8 quantize its linear layers with bitsandbytes",
        choices=("fp32", "bf16", "nf4", "int8"),
    )
    compute: str = opt(
        "auto", "precision=nf4 or int8: dtype of products and unquantized weights; auto: bf16 if the machine supports it natively",
        choices=("auto", "bf16", "fp32"),
    )  # fmt: skip
    checkpointing: bool = opt(False, "recompute activations in the backward pass instead of storing them: less memory, slower steps")
    dropout: bool = opt(False, "keep the frozen backbone's own dropout in training; false: only the adapter's dropout (peft.dropout)")
    device: str = opt("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    trust_remote_code: bool = opt(False, "run the Python code of a hub repository; leave it false unless you trust that code")


@dataclass(kw_only=True)
class DataConfig:
    source: str = opt("demo", "demo: the built-in smart-home data; hub: a hub data set; local: files", choices=("demo", "hub", "local"))
    homes: int = opt(24, "number of homes (source=demo)", ge=1)
    name: str = opt("", "hub data set (source=hub)")
    subset: str | None = opt(None, "hub configuration name")
    split: str = opt("train", "hub split to federate")
    test_split: str | None = opt(None, "hub split for the global test; none: test_fraction of the training rows")
    path: str = opt("", "file, folder or glob (source=local)")
    test_path: str | None = opt(None, "file, folder or glob of the global test")
    format: str = opt(
        "auto", "file format; auto: by the file name (.gz works too)", choices=("auto", "jsonl", "json", "csv", "tsv", "parquet", "text")
    )
    encoding: str = opt(
        "auto", "text encoding of the files, such as latin-1; auto: by byte order mark, else UTF-8, else (csv, tsv) Windows-1252"
    )
    record_pattern: str | None = opt(None, "regular expression that splits a text file into records; its named groups become columns")
    client_from_file: bool = opt(False, "each file is a client, named after the file")
    columns: dict[str, str] = opt(
        {}, "fedtune's column → the data's column; fedtune's: the task's, such as text, label or prompt, and client, device_class"
    )
    prompt: str | None = opt(None, "prompt template over the file's columns, such as 'Q: {question}\\nA:'")
    answer: str | None = opt(None, "answer template over the file's columns, such as ' {answer}'")
    test_fraction: float = opt(0.1, "share of rows for the global test if no test file or split is given", ge=0, le=0.9)
    test_limit: int | None = opt(None, "use at most this many global test rows (a seeded sample)", ge=1)
    held_out: float = opt(0.2, "share of each client's rows held out to evaluate that client", ge=0, le=0.9)
    limit: int | None = opt(None, "use at most this many training rows (a seeded sample)", ge=1)
    labels: list[str] = opt([], "class names in the order of their ids, for tasks with classes whose local rows do not contain all of them")
    client: str | None = opt(None, "the only client whose rows this machine has (fedtune-client sets it); none: all clients")


@dataclass(kw_only=True)
class PartitionConfig:
    kind: str = opt(
        "natural", "how rows are assigned to clients; one: all rows belong to data.client",
        choices=("natural", "iid", "dirichlet", "pathological", "size", "prior", "one"),
    )  # fmt: skip
    clients: int = opt(10, "number of clients (natural: from the data)", ge=1)
    alpha: float = opt(0.5, "Dirichlet concentration (dirichlet, prior) or skew (size)", gt=0)
    classes_per_client: int = opt(2, "classes a client holds (pathological)", ge=1)
    min_examples: int = opt(1, "natural: leave out clients with fewer rows", ge=1)


@dataclass(kw_only=True)
class TaskConfig:
    kind: str = opt("instruction", "learning task, with its loss and metrics", choices=TASKS)
    max_length: int = opt(128, "tokens per example; longer examples are truncated", ge=2)
    max_new_tokens: int = opt(24, "instruction, chat: longest generated answer, in tokens", ge=1)
    generate: bool = opt(True, "instruction, chat: generate answers and score exact match; false: report only the answer loss")
    overlap: bool = opt(False, "instruction, chat: score token F1 and ROUGE-L too; every answer that is not exact is generated in full")
    packing: bool = opt(False, "tasks with token targets: train on short rows joined to rows of up to max_length; no row sees another")
    loss: str = opt("dpo", "preference: dpo compares with the model before the run, orpo needs no reference", choices=("dpo", "orpo"))
    beta: float = opt(0.1, "preference: dpo: β of the reward β·(log π − log π_ref); orpo: λ, the weight of the odds ratio", gt=0)
    outputs: int = opt(1, "regression: numbers that the model predicts for each text", ge=1)
    date: str = opt("2026-01-01", "chat: the date that chat templates print, YYYY-MM-DD; not today's, so that a run repeats")
    stride_texts: bool = opt(True, "causal_lm: concatenate a client's texts and split them into blocks of max_length")


@keyword_keys
@dataclass(kw_only=True)
class PeftConfig:
    method: str = opt("lora", "parameter-efficient method", choices=METHODS)
    from_: str | None = opt(None, "warm start: an earlier run's directory, or an adapter folder; none: a new adapter")
    rank: int = opt(8, "LoRA family: rank r", ge=1)
    rank_pattern: dict[str, int] = opt({}, "LoRA family: module name (or its last parts) → rank of that module")
    alpha: float = opt(16.0, "LoRA family: the update is scaled by alpha / rank (rslora: alpha / √rank)", gt=0)
    dropout: float = opt(0.0, "LoRA family: dropout on the adapter's input", ge=0, le=0.9)
    init: str = opt(
        "default", "lora, rslora: initialization of A and B: default is B = 0; loftq compensates the error of model.precision=nf4 or int8",
        choices=("default", "loftq"),
    )  # fmt: skip
    targets: Any = opt("all-linear", "LoRA family, ravan, fedsb and ia3: module names to adapt: all-linear, one name, or a list")
    target_parameters: list[str] = opt(
        [], "lora, rslora: stacked weights of experts to adapt too, by name or its last parts, such as experts.down_proj"
    )
    heads: int = opt(4, "ravan: heads of each layer, with a trained core each", ge=1)
    core: int = opt(32, "ravan, fedsb: rows of a trained core; a smaller layer has cores of its own size", ge=1)
    bottleneck: int = opt(16, "adapter: width of the bottleneck", ge=1)
    placement: str = opt(
        "pfeiffer", "adapter: after the feed-forward block (pfeiffer), or after attention too (houlsby)", choices=("pfeiffer", "houlsby")
    )
    tokens: int = opt(20, "prefix, prompt, ptuning_v2: virtual tokens", ge=1)
    lr_ratio: float = opt(1.0, "learning rate suited to the method, as a multiple of client.lora_lr", gt=0)


@dataclass(kw_only=True)
class ClientConfig:
    steps: int | None = opt(None, "optimizer steps per round; none: use epochs", ge=1)
    epochs: float | None = opt(1.0, "passes over the client's rows per round", gt=0)
    batch_size: int = opt(16, "examples per micro-batch", ge=1)
    accumulate: int = opt(1, "micro-batches per optimizer step", ge=1)
    optimizer: str = opt("adamw", "local optimizer, with fresh state each round (except in strategy=diloco)", choices=("adamw", "sgd"))
    lora_lr: float = opt(1e-3, "peak learning rate suited to LoRA on this backbone and task", gt=0)
    lr: float = opt(1e-3, "peak learning rate; if not set, client.lora_lr times peft.lr_ratio", gt=0)
    lr_end: float = opt(0.1, "final learning rate as a share of the peak", ge=0, le=1)
    schedule: str = opt("cosine", "learning rate schedule over the rounds", choices=("constant", "linear", "cosine"))
    warmup_rounds: float = opt(0.0, "rounds over which the learning rate rises from 0", ge=0)
    weight_decay: float = opt(0.0, "decoupled weight decay", ge=0)
    clip_norm: float | None = opt(1.0, "largest gradient norm; none: no clipping", gt=0)
    prox: float = opt(0.0, "FedProx μ: adds μ/2·‖w − w_t‖² to the loss", ge=0)
    lean: str = opt(
        "auto", "LoRA on decoders and encoders: auto: fedtune's own training step, which needs less memory and time; none: PEFT's modules",
        choices=("auto", "none"),
    )  # fmt: skip


@dataclass(kw_only=True)
class DeviceClass:
    share: float = opt(1.0, "share of clients in this class if the data does not assign classes", ge=0)
    max_examples: int | None = opt(None, "most training rows that the device stores", ge=1)
    offline: float = opt(0.0, "probability that the device is offline in a round", ge=0, le=1)
    memory_mb: float | None = opt(None, "MB (10⁶ bytes) available for training, weights included; none is unlimited", gt=0)
    cores: int = opt(1, "CPU cores that train", ge=1)
    gflops_per_core: float = opt(0.0, "sustained training throughput of a core in 10⁹ operations per second; 0: no simulated time", ge=0)
    accelerator: str = opt("none", "accelerator that computes instead of the CPU cores", choices=("none", "cuda"))
    accelerator_gflops: float = opt(
        0.0, "sustained training throughput of the accelerator in 10⁹ operations per second; 0: no simulated time", ge=0
    )
    duty: float = opt(1.0, "share of the time that the device may compute (battery, heat)", gt=0, le=1)
    mbit_per_second: float = opt(0.0, "bandwidth in each direction; 0 is unlimited", ge=0)
    jitter: float = opt(0.0, "sigma of the log-normal spread of its time from round to round", ge=0)
    precision: str | None = opt(
        None,
        "precision of its frozen backbone; none: the highest that fits, from model.precision down",
        choices=("fp32", "bf16", "int8", "nf4"),
    )
    rank: int | None = opt(None, "largest LoRA rank, at most peft.rank; none: as memory and bandwidth allow", ge=1)


@dataclass(kw_only=True)
class DevicesConfig:
    classes: dict[str, DeviceClass] = opt({}, "device class → its capabilities; empty: all clients are alike and always online")
    deadline_s: float | None = opt(None, "simulated seconds after which a reply is late; none: no deadline", gt=0)


@dataclass(kw_only=True)
class PrivacyConfig:
    kind: str = opt(
        "none", "unit of differential privacy: none, a single row (record), or a whole client (user)", choices=("none", "record", "user")
    )
    epsilon: float | None = opt(
        8.0, "ε budget of each client over the run; a client that has spent it no longer takes part; none is unlimited", gt=0
    )
    delta: float = opt(1e-5, "δ of (ε, δ)-differential privacy: well below 1 / rows (record) or 1 / clients (user)", gt=0, lt=1)
    noise: float | None = opt(None, "standard deviation of the noise as a multiple of clip; none: computed from epsilon", gt=0)
    clip: float = opt(1.0, "largest norm of one row's gradient (record) or of one client's update (user), over all tensors together", gt=0)
    turns: int | None = opt(
        None, "turns of a client that epsilon must cover; none: the number of rounds, the most a client can take part in", ge=1
    )
    accountant: str = opt("prv", "privacy accountant: prv is tighter, rdp is faster", choices=("prv", "rdp"))
    where: str = opt(
        "server",
        "user: who clips and adds noise; server: it sees every update; client: it needs far more noise",
        choices=("server", "client"),
    )
    adaptive: bool = opt(False, "user: adapt the clip norm to the updates' norms, starting from clip (needs where=server)")
    clip_quantile: float = opt(0.5, "user, adaptive: target quantile of the updates' norms for the clip norm", ge=0, le=1)
    clip_rate: float = opt(0.2, "user, adaptive: learning rate of the clip norm's logarithm", gt=0)
    bit_noise: float = opt(0.05, "user, adaptive: noise on the count of unclipped updates, as a share of the cohort", gt=0)
    secure_rng: bool = opt(
        False, "draw noise and samples from the operating system; false: from the run's seed, so anyone who knows it can subtract the noise"
    )


@dataclass(kw_only=True)
class EngineConfig:
    kind: str = opt(
        "inprocess",
        "inprocess: one process with one shared backbone; ray: one process per worker, on one or more machines",
        choices=("inprocess", "ray"),
    )
    threads: int = opt(0, "torch threads; 0: all cores", ge=0)
    batched: str = opt("auto", "clients trained together in a process: auto measures what is fastest, none: one at a time, or a number")
    ray_cpus: int = opt(1, "ray: CPUs (and torch threads) per worker", ge=1)
    ray_gpus: float = opt(0.0, "ray: GPUs per worker; 0.5: two workers share one GPU", ge=0)
    ray_address: str = opt("", "ray: HOST:PORT of a cluster that this machine has joined (auto: find it); empty: start Ray on this machine")
    cache_layers: float = opt(
        0.0, "GB of temporary disk to cache activations below the lowest adapter (see peft.targets); 0: no cache", ge=0
    )


@dataclass(kw_only=True)
class EvalConfig:
    where: str = opt("server", "global test: on the server, in the process that started the run; or none", choices=("server", "none"))
    clients: int = opt(-1, "clients that evaluate their held-out rows in each evaluation; -1: all, 0: none", ge=-1)
    every: int = opt(1, "rounds between evaluations (the first and last round are always evaluated)", ge=1)
    batch_size: int = opt(64, "examples per evaluation batch", ge=1)


@dataclass(kw_only=True)
class WeightsConfig:
    max_examples: int = opt(100_000, "most rows that a client may report; a client that reports more is rejected", ge=1)
    max_share: float | None = opt(
        None,
        "largest share of a round's weight for one client (at least an equal share); none: on a network three equal shares and at most 0.5,"
        " in a simulation, where row counts are known, no limit",
        gt=0,
        le=1,
    )


@dataclass(kw_only=True)
class TrafficConfig:
    up: str = opt(
        "fp32",
        "number format of updates, sent as the difference from the broadcast",
        choices=("fp32", "fp16", "bf16", "int8", "nf4"),
    )
    down: str = opt(
        "fp32",
        "number format of broadcasts, sent as the difference from the run's first adapter if that is smaller",
        choices=("fp32", "fp16", "bf16", "int8", "nf4"),
    )
    topk: float | None = opt(None, "share of an update's entries to send, the largest ones; none: all", gt=0, le=1)
    error_feedback: bool = opt(False, "clients add the compression error of an update to their next one")
    stochastic: bool = opt(False, "stochastic rounding, so that the mean over many clients or rounds is unbiased")
    max_mb_per_round: float | None = opt(
        None, "MB (10⁶ bytes) that a client may receive and send in a round; a client whose turn needs more is dropped", gt=0
    )


@dataclass(kw_only=True)
class DeliverConfig:
    at_end: bool = opt(True, "fedtune-server: deliver the model to the connected devices when the run ends")
    every: int = opt(0, "fedtune-server: rounds between deliveries during the run; 0: none", ge=0)
    timeout_s: float = opt(600.0, "seconds that the server waits for the devices to download and install a model", gt=0)


@dataclass(kw_only=True)
class InferenceConfig:
    export: str = opt(
        "none", "merged model to write when the run ends: none, or hf (a Hugging Face folder, RUN/merged)", choices=("none", "hf")
    )
    samples: int = opt(3, "instruction: test requests whose answers before and after the run are shown", ge=0)


@dataclass(kw_only=True)
class Config:
    name: str = opt("run", "name of the experiment; its folder under output_dir")
    seed: int = opt(0, "seed of all random choices", ge=0)
    rounds: int = opt(10, "federated rounds", ge=0)
    clients_per_round: int = opt(10, "clients sampled per round", ge=1)
    min_clients: int = opt(1, "good updates that a round needs to count", ge=1)
    round_timeout_s: float | None = opt(
        None, "real seconds after which a round ends without the clients that have not answered; none: no limit", gt=0
    )
    late: str = opt(
        "drop",
        "late updates: drop them, or use them in a later round, scaled by 1/√(1 + staleness in rounds)",
        choices=("drop", "use"),
    )
    max_staleness: int = opt(3, "late=use: largest staleness, in rounds, of an update that still counts", ge=1)
    resume: str | None = opt(None, "run directory to continue")
    output_dir: str = opt("outputs", "folder for run directories")
    keep_checkpoints: int = opt(3, "number of newest checkpoints to keep", ge=1)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    strategy: Any = opt({"_target_": "fedtune.strategies.fedavg.FedAvg"}, "aggregation strategy: _target_ and its arguments")
    client: ClientConfig = field(default_factory=ClientConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    deliver: DeliverConfig = field(default_factory=DeliverConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def reference() -> list[tuple[str, str, str]]:
    """Every key with its default and help text: `("client.lr", "0.001", "peak learning rate …")`."""

    def walk(node: Any, prefix: str) -> typing.Iterator[tuple[str, str, str]]:
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")
            else:
                choices = f.metadata["choices"]
                text = f.metadata["help"] + (f" [{' | '.join(choices)}]" if choices else "")
                yield prefix + f.name, "none" if value is None else str(value), text

    return list(walk(Config(), ""))
