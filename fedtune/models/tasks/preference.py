"""Preference tuning: of two answers to a prompt, make the chosen one likelier and the rejected one less likely.

Sources: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 7; Hong et al. 2024, ORPO, arXiv:2403.07691, eq. 6-7.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import IGNORED, Example, Score
from fedtune.errors import ConfigError
from fedtune.models.tasks._tokens import TokenTask, check_date
from fedtune.storage.parsing import parse_json

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config

log = logging.getLogger("fedtune.tasks")
_TIE = 1e-3  # nats: rounding makes the log-probabilities of one model differ by less


class Preference(TokenTask):
    """An example is a pair of conversations, chosen and rejected, in the model's chat template, which differ in the last answer.

    log π(y) is the sum over an answer's tokens, m(y) their mean, and π_ref the model before the run.

        dpo   reward r(y) = β·[log π(y) - log π_ref(y)]   loss -log σ(r(y_w) - r(y_l))
        orpo  reward r(y) = β·m(y)                        loss -m(y_w) - β·log σ(o(y_w) - o(y_l)), with o = log of p/(1 - p), p = exp m

    The metrics are the loss (per pair), reward_accuracy, the share of pairs whose chosen answer has the larger reward (a tie counts half,
    such as before training), reward_margin, the mean difference, and chosen_logprob, the mean log π(y_w), which may fall in training.
    """

    columns = {"chosen": "answers", "rejected": "answers"}
    metrics = {"reward_accuracy": True, "reward_margin": True, "chosen_logprob": True}
    encoder_decoder = False
    packs = False
    prompted = True
    conversational = True
    sequences = 2
    cross_entropy = False

    def check(self, config: "Config") -> None:
        check_date(self.settings)
        if config.privacy.kind == "record":
            raise ConfigError(
                f"privacy=record clips the gradient of each row, but with task.kind={config.task.kind} a row is a pair of sequences: take"
                " privacy=user"
            )
        if self.needs_reference and config.peft.init != "default":
            raise ConfigError(
                f"peft.init={config.peft.init} begins with an adapter that changes the model, but task.loss={self.settings.loss} compares"
                " with the model without it: set peft.init=default, or task.loss=orpo"
            )

    @property
    def needs_reference(self) -> bool:
        return self.settings.loss == "dpo"

    @property
    def answer_tokens(self) -> int:
        return self.settings.max_new_tokens  # of sample answers; the metrics need none

    def most_targets(self, length: int) -> int:
        return max(1, length - self.sequences)

    # -- rows -----------------------------------------------------------------------------------------------------------------------------

    def encode(self, rows: RowSet, tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """One example per pair. A pair with a conversation of more than half of `max_length` tokens is left out, or with `keep_short`
        becomes an example without a target."""
        import numpy as np

        from fedtune.data.examples import filler

        out, long = [], 0
        for pair in self._pairs(rows, tokenizer):
            (better, worse), fits = pair, max(len(ids) for ids, _, _ in pair) <= self.longest_sequence
            long += not fits
            if fits:
                ids, labels = (np.concatenate([better[i], worse[i]]) for i in (0, 1))
                answer = tokenizer.decode(better[0][better[2] :].tolist(), skip_special_tokens=True)
                out.append(Example(ids, labels, better[2], answer, len(better[0])))
            elif keep_short:
                out.append(Example(np.full(4, filler(tokenizer), np.int32), np.full(4, IGNORED, np.int32), first=2))
        if long:
            log.warning(
                "%d of %d pairs are left out, because a conversation has more than %d tokens (half of task.max_length)",
                long, len(rows), self.longest_sequence,
            )  # fmt: skip
        return out

    def unusable(self, rows: RowSet, tokenizer: Any) -> str:
        shortest = 2 * min(max(len(ids) for ids, _, _ in pair) for pair in self._pairs(rows, tokenizer))
        return f"none of {len(rows)} pairs fits into task.max_length={self.settings.max_length}: raise it to {shortest} or more"

    def _pairs(self, rows: RowSet, tokenizer: Any) -> Iterator[list[tuple[Any, Any, int]]]:
        """For both conversations of each row: token ids, labels with the last answer only, and where the answer begins."""
        from fedtune.models.chat_template import Conversation, encode_start, located

        for chosen, rejected, where in zip(rows["chosen"][:], rows["rejected"][:], rows["row"][:], strict=True):
            pair = []
            for text in (chosen, rejected):
                messages = parse_json(text)
                with located(where):
                    ids, labels, begun = encode_start(Conversation(tokenizer, messages, date=self.settings.date), len(messages))
                labels[:begun] = IGNORED  # earlier answers belong to the prompt
                pair.append((ids, labels, begun))
            yield pair

    def count_terms(self, example: Example) -> int:
        return int(self.count(example) > 0)

    # -- loss -----------------------------------------------------------------------------------------------------------------------------

    def terms(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        if "reference" not in batch:  # artificial rows, which probes learn as texts
            return super().terms(batch)
        return self.counts(batch).any(1).view(-1, 2).all(1).nonzero()[:, 0]

    def reduce(self, losses: "Tensor", batch: "Mapping[str, Tensor]") -> "Tensor":
        """The losses of the pairs, from those of their tokens."""
        if "reference" not in batch:
            return losses
        counts, chosen = self.counts(batch), self.terms(batch)
        sums = losses.new_zeros(len(counts)).index_add(0, counts.nonzero()[:, 0], losses)
        return self.pair_losses(-sums.view(-1, 2)[chosen], counts.sum(1).view(-1, 2)[chosen], batch["reference"][chosen])

    def pair_losses(self, logprobs: "Tensor", lengths: "Tensor", reference: "Tensor") -> "Tensor":
        """(M,): the loss of each pair.

        Args:
            logprobs: (M, 2) log π(y_w) and log π(y_l), in nats.
            lengths: (M, 2) tokens of the answers.
            reference: (M, 2) as `logprobs`, of the reference model.
        """
        from torch.nn.functional import logsigmoid

        beta = self.settings.beta
        if self.needs_reference:
            gain = logprobs - reference
            return -logsigmoid(beta * (gain[:, 0] - gain[:, 1]))
        mean = logprobs / lengths
        odds = mean - (-mean.clamp(max=-1e-6).expm1()).log()  # log of p / (1 - p); p = 1 would be infinite
        return -mean[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1])

    # -- scores ---------------------------------------------------------------------------------------------------------------------------

    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        """`detail` is (gain, log π(y_w)); the gain is the reward's difference over β."""
        import torch

        sums = torch.stack([each.sum() for each in self.loss(logits, targets, "none").split(list(sizes))]).view(-1, 2)
        lengths = torch.tensor(sizes, device=sums.device).view(-1, 2)
        reference = torch.tensor([e.reference or (0.0, 0.0) for e in examples], device=sums.device)
        losses, gains = self.pair_losses(-sums, lengths, reference), -sums - reference if self.needs_reference else -sums / lengths
        found = zip(losses.tolist(), (gains[:, 0] - gains[:, 1]).tolist(), (-sums[:, 0]).tolist(), examples, strict=True)
        return [Score(loss, 1, (gain, chosen)) if self.count_terms(e) else Score(0.0, 0) for loss, gain, chosen, e in found]

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        gains, chosen = zip(*(s.detail for s in scores if s.count), strict=True)
        return {
            "reward_accuracy": sum(0.5 if abs(g) < _TIE else float(g > 0) for g in gains) / len(gains),
            "reward_margin": self.settings.beta * math.fsum(gains) / len(gains),
            "chosen_logprob": math.fsum(chosen) / len(chosen),
        }
