"""Hosts on one machine: network namespaces with processes, names, files and an sshd of their own, on one bridge.

A host sees no other's processes, shared memory or /proc, and has a boot id of its own, so nothing that works here works
because it is one machine in truth. Root, iproute2 and openssh-server are needed.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time  # noqa: TID251 - waits for other processes
import uuid
from collections.abc import Generator, Sequence
from pathlib import Path

SSHD = "/usr/sbin/sshd"
UP_S = 20.0
ETHTOOL_STXCSUM = 0x17
"""SIOCETHTOOL's command that says whether a device sums what it sends."""
_SSHD_CONFIG = """\
ListenAddress {address}
Port 22
HostKey {folder}/host_{name}
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
MaxStartups 10
MaxSessions 10
"""


def why_not() -> str | None:
    """Why there can be no such hosts here; None: there can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for tool in ("ip", SSHD, "ssh", "ssh-keygen", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], check=False, capture_output=True)
    return "this kernel gives no namespaces" if probe.returncode else None


class Host:
    """One of them."""

    def __init__(self, rig: "Rig", name: str, address: str) -> None:
        self.rig, self.name, self.address = rig, name, address
        self.space = f"{rig.prefix}-{name}"
        self.link = f"{rig.prefix}{name}"
        self.root = rig.folder / "roots" / name
        self.process: subprocess.Popen[bytes] | None = None
        self.going: list[subprocess.Popen[bytes]] = []
        self._delaying: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, check: bool = True, timeout_s: float = 60.0) -> str:
        """A command there, as somebody at its console."""
        process = self.process
        assert process is not None, "it runs"
        words = ["nsenter", "-t", str(self._init()), "--net", "--mount", "--uts", "--ipc", "--pid", "--", *command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"{command[0]} on {self.name}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def begin(self, *command: str) -> None:
        """A command that goes on there until the host ends."""
        words = ["nsenter", "-t", str(self._init()), "--net", "--mount", "--uts", "--ipc", "--pid", "--", *command]
        self.going.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True))

    def limit(self, what: str, value: int) -> None:
        """Of whatever logs in from now on."""
        subprocess.run(["prlimit", "--pid", str(self._init()), f"--{what}={value}:{value}"], check=True)

    def _init(self) -> int:
        """Its process 1, as this machine calls it."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def start(self) -> None:
        """Boots it."""
        boot = self.rig.folder / "ssh" / f"boot_{self.name}"
        boot.write_text(f"{uuid.uuid4()}\n")
        self.root.mkdir(parents=True, exist_ok=True)
        script = f"""
            hostname {self.name}
            mount --bind {self.root} /srv
            mount -t tmpfs -o size=64m shm /dev/shm
            mount -t tmpfs run /run
            mkdir -p /run/sshd
            mount --bind {boot} /proc/sys/kernel/random/boot_id
            exec {SSHD} -D -E {self.rig.folder}/ssh/sshd_{self.name}.log -f {self.rig.folder}/ssh/sshd_{self.name}.conf
        """
        spaces = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.space, *spaces, "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """Pulls its plug: everything on it ends at once."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, IndexError, FileNotFoundError):
            os.kill(self._init(), signal.SIGKILL)
        self.process.wait(timeout=10)
        self.process = None
        for process in self.going:
            process.wait(timeout=10)
        self.going.clear()

    def cut(self) -> None:
        """Pulls its cable."""
        ip("link", "set", self.link, "down")

    def mend(self) -> None:
        """Plugs it in again."""
        ip("link", "set", self.link, "up")

    def impair(self) -> None:
        """Loses one packet in fifty that comes in, at random."""
        rules = "add table inet lossy; add chain inet lossy in { type filter hook input priority 0; }; "
        rules += "add rule inet lossy in numgen random mod 50 < 1 drop"
        self.run("nft", rules)

    def delay(self, each_way_s: float, jitter_s: float = 0.0, loss: float = 0.0) -> None:
        """Makes the way to and from it so much longer, give or take ``jitter_s``; ``loss``: the share that is lost."""
        self.undelay()
        # Else the link would get what its network card is to cut into packets and to sum.
        self._ethtool(ETHTOOL_STXCSUM, 0)
        words = [self.link, f"{self.link}t", self.rig.bridge, str(each_way_s), str(jitter_s), str(loss)]
        program = [sys.executable, str(Path(__file__).with_name("slow_link.py")), *words]
        self._delaying = subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._delaying.stdout is not None
        if self._delaying.stdout.readline() != b"ready\n":
            self.undelay()
            raise RuntimeError(f"the link of {self.name} cannot be delayed")

    def undelay(self) -> None:
        """Makes it as short as it was."""
        if self._delaying is not None:
            self._delaying.kill()
            self._delaying.communicate()
            self._delaying = None
            ip("link", "set", self.link, "master", self.rig.bridge)
            self._ethtool(ETHTOOL_STXCSUM, 1)

    def _ethtool(self, command: int, value: int) -> None:
        program = "import array, fcntl, socket, struct; a = array.array('I', [{}, {}]); "
        program += "fcntl.ioctl(socket.socket(), 0x8946, struct.pack('16sP16x', b'eth0', a.buffer_info()[0]))"
        words = ["ip", "netns", "exec", self.space, sys.executable, "-c", program.format(command, value)]
        subprocess.run(words, check=True)

    def unimpair(self) -> None:
        """Loses none any more."""
        self.run("nft", "delete table inet lossy", check=False)

    def shape(self, rate: str) -> None:
        """Lets no more than that out of and into it: ``1gbit``."""
        for words in (["dev", self.link], ["dev", "eth0"]):
            command = ["tc", "qdisc", "replace", *words, "root", "tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
            prefix = ["ip", "netns", "exec", self.space] if words[1] == "eth0" else []
            subprocess.run([*prefix, *command], check=True)


class Rig:
    """Several hosts, and the place of an operator who reaches them by ssh."""

    def __init__(self, folder: Path, names: Sequence[str], prefix: str, network: str) -> None:
        """``prefix``: of all that is made, at most four letters. ``network``: its first three numbers."""
        self.folder, self.prefix, self.network = folder, prefix, network
        self.hosts = {name: Host(self, name, f"{network}.{11 + at}") for at, name in enumerate(names)}
        self.bridge = f"{prefix}br"

    @property
    def ssh(self) -> str:
        """For ``TRACEHAUL_SSH``: goes through the operator's place."""
        return f"ip netns exec {self.prefix}-ctl ssh -F {self.folder}/ssh/config"

    def up(self) -> None:
        """Builds and boots them."""
        (self.folder / "ssh").mkdir(parents=True)
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        self._wire("ctl", f"{self.network}.1")
        self._keys()
        for host in self.hosts.values():
            self._wire(host.name, host.address)
            host.start()
        self.wait()

    def wait(self) -> None:
        """Until ssh reaches all of them."""
        end_s = time.monotonic() + UP_S
        for host in self.hosts.values():
            while subprocess.run([*self.ssh.split(), host.name, "true"], check=False, capture_output=True).returncode:
                assert time.monotonic() < end_s, (self.folder / "ssh" / f"sshd_{host.name}.log").read_text()
                time.sleep(0.1)

    def _wire(self, name: str, address: str) -> None:
        space, link = f"{self.prefix}-{name}", f"{self.prefix}{name}"
        ip("netns", "add", space)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", link, "master", self.bridge)
        ip("link", "set", link, "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")

    def _keys(self) -> None:
        ssh = self.folder / "ssh"
        _keygen(ssh / "id")
        shutil.copy(ssh / "id.pub", ssh / "authorized_keys")
        known: list[str] = []
        config: list[str] = []
        for host in self.hosts.values():
            _keygen(ssh / f"host_{host.name}")
            known.append(f"{host.address} " + " ".join((ssh / f"host_{host.name}.pub").read_text().split()[:2]))
            text = _SSHD_CONFIG.format(address=host.address, folder=ssh, name=host.name)
            (ssh / f"sshd_{host.name}.conf").write_text(text)
            config += [f"Host {host.name}", f"  HostName {host.address}"]
        (ssh / "known_hosts").write_text("\n".join(known) + "\n")
        config += ["Host *", "  User root", f"  IdentityFile {ssh}/id", "  IdentitiesOnly yes"]
        config += [f"  UserKnownHostsFile {ssh}/known_hosts", "  StrictHostKeyChecking yes"]
        (ssh / "config").write_text("\n".join(config) + "\n")

    def at_control(self, *command: str) -> list[str]:
        """A command as the operator would give it."""
        return ["ip", "netns", "exec", f"{self.prefix}-ctl", *command]

    def down(self) -> None:
        """Leaves nothing of it."""
        for host in self.hosts.values():
            host.kill()
            host.undelay()
        for name in ("ctl", *self.hosts):
            _quiet("ip", "link", "del", f"{self.prefix}{name}")
            for pid in _out("ip", "netns", "pids", f"{self.prefix}-{name}").split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _quiet("ip", "netns", "del", f"{self.prefix}-{name}")
        _quiet("ip", "link", "del", self.bridge)


@contextlib.contextmanager
def rig(
    folder: Path, names: Sequence[str], prefix: str = "tht", network: str = "10.77.9"
) -> Generator[Rig, None, None]:
    """Hosts of these names, for as long as the context is open."""
    made = Rig(folder, names, prefix, network)
    with Path(tempfile.gettempdir(), f"tracehaul-rig-{prefix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # links and namespaces have names that are there once
        made.down()  # of a run that was killed
        try:
            made.up()
            yield made
        finally:
            made.down()


def ip(*words: str) -> None:
    """iproute2's."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _quiet(*command: str) -> None:
    subprocess.run(command, check=False, capture_output=True)


def _out(*command: str) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout
