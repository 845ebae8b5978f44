"""A KV connector for vLLM's process: requests may say how much of their prompt counts as computed already.

Contexts of many thousand tokens are then there at once, filled with the constant that vLLM's own connector for decode
benchmarks fills the memory with at the start.
"""

from importlib import import_module
from typing import Any

_base: Any = import_module("vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector")


class Held(_base.DecodeBenchConnector):
    """Takes ``kv_transfer_params={"held": tokens}``."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """See the base class."""
        held = (request.kv_transfer_params or {}).get("held", 0)
        return max(0, held - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See the base class: here nothing is to be filled."""
