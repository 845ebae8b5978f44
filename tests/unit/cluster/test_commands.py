"""Which module has which command: they are imported when asked for."""

import subprocess
import sys
from importlib import import_module

import pytest
import typer

from cluster.cli import commands
from cluster.further import ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_registers_the_commands_that_are_said_of_it(room: str) -> None:
    app = typer.Typer()
    import_module(room).register(app)
    app.command("other")(lambda: None)  # of one alone typer makes no group
    found = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert found - {"other"} == set(ROOMS[room])


def test_no_two_rooms_have_the_same_command() -> None:
    names = [name for names in ROOMS.values() for name in names]
    assert len(names) == len(set(names))
    assert set(names) < set(typer.main.get_command(commands()).commands)  # type: ignore[attr-defined]


def test_a_node_brings_in_no_other_command() -> None:
    code = f"import sys, cluster.cli, cluster.node; print({set(ROOMS)!r} & set(sys.modules), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["set()", "False"]
