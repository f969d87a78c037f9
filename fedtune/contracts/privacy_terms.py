"""The privacy terms of a plan.

Both ends check them: a client rejects a plan whose terms differ from its own config, and the server rejects an update that should be
private but does not report its privacy (fedtune/privacy/verify.py). The checks detect a misconfigured peer, which could otherwise train
without privacy unnoticed. They cannot detect a malicious peer.
"""

from fedtune.config import Config
from fedtune.contracts.plan import Plan
from fedtune.errors import PlanError


def terms(config: Config) -> dict[str, str | float | int | None]:
    """The privacy terms that the config sets for each client, as fields of its plan. They are `none` if the server clips and adds noise."""
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


def check_terms(plan: Plan, config: Config) -> None:
    """Raises PlanError if the plan's terms differ from this client's own config, or a private plan asks for an exact loss."""
    for name, own in terms(config).items():
        if (asked := getattr(plan, name)) != own:
            raise PlanError(f"the plan asks for {name}={asked}, but this client's config has {own}: set the same privacy on both ends")
    if plan.privacy == "record" and plan.measure:
        raise PlanError(f"the plan asks for {plan.measure[0]}, an exact loss over the client's rows: privacy=record reports none")
