"""What was decided at launch: every process, where it runs and how it is reached. Each node reads it."""

import hashlib
import os

import msgspec

from cluster.config import ROUTER, ClusterConfig, PoolConfig, Role, authority, base_url, is_loopback, pools_of
from cluster.known import known_part
from cluster.rundir import ClusterFault, RunDir
from kvstore.config import StoreConfig
from router.dispatch.config import DispatchConfig
from tracehaul.model.source import ModelSource
from tracehaul.runtime.addresses import literal
from tracehaul.transfer.opening import Kind
from tracehaul.transfer.place import Place

LOOPBACK = "127.0.0.1"


class NodeSpec(msgspec.Struct, frozen=True):
    """One process to run."""

    name: str
    role: Role
    pool: str = ""
    """A worker's; empty for other roles, and for the one pool of a cluster that names none."""
    host: str = ""
    """The host that it runs on; empty: the machine that launched it."""
    listen: str = LOOPBACK
    """The address that its sockets are bound to."""
    address: str = LOOPBACK
    """What the others are told: an address, or a name."""
    data_address: str = ""
    """The same of its data plane; empty: the address."""
    control_port: int = 0
    """Of its control plane; 0, here and below: any that is free."""
    data_port: int = 0
    metrics_port: int = 0
    ucx_devices: tuple[str, ...] = ()
    """Those that UCX may use; empty: it chooses."""
    ucx_tls: tuple[str, ...] = ()
    """Transports that UCX may use; empty: it chooses."""
    gpus: tuple[int, ...] = ()
    """Those of its host that it sees; empty: all."""

    @property
    def control(self) -> str:
        """``host:port`` that others reach its control plane by."""
        return authority(self.address, self.control_port)

    @property
    def data(self) -> Place:
        """Where its data plane is. One that has an address of its own is bound to that, unless all are bound."""
        address = self.data_address or self.address
        bound = literal(self.listen)
        everywhere = bound is not None and bound.is_unspecified
        listen = self.listen if everywhere or not self.data_address else self.data_address
        return Place(listen, address, self.data_port, self.ucx_devices, ",".join(self.ucx_tls))


class PoolPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pool as launched."""

    name: str
    model: ModelSource
    """Under the name that clients call it by."""
    config: PoolConfig
    """With nothing left open."""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cluster as launched."""

    config: ClusterConfig
    pools: tuple[PoolPlan, ...]
    store: StoreConfig
    nodes: tuple[NodeSpec, ...]
    """In the order to start them."""
    name: str = ""
    """What tells this cluster from others: a node of another one is refused; empty: nothing does."""

    def pool(self, name: str) -> PoolPlan:
        """The pool of that name, which is one of the plan's."""
        return next(pool for pool in self.pools if pool.name == name)

    def node(self, name: str) -> NodeSpec:
        """The node of that name.

        Raises:
            ClusterFault: the plan has none.
        """
        for spec in self.nodes:
            if spec.name == name:
                return spec
        raise ClusterFault(f"no node {name} here; there are {', '.join(spec.name for spec in self.nodes)}")

    @property
    def routers(self) -> tuple[str, ...]:
        """``host:port`` of each router's control plane: fixed, so that nodes find one that was restarted."""
        return tuple(spec.control for spec in self.nodes if spec.role == "router")

    @property
    def transports(self) -> tuple[Kind, ...]:
        """How KV moves between processes: where there are several hosts, within one through shared memory."""
        kind = self.config.transport
        if len({spec.host for spec in self.nodes}) == 1:
            return ("shm",) if kind == "auto" else (kind,)
        return ("shm", "auto" if kind == "shm" else kind)

    def dispatch(self, router: str) -> DispatchConfig:
        """Of a router: where several know nothing of each other, the first alone adapts the fleet."""
        own, routers = self.config.dispatch, [spec.name for spec in self.nodes if spec.role == "router"]
        if self.config.database or not own.adapt.enabled or router == min(routers):
            return own
        return msgspec.structs.replace(own, adapt=msgspec.structs.replace(own.adapt, enabled=False))

    def nodes_on(self, host: str) -> tuple[NodeSpec, ...]:
        """Those of one host, in the order to start them."""
        return tuple(spec for spec in self.nodes if spec.host == host)

    def workers_on(self, host: str) -> int:
        """How many share that host's cores."""
        return sum(spec.role in ("prefill", "decode") for spec in self.nodes_on(host))


