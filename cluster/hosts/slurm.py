"""A Slurm batch script of a plan. Pure.

One step per host: our own supervisor with that host's nodes, so that a node that dies comes back by the same rules as
elsewhere. The batch script starts a step again that was killed, has the job requeued when that does not help, and
drains on the signal that Slurm sends before the end.
"""

import shlex

import msgspec

from cluster.hosts.restarts import RestartPolicy
from cluster.plan import LOOPBACK, NodeSpec, Plan
from cluster.rundir import FAULT_EXIT

PLAN_VARIABLE = "TRACEHAUL_PLAN"
SIGNAL_MIN_S = 60
REQUEUES_MAX = 3
ANYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


class SlurmJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What Slurm is asked for beside the hosts."""

    command: str
    """What ``tracehaul`` is on the hosts: words of a shell."""
    run_dir: str
    """Below it each of the plan's hosts has a folder of its own; hosts may share a file system."""
    name: str = "tracehaul"
    partition: str = ""
    time: str = ""
    """A limit, as Slurm writes it; empty: the partition's."""
    cpus: int = 0
    """Of each host; 0: whole hosts."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, as they are."""
    restarts: RestartPolicy = RestartPolicy()
    """Of steps, and of the nodes within them."""


def hosts_of(plan: Plan) -> list[str]:
    """The plan's hosts, in its order."""
    return list(dict.fromkeys(spec.host for spec in plan.nodes))


def placed(plan: Plan, addresses: dict[str, str]) -> Plan:
    """The plan with its hosts where an allocation has them. ``addresses``: by the plan's names of hosts.

    Raises:
        ValueError: a router's port is open: nobody on another host would find it.
    """
    if len(addresses) > 1 and any(spec.role == "router" and not spec.control_port for spec in plan.nodes):
        raise ValueError("a router's control_port must be said where there are several hosts")
    alone = len(addresses) == 1

    def moved(spec: NodeSpec) -> NodeSpec:
        everywhere = spec.listen in ANYWHERE
        address = LOOPBACK if alone and not everywhere else addresses[spec.host]
        listen = spec.listen if everywhere else address
        return msgspec.structs.replace(spec, address=address, data_address="", listen=listen)

    return msgspec.structs.replace(plan, nodes=tuple(moved(spec) for spec in plan.nodes))


def gpus_of(plan: Plan) -> int:
    """Of the host that has the most: a job asks for the same of each."""
    wanted: dict[str, set[int]] = {}
    for spec in plan.nodes:
        wanted.setdefault(spec.host, set()).update(spec.gpus)
    return max((max(gpus) + 1 for gpus in wanted.values() if gpus), default=0)


def batch_script(plan: Plan, job: SlurmJob) -> str:
    """What ``sbatch`` is given."""
    hosts = hosts_of(plan)
    drain_s = int(plan.config.drain_timeout_s)
    gpus = gpus_of(plan)
    head = [
        "#!/bin/bash",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={len(hosts)}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --cpus-per-task={job.cpus}" if job.cpus else "#SBATCH --exclusive",
        *([f"#SBATCH --gres=gpu:{gpus}"] if gpus else []),
        *([f"#SBATCH --partition={job.partition}"] if job.partition else []),
        *([f"#SBATCH --time={job.time}"] if job.time else []),
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --signal=B:TERM@{max(SIGNAL_MIN_S, 3 * drain_s + 30)}",
        *(f"#SBATCH {option}" for option in job.options),
    ]
    encoded = msgspec.json.encode(plan, enc_hook=str).decode()
    policy = job.restarts
    said = [
        f"readonly TRACEHAUL={shlex.quote(job.command)}",
        f"readonly RUN_DIR={shlex.quote(job.run_dir)}",
        f"readonly HOSTS=({' '.join(shlex.quote(host) for host in hosts)})",
        f"readonly DEATHS_MAX={policy.deaths_max} WINDOW_S={policy.window_s:.0f} REQUEUES_MAX={REQUEUES_MAX}",
        f"readonly FAULT_EXIT={FAULT_EXIT} SETTLED_S={policy.settled_s:.0f}",
        f"readonly DELAY_S={max(1, round(policy.delay_s))} DELAY_MAX_S={max(1, round(policy.delay_max_s))}",
        f"export {PLAN_VARIABLE}={shlex.quote(encoded)}",
    ]
    return "\n".join([*head, "", *said, _BODY])


_BODY = r"""
say() { echo "$(date -u +%FT%TZ) tracehaul: $*"; }

mapfile -t there < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
addresses=()
for i in "${!HOSTS[@]}"; do
  address=$(scontrol show node "${there[i]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  address=$(getent ahosts "$address" | awk '{ print $1; exit }')
  [ -n "$address" ] || { say "no address of ${there[i]}"; exit 1; }
  addresses+=(--at "${HOSTS[i]}=$address")
  say "${HOSTS[i]} is ${there[i]} ($address)"
done

stopping=
keepers=()
drain() {
  [ -z "$stopping" ] || return 0
  stopping=yes
  say "draining"
  kill -TERM "${keepers[@]}" 2>/dev/null
  # The steps, as this script knows already. While a job ends Slurm has told them itself, and this would wait in vain.
  scancel --quiet --signal=TERM "$SLURM_JOB_ID" 2>/dev/null &
  telling=$!
}
trap drain TERM INT

# A step with one host's nodes, until it ends by itself. A killed one is started again.
keep_step() {
  local host=$1 node=$2 delay=$DELAY_S code began step deaths=() recent died
  trap 'stopping=yes' TERM
  while :; do
    began=$SECONDS
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --cpu-bind=none --kill-on-bad-exit=0 \
      --job-name="tracehaul-$host" \
      bash -c "exec $TRACEHAUL host slurm-step \"\$@\"" - "$host" --run-dir "$RUN_DIR/$host" "${addresses[@]}" &
    step=$!
    wait "$step"; code=$?
    # A signal ends only the wait.
    while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
    [ -z "$stopping" ] || return 0
    say "the step of $host on $node ended with code $code"
    # What an operator must mend, and what its output tells.
    [ "$code" -ne "$FAULT_EXIT" ] || return "$FAULT_EXIT"
    [ $((SECONDS - began)) -lt "$SETTLED_S" ] || delay=$DELAY_S
    recent=("$SECONDS")
    for died in "${deaths[@]}"; do [ $((SECONDS - died)) -ge "$WINDOW_S" ] || recent+=("$died"); done
    deaths=("${recent[@]}")
    if [ ${#deaths[@]} -gt "$DEATHS_MAX" ]; then
      [ "${SLURM_RESTART_COUNT:-0}" -lt "$REQUEUES_MAX" ] || { say "$host is given up; the others serve on"; return 1; }
      say "the step of $host died too often: the job is requeued"
      scontrol requeue "$SLURM_JOB_ID" || return 1
      sleep 60 & wait $! # Slurm ends this script
      return 1
    fi
    sleep "$delay" & wait $!
    [ -z "$stopping" ] || return 0
    delay=$((2 * delay < DELAY_MAX_S ? 2 * delay : DELAY_MAX_S))
  done
}

for i in "${!HOSTS[@]}"; do
  keep_step "${HOSTS[i]}" "${there[i]}" &
  keepers+=($!)
done
worst=0
for keeper in "${keepers[@]}"; do
  wait "$keeper"; code=$?
  while kill -0 "$keeper" 2>/dev/null; do wait "$keeper"; code=$?; done
  [ "$code" -eq 0 ] || worst=$code
done
if [ -n "$stopping" ]; then
  say "drained"
  kill "$telling" 2>/dev/null
  exit 0
fi
exit "$worst"
"""
