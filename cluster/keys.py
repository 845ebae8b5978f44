"""``tracehaul keys``: API keys in a file, which a running router reads again by itself."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.api import new_secret
from cluster.rundir import ClusterFault
from router.http.keys import BadKeys, Key, KeyFile, hashed, name_of, read_keys, write_keys
from tracehaul.runtime import clock
from tracehaul.runtime.durable import write_whole

out = Console()
err = Console(stderr=True)
PIPE_COLUMNS = 200
"""A pipe has no width to respect."""

app = typer.Typer(no_args_is_help=True, help="API keys: who may use the API, for what, and how much.")

FileOption = Annotated[Path, typer.Option("--keys", help="The file of keys.", show_default=True)]
DEFAULT_FILE = Path("keys.json")


@app.command("add")
def add(
    tenant: Annotated[
        str,
        typer.Option(help="Whose traces and blocks its calls use: letters, digits, dots, - and _. Default: nobody's."),
    ] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="A model that it may ask for; repeat for others. Default: all.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Calls a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens a minute, of prompts and answers.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Calls at once.")] = None,
    steer: Annotated[
        bool, typer.Option("--steer", help="May look at the cluster, pin, choose workers and say cache_salt.")
    ] = False,
    note: Annotated[str, typer.Option(help="For whoever reads the list.")] = "",
    file: FileOption = DEFAULT_FILE,
) -> None:
    """Make a key. It is shown once, and kept as a hash.

    Example:

      tracehaul keys add --tenant acme --tokens-per-minute 200000
    """
    with _changing(file) as kept:
        taken = {key.id for key in kept.keys}
        while (name := name_of(secret := new_secret())) is None or name in taken:
            pass
        key = Key(
            name,
            hashed(secret),
            tenant,
            None if not model else tuple(model),
            requests_per_minute,
            tokens_per_minute,
            concurrency,
            steer,
            int(clock.wall_s()),
            note,
        )
        try:
            after = read_keys(write_keys(KeyFile((*kept.keys, key))))
        except BadKeys as error:
            raise ClusterFault(f"not a key: {error}") from None
        _write(file, after)
    typer.echo(secret)
    err.print(f"Key {name} is in {file}. It is shown this once.", highlight=False, markup=False, soft_wrap=True)


@app.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    file: FileOption = DEFAULT_FILE,
) -> None:
    """Show the keys: what each may do, and never its secret."""
    kept = _read(file)
    if as_json:
        shown = [{**msgspec.to_builtins(key), "sha256": None} for key in kept.keys]
        typer.echo(msgspec.json.encode([{k: v for k, v in key.items() if v is not None} for key in shown]))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("key", "tenant", "models", "requests/min", "tokens/min", "at once", "steers", "made", "note"):
        table.add_column(column, no_wrap=column in ("key", "made"))
    for key in kept.keys:
        limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrency)
        table.add_row(
            key.id,
            key.tenant,
            "all" if key.models is None else ", ".join(key.models),
            *("" if limit is None else str(limit) for limit in limits),
            "yes" if key.steer else "",
            f"{datetime.fromtimestamp(key.created, UTC):%Y-%m-%d}",
            key.note,
        )
    (out if out.is_terminal else Console(width=PIPE_COLUMNS)).print(table)


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, as `tracehaul keys list` shows it, or the key itself.")],
    file: FileOption = DEFAULT_FILE,
) -> None:
    """Take a key away. A running router knows within a second or two; calls in progress end by themselves."""
    name = name_of(key) or key
    with _changing(file) as kept:
        left = tuple(each for each in kept.keys if each.id != name)
        if len(left) == len(kept.keys):
            raise ClusterFault(f"{file} has no key {name[:64]}")
        _write(file, KeyFile(left))
    out.print(f"Revoked {name}.", highlight=False, markup=False)


@contextmanager
def _changing(file: Path) -> Generator[KeyFile, None, None]:
    """The file's content, which nobody else changes meanwhile."""
    try:
        handle = os.open(file.with_name(f"{file.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ClusterFault(f"cannot write {file}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield _read(file) if file.exists() else KeyFile()
    finally:
        os.close(handle)


def _read(file: Path) -> KeyFile:
    try:
        return read_keys(file.read_bytes())
    except FileNotFoundError as error:
        raise ClusterFault(f"there is no {file}; make a key with: tracehaul keys add --keys {file}") from error
    except OSError as error:
        raise ClusterFault(f"cannot read {file}: {error.strerror}") from error
    except BadKeys as error:
        raise ClusterFault(f"{file} holds no keys: {error}") from error


def _write(file: Path, content: KeyFile) -> None:
    try:
        write_whole(file, write_keys(content), private=True)
    except OSError as error:
        raise ClusterFault(f"cannot write {file}: {error.strerror}") from error


def register(to: typer.Typer) -> None:
    """Add them to the command line."""
    to.add_typer(app, name="keys")
