"""Units of systemd: what is in them, and that systemd has nothing to say about them."""

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cluster.hosts.managers import Facts, choose
from cluster.hosts.orders import NodeReport, Order
from cluster.hosts.systemd import node_report
from cluster.hosts.units import TARGET, Site, owner, services_of, unit_files
from cluster.rundir import ClusterFault
from tests.unit.cluster.hosts.plans import order

NODES = ["router-a-0", "store-a-0", "prefill-a-0", "decode-a-0"]


def site(run_path: str = "/srv/tracehaul/run", **said: object) -> Site:
    commands = {
        name: [sys.executable, "-m", "cluster.cli", "node", name] for name in (*NODES, "decode-b-0", "store-b-0")
    }
    return Site(run_path, "1.0", commands, **({"version": 252} | said))  # type: ignore[arg-type]


def lines(text: str) -> list[str]:
    return text.splitlines()


def test_every_node_has_a_service_and_the_target_names_them():
    files = unit_files(order(), site())
    services = [f"tracehaul-{name}.service" for name in NODES]
    assert sorted(files) == sorted([*services, TARGET])
    assert services_of(files[TARGET]) == services
    assert owner(files[TARGET]) == "/srv/tracehaul/run"
    assert owner("") == ""


def test_a_service_is_restarted_with_its_limits_but_not_when_it_is_fenced():
    store = lines(unit_files(order(), site(user="serve"))["tracehaul-store-a-0.service"])
    for line in (
        "User=serve",
        "Restart=always",
        "RestartSec=1",
        "RestartPreventExitStatus=4",
        "StartLimitIntervalSec=300",
        "StartLimitBurst=6",
        "TimeoutStopSec=15",
        "KillMode=mixed",
        "LimitMEMLOCK=infinity",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        'ReadWritePaths="/srv/tracehaul/run"',
        f"MemoryMax={(64 << 20) + (8 << 20) + (2 << 30)}",
    ):
        assert line in store
    assert not any("MemoryDenyWriteExecute" in line or line.startswith("RestartSteps") for line in store)
    decode = unit_files(order(), site())["tracehaul-decode-a-0.service"]
    assert "MemoryMax" not in decode  # nobody knows what a model's code takes
    assert "User=" not in decode


def test_the_delay_grows_where_systemd_can():
    store = lines(unit_files(order(), site(version=254))["tracehaul-store-a-0.service"])
    assert "RestartSteps=5" in store
    assert "RestartMaxDelaySec=30" in store


def test_those_who_let_work_in_stop_first():
    files = unit_files(order(), site())
    router = lines(files["tracehaul-router-a-0.service"])
    assert {f"After=tracehaul-{name}.service" for name in ("store-a-0", "prefill-a-0", "decode-a-0")} <= set(router)
    assert "After=tracehaul-store-a-0.service" in lines(files["tracehaul-decode-a-0.service"])
    store = lines(files["tracehaul-store-a-0.service"])
    assert not any(line.startswith("After=tracehaul") for line in store)


def test_folders_that_nodes_need_stay_in_sight():
    def said(run_path: str, **more: object) -> list[str]:
        return lines(unit_files(order(), site(run_path, **more))["tracehaul-store-a-0.service"])

    assert {"ProtectHome=yes", "PrivateTmp=yes"} <= set(said("/srv/run"))
    assert "ProtectHome=read-only" in said("/home/serve/run")
    assert "ProtectHome=read-only" in said("/srv/run", read=("/root/models",))
    assert "PrivateTmp=no" in said("/tmp/run")
    assert 'ReadWritePaths="-/disk/tier"' in said("/srv/run", writable=("/disk/tier",))


def test_a_users_manager_is_asked_for_nothing_that_it_cannot_do():
    text = unit_files(order(), site(of_user=True, user="serve"))["tracehaul-store-a-0.service"]
    assert not any(word in text for word in ("User=", "ProtectSystem", "PrivateTmp", "network-online"))
    assert "WantedBy=default.target" in unit_files(order(), site(of_user=True))[TARGET]


