"""A cluster's CA, and the secrets beside a plan."""

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from cluster.config import ClusterConfig
from cluster.plan import NodeSpec
from cluster.rundir import ClusterFault
from cluster.security.ca import ensure_ca, issue, retire, rotate
from cluster.security.config import SecurityConfig
from cluster.security.expiry import expires_s, watching
from cluster.security.laying import ensure_token, files_for, lay
from cluster.security.secrets import read_tokens
from tracehaul.runtime import clock

DAY_S = 86400.0


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    authority, secrets = tmp_path / "authority", tmp_path / "secrets"
    ensure_ca(authority, "test", now_s=clock.wall_s())
    lay(secrets, issue(authority, "a", [], now_s=clock.wall_s()))
    token = ensure_token(secrets)
    for path in (authority, secrets):
        assert path.stat().st_mode & 0o077 == 0
        for file in path.iterdir():
            if file.name != "lock":
                assert file.stat().st_mode & 0o077 == 0, file
    assert ensure_token(secrets) == token
    file = secrets / "join.token"
    file.chmod(0o644)
    with pytest.raises(ClusterFault, match="others may read"):
        read_tokens(secrets)
    file.chmod(0o600)
    file.write_text("\n")
    with pytest.raises(ClusterFault, match="no join token"):
        read_tokens(secrets)
    assert 89 * DAY_S < expires_s(secrets) - clock.wall_s() < 91 * DAY_S


def test_a_certificate_that_ends_soon_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ensure_ca(tmp_path, "test", now_s=clock.wall_s())

    async def watch() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(watching(tmp_path), 0.1)

    for days, said in ((90, False), (20, True)):
        lay(tmp_path, issue(tmp_path, "a", [], now_s=clock.wall_s(), days=days))
        asyncio.run(watch())
        assert ("the certificate ends soon: launch again" in caplog.messages) is said


def test_what_a_fleets_host_gets(tmp_path: Path) -> None:
    """Its own certificate, of the CA that it trusts already, or nothing."""
    security = SecurityConfig(control="mtls", token=True, authority=str(tmp_path / "authority"))
    config = ClusterConfig(name="fleet", security=security)
    nodes = (NodeSpec("store-a-0", "store", host="a", address="10.0.0.1", data_address="10.1.0.1"),)
    first = files_for(config, "a", nodes, b"", now_s=clock.wall_s())
    assert list(first) == ["ca.pem", "node.key", "node.pem", "join.token"], "trust comes first"
    cert = x509.load_pem_x509_certificate(first["node.pem"])
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "10.1.0.1"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["tracehaul:store-a-0"]
    rotate(tmp_path / "authority", now_s=clock.wall_s())
    second = files_for(config, "a", nodes, first["ca.pem"], now_s=clock.wall_s())
    assert second["ca.pem"].endswith(first["ca.pem"])
    assert second["join.token"] == first["join.token"]
    other = msgspec.structs.replace(security, authority=str(tmp_path / "other"))
    stranger = msgspec.structs.replace(config, security=other)
    with pytest.raises(ClusterFault, match="trusts another CA"):
        files_for(stranger, "a", nodes, second["ca.pem"], now_s=clock.wall_s())


def test_a_ca_is_made_once_and_replaced_one_at_a_time(tmp_path: Path) -> None:
    now_s = clock.wall_s()
    with pytest.raises(ClusterFault, match="there is no CA"):
        issue(tmp_path, "a", [], now_s=now_s)
    first = ensure_ca(tmp_path, "one", now_s=now_s)
    assert ensure_ca(tmp_path, "one", now_s=now_s) == first
    with pytest.raises(ClusterFault, match="the CA of cluster one, not of two"):
        ensure_ca(tmp_path, "two", now_s=now_s)
    both = rotate(tmp_path, now_s=now_s)
    assert both.endswith(first)
    assert len(both) > len(first)
    with pytest.raises(ClusterFault, match="is being replaced already"):
        rotate(tmp_path, now_s=now_s)
    assert both == retire(tmp_path) + first
    assert retire(tmp_path) == ensure_ca(tmp_path, "one", now_s=now_s)
    for name, addresses in (("", []), ("x" * 65, []), ("a", ["höst"])):
        with pytest.raises(ClusterFault):
            issue(tmp_path, name, addresses, now_s=now_s)
    (tmp_path / "authority.pem").write_bytes(both)
    with pytest.raises(ClusterFault, match="cannot be used"):
        ensure_ca(tmp_path, "one", now_s=now_s)