def load_plan(run: RunDir) -> Plan:
    """What was launched in this run directory. What a later version has added to plans is not read.

    Raises:
        ClusterFault: there is no readable plan.
    """
    try:
        said = msgspec.json.decode(run.plan_file.read_bytes())
        known = msgspec.json.encode(known_part(said, msgspec.inspect.type_info(Plan)))
        return msgspec.json.decode(known, type=Plan, dec_hook=lambda kind, value: kind(value))
    except FileNotFoundError as error:
        raise ClusterFault(f"no cluster runs here ({run.path}); start one with: tracehaul up") from error
    except (OSError, msgspec.DecodeError) as error:
        raise ClusterFault(f"cannot read {run.plan_file}: {error}") from error


def save_plan(run: RunDir, plan: Plan) -> None:
    """Puts the plan where :func:`load_plan` finds it."""
    run.write_plan(msgspec.json.format(msgspec.json.encode(plan, enc_hook=str)))


def nodes_of(config: ClusterConfig, router_port: int = 0) -> tuple[NodeSpec, ...]:
    """Every process of a cluster on this machine, in the order to start them."""
    specs = [
        NodeSpec(ROUTER, "router", control_port=router_port),
        *(NodeSpec(f"store-{i}", "store") for i in range(config.nodes.store)),
    ]
    for name, pool in pools_of(config).items():
        counts: tuple[tuple[Role, int], ...] = (("prefill", pool.prefill), ("decode", pool.decode))
        for role, count in counts:
            kind = f"{role}-{name}" if name else role
            specs += [NodeSpec(f"{kind}-{i}", role, name) for i in range(count)]
    return tuple(specs)


def fleet_name(config: ClusterConfig, nodes: tuple[NodeSpec, ...]) -> str:
    """What tells a fleet from others, whoever launches it: what its config says, or else where its routers are."""
    where = " ".join(spec.control for spec in nodes if spec.role == "router")
    return config.name or hashlib.sha256(where.encode()).hexdigest()[:8]


def api_url(plan: Plan) -> str:
    """Where a client reaches the API: of a fleet at its first router, unless that listens for its own host alone."""
    config = plan.config
    router = next(spec for spec in plan.nodes if spec.role == "router")
    if not router.host or is_loopback(config.host):
        return base_url(config)
    return base_url(msgspec.structs.replace(config, host=router.address))


def threads_of(config: ClusterConfig, workers: int, cores: int) -> int:
    """Compute threads of each of ``workers`` on a host of so many cores.

    At least two where there are two cores, even if the workers then share them: the prefill and the decode of one
    trace take turns, so on a small machine each may have what the other leaves.
    """
    if config.threads is not None:
        return config.threads
    return max(min(cores, 2), cores // workers)


def shared_cores(workers: int, threads: int, cores: int) -> float:
    """The share of a worker's ``threads`` that have no core of their own where all ``workers`` of a host compute."""
    return min(1.0, max(0.0, (workers * threads - cores) / threads))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def with_engine(plan: Plan, name: str, engine: str | None, attach: str) -> Plan:
    """The plan as it is for that node, where it is told another engine, or a server of its own.

    Raises:
        ClusterFault: there is no such engine, the node is no worker, or our own engine is to use a server.
    """
    if engine not in (None, "native", "sglang", "vllm"):
        raise ClusterFault(f"there is no engine {engine!r}: say native, sglang or vllm")
    if engine is None and not attach:
        return plan
    spec = plan.node(name)
    if spec.role not in ("prefill", "decode"):
        raise ClusterFault(f"{name} is no worker: it has no engine")
    pools = list(plan.pools)
    at = next(at for at, pool in enumerate(pools) if pool.name == spec.pool)
    config = pools[at].config
    said = {"engine": engine or config.engine} | ({"attach": config.attach | {name: attach}} if attach else {})
    try:
        config = msgspec.structs.replace(config, **said)
    except ValueError as error:
        raise ClusterFault(str(error)) from error
    if attach and config.engine == "native":
        raise ClusterFault("--attach is for a stock server: say --engine sglang or --engine vllm")
    pools[at] = msgspec.structs.replace(pools[at], config=config)
    return msgspec.structs.replace(plan, pools=tuple(pools))
