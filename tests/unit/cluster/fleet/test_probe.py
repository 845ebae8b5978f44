"""What the probe makes of what tools of the system say."""

import pytest

from cluster.fleet import probe

UCX_INFO = """\
#
# Memory domain: mlx5_0
#     Component: ib
#
#      Transport: rc_verbs
#         Device: mlx5_0:1
#           Type: network
#  System device: mlx5_0 (0)
#
#      Transport: ud_verbs
#         Device: mlx5_0:1
#
# Memory domain: tcp
#      Transport: tcp
#         Device: eth0
#      Transport: tcp
#         Device: lo
"""


@pytest.mark.parametrize("said", [UCX_INFO, ""])
def test_ucx_is_asked_by_its_own_tool(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    asked: list[tuple[str, ...]] = []

    def output(*command: str) -> str:
        asked.append(command)
        return said

    monkeypatch.setattr(probe, "output", output)
    found = {each["name"]: each["transports"] for each in probe.ucx()}
    assert asked == [("ucx_info", "-d")]
    assert found == ({"eth0": ["tcp"], "lo": ["tcp"], "mlx5_0:1": ["rc_verbs", "ud_verbs"]} if said else {})
