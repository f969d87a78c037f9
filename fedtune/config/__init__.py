"""The settings of an experiment: their schema, the rules that a config must satisfy, and the composition of scenarios."""

from fedtune.config.method_files import METHODS
from fedtune.config.rules import check
from fedtune.config.schema import (
    ClientConfig,
    Config,
    DataConfig,
    DeliverConfig,
    DeviceClass,
    DevicesConfig,
    EngineConfig,
    EvalConfig,
    InferenceConfig,
    ModelConfig,
    PartitionConfig,
    PeftConfig,
    PrivacyConfig,
    TaskConfig,
    TrafficConfig,
    WeightsConfig,
    reference,
    template_text,
)
from fedtune.config.values import from_dict, to_dict

__all__ = [
    "METHODS", "ClientConfig", "Config", "DataConfig", "DeliverConfig", "DeviceClass", "DevicesConfig", "EngineConfig", "EvalConfig",
    "InferenceConfig", "ModelConfig", "PartitionConfig", "PeftConfig", "PrivacyConfig", "TaskConfig", "TrafficConfig", "WeightsConfig",
    "check", "from_dict", "reference", "template_text", "to_dict",
]  # fmt: skip
