"""How large a simulated cluster is, and of what nodes: roomy, or always short of something, by its seed."""

import random

from kvstore.config import StoreConfig
from router.dispatch.config import DispatchConfig
from router.fleet.flips import FlipConfig
from router.policy.admission import AdmissionConfig
from router.policy.retention import RetentionConfig
from sim.faults import Targets
from sim.nodes import Shape
from sim.storage import make_below
from sim.text import VOCAB
from sim.traces import Mix, context_max
from tracehaul.engine.fake import EngineCost, fake_info
from tracehaul.wire.cluster import Role
from tracehaul.wire.ids import NodeId
from worker.config import WorkerConfig

MIX = Mix(traces=20, steps_min=3, steps_max=8, system_tokens_max=40, new_tokens_max=24, output_tokens_max=12)
TENANTS = ("tenant-0",)
"""Those with a quota, of the traces' salts; the others share the rest."""
ROUTER = NodeId("router")
"""The one that clients ask."""
ROUTERS = (ROUTER, NodeId("router-1"))
ROLES: dict[NodeId, Role | None] = {
    **dict.fromkeys(ROUTERS),
    **{NodeId(f"store-{i}"): "store" for i in range(3)},
    **{NodeId(f"prefill-{i}"): "prefill" for i in range(2)},
    **{NodeId(f"decode-{i}"): "decode" for i in range(2)},
}
FLEET = Targets(
    routers=ROUTERS,
    stores=tuple(node for node, role in ROLES.items() if role == "store"),
    workers=tuple(node for node, role in ROLES.items() if role in ("prefill", "decode")),
)
FAULTS_END_S = 25.0
LATE_WRITE_S = 15.0
"""Longer than any fault holds a copy back: what a store has to be told of its transport."""
PINS_END_S = 10.0
"""Well before the stores are looked at in the end: those of a router that died are never ended by it."""


def make_gate(seed: int) -> AdmissionConfig:
    """Every third cluster refuses traces long before it must."""
    gated = random.Random(f"gates {seed}").random() < 0.3  # noqa: S311 - reproducible is the point
    return AdmissionConfig(enabled=gated, close_share=0.4, open_share=0.3, half_life_s=1.0, stored_half_life_s=2.0)


def make_flips(seed: int) -> FlipConfig:
    """Time for what runs, or none; and one change after the other, or not so often."""
    rng = random.Random(f"flips {seed}")  # noqa: S311 - reproducible is the point
    return FlipConfig(drain_s=rng.choice([0.0, 0.05, 1.0]), cooldown_s=rng.choice([0.0, 2.0]))


def make_turns(seed: int) -> bool:
    """In every other cluster steps wait in the router."""
    return random.Random(f"turns {seed}").random() < 0.5  # noqa: S311 - reproducible is the point


def make_shape(seed: int) -> Shape:
    """Sizes of a cluster: roomy ones, and such that everything is always short of something."""
    rng = random.Random(f"shape {seed}")  # noqa: S311 - reproducible is the point
    longest = context_max(MIX)
    slots = rng.choice([24, 100, 1000])
    below = make_below(seed, slots)
    return Shape(
        engine=fake_info(
            context_max=longest, kv_tokens_max=rng.choice([longest, 2 * longest, 6 * longest]), vocab_size=VOCAB
        ),
        cost=EngineCost(iteration_s=0.005, prefill_token_s=0.0002, copy_token_s=0.00001),
        store=StoreConfig(
            arena_bytes=slots * 4096,
            slot_bytes=4096,
            reservation_ttl_s=rng.choice([0.5, 5.0]),
            lease_ttl_max_s=rng.choice([0.1, 6.0]),
            late_write_s=LATE_WRITE_S,
            hard_tenant_share_max=0.25 if below is None else below.hard_share,
            quota_bytes=dict.fromkeys(TENANTS, slots * 4096 // 4) if below is not None and below.quotas else {},
        ),
        worker=WorkerConfig(
            chunk_tokens=rng.choice([16, 64]),
            sequences_max=rng.choice([2, 16]),
            waiting_max=64,
            headroom_tokens=rng.choice([1, 16]),
            local_prefill_tokens=rng.choice([0, 16, 64]),
            staging_blocks=rng.choice([8, 64]),
            group_blocks=rng.choice([1, 4, 8]),
            store_timeout_s=rng.choice([1.0, 5.0]),
        ),
        dispatch=DispatchConfig(
            retention=RetentionConfig(pin_max_s=PINS_END_S),
            admission=make_gate(seed),
            flips=make_flips(seed),
            turns=make_turns(seed),
        ),
        below=below,
    )
