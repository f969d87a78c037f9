"""SLoRA's first stage: train masked entries of the frozen matrices, and measure gradient magnitudes to choose the mask.

Source: Babakniya et al. 2023, SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models, arXiv:2308.06522, section 4.
"""

from dataclasses import dataclass

import torch
from transformers.pytorch_utils import Conv1D

from fedtune.clients.steps import batches
from fedtune.clients.turns._base import Turn, Work
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.data import collate
from fedtune.errors import PlanError, UpdateError
from fedtune.models import LiveAdapter, loss_sum
from fedtune.models.sparse import frozen_linear, lora_layers


@dataclass(frozen=True, kw_only=True)
class SLoRA(Turn):
    """Trains masked entries, or measures gradients to choose the mask.

    Args:
        stage: `sparse`: train the sparse slot's entries; `gradient`: measure |∇W| of each matrix that LoRA adapts.
    """

    stage: str

    def check(self) -> None:
        require("the turn's stage", self.stage, PlanError, choices=("sparse", "gradient"))

    @property
    def trains(self) -> bool:
        return self.stage == "sparse"

    def observe(self, work: Work) -> AdapterState:
        if not isinstance(work.live, LiveAdapter):
            raise PlanError("the turn 'slora' measures gradients with a LoRA adapter, but the adapter has method 'sparse': set peft=lora")
        return gradient_magnitudes(work.live, work)


def gradient_magnitudes(live: LiveAdapter, work: Work) -> AdapterState:
    """|∂loss/∂W| of each entry, for the mean loss of one batch without dropout.

    Args:
        live: An initial LoRA adapter, B = 0, so that the model equals the backbone.
        work: The turn; the batch is the first `plan.batch_size` rows after a shuffle with `plan.seed`.

    Returns:
        `<module>.gradient` (out, in) float32 for each module, dense.

    Raises:
        UpdateError: A gradient is not finite.
        ModelError: A module is not a linear layer with floating-point weights.
    """
    plan, examples, task, pad_id = work.plan, work.examples, work.task, work.pad_id
    linears = {name: frozen_linear(name, layer) for name, layer in lora_layers(live.model).items()}
    chosen = next(batches(len(examples), plan.batch_size, plan.seed))
    batch = {k: v.to(live.backbone.device) for k, v in collate([examples[i] for i in chosen], pad_id).items()}
    flags, training = {p: p.requires_grad for p in live.parameters.values()}, live.model.training
    live.model.eval()
    try:
        for p in live.parameters.values():
            p.requires_grad_(False)
        for linear in linears.values():
            linear.weight.requires_grad_(True)
        loss, count = loss_sum(live.model, batch, task)
        gradients = torch.autograd.grad(loss / max(count, 1), [linear.weight for linear in linears.values()])
    finally:
        for linear in linears.values():
            linear.weight.requires_grad_(False)
        for p, flag in flags.items():
            p.requires_grad_(flag)
        live.model.train(training)
    tensors = {}
    for (name, linear), gradient in zip(linears.items(), gradients, strict=True):
        if not torch.isfinite(gradient).all():
            raise UpdateError(f"the gradient of '{name}' is not finite: the loss overflows on this client's rows, set model.precision=fp32")
        size = gradient.abs().float().cpu()
        tensors[f"{name}.gradient"] = (size.T if isinstance(linear, Conv1D) else size).contiguous()  # Conv1D stores W as (in, out)
    return AdapterState(tensors, live.spec).replace(version=plan.base_version)
