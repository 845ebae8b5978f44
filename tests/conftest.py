"""What all tests share: where GPU tests run, how Hypothesis behaves on busy machines, and a server of S3's protocol."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

import httpx
import pytest
from hypothesis import settings

TESTS = Path(__file__).parent

# Triton decides when it is first imported, by whomever, whether its kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A deadline per example measures the machine's load, not the code. The suite must say the same twice about the same
# tree, so its examples are fixed; `--hypothesis-profile=explore` draws new ones, and more of them.
settings.register_profile("tracehaul", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("tracehaul")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole clusters are slow, simulated ones too. What is marked ``gpu`` is skipped where there is none, aloud."""
    for item in items:
        if {"process", "sim", "hosts"} & set(item.path.relative_to(TESTS).parts):
            item.add_marker(pytest.mark.slow)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # only now: importing it costs seconds

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none here"))


@pytest.fixture(scope="session")
def s3_port() -> Generator[int, None, None]:
    """The port of a server that speaks S3's protocol: of our own, or the local one that ``TRACEHAUL_S3_PORT`` names."""
    if port := os.environ.get("TRACEHAUL_S3_PORT"):
        yield int(port)
        return
    script = Path(__file__).with_name("s3_server.py")
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


@pytest.fixture
def s3_url(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Makes an address in a new bucket, and the environment say how to reach it."""
    endpoint = f"http://127.0.0.1:{s3_port}"
    for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "tests", "SECRET_ACCESS_KEY": "tests"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")

    def make() -> str:
        bucket = f"blocks-{uuid.uuid4().hex[:12]}"
        httpx.put(f"{endpoint}/{bucket}", trust_env=False, timeout=30.0).raise_for_status()
        return f"s3://{bucket}/some/prefix"

    return make
