"""Reads a config: a TOML file, then the command line on top; strict, and each error says where."""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cluster.config import ClusterConfig, is_loopback
from cluster.fleet.config import LOCAL, HostConfig, WorkerCount
from cluster.rundir import ClusterFault
from kvstore.tiers.objects import parse_url

_TABLE = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")
_PART = re.compile(r"[\w-]+|\"[^\"]*\"|'[^']*'")
_PLACE = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>\$[^`]*)`)?")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> ClusterConfig:
    """The config in ``path`` (TOML), with ``overrides`` on top: dotted names, those that are None left out.

    Raises:
        ClusterFault: the file cannot be read, or names or holds what no config has.
    """
    merged: dict[str, Any] = {}
    text = ""
    if path is not None:
        try:
            text = path.read_text()
            merged = tomllib.loads(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ClusterFault(f"cannot read the config {path}: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ClusterFault(f"{path} is not valid TOML: {error}") from error
    for name, value in overrides.items():
        if value is None:
            continue
        section = merged
        *parents, leaf = name.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ClusterFault(f"{path}: `{parent}` must be a section")
        section[leaf] = value
    try:
        _check_counts(merged)
        config = msgspec.convert(merged, ClusterConfig)
        _check_names(config)
        if config.directory.etcd and not config.name:  # a name that is made up is another for each file
            raise msgspec.ValidationError("with etcd a cluster has a `name` of its own - at `$.directory.etcd`")
        if config.database and not config.name:  # others may have rows there
            raise msgspec.ValidationError("with `database` a cluster has a `name` of its own - at `$.database`")
        for number, host in enumerate(config.hosts):
            _check_host(number, host, config)
        _check_roles(config)
        _check_files(config)
        if config.security.proves_data and config.security.control is None and not config.hosts:
            raise msgspec.ValidationError(
                f'data = "{config.security.data}" needs control = "mtls" - at `$.security.data`'
            )
    except msgspec.ValidationError as error:
        raise ClusterFault(_wrong(error, path, text)) from error
    check_open(config)
    return _placed(config)


def _wrong(error: msgspec.ValidationError, path: Path | None, text: str) -> str:
    """One line: what is wrong, and where, with the line of the file if it is there."""
    if path is None:
        return f"the config is wrong: {error}"
    found = _PLACE.fullmatch(str(error))
    assert found is not None
    place = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]$]+", found["path"] or "")]
    unknown = _UNKNOWN.match(found["what"])
    line = line_of(text, [*place, *([unknown[1]] if unknown else [])])
    where = f"{path}, line {line}" if line else f"in {path} or on the command line"
    return f"the config is wrong ({where}): {error}"


def line_of(text: str, place: Sequence[str | int]) -> int | None:
    """The line of a TOML file, from 1, where a key is said, or else the innermost table or list that would hold it.

    ``place``: names of keys, and numbers of the elements of lists.
    """
    lines: dict[tuple[str | int, ...], int] = {}
    numbers: Counter[tuple[str | int, ...]] = Counter()
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if head := _TABLE.fullmatch(line):
            table = ()
            parts = [part.strip("\"'") for part in _PART.findall(head[2])]
            for at, part in enumerate(parts):
                table += (part,)
                last = at == len(parts) - 1
                if head[1] == "[[" and last:
                    lines.setdefault(table, number)
                    table += (numbers[table],)
                    numbers[table[:-1]] += 1
                elif numbers[table]:  # a table within the latest of a list
                    table += (numbers[table] - 1,)
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            said = table
            for part in _PART.findall(key[1]):
                said += (part.strip("\"'"),)
                lines.setdefault(said, number)
    for length in range(len(place), 0, -1):
        if (line := lines.get(tuple(place[:length]))) is not None:
            return line
    return None


def _check_counts(said: Mapping[str, Any]) -> None:
    """Raises ValidationError if numbers of workers are said in two places, or a model is."""
    hosts = bool(said.get("hosts"))
    nodes = said["nodes"] if isinstance(said.get("nodes"), dict) else {}
    pools = said["pools"] if isinstance(said.get("pools"), dict) else {}
    if hosts and nodes:
        raise msgspec.ValidationError("with [[hosts]] each host says its own nodes - at `$.nodes`")
    for name, pool in pools.items():
        for role in ("prefill", "decode"):
            if hosts and isinstance(pool, dict) and role in pool:
                raise msgspec.ValidationError(
                    f"with [[hosts]] each host says its own nodes - at `$.pools.{name}.{role}`"
                )
    for name in ("model", "prefill", "decode"):
        if pools and (name in said or name in nodes):
            place = name if name in said else f"nodes.{name}"
            raise msgspec.ValidationError(f"with [pools] each pool says its own {name} - at `$.{place}`")


