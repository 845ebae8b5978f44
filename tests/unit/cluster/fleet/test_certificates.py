"""New certificates, and a new CA, for a fleet: step by step, and on from where a host broke it off."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.config import ClusterConfig
from cluster.fleet import certificates
from cluster.fleet.certificates import Held, Rotation, held
from cluster.fleet.config import HostConfig
from cluster.fleet.connection import HostFault, Local
from cluster.fleet.launch import Launching
from cluster.fleet.opened import Opened
from cluster.fleet.progress import Progress
from cluster.fleet.survey import Hand, Survey
from cluster.hosts.certificates import HostCertificates, certificates_of
from cluster.plan import NodeSpec
from cluster.rundir import ClusterFault, RunDir
from cluster.security import ca
from cluster.security.config import SecurityConfig
from cluster.security.laying import files_for
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import mark_of

NAMES = ("a", "b")
NODES = tuple(NodeSpec(f"store-{name}-0", "store", host=name, address=f"10.0.0.{n}") for n, name in enumerate(NAMES))


class Fleet:
    """Folders for hosts, whose nodes use at once what lies there, but for those that are frozen."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.authority = folder / "authority"
        self.config = ClusterConfig(security=SecurityConfig("mtls", "auth", False, str(self.authority)))
        hosts = [HostConfig(name, home=str(folder / name)) for name in NAMES]
        self.hands = [Hand(host, Local()) for host in hosts]
        self.frozen: dict[str, str] = {}
        self.gone: set[str] = set()
        for hand in self.hands:
            secrets = folder / hand.host.name / "run" / "secrets"
            secrets.mkdir(parents=True)
            nodes = [spec for spec in NODES if spec.host == hand.host.name]
            for name, data in files_for(self.config, hand.host.name, nodes, b"", now_s=clock.wall_s()).items():
                (secrets / name).write_bytes(data)
        monkeypatch.setattr(certificates, "told_by", self.told_by)
        monkeypatch.setattr(certificates, "USED_S", 0.05)
        monkeypatch.setattr(certificates, "POLL_S", 0.01)

    async def told_by(self, hand: Hand) -> HostCertificates:
        if hand.host.name in self.gone:
            raise HostFault("no route to host")
        there = certificates_of(RunDir(Path(hand.run_dir)), [])
        used = self.frozen.get(hand.host.name) or mark_of(there.ca.encode(), there.cert.encode())
        return HostCertificates(there.ca, there.cert, {f"store-{hand.host.name}-0": used})

    def held(self) -> list[Held]:
        found = [held(asyncio.run(self.told_by(hand))) for hand in self.hands]
        return [each for each in found if each is not None]

    def rotate(self, *, ca_too: bool) -> None:
        async def main() -> None:
            shown = Progress(Console(quiet=True), NAMES, None)
            await Rotation(self.config, self.hands, NODES, shown).run(ca_too=ca_too)

        asyncio.run(main())


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    return Fleet(tmp_path, monkeypatch)


def test_who_has_what(fleet: Fleet) -> None:
    before = fleet.held()
    assert [each.names for each in before] == [("store-a-0",), ("store-b-0",)]
    assert all(each.trusts == (each.issuer,) and not each.late for each in before)
    assert all(80 < (each.until_s - clock.wall_s()) / 86400 < 91 for each in before)
    assert held(HostCertificates("", "", {})) is None
    fleet.rotate(ca_too=False)
    after = fleet.held()
    assert [each.issuer for each in after] == [each.issuer for each in before]
    assert all(new.until_s >= old.until_s for new, old in zip(after, before, strict=True))


def test_a_new_ca_is_alone_in_the_end(fleet: Fleet) -> None:
    old = fleet.held()[0].issuer
    fleet.rotate(ca_too=True)
    after = fleet.held()
    assert {each.issuer for each in after} != {old}
    assert all(each.trusts == (each.issuer,) for each in after)
    assert len(ca.trusted(fleet.authority)) == 1


@pytest.mark.parametrize("fault", ["frozen", "gone"])
def test_a_step_that_is_not_complete_everywhere_is_not_followed_by_the_next(fleet: Fleet, fault: str) -> None:
    old = fleet.held()[0].issuer
    if fault == "frozen":
        fleet.frozen["b"] = "what it had"
    else:
        fleet.gone.add("b")
    cas: list[bytes] = []
    for _ in range(2):  # begun again it makes no third CA
        with pytest.raises(ClusterFault, match=r"b: .*(did not take|no route).*run this again"):
            fleet.rotate(ca_too=True)
        cas = ca.trusted(fleet.authority)
        assert len(cas) == 2
        mine = held(asyncio.run(fleet.told_by(fleet.hands[0])))
        assert mine is not None
        assert mine.issuer == old, "no certificate of the new CA before all trust it"
        assert len(mine.trusts) == 2
    fleet.frozen.clear()
    fleet.gone.clear()
    fleet.rotate(ca_too=True)
    after = fleet.held()
    assert {each.issuer for each in after} != {old}
    assert all(each.trusts == (each.issuer,) for each in after)
    assert ca.trusted(fleet.authority) == cas[:1]


def test_a_change_of_the_ca_that_was_broken_off_is_not_passed_over(fleet: Fleet) -> None:
    old = fleet.held()[0].issuer
    ca.rotate(fleet.authority, now_s=clock.wall_s())
    fleet.frozen["b"] = "what it had"
    with pytest.raises(ClusterFault, match=r"b: .*did not take"):
        fleet.rotate(ca_too=False)
    assert [each.issuer for each in fleet.held()] == [old, old], "no certificate of the new CA before all trust it"
    fleet.frozen.clear()
    fleet.rotate(ca_too=False)
    after = fleet.held()
    assert {len(each.trusts) for each in after} == {2}, "which `rotate --ca` alone ends"
    assert {each.issuer for each in after} == {each.trusts[0] for each in after} != {old}


def test_nothing_is_launched_while_the_ca_is_being_replaced(fleet: Fleet) -> None:
    class Passed(Exception):
        """It went on to look at the host."""

    class Seen(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            raise Passed

    plan: Any = SimpleNamespace(config=fleet.config)
    launching = Launching(plan, Survey(Seen(), {}, ()), {}, {})

    def prepare() -> None:
        asyncio.run(launching.prepare(fleet.hands[0], lambda line: None))

    with pytest.raises(Passed):
        prepare()
    ca.rotate(fleet.authority, now_s=clock.wall_s())
    with pytest.raises(HostFault, match="the CA is being replaced: finish `tracehaul certificates rotate --ca` first"):
        prepare()
    fleet.rotate(ca_too=True)
    with pytest.raises(Passed):
        prepare()


def test_a_node_that_runs_and_is_not_in_the_file_keeps_its_name(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fleet.held()
    opened = Opened(fleet.config, fleet.hands)
    monkeypatch.setattr(certificates, "place", lambda *_: NODES[:1])
    for replaced, way in ((False, "launch first"), (True, "put it back until the CA is replaced")):
        if replaced:
            ca.rotate(fleet.authority, now_s=clock.wall_s())
        told = f"b: store-b-0 is not in the file any more: {way}; nothing was changed"
        with pytest.raises(ClusterFault, match=f"^{told}$"):
            asyncio.run(certificates.rotate(opened, Console(quiet=True), ca_too=replaced))
    assert fleet.held() == before
    monkeypatch.setattr(certificates, "place", lambda *_: NODES)
    asyncio.run(certificates.rotate(opened, Console(quiet=True), ca_too=False))
