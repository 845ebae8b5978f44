"""``tracehaul keys``, and what `up` asks for before it opens the API to others."""

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.api import Api, make_operator_key, new_secret, operator_key
from cluster.cli import commands
from cluster.config import is_loopback
from cluster.config_file import load_config
from cluster.launch import check_access
from cluster.rundir import ClusterFault, RunDir
from router.http.keys import Keyring, read_keys
from tracehaul.runtime.durable import write_whole


def keys(*args: str) -> str:
    made = CliRunner().invoke(commands("keys"), ["keys", *args])
    if isinstance(made.exception, ClusterFault):
        raise made.exception
    assert made.exit_code == 0, made.output
    return made.stdout


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    limits = ("--requests-per-minute", "5", "--tokens-per-minute", "600", "--concurrency", "2")
    secret = keys("add", "--tenant", "acme", "--model", "m", *limits, "--note", "of Ann", "--keys", str(file)).strip()
    other = keys("add", "--steer", "--keys", str(file)).strip()
    assert secret != other
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret[-43:] not in file.read_text()
    kept = read_keys(file.read_bytes()).keys
    found = Keyring(kept).find(secret)
    assert found is not None
    assert (found.tenant, found.models, found.steer, found.note) == ("acme", ("m",), False, "of Ann")
    assert (found.requests_per_minute, found.tokens_per_minute, found.concurrency) == (5, 600, 2)
    assert found.created > 10**9
    steers = Keyring(kept).find(other)
    assert steers is not None
    assert steers.steer
    listed = keys("list", "--keys", str(file))
    assert found.id in listed
    assert "acme" in listed
    assert secret[-43:] not in listed
    assert found.sha256 not in listed
    told = json.loads(keys("list", "--json", "--keys", str(file)))
    assert [each["id"] for each in told] == [found.id, steers.id]
    assert all("sha256" not in each for each in told)
    keys("revoke", found.id, "--keys", str(file))
    assert Keyring(read_keys(file.read_bytes()).keys).find(secret) is None
    keys("revoke", other, "--keys", str(file))  # by the key itself
    assert read_keys(file.read_bytes()).keys == ()


def test_what_is_no_key_and_no_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(ClusterFault, match="keys add"):
        keys("list", "--keys", str(file))
    with pytest.raises(ClusterFault, match="tenant"):
        keys("add", "--tenant", "a/b", "--keys", str(file))
    with pytest.raises(ClusterFault, match="concurrency"):
        keys("add", "--concurrency", "0", "--keys", str(file))
    assert not file.exists()
    keys("add", "--keys", str(file))
    with pytest.raises(ClusterFault, match="no key 00000000"):
        keys("revoke", "00000000", "--keys", str(file))
    file.write_text("{")
    with pytest.raises(ClusterFault, match="holds no keys"):
        keys("add", "--keys", str(file))
    assert file.read_text() == "{", "what cannot be read is not overwritten"


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"old")
    file.chmod(0o644)
    write_whole(file, b"new", private=True)
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", 0o600)
    assert list(tmp_path.iterdir()) == [file]


def test_a_launch_has_a_key_of_its_own_that_goes_with_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    assert operator_key(run) is None
    make_operator_key(run)
    kept = operator_key(run)
    assert kept is not None
    assert kept.steer
    assert Keyring([kept]).find(run.operator_key.read_text()) == kept
    assert stat.S_IMODE(run.operator_key.stat().st_mode) == 0o600
    run.clear()
    assert operator_key(run) is None
    assert len({new_secret() for _ in range(100)}) == 100


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org", ""])
def test_without_keys_others_are_kept_out(host: str, tmp_path: Path) -> None:
    assert not is_loopback(host)
    with pytest.raises(ClusterFault, match="--keys FILE, or say --open"):
        load_config(None, {"host": host})
    assert load_config(None, {"host": host, "api.open": True}).host == host
    file = str(tmp_path / "keys.json")
    assert load_config(None, {"host": host, "api.keys_file": file}).api.keys_file == file


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_keys(host: str) -> None:
    assert load_config(None, {"host": host}).host == host


def test_files_are_named_so_that_nodes_find_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    api = load_config(None, {"api.keys_file": "k.json", "api.tls_cert": "c.pem", "api.tls_key": "k.pem"}).api
    assert (api.keys_file, api.tls_cert) == (str(tmp_path / "k.json"), str(tmp_path / "c.pem"))
    with pytest.raises(ClusterFault, match="--tls-cert"):
        load_config(None, {"api.tls_key": "k.pem"})


def test_a_launch_says_what_it_cannot_read(tmp_path: Path) -> None:
    missing, wrong = tmp_path / "missing", tmp_path / "wrong"
    wrong.write_text("x")
    for name, path, why in (
        ("api.keys_file", missing, "keys add"),
        ("api.keys_file", wrong, "holds no keys"),
        ("api.tls_cert", missing, "certificate"),
        ("api.tls_cert", wrong, "certificate"),
    ):
        with pytest.raises(ClusterFault, match=why):
            check_access(load_config(None, {name: str(path)}))
    check_access(load_config(None, {}))


def test_nobody_answers() -> None:
    with pytest.raises(ClusterFault, match="no router answers at"):
        Api("http://127.0.0.1:9", "key").get("/cluster", 1.0)
