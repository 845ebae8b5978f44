"""What all tests share: where GPU tests run, and how Hypothesis behaves on busy machines."""

import pytest
from hypothesis import settings

# A deadline per example measures the machine's load, not the code. The suite must say the same twice about the same
# tree, so its examples are fixed; `--hypothesis-profile=explore` draws new ones, and more of them.
settings.register_profile("tracehaul", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("tracehaul")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none, with the reason in the report."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # only now: importing it costs seconds

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none here"))
