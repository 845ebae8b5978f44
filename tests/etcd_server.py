"""A real etcd for tests, where it is installed."""

import contextlib
import shutil
import signal
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx

from cluster.launch import free_port
from tracehaul.runtime.credentials import CA_FILE, CERT_FILE, KEY_FILE


class Etcd:
    """One member, on free ports; with a folder of ``secrets`` it shows its certificate and wants to see others'."""

    def __init__(self, folder: Path, secrets: Path | None = None) -> None:
        self.folder, self.secrets = folder, secrets
        self.url = f"{'https' if secrets else 'http'}://127.0.0.1:{free_port()}"
        self.peer = f"http://127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["--data-dir", str(self.folder), "--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        words += ["--listen-peer-urls", self.peer, "--initial-advertise-peer-urls", self.peer]
        words += ["--initial-cluster", f"default={self.peer}", "--unsafe-no-fsync"]
        if self.secrets is not None:
            words += ["--client-cert-auth", "--trusted-ca-file", str(self.secrets / CA_FILE)]
            words += ["--cert-file", str(self.secrets / CERT_FILE), "--key-file", str(self.secrets / KEY_FILE)]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(["etcd", *words], stdout=quiet, stderr=quiet)
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", verify=self.verify(), trust_env=False).json()["health"] == "true":
                    return
            assert self.process.poll() is None
            threading.Event().wait(0.05)
        raise AssertionError("etcd does not start")

    def verify(self) -> ssl.SSLContext | bool:
        if self.secrets is None:
            return False
        context = ssl.create_default_context(cafile=str(self.secrets / CA_FILE))
        context.load_cert_chain(self.secrets / CERT_FILE, self.secrets / KEY_FILE)
        return context

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def restart_empty(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)
        self.start()

    def ask(self, what: str, **body: Any) -> dict[str, Any]:
        return httpx.post(f"{self.url}/v3/{what}", json=body, trust_env=False).json()
