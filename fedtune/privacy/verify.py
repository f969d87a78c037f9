"""Checks that an update reports the privacy terms of its plan; the counterpart of fedtune/contracts/privacy_terms.py."""

from collections.abc import Mapping

from fedtune.contracts.plan import Plan
from fedtune.errors import UpdateError
from fedtune.privacy.accounting import Spend, at_least


def verify(plan: Plan, measurements: Mapping[str, float]) -> None:
    """Raises UpdateError if an update does not report the privacy that its plan asked for."""
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
        came = f"reports {name}={m[name]:g}" if name in measurements else f"does not report {name}"
        raise UpdateError(f"the update must be private (privacy={plan.privacy}), but it {came}")
    reach = 1 if record else 2  # as in fedtune.privacy.turn
    turn = Spend(noise=m["dp_noise"] / reach, rate=m["dp_sample_rate"], steps=1)
    if not at_least(turn, m["epsilon"], plan.dp_delta):
        raise UpdateError(
            f"the update must be private (privacy={plan.privacy}), but it reports epsilon={m['epsilon']:g} with dp_noise={m['dp_noise']:g},"
            " with which a single step costs more"
        )
