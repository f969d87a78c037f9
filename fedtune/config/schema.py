"""The typed schema of an experiment. Every field carries its help text and its bounds."""

import dataclasses
import re
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

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
    """A config field with its help text and the values that it accepts."""
    rules = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=rules)
    return field(default=default, metadata=rules)


def template_text(template: str) -> str:
    r"""The template with `\n`, `\t` and `\\`, which a shell passes as two characters, as a line break, a tab and a backslash."""
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
        "fp32", "of the frozen backbone; nf4 (4 bits) and int8: its linear layers, by bitsandbytes", choices=("fp32", "bf16", "nf4", "int8")
    )
    compute: str = opt(
        "auto", "precision=nf4 or int8: dtype of the products and of what is not quantized; auto: bf16 where the machine multiplies in it",
        choices=("auto", "bf16", "fp32"),
    )  # fmt: skip
    checkpointing: bool = opt(False, "compute activations again in the backward pass instead of keeping them: less memory, slower steps")
    dropout: bool = opt(False, "keep the frozen backbone's own dropout in training; off, only the adapter's (peft.dropout) is drawn")
    device: str = opt("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    trust_remote_code: bool = opt(False, "run code that a hub repository brings along; leave it off")


@dataclass(kw_only=True)
class DataConfig:
    source: str = opt("demo", "demo: the built-in homes; hub: a hub data set; local: files", choices=("demo", "hub", "local"))
    homes: int = opt(24, "homes of the demo (source=demo)", ge=1)
    name: str = opt("", "hub data set (source=hub)")
    subset: str | None = opt(None, "hub configuration name")
    split: str = opt("train", "hub split to federate")
    test_split: str | None = opt(None, "hub split for the global test; none takes test_fraction of the training rows")
    path: str = opt("", "file, folder or glob (source=local)")
    test_path: str | None = opt(None, "file, folder or glob of the global test")
    format: str = opt(
        "auto", "file format; auto goes by the file name (.gz is fine)", choices=("auto", "jsonl", "json", "csv", "tsv", "parquet", "text")
    )
    encoding: str = opt(
        "auto", "text encoding of the files, such as latin-1; auto: what a byte order mark says, else UTF-8, else (csv, tsv) Windows-1252"
    )
    record_pattern: str | None = opt(None, "regular expression that splits a text file into records; its named groups become columns")
    client_from_file: bool = opt(False, "each file is a client, named after the file")
    columns: dict[str, str] = opt({}, "ours → theirs: text, label, prompt, answer, client, device_class")
    prompt: str | None = opt(None, "prompt template over the file's columns, such as 'Q: {question}\\nA:'")
    answer: str | None = opt(None, "answer template over the file's columns, such as ' {answer}'")
    test_fraction: float = opt(0.1, "share of rows kept as the global test where no test file or split is named", ge=0, le=0.9)
    test_limit: int | None = opt(None, "use at most this many global test rows (a seeded sample)", ge=1)
    held_out: float = opt(0.2, "share of each client's rows kept to evaluate that client", ge=0, le=0.9)
    limit: int | None = opt(None, "use at most this many training rows (a seeded sample)", ge=1)
    labels: list[str] = opt([], "classification: class names in the order of their ids, where the rows at hand do not tell them all")
    client: str | None = opt(None, "the one client whose rows this machine holds (fedtune-client sets it); none: all")


@dataclass(kw_only=True)
class PartitionConfig:
    kind: str = opt(
        "natural", "how rows are dealt to clients; one: all are data.client's",
        choices=("natural", "iid", "dirichlet", "pathological", "size", "prior", "one"),
    )  # fmt: skip
    clients: int = opt(10, "number of clients (natural: taken from the data)", ge=1)
    alpha: float = opt(0.5, "Dirichlet concentration (dirichlet, prior) or skew (size)", gt=0)
    classes_per_client: int = opt(2, "classes a client holds (pathological)", ge=1)
    min_examples: int = opt(1, "natural: leave out clients with fewer rows", ge=1)


@dataclass(kw_only=True)
class TaskConfig:
    kind: str = opt("instruction", "what is learned and how it is scored", choices=TASKS)
    max_length: int = opt(128, "tokens of an example; longer ones are cut", ge=2)
    max_new_tokens: int = opt(24, "instruction: longest generated answer, in tokens", ge=1)
    generate: bool = opt(True, "instruction: score exact match by generation; false reports answer loss only")
    stride_texts: bool = opt(True, "causal_lm: join a client's texts and cut them into blocks of max_length")


@dataclass(kw_only=True)
class PeftConfig:
    method: str = opt("lora", "parameter-efficient method", choices=METHODS)
    rank: int = opt(8, "LoRA family: rank r", ge=1)
    rank_pattern: dict[str, int] = opt({}, "LoRA family: module name (or its last parts) → a rank of its own")
    alpha: float = opt(16.0, "LoRA family: the update is scaled by alpha / rank (rslora: alpha / √rank)", gt=0)
    dropout: float = opt(0.0, "LoRA family: dropout on the adapter's input", ge=0, le=0.9)
    init: str = opt(
        "default", "lora, rslora: how A and B start: default changes nothing; loftq makes up for what model.precision=nf4 or int8 rounds",
        choices=("default", "loftq"),
    )  # fmt: skip
    targets: Any = opt("all-linear", "LoRA family and ia3: module names to adapt: all-linear, one name, or a list")
    bottleneck: int = opt(16, "adapter: width of the bottleneck", ge=1)
    placement: str = opt(
        "pfeiffer", "adapter: after the feed-forward block (pfeiffer), or after attention too (houlsby)", choices=("pfeiffer", "houlsby")
    )
    tokens: int = opt(20, "prefix, prompt, ptuning_v2: virtual tokens", ge=1)
    lr_ratio: float = opt(1.0, "learning rate that suits the method, as a multiple of LoRA's (client.lora_lr)", gt=0)


@dataclass(kw_only=True)
class ClientConfig:
    steps: int | None = opt(None, "optimizer steps a round; none goes by epochs", ge=1)
    epochs: float | None = opt(1.0, "passes over the client's rows a round", gt=0)
    batch_size: int = opt(16, "examples of one micro-batch", ge=1)
    accumulate: int = opt(1, "micro-batches of one optimizer step", ge=1)
    optimizer: str = opt("adamw", "local optimizer, fresh each round", choices=("adamw", "sgd"))
    lora_lr: float = opt(1e-3, "peak learning rate that suits LoRA on this backbone and this task", gt=0)
    lr: float = opt(1e-3, "peak learning rate; where none is given, client.lora_lr times peft.lr_ratio", gt=0)
    lr_end: float = opt(0.1, "last learning rate as a share of the peak", ge=0, le=1)
    schedule: str = opt("cosine", "learning rate over the rounds", choices=("constant", "linear", "cosine"))
    warmup_rounds: float = opt(0.0, "rounds over which the learning rate rises from 0", ge=0)
    weight_decay: float = opt(0.0, "decoupled weight decay", ge=0)
    clip_norm: float | None = opt(1.0, "gradient norm is clipped to this; none leaves it", gt=0)
    prox: float = opt(0.0, "FedProx μ: adds μ/2·‖w − w_t‖² to the loss", ge=0)


@dataclass(kw_only=True)
class DeviceClass:
    share: float = opt(1.0, "share of the clients in this class where the data does not say", ge=0)
    max_examples: int | None = opt(None, "training rows that the device can hold", ge=1)
    offline: float = opt(0.0, "chance that it is offline in a round", ge=0, le=1)
    memory_mb: float | None = opt(None, "MB (10⁶ bytes) that training may take, weights included; none is unbounded", gt=0)
    cores: int = opt(1, "processor cores that train", ge=1)
    gflops_per_core: float = opt(0.0, "10⁹ operations a second that a core sustains in training; 0 takes no simulated time", ge=0)
    accelerator: str = opt("none", "what computes in place of the cores", choices=("none", "cuda"))
    accelerator_gflops: float = opt(0.0, "what it sustains in training; 0 takes no simulated time", ge=0)
    duty: float = opt(1.0, "share of the time that it may compute: battery, heat", gt=0, le=1)
    mbit_per_second: float = opt(0.0, "bandwidth both ways; 0 is unlimited", ge=0)
    jitter: float = opt(0.0, "spread of its time from round to round: log-normal, this is sigma", ge=0)
    precision: str | None = opt(
        None, "of its frozen backbone; none: the finest that fits, from model.precision down", choices=("fp32", "bf16", "int8", "nf4")
    )
    rank: int | None = opt(None, "largest LoRA rank, at most peft.rank; none: what memory and bandwidth allow", ge=1)


@dataclass(kw_only=True)
class DevicesConfig:
    classes: dict[str, DeviceClass] = opt({}, "device class → what it can do; none: all alike, always on")
    deadline_s: float | None = opt(None, "simulated seconds after which a reply is late; none waits", gt=0)


@dataclass(kw_only=True)
class PrivacyConfig:
    kind: str = opt("none", "whose traces are hidden: nobody's, a single row's, or a whole client's", choices=("none", "record", "user"))
    epsilon: float | None = opt(
        8.0, "budget of each client over the run: a client that has spent it takes part no more; none does not stop anybody", gt=0
    )
    delta: float = opt(1e-5, "δ, what the promise of epsilon may fail by: well below 1 / rows (record) or 1 / clients (user)", gt=0, lt=1)
    noise: float | None = opt(None, "standard deviation of the noise as a multiple of clip; none solves for epsilon", gt=0)
    clip: float = opt(1.0, "largest norm of one row's gradient (record) or of one client's update (user), over all tensors together", gt=0)
    turns: int | None = opt(None, "turns of a client that epsilon must last for; none is rounds, as many as it can be asked for", ge=1)
    accountant: str = opt("prv", "how the cost is added up: prv is tighter, rdp quicker", choices=("prv", "rdp"))
    where: str = opt(
        "server", "user: who clips and adds noise; the server sees every update, the client must add far more", choices=("server", "client")
    )
    adaptive: bool = opt(False, "user: the clip follows the norms of the updates (where=server); clip is where it starts")
    clip_quantile: float = opt(0.5, "user, adaptive: share of the norms that the clip is to lie above", ge=0, le=1)
    clip_rate: float = opt(0.2, "user, adaptive: learning rate of the clip's logarithm", gt=0)
    bit_noise: float = opt(0.05, "user, adaptive: noise on the count of unclipped updates, as a share of the cohort", gt=0)
    secure_rng: bool = opt(
        False, "noise and samples from the operating system; off, they hang on the run's seed, which whoever knows it can subtract"
    )


@dataclass(kw_only=True)
class EngineConfig:
    kind: str = opt(
        "inprocess",
        "inprocess: one process, one shared backbone; ray: a process a worker, on one machine or more",
        choices=("inprocess", "ray"),
    )
    threads: int = opt(0, "torch threads; 0 takes all cores", ge=0)
    batched: str = opt("auto", "clients trained at once in a process: auto measures, none trains one after the other, or a number")
    ray_cpus: int = opt(1, "ray: CPUs (and torch threads) of one worker", ge=1)
    ray_gpus: float = opt(0.0, "ray: GPUs of one worker; 0.5 lets two share one", ge=0)
    ray_address: str = opt("", "ray: HOST:PORT of a cluster that this machine has joined (auto finds it); empty starts Ray on this machine")
    cache_layers: float = opt(
        0.0, "GB of temporary disk for the training rows' activations below the lowest adapter (see peft.targets); 0 keeps none", ge=0
    )


@dataclass(kw_only=True)
class EvalConfig:
    where: str = opt("door", "global test: in the process that started the run, or not at all", choices=("door", "none"))
    clients: int = opt(-1, "clients that evaluate their held-out rows each round; -1 all, 0 none", ge=-1)
    every: int = opt(1, "evaluate every so many rounds (the first and the last always)", ge=1)
    batch_size: int = opt(64, "examples of an evaluation batch", ge=1)


@dataclass(kw_only=True)
class WeightsConfig:
    max_examples: int = opt(100_000, "rows that a client may say it has; one that says more is left out", ge=1)
    max_share: float | None = opt(
        None,
        "largest share of a round's weight that one client may have (an equal share at least); none: on a network three equal shares and at"
        " most 0.5, in a simulation, where nobody can lie about its rows, no bound",
        gt=0,
        le=1,
    )


@dataclass(kw_only=True)
class TrafficConfig:
    up: str = opt(
        "fp32",
        "numbers of an update, which is sent as its difference from the broadcast",
        choices=("fp32", "fp16", "bf16", "int8", "nf4"),
    )
    down: str = opt(
        "fp32",
        "numbers of a broadcast, which is sent as its difference from the run's first adapter where that is smaller",
        choices=("fp32", "fp16", "bf16", "int8", "nf4"),
    )
    topk: float | None = opt(None, "share of an update's entries that is sent, the largest; none sends all", gt=0, le=1)
    error_feedback: bool = opt(False, "a client adds what an update left out to its next one")
    stochastic: bool = opt(False, "round at random, so that the mean over many clients or rounds is not off")
    max_mb_per_round: float | None = opt(
        None, "MB (10⁶ bytes) that a client may receive and send in a round; one whose turn takes more is left out", gt=0
    )


@dataclass(kw_only=True)
class InferenceConfig:
    export: str = opt(
        "none", "merged model written when the run ends: none, or hf, a Hugging Face folder in RUN/merged", choices=("none", "hf")
    )
    samples: int = opt(3, "instruction: test requests answered before and after, for a person to read", ge=0)


@dataclass(kw_only=True)
class Config:
    name: str = opt("run", "name of the experiment; its folder under output_dir")
    seed: int = opt(0, "seed of everything random", ge=0)
    rounds: int = opt(10, "federated rounds", ge=0)
    clients_per_round: int = opt(10, "clients sampled a round", ge=1)
    min_clients: int = opt(1, "fewest good updates for a round to count", ge=1)
    round_timeout_s: float | None = opt(
        None, "real seconds after which a round closes without the clients that have not answered; none waits", gt=0
    )
    late: str = opt(
        "drop",
        "replies that come after their round: drop, or use each in a later one by what it adds, scaled by 1/√(1 + rounds late)",
        choices=("drop", "use"),
    )
    max_staleness: int = opt(3, "late=use: most rounds that a reply may be late and still count", ge=1)
    resume: str | None = opt(None, "run directory to go on with")
    output_dir: str = opt("outputs", "where run directories are made")
    keep_checkpoints: int = opt(3, "newest checkpoints to keep", ge=1)
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
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def reference() -> list[tuple[str, str, str]]:
    """Every key with its default and help, for `--help` and the docs: `("client.lr", "0.001", "peak learning rate …")`."""

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
