"""The client's side of a private turn: its noise and cost, the budget check, and the reported measurements.

A turn's cost is written to the ledger before the turn is computed (`Ledger.spend`).
"""

from dataclasses import dataclass

from fedtune.contracts.plan import Plan
from fedtune.privacy.accounting import Spend, solve_noise
from fedtune.privacy.dpsgd import sampling_rate
from fedtune.privacy.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class TurnPrivacy:
    """The clip norm, noise and cost of a private turn.

    Args:
        clip: C.
        noise: Noise multiplier.
        cost: Privacy cost of the turn.
    """

    clip: float
    noise: float
    cost: Spend


def turn_privacy(plan: Plan, rows: int, steps: int) -> TurnPrivacy | None:
    """The privacy of this plan's turn for a client with `rows` rows that takes `steps` steps; None if the turn is not private."""
    if plan.privacy == "none":
        return None
    record = plan.privacy == "record"
    rate = sampling_rate(rows, plan.batch_size * plan.accumulate) if record else 1.0
    steps, reach = (steps, 1) if record else (1, 2)  # replacing a client's data changes its update by up to 2C
    noise = plan.dp_noise
    if noise is None:
        assert plan.dp_epsilon is not None  # Plan.from_json
        noise = reach * solve_noise(plan.dp_epsilon, plan.dp_delta, rate, steps * plan.dp_turns, plan.dp_accountant)
    return TurnPrivacy(clip=plan.dp_clip, noise=noise, cost=Spend(noise=noise / reach, rate=rate, steps=steps))


def budget_error(plan: Plan, ledger: Ledger, turn: TurnPrivacy) -> str | None:
    """Why the budget does not suffice for another turn; None if it does."""
    if plan.dp_epsilon is None:
        return None
    total = ledger.epsilon(plan.dp_delta, plan.dp_accountant, turn.cost)
    if total <= plan.dp_epsilon:
        return None
    spent = ledger.epsilon(plan.dp_delta, plan.dp_accountant)
    return f"its privacy budget is spent: ε = {spent:.3f} so far, another turn would raise it to {total:.3f}, above {plan.dp_epsilon:g}"


def privacy_measurements(plan: Plan, ledger: Ledger, turn: TurnPrivacy) -> dict[str, float]:
    """The update's measurements about privacy. `epsilon` includes this turn, whose cost is in the ledger already."""
    return {
        "dp_clip": turn.clip,
        "dp_noise": turn.noise,
        "dp_sample_rate": turn.cost.rate,
        "dp_steps": turn.cost.steps,
        "epsilon": ledger.epsilon(plan.dp_delta, plan.dp_accountant),
    }
