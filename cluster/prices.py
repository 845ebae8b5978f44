"""What an hour of each worker costs, by the machine that it runs on."""

from cluster.fleet.config import LOCAL
from cluster.plan import Plan
from router.policy.prices import Prices
from tracehaul.wire.ids import NodeId


def prices_of(plan: Plan) -> Prices:
    """The tariff's, and of workers whose host's kind has a price in ``[prices]`` their share of that. A cluster without
    hosts runs on one of kind ``local``."""
    kinds = {host.name: host.kind for host in plan.config.hosts} or {"": LOCAL}
    prices = plan.config.prices
    hours = {
        NodeId(spec.name): prices[kind] / plan.workers_on(spec.host)
        for spec in plan.nodes
        if spec.role in ("prefill", "decode") and (kind := kinds.get(spec.host, "")) in prices
    }
    return Prices(plan.config.dispatch.tariff, hours)
