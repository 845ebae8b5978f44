"""Who of a fleet has which certificate until when, and giving all of them new ones, or a new CA, while they serve.

Each step is complete on every host, and used by every node that runs there, before the next one begins; one that is
broken off is begun again by the same command, and goes on where it ended.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from rich.console import Console

from cluster.config import ClusterConfig
from cluster.fleet.connection import HostFault
from cluster.fleet.install import put
from cluster.fleet.opened import Opened
from cluster.fleet.placing import place
from cluster.fleet.progress import Progress, progress
from cluster.fleet.survey import Hand, addresses_of, whole
from cluster.hosts.certificates import HostCertificates
from cluster.plan import NodeSpec
from cluster.rundir import ClusterFault
from cluster.security import ca
from cluster.security.laying import authority_of, files_for, replacing
from cluster.security.secrets import FOLDER
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import CA_FILE, NAME_SCHEME, mark_of

USED_S = 30.0
"""By then a node that is well uses what lies there: it looks once a second."""
POLL_S = 0.5
NAME_CHARS = 8
"""Of a CA's fingerprint, for people."""


class Held(NamedTuple):
    """What a host has, and whether those who run there use it."""

    names: tuple[str, ...]
    """Nodes that its certificate is of."""
    until_s: float
    """Wall time."""
    issuer: str
    """Of its certificate: the CA, by the beginning of its fingerprint; empty: none that it trusts itself."""
    trusts: tuple[str, ...]
    late: tuple[str, ...]
    """Nodes that run, and use something else."""
    running: tuple[str, ...]


def held(told: HostCertificates) -> Held | None:
    """What a host's answer says; None: it has no certificate. Pure.

    Raises:
        ValueError: it has what is none.
    """
    if not told.cert or not told.ca:
        return None
    cert = x509.load_pem_x509_certificate(told.cert.encode())
    cas = x509.load_pem_x509_certificates(told.ca.encode())
    issuer = next((name_of(each) for each in cas if each.subject == cert.issuer), "")
    uris = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.UniformResourceIdentifier
    )
    mark = mark_of(told.ca.encode(), told.cert.encode())
    late = tuple(name for name, used in told.uses.items() if used != mark)
    names = tuple(uri.removeprefix(NAME_SCHEME) for uri in uris)
    return Held(names, cert.not_valid_after_utc.timestamp(), issuer, tuple(map(name_of, cas)), late, tuple(told.uses))


def name_of(cert: x509.Certificate) -> str:
    """A CA, for people."""
    return cert.fingerprint(hashes.SHA256()).hex()[:NAME_CHARS]


async def told_by(hand: Hand) -> HostCertificates:
    """What that host has, and what its running nodes use.

    Raises:
        HostFault: it does not say, or nothing is installed there.
    """
    report = await hand.report()
    if report is None:
        raise HostFault("nothing is installed there")
    names = [node.name for node in report.nodes if node.pid is not None]
    try:
        return msgspec.json.decode(await hand.tell(["host", "certificates", *names]), type=HostCertificates)
    except msgspec.DecodeError as error:
        raise HostFault(f"its tracehaul answers nonsense: {error}") from error


async def status(fleet: Opened) -> tuple[Mapping[str, Held | None], Mapping[str, str]]:
    """What each host has; and of those that do not say, why."""
    found: dict[str, Held | None] = {}
    faults: dict[str, str] = {}

    async def one(hand: Hand) -> None:
        try:
            found[hand.host.name] = held(await told_by(hand))
        except (HostFault, ValueError) as fault:
            faults[hand.host.name] = str(fault)

    await asyncio.gather(*map(one, fleet.hands))
    names = [hand.host.name for hand in fleet.hands]
    return {n: found[n] for n in names if n in found}, {n: faults[n] for n in names if n in faults}


