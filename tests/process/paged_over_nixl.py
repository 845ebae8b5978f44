"""Run by ``test_paged_over_nixl.py``: block 3 of one paged pool becomes block 1 of another by one NIXL transfer."""

import os
import sys
import threading

import torch
from nixl._api import nixl_agent, nixl_agent_config

from tracehaul.engine.paged_pool import PagedPool
from tracehaul.wire.hashing import KVLayout

POLLS_MAX = 3000
POLL_S = 0.01


def main(device: torch.device) -> None:
    """Says ``same`` when the blocks are."""
    layout = KVLayout("m", "bfloat16", layers=5, kv_heads=3, head_dim=16, element_bytes=2, block_tokens=8)
    source, target = (PagedPool(layout, 6, torch.bfloat16, device) for _ in range(2))
    source.tensor.copy_(torch.randn(source.tensor.shape))
    agents = [nixl_agent(name, nixl_agent_config(backends=["UCX"])) for name in ("reader", "writer")]
    for agent, pool in zip(agents, (target, source), strict=True):
        agent.register_memory(pool.tensor)
    reader, writer = agents
    reader.add_remote_agent(writer.get_agent_metadata())
    ours, theirs = (reader.get_xfer_descs([pool.tensor[at]]) for pool, at in ((target, 1), (source, 3)))
    handle = reader.initialize_xfer("READ", ours, theirs, "writer")
    state, pause = reader.transfer(handle), threading.Event()
    for _ in range(POLLS_MAX):
        if state != "PROC":
            break
        pause.wait(POLL_S)
        state = reader.check_xfer_state(handle)
    same = torch.equal(target.tensor[1], source.tensor[3])
    others = target.tensor[[0, 2, 3, 4, 5, 6]].count_nonzero().item()
    sys.stdout.write(f"{state} {'same' if same and others == 0 else 'other'}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with torch.inference_mode():
        main(torch.device(sys.argv[1]))
    os._exit(0)  # the library's own threads may crash an orderly end