@pytest.mark.parametrize("of_user", [False, True])
@pytest.mark.parametrize("run_path", ["/srv/tracehaul/run", '/srv/a b%c"d$e\\f'])
def test_systemd_has_nothing_to_say(tmp_path: Path, of_user: bool, run_path: str):
    """``systemd-analyze verify`` returns 0 also where it warns of keys that it does not know: it must be silent."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    told = [
        verify(tmp_path / host, unit_files(order(host), site(run_path, of_user=of_user, environment_file=run_path)))
        for host in ("a", "b")
    ]
    assert told == ["", ""]


def test_systemd_does_say_what_is_wrong(tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    files = unit_files(order(), site())
    name = "tracehaul-store-a-0.service"
    assert "NoSuchKey" in verify(tmp_path / "wrong", files | {name: files[name] + "NoSuchKey=1\n"})


def verify(folder: Path, files: dict[str, str]) -> str:
    """What ``systemd-analyze verify`` says, but for what it says of this machine."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(folder / name) for name in files)],
        capture_output=True,
        text=True,
        env={"SYSTEMD_UNIT_PATH": f"{folder}:", "PATH": "/usr/bin:/bin", "SYSTEMD_LOG_LEVEL": "warning"},
        timeout=60,
    )
    return "".join(line for line in (done.stdout + done.stderr).splitlines(True) if "tracehaul" in line)


# --- what systemd says of a service -------------------------------------------------------------------------

STORE = NodeReport("store-0", "store", "stopped")


@pytest.mark.parametrize(
    ("shown", "phase", "state", "exit_code"),
    [
        ({}, "", "stopped", None),
        ({"ActiveState": "active", "SubState": "running", "MainPID": "7"}, "ready", "running", None),
        ({"ActiveState": "active", "SubState": "running", "MainPID": "7"}, "joining", "starting", None),
        ({"ActiveState": "deactivating", "SubState": "stop-sigterm", "MainPID": "7"}, "stopping", "running", None),
        (
            {"ActiveState": "activating", "SubState": "auto-restart", "ExecMainCode": "2", "ExecMainStatus": "9"},
            "ready",
            "backoff",
            -9,
        ),
        (
            {"ActiveState": "activating", "SubState": "auto-restart", "ExecMainCode": "1", "ExecMainStatus": "3"},
            "ready",
            "faulty",
            3,
        ),
        ({"ActiveState": "failed", "ExecMainCode": "1", "ExecMainStatus": "4"}, "", "fenced", 4),
        ({"ActiveState": "failed", "ExecMainCode": "1", "ExecMainStatus": "1"}, "", "given up", 1),
        ({"ActiveState": "inactive", "ExecMainCode": "1", "ExecMainStatus": "0"}, "ready", "stopped", 0),
    ],
)
def test_states_are_named_as_our_own_supervisor_names_them(
    shown: dict[str, str], phase: str, state: str, exit_code: int | None
):
    said = node_report(STORE, shown | {"StateChangeTimestampMonotonic": "4000000"}, phase, 10.0)
    assert (said.state, said.exit_code, said.since_s) == (state, exit_code, 6.0)
    assert said.pid == (7 if "MainPID" in shown else None)


# --- who supervises ------------------------------------------------------------------------------------------

NOTHING = Facts(booted=False, root=False, user_manager=False, lingers=False)


def test_a_host_is_supervised_by_what_it_has():
    assert choose("auto", NOTHING) == "own"
    assert choose("auto", NOTHING._replace(root=True)) == "own"
    assert choose("auto", NOTHING._replace(booted=True)) == "own"
    assert choose("auto", NOTHING._replace(booted=True, root=True, user_manager=True, lingers=True)) == "systemd"
    assert choose("auto", NOTHING._replace(booted=True, user_manager=True, lingers=True)) == "systemd-user"
    # It would end with the login that launched.
    assert choose("auto", NOTHING._replace(user_manager=True)) == "own"
    assert choose("own", NOTHING._replace(booted=True, root=True)) == "own"


@pytest.mark.parametrize(
    ("asked", "facts", "why"),
    [
        ("systemd", NOTHING, "not run by systemd"),
        ("systemd", NOTHING._replace(booted=True), "only root"),
        ("systemd-user", NOTHING._replace(booted=True), "no systemd of this user"),
        ("systemd-user", NOTHING._replace(user_manager=True), "enable-linger"),
    ],
)
def test_what_is_not_here_is_refused_in_a_line(asked: str, facts: Facts, why: str):
    with pytest.raises(ClusterFault, match=why):
        choose(msgspec.convert(asked, Order.__annotations__["supervisor"]), facts)
