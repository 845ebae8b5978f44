"""What of ``[security]`` a fleet has where its file does not say, and what it may not be changed to while it runs."""

import asyncio
from pathlib import Path

import pytest

from cluster.config_file import load_config
from cluster.fleet.command import slurm
from cluster.fleet.operations import opened
from cluster.rundir import ClusterFault
from cluster.security.config import SecurityConfig, clash, decided

HOST = """\
[[hosts]]
name = "{name}"
ssh = "{ssh}"
address = "10.0.0.{n}"
nodes = {{ router = 1, store = 1, decode = 1 }}
"""


def decided_of(folder: Path, security: str, *ssh: str) -> SecurityConfig:
    """By a file with hosts at these places."""
    file = folder / "cluster.toml"
    hosts = [HOST.format(name=f"h{n}", ssh=to, n=n) for n, to in enumerate(ssh)]
    file.write_text(f"[security]\n{security}\n" + "".join(hosts))

    async def main() -> SecurityConfig:
        async with opened(file) as fleet:
            return fleet.config.security

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("said", "control", "data", "token"),
    [
        ("", "mtls", "auth", True),
        ('control = "mtls"', "mtls", "auth", True),
        ('data = "tls"', "mtls", "tls", True),
        ('data = "plain"', "mtls", "plain", True),
        ("token = false", "mtls", "auth", False),
        ('control = "plain"', "plain", "plain", False),
        ('control = "plain"\ntoken = true', "plain", "plain", True),
    ],
)
def test_a_fleet_shows_certificates_unless_it_says_that_it_does_not(
    tmp_path: Path, said: str, control: str, data: str, token: bool
) -> None:
    for hosts in (("ops@a", "ops@b"), ("ops@a",), ("local", "ops@b")):
        security = decided_of(tmp_path, said, *hosts)
        assert (security.control, security.data, security.token) == (control, data, token)


def test_one_machine_is_plain_unless_it_says_otherwise(tmp_path: Path) -> None:
    security = decided_of(tmp_path, "", "local")
    assert (security.control, security.data, security.token) == ("plain", "plain", False)
    assert not load_config(None, {}).security.secrets
    assert decided(SecurityConfig("mtls"), fleet=False) == SecurityConfig("mtls", "plain", False)


@pytest.mark.parametrize("said", ['data = "auth"', 'data = "tls"\ncontrol = "plain"'])
def test_data_is_proven_by_the_control_planes_certificates(tmp_path: Path, said: str) -> None:
    file = tmp_path / "one.toml"
    file.write_text(f"[security]\n{said}\n")
    with pytest.raises(ClusterFault, match=r"line \d\): data = .* needs control = \"mtls\""):
        load_config(file, {})


def test_what_runs_and_what_is_launched_must_be_able_to_speak() -> None:
    old = SecurityConfig("plain", "plain", False)
    fleet = decided(SecurityConfig(), fleet=True)
    assert clash(old, old) == clash(fleet, fleet) == clash(SecurityConfig(), old) == ""
    assert 'control = "plain", data = "plain", token = false: say that' in clash(old, fleet)
    assert 'data = "auth"' in clash(fleet, SecurityConfig("mtls", "tls", True))


@pytest.mark.parametrize("said", ['control = "mtls"', 'data = "auth"', "token = true"])
def test_a_batch_script_carries_no_secrets(tmp_path: Path, said: str) -> None:
    decided_of(tmp_path, said, "ops@a")
    with pytest.raises(ClusterFault, match="carries no certificates and no token"):
        slurm(tmp_path / "cluster.toml")
