"""The ``tracehaul`` command."""

import asyncio
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from cluster import further
from cluster.api import Api, here
from cluster.config import ROUTER, base_url
from cluster.config_file import load_config
from cluster.options import DiskOption, KeyOption, QuotaOption, S3Option, SizeOption
from cluster.plan import load_plan
from cluster.rundir import ClusterFault, RunDir
from tracehaul import __version__

err = Console(stderr=True)
out = Console()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="An inference cluster for agents: disaggregated prefill and decode around a shared KV store.",
    epilog="Begin with: [bold]tracehaul up[/], then [bold]tracehaul status[/], in the end [bold]tracehaul down[/].",
)

RunDirOption = Annotated[
    Path, typer.Option("--run-dir", help="Where the cluster's state and logs are.", show_default=True)
]
FleetOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The file of a fleet, with its [[hosts]]. Default: this machine.")
]
DEFAULT_RUN_DIR = Path(".run")
PLAN_FILE = DEFAULT_RUN_DIR / "cluster.json"
WIDE_COLUMNS = 120
PIPE_COLUMNS = 200  # it has no width to respect


@app.command()
def up(
    model: Annotated[
        str | None, typer.Option(help="A model directory, a GGUF file, or a name. Default: a small model that answers.")
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Prefill workers; 0 leaves prompts to the decode workers.")
    ] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    store: Annotated[int | None, typer.Option(help="Store nodes.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the HTTP API.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that the HTTP API listens on.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="int8: round the weights, on the CPU. Default: of the dtype.")
    ] = None,
    transport: Annotated[
        str | None, typer.Option(help="auto, shm, tcp, nixl or ucxx: how KV moves between processes.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads of each worker.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="KV memory of each worker, in tokens.")] = None,
    store_bytes: SizeOption = None,
    disk_bytes: DiskOption = None,
    disk_dir: Annotated[
        Path | None, typer.Option(help="Where the store nodes' disk files are. Default: in the run directory.")
    ] = None,
    quota: QuotaOption = None,
    s3_url: Annotated[
        str | None, typer.Option(help="s3://bucket/prefix for blocks; endpoint and credentials: AWS_* variables.")
    ] = None,
    s3_bytes: S3Option = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Most prompt tokens computed between two decode steps.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="How decode workers are chosen: cost; sticky and round-robin to compare with.")
    ] = None,
    without_store: Annotated[
        bool, typer.Option("--without-store", help="Steps neither read nor fill the store: to compare with.")
    ] = False,
    keys: Annotated[
        Path | None, typer.Option(help="API keys, as `tracehaul keys` makes them: whoever asks needs one.")
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Without keys, listen also where others than this machine reach it.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Serve over TLS, with this certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, if it is not in the same file.")] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Pages of this origin may use the API from a browser; repeat for others, * for all."),
    ] = None,
    access_log: Annotated[
        bool | None, typer.Option("--access-log/--no-access-log", help="A log line a request. Default: with keys.")
    ] = None,
    restart: Annotated[str | None, typer.Option(help="never: a node that dies is left alone. Default: always.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; options given here win over it.")] = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Start a cluster on this machine and wait until it answers.

    Nodes stay when this command ends, and come back when they die; stop them with `tracehaul down`. Run again where
    their supervisor died, it brings that back.

    Examples:

      tracehaul up

      tracehaul up --decode 2 --store-bytes 4GiB --port 8100

      tracehaul up --model ./my-model --config cluster.toml
    """
    from cluster.launch import up

    overrides: dict[str, Any] = {
        "model": model,
        "nodes.prefill": prefill,
        "nodes.decode": decode,
        "nodes.store": store,
        "port": port,
        "host": host,
        "device": device,
        "dtype": dtype,
        "weights": weights,
        "transport": transport,
        "threads": threads,
        "kv_tokens": kv_tokens,
        "store_bytes": store_bytes,
        "disk_bytes": disk_bytes,
        "disk_dir": str(disk_dir.absolute()) if disk_dir is not None else None,
        "quota_bytes": dict(quota) if quota else None,
        "s3_url": s3_url,
        "s3_bytes": s3_bytes,
        "restart": restart,
        "api.keys_file": _text(keys),
        "api.open": open_to_all or None,
        "api.tls_cert": _text(tls_cert),
        "api.tls_key": _text(tls_key),
        "api.origins": origin or None,
        "api.access_log": access_log,
        "worker.chunk_tokens": chunk_tokens,
        "dispatch.policy": policy,
        "dispatch.use_store": False if without_store else None,
        "worker.use_store": False if without_store else None,
    }
    run = RunDir(run_dir)
    names = up(load_config(config, overrides), run, err)
    chosen = load_plan(run).config
    url = base_url(chosen)
    typer.echo(f"ready {url}")
    messages = [{"role": "user", "content": "What is gravity?"}]
    body = msgspec.json.encode({"model": names[0], "temperature": 0, "messages": messages}).decode()
    more = ' -H "authorization: Bearer $KEY"' if chosen.api.keys_file else ""
    more += f" --cacert {shlex.quote(chosen.api.tls_cert)}" if chosen.api.tls_cert else ""
    curl = f"curl -s {url}/v1/chat/completions -H 'content-type: application/json'{more} -d {shlex.quote(body)}"
    err.print(f"Try it:\n  {curl}", highlight=False, markup=False, soft_wrap=True)
    if len(names) > 1:
        err.print(f"Models: {', '.join(names)}", highlight=False, markup=False, soft_wrap=True)


def _warn(line: str) -> None:
    err.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


@app.command()
def down(run_dir: RunDirOption = DEFAULT_RUN_DIR) -> None:
    """Stop the cluster that was started from here, and only it. Logs are kept."""
    from cluster.launch import down

    stopped, killed = down(RunDir(run_dir), _warn)
    if not stopped:
        out.print("Nothing runs here.", highlight=False)
        return
    out.print(f"Stopped {', '.join(stopped)}.", highlight=False)
    if killed:
        err.print(f"Had to be killed: {', '.join(killed)}.", highlight=False)


@app.command()
def status(
    url: Annotated[str | None, typer.Option(help="Base URL of a cluster's API. Default: the one started here.")] = None,
    key: KeyOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
    config: FleetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of a fleet, as JSON.")] = False,
) -> None:
    """Show the nodes of a running cluster: health, load, and what they hold; of a fleet, what its hosts say of them.

    Examples:

      tracehaul status

      tracehaul status --url http://127.0.0.1:8100

      tracehaul status --config cluster.toml
    """
    from cluster.asking import ask_router
    from cluster.status import mending, outside, supervision, table

    if config is not None:
        from cluster.fleet.command import fleet_status

        asyncio.run(fleet_status(config, as_json))
        return
    console = out if out.is_terminal else Console(width=PIPE_COLUMNS)
    wide = console.width >= WIDE_COLUMNS
    if url is not None:
        nodes = ask_router(Api(url, key), f"the logs of a cluster here are in {run_dir}/logs")
        console.print(table(url, nodes, None, [], wide=wide))
        return
    run = RunDir(run_dir)
    plan = load_plan(run)
    api = here(plan, run)
    nodes, fault = [], None
    try:
        nodes = ask_router(api, f"its log is {run.log(ROUTER)}")
    except ClusterFault as unanswered:
        fault = unanswered
    names, members = [spec.name for spec in plan.nodes if not spec.host], [node.info.node for node in nodes]
    others = outside(run, names, members, answers=fault is None)
    console.print(table(api.url, nodes, run, others, wide=wide))
    for line in (*run.torn(), *supervision(run)):
        _warn(line)
    if fault is not None:
        raise ClusterFault(mending(run, others, str(fault)))


@app.command()
def explain(
    trace: Annotated[str, typer.Argument(help="Which trace: its X-Trace-Id; or a worker, such as decode-1.")],
    salt: Annotated[str, typer.Option("--salt", help="The tenant's cache_salt, if it has one.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="What the router knows, as JSON.")] = False,
    url: Annotated[str | None, typer.Option(help="Base URL of a cluster's API. Default: the one started here.")] = None,
    key: KeyOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Tell a trace's story: its steps, where they ran and why, what was cached, what was lost and why; or a worker's:
    how its role was changed, and why. Where the router here is dead or has forgotten it: what its decision file has.

    Example:

      tracehaul explain my-agent-1
    """
    from cluster.explain import explain, explain_json

    run = None if url is not None else RunDir(run_dir)

    def ask() -> Api:
        if url is not None:
            return Api(url, key)
        local = RunDir(run_dir)
        return here(load_plan(local), local)

    if as_json:
        typer.echo(explain_json(ask, trace, salt, run))
        return
    for line in explain(ask, trace, salt, run):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def erase(
    tenant: Annotated[str, typer.Argument(help="Whose data: the tenant of its API keys, or its cache_salt.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Annotated[
        list[str] | None, typer.Option(help="Base URL of a router; repeat for each. Default: the one started here.")
    ] = None,
    key: KeyOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Erase all that routers keep of a tenant: traces, responses, chat completions, batches and files.

    What runs of it ends.

    Example:

      tracehaul erase acme --url http://10.0.0.1:8000 --url http://10.0.0.2:8000
    """
    from cluster.erase import erase

    local = RunDir(run_dir)
    apis = [Api(each, key) for each in url] if url else [here(load_plan(local), local)]
    if not yes:
        typer.confirm(f"Erase all data of {tenant!r} at {', '.join(api.url for api in apis)}?", abort=True)
    for where, erased in erase(apis, tenant):
        counts = ", ".join(
            f"{count} {what.replace('_', ' ')}" for what, count in msgspec.structs.asdict(erased).items()
        )
        out.print(f"{where}: {counts}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def restart(
    names: Annotated[list[str] | None, typer.Argument(help="Which nodes, such as decode-0.")] = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
    config: FleetOption = None,
    rolling: Annotated[
        bool, typer.Option("--rolling", help="Of a fleet: one at a time, each once the one before it serves.")
    ] = False,
) -> None:
    """Stop nodes of the cluster that runs here, or of a fleet, and start them anew; the others serve on.

    Examples:

      tracehaul restart prefill-0 decode-0

      tracehaul restart --config cluster.toml --rolling
    """
    if config is not None:
        from cluster.fleet.command import fleet_restart

        asyncio.run(fleet_restart(config, names or [], rolling=rolling))
        return
    if not names:
        raise ClusterFault("which nodes? `tracehaul status` names them")
    from cluster.launch import restart as start_again

    start_again(RunDir(run_dir.absolute()), names, out)


@app.command()
def node(
    name: Annotated[str, typer.Argument(help="Which node to be, such as decode-0.")],
    config: Annotated[Path, typer.Option(help="The plan: cluster.json of a run directory.")] = PLAN_FILE,
    engine: Annotated[str | None, typer.Option(help="native, sglang or vllm. Default: as the plan says.")] = None,
    attach: Annotated[str, typer.Option(help="URL of a server of that engine; else one is started.")] = "",
) -> None:
    """Be one node of a launched cluster, in the foreground: how to bring back one that died.

    Example:

      tracehaul node decode-0
    """
    from cluster.node import run_node

    code = run_node(name, RunDir(config.absolute().parent), engine, attach)
    if "nixl" in sys.modules:
        # Its wheel and the system each bring a libnl, and unloading both crashes: nothing is left to be done anyway.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


_OWN = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def commands(name: str = "") -> typer.Typer:
    """The command line, with all commands unless ``name`` is one: then with that at least."""
    if name not in _OWN:
        further.register(app, name)
    return app


def main() -> None:
    """Runs the command; what the operator must know goes to stderr in one line, and the exit code is 1."""
    asked = commands(*sys.argv[1:2])
    try:
        asked()
    except ClusterFault as fault:
        err.print(f"tracehaul: {fault}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