def _check_names(config: ClusterConfig) -> None:
    served = [pool.serves or name for name, pool in config.pools.items()]
    if len(set(served)) < len(served):
        raise msgspec.ValidationError(f"two pools serve one name ({', '.join(sorted(served))}) - at `$.pools`")
    urls = [webhook.url for webhook in config.webhooks]
    if len(set(urls)) < len(urls):
        raise msgspec.ValidationError("two webhooks have one url - at `$.webhooks`")
    seen: set[str] = set()
    for number, host in enumerate(config.hosts):
        if host.name in seen:
            raise msgspec.ValidationError(f"two hosts are called {host.name} - at `$.hosts[{number}].name`")
        seen.add(host.name)


def _check_host(number: int, host: HostConfig, config: ClusterConfig) -> None:
    place = f"$.hosts[{number}]"
    for role in ("prefill", "decode"):
        count: WorkerCount = getattr(host.nodes, role)
        if isinstance(count, dict) != bool(config.pools) and count != 0:
            how = "by pool: { NAME = 1 }" if config.pools else "a number: there are no [pools]"
            raise msgspec.ValidationError(f"a host's {role} workers are said as {how} - at `{place}.nodes.{role}`")
        by_pool = count if isinstance(count, dict) else {"": count}
        if unknown := [name for name in by_pool if name and name not in config.pools]:
            raise msgspec.ValidationError(f"there is no pool {unknown[0]} - at `{place}.nodes.{role}`")
        if "per-gpu" in by_pool.values() and not host.gpus:
            raise msgspec.ValidationError(f"{host.name} has no GPUs: say gpus = N - at `{place}.nodes.{role}`")
    if isinstance(host.model, dict) != bool(config.pools) and host.model:
        raise msgspec.ValidationError(f"with [pools] a host says where each one's model is - at `{place}.model`")
    if host.kind and host.kind not in config.prices:
        raise msgspec.ValidationError(f"[prices] has no {host.kind} - at `{place}.kind`")
    if host.target == LOCAL and len(config.hosts) > 1 and not host.address:
        raise msgspec.ValidationError(f"say by which address the others reach {host.name} - at `{place}`")


def _check_roles(config: ClusterConfig) -> None:
    """Raises ValidationError if a role that every cluster needs is on no host."""
    if not config.hosts:
        return
    nodes = [host.nodes for host in config.hosts]
    missing = [role for role in ("router", "store") if not any(getattr(each, role) for each in nodes)]
    for pool in config.pools or ("",):
        counts = [each.decode.get(pool, 0) if isinstance(each.decode, dict) else each.decode for each in nodes]
        if not any(counts):
            missing.append(f"decode worker of {pool}" if pool else "decode worker")
    if missing:
        raise msgspec.ValidationError(f"no host has a {missing[0]} - at `$.hosts`")


def _check_files(config: ClusterConfig) -> None:
    if not config.api.files_url:
        return
    if config.api.files_dir:
        raise msgspec.ValidationError("files are in a folder or in a bucket, not both - at `$.api.files_url`")
    try:
        parse_url(config.api.files_url)
    except ValueError as error:
        raise msgspec.ValidationError(f"{error} - at `$.api.files_url`") from None


def _placed(config: ClusterConfig) -> ClusterConfig:
    """With the API's files named so that nodes find them, which run elsewhere."""
    names = ("keys_file", "tls_cert", "tls_key")
    placed = {name: str(Path(said).absolute()) for name in names if (said := getattr(config.api, name))}
    return msgspec.structs.replace(config, api=msgspec.structs.replace(config.api, **placed)) if placed else config


def check_open(config: ClusterConfig) -> None:
    """Raises ClusterFault if the API would be there for everybody, and nobody said so."""
    api = config.api
    if not (api.keys_file or api.open or is_loopback(config.host)):
        raise ClusterFault(
            f"{config.host} can be reached from elsewhere, and the API asks nobody for a key: make some with "
            "`tracehaul keys add` and say --keys FILE, or say --open"
        )
    if api.tls_key and not api.tls_cert:
        raise ClusterFault("--tls-key needs the certificate too: --tls-cert")
