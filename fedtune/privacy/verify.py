"""How an update shows that what its plan promised about privacy was kept; the other half of fedtune/contracts/privacy_terms.py."""

from collections.abc import Mapping

from fedtune.contracts.plan import Plan
from fedtune.errors import UpdateError
from fedtune.privacy.accounting import Spend, at_least


def verify(plan: Plan, measurements: Mapping[str, float]) -> None:
    """Raises UpdateError where an update does not say that it is as private as its plan asked."""
    if plan.privacy == "none":
        return
    record = plan.privacy == "record"
    m = {n: measurements.get(n, -1.0) for n in ("steps", "dp_clip", "dp_noise", "dp_sample_rate", "dp_steps", "epsilon")}
    good = {
        "dp_clip": m["dp_clip"] == plan.dp_clip,
        "dp_noise": m["dp_noise"] > 0 and plan.dp_noise in (None, m["dp_noise"]),
        "dp_sample_rate": 0 < m["dp_sample_rate"] <= 1 and (record or m["dp_sample_rate"] == 1),
        "dp_steps": m["dp_steps"] == (m["steps"] if record else 1),
        "epsilon": m["epsilon"] > 0 and (plan.dp_epsilon is None or m["epsilon"] <= plan.dp_epsilon),
    }
    for name in (n for n, fine in good.items() if not fine):
        came = f"{m[name]:g} for {name}" if name in measurements else f"nothing of {name}"
        raise UpdateError(f"the update should be private (privacy={plan.privacy}) and says {came}: it must not count")
    reach = 1 if record else 2  # as fedtune.privacy.turn counts
    turn = Spend(noise=m["dp_noise"] / reach, rate=m["dp_sample_rate"], steps=1)
    if not at_least(turn, m["epsilon"], plan.dp_delta):
        raise UpdateError(
            f"the update should be private (privacy={plan.privacy}) and says epsilon={m['epsilon']:g} with dp_noise={m['dp_noise']:g},"
            " of which a single step costs more: it must not count"
        )
