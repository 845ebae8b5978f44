"""Memory files: present, private, refused in one clear line when there is no room."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tracehaul.transfer import memory
from tracehaul.transfer.memory import PAGE_BYTES, NoMemory, address_of, allocate, available_bytes, available_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_every_page_is_present_and_zero() -> None:
    before = resident_bytes()
    arena = allocate(64 << 20, "every-page")
    assert resident_bytes() - before > 60 << 20
    assert arena.buffer.nbytes == 64 << 20
    assert address_of(arena.buffer) % PAGE_BYTES == 0
    assert arena.buffer == bytes(64 << 20)
    assert "every-page" in Path("/proc/self/maps").read_text()
    arena.close()
    assert "every-page" not in Path("/proc/self/maps").read_text()


def test_sizes_need_not_be_whole_pages() -> None:
    arena = allocate(PAGE_BYTES + 1, "odd")
    assert arena.buffer.nbytes == PAGE_BYTES + 1
    assert arena.buffer.format == "B"
    arena.buffer[-1] = 7
    arena.close()
    arena.close()


def test_only_its_own_files_pass_for_memory(tmp_path: Path) -> None:
    arena = allocate(PAGE_BYTES, "seal")
    assert memory.is_memory_file(arena.fd)
    with pytest.raises(PermissionError):
        os.truncate(arena.fd, 0)
    arena.close()
    path = tmp_path / f"{memory.FILE_PREFIX}file"
    path.write_bytes(bytes(PAGE_BYTES))
    for other in (os.open(path, os.O_RDWR), os.memfd_create(f"{memory.FILE_PREFIX}unsealed")):
        assert not memory.is_memory_file(other)
        os.close(other)


def test_views_outlive_close() -> None:
    arena = allocate(PAGE_BYTES, "view")
    view = arena.buffer[10:20]
    arena.close()
    view[:] = b"still here"
    assert bytes(view) == b"still here"


def test_no_room_is_said_before_anything_is_taken() -> None:
    gc.collect()  # what other tests left open must not close meanwhile
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NoMemory) as failure:
        allocate(1 << 50, "the arena")
    assert failure.value.asked_bytes == 1 << 50
    assert 0 < failure.value.available_bytes < 1 << 50
    assert "the arena" in str(failure.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_limit_of_the_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1000000 kB\n",
        "/proc/self/cgroup": "0::/pod/box\n",
        "/sys/fs/cgroup/pod/box/memory.max": "max\n",
        "/sys/fs/cgroup/pod/box/memory.current": "5\n",
        "/sys/fs/cgroup/pod/memory.max": "700000000\n",
        "/sys/fs/cgroup/pod/memory.current": "300000000\n",
        "/sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 100000000\n",
    }
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    assert available_memory() == (500_000_000, "what memory.max of the control group /pod leaves")
    files["/proc/self/cgroup"] = "4:memory:/box\n0::/\n"
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "400000000\n"
    files["/sys/fs/cgroup/memory/memory.usage_in_bytes"] = "100000000\n"
    assert available_bytes() == 300_000_000
    files["/proc/self/cgroup"] = ""
    assert available_memory() == (1_024_000_000, "this machine's")


def test_nothing_is_left_of_a_killed_process() -> None:
    program = (
        "import sys; from tracehaul.transfer.memory import allocate; m = allocate(256 << 20, 'killed');"
        "print('up', flush=True); sys.stdin.read()"
    )
    shm_before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert not any("killed" in name for name in set(os.listdir("/dev/shm")) - shm_before)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert not Path(f"/proc/{process.pid}").exists()
