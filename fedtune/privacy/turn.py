"""A client's side of a private turn: what it applies, whether its budget still reaches, and what it says of it.

What a turn costs is written to the ledger before anything of it is computed (`Ledger.spend`).
"""

from dataclasses import dataclass

from fedtune.contracts.plan import Plan
from fedtune.privacy.accounting import Spend, solve_noise
from fedtune.privacy.dpsgd import sampling_rate
from fedtune.privacy.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a turn applies.

    Args:
        clip: C.
        noise: The multiplier that noise is drawn with.
        cost: What it costs.
    """

    clip: float
    noise: float
    cost: Spend


def applied(plan: Plan, rows: int, steps: int) -> Applied | None:
    """What the plan makes of a client with so many rows that takes so many steps; None where the turn is not private."""
    if plan.privacy == "none":
        return None
    record = plan.privacy == "record"
    rate = sampling_rate(rows, plan.batch_size * plan.accumulate) if record else 1.0
    steps, reach = (steps, 1) if record else (1, 2)  # any other data of a client moves its update by up to 2C
    noise = plan.dp_noise
    if noise is None:
        assert plan.dp_epsilon is not None  # Plan.from_json
        noise = reach * solve_noise(plan.dp_epsilon, plan.dp_delta, rate, steps * plan.dp_turns, plan.dp_accountant)
    return Applied(clip=plan.dp_clip, noise=noise, cost=Spend(noise=noise / reach, rate=rate, steps=steps))


def cannot_pay(plan: Plan, ledger: Ledger, turn: Applied) -> str | None:
    """Why the budget does not reach for another turn; None where it does."""
    if plan.dp_epsilon is None:
        return None
    coming = ledger.epsilon(plan.dp_delta, plan.dp_accountant, turn.cost)
    if coming <= plan.dp_epsilon:
        return None
    spent = ledger.epsilon(plan.dp_delta, plan.dp_accountant)
    return f"its privacy budget is spent: ε = {spent:.3f} so far, another turn would make it {coming:.3f} of {plan.dp_epsilon:g}"


def said(plan: Plan, ledger: Ledger, turn: Applied) -> dict[str, float]:
    """What the update says that it applied, the turn's own cost included: it has been paid already."""
    return {
        "dp_clip": turn.clip,
        "dp_noise": turn.noise,
        "dp_sample_rate": turn.cost.rate,
        "dp_steps": turn.cost.steps,
        "epsilon": ledger.epsilon(plan.dp_delta, plan.dp_accountant),
    }
