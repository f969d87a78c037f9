"""What a plan promises about privacy.

Both ends hold the other to it: a client refuses a plan that asks for less than its own config says, and the bridge refuses an update that
should have been private and does not say that it is (fedtune/privacy/verify.py). Neither can stop a peer that lies; they stop one that is
set up wrongly, which would otherwise train in the open without a word.
"""

from fedtune.config import Config
from fedtune.contracts.plan import Plan
from fedtune.errors import PlanError


def terms(config: Config) -> dict[str, str | float | int | None]:
    """What the config has each client do, as fields of its plan. Where the server clips and adds the noise, clients do nothing."""
    p = config.privacy
    if p.kind == "none" or (p.kind == "user" and p.where == "server"):
        return {"privacy": "none"}
    return {
        "privacy": p.kind,
        "dp_clip": p.clip,
        "dp_noise": p.noise,
        "dp_epsilon": p.epsilon,
        "dp_delta": p.delta,
        "dp_turns": max(1, p.turns or config.rounds),
        "dp_accountant": p.accountant,
    }


def agree(plan: Plan, config: Config) -> None:
    """Raises PlanError where the plan is not what this client's own config says, or asks for an exact loss."""
    for name, own in terms(config).items():
        if (asked := getattr(plan, name)) != own:
            raise PlanError(f"the plan asks for {name}={asked}, this client's own config says {own}: set privacy alike on both ends")
    if plan.privacy == "record" and plan.measure:
        raise PlanError(f"the plan asks to measure {plan.measure[0]}, an exact loss over the client's rows: privacy=record tells none")
