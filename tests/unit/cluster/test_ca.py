"""A cluster's CA, and the secrets beside a plan."""

from pathlib import Path

import pytest

from cluster.rundir import ClusterFault
from cluster.security.ca import ensure_ca, issue, retire, rotate
from cluster.security.laying import ensure_token, expires_s, lay
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