async def rotate(fleet: Opened, console: Console, *, ca_too: bool) -> None:
    """New certificates on every host; ``ca_too``: of a new CA, after which those of the old one are refused.

    Raises:
        ClusterFault: the fleet has no certificates, a host does not answer or runs what is not in the file (nothing was
            changed then), or one broke the change off.
    """
    config = fleet.config
    if config.security.control != "mtls":
        raise ClusterFault('this fleet has no certificates: [security] says control = "plain"')
    found, faults = await status(fleet)
    if lacking := faults or {name: "it has no certificate: launch first" for name, each in found.items() if not each}:
        raise ClusterFault("; ".join(f"{name}: {why}" for name, why in lacking.items()) + "; nothing was changed")
    try:
        nodes = place(config, await addresses_of(fleet.hands))
    except HostFault as fault:
        raise ClusterFault(str(fault)) from fault
    if strange := strangers({name: each for name, each in found.items() if each is not None}, nodes):
        # A launch refuses while the CA is being replaced.
        way = "put it back until the CA is replaced" if replacing(config) else "launch first"
        said = "; ".join(f"{host}: {', '.join(names)} is not in the file any more" for host, names in strange.items())
        raise ClusterFault(f"{said}: {way}; nothing was changed")
    with progress(console, [hand.host.name for hand in fleet.hands]) as shown:
        await Rotation(config, fleet.hands, nodes, shown).run(ca_too=ca_too)


def strangers(found: Mapping[str, Held], nodes: Sequence[NodeSpec]) -> dict[str, list[str]]:
    """By host, what runs there and is none of ``nodes``: a new certificate would not be of it. Pure."""
    placed = {(spec.host, spec.name) for spec in nodes}
    strange = {host: [name for name in held.running if (host, name) not in placed] for host, held in found.items()}
    return {host: names for host, names in strange.items() if names}


class Rotation:
    """One change of certificates."""

    def __init__(
        self,
        config: ClusterConfig,
        hands: Sequence[Hand],
        nodes: Sequence[NodeSpec],
        shown: Progress,
    ) -> None:
        """``shown``: is told how far each host is."""
        self._config = config
        self._hands = hands
        self._nodes = nodes
        self._shown = shown
        self._authority = authority_of(config)

    async def run(self, *, ca_too: bool) -> None:
        """All steps.

        Raises:
            ClusterFault: one failed on a host; those before it are complete, and to run this again goes on.
        """
        if ca_too and len(ca.trusted(self._authority)) == 1:
            ca.rotate(self._authority, now_s=clock.wall_s())
        cas = ca.trusted(self._authority)
        if len(cas) > 1:  # also where a replacement was broken off: certificates are of the new CA from then on
            await self._on_all("trusts both CAs", partial(self._trust, b"".join(cas)))
        await self._on_all("has a new certificate", self._certify)
        if ca_too:
            await self._on_all("trusts the new CA alone", partial(self._trust, cas[0]))
            ca.retire(self._authority)

    async def _on_all(self, stage: str, step: Callable[[Hand], Awaitable[None]]) -> None:
        faults: dict[str, str] = {}

        async def one(hand: Hand) -> None:
            name = hand.host.name
            try:
                await step(hand)
                await self._used(hand)
            except (HostFault, ClusterFault, ValueError) as fault:
                faults[name] = str(fault)
                self._shown.tell(name, str(fault), failed=True)
            else:
                self._shown.tell(name, stage)

        await asyncio.gather(*map(one, self._hands))
        if faults:
            said = "; ".join(f"{name}: {why}" for name, why in faults.items())
            raise ClusterFault(f"{said}; once that is mended run this again: it goes on from here")

    async def _trust(self, cas: bytes, hand: Hand) -> None:
        await put(hand.way, cas, f"{await self._folder(hand)}/{CA_FILE}")

    async def _certify(self, hand: Hand) -> None:
        there, name = await told_by(hand), hand.host.name
        nodes = [spec for spec in self._nodes if spec.host == name]
        now_s = clock.wall_s()
        files = await asyncio.to_thread(files_for, self._config, name, nodes, there.ca.encode(), now_s=now_s)
        folder = await self._folder(hand)
        for file, content in files.items():
            await put(hand.way, content, f"{folder}/{file}")

    async def _folder(self, hand: Hand) -> str:
        """Where its secrets are: whole."""
        done = await hand.way.run(["sh", "-c", f"cd {whole(hand.run_dir)} && pwd"])
        if done.code != 0:
            raise HostFault(f"there is no {hand.run_dir}: launch first")
        return f"{done.out.decode().strip()}/{FOLDER}"

    async def _used(self, hand: Hand) -> None:
        """Until all nodes that run there use what lies there.

        Raises:
            HostFault: one does not in time: it is frozen, say.
        """
        end_s = clock.now_s() + USED_S
        while True:
            there = held(await told_by(hand))
            if there is None:
                raise HostFault("its certificate is gone")
            if not there.late:
                return
            if clock.now_s() > end_s:
                raise HostFault(f"{', '.join(there.late)} did not take the new certificates within {USED_S:.0f} s")
            await asyncio.sleep(POLL_S)
