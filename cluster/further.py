"""Commands that are imported when asked for: a node asks for none of them."""

from importlib import import_module
from importlib.metadata import entry_points

import typer

GROUP = "tracehaul.commands"
"""Entry points of this group are further commands, by rooms that this one must not know: typer apps by name."""
ROOMS: dict[str, tuple[str, ...]] = {
    "cluster.store.commands": ("store",),
    "cluster.keys": ("keys",),
    "cluster.batch.command": ("batch",),
    "cluster.webhooks.commands": ("webhooks",),
    "cluster.hosts.command": ("host",),
    "cluster.bill_command": ("bill",),
    "cluster.whatif_command": ("whatif",),
    "cluster.fleet.command": (
        "plan", "launch", "stop", "add-host", "remove-host", "upgrade", "logs", "doctor", "bundle", "slurm",
        "certificates",
    ),
    "cluster.roles": ("flip",),
}  # fmt: skip
"""Commands by the module whose ``register`` adds them."""

_registered: set[str] = set()


def register(app: typer.Typer, name: str) -> None:
    """Add the command of that name, perhaps others with it; all of them if there is none."""
    rooms = [room for room, names in ROOMS.items() if name in names]
    for room in rooms or ROOMS:
        if room not in _registered:
            _registered.add(room)
            import_module(room).register(app)
    if not rooms:
        for point in entry_points(group=GROUP):
            app.add_typer(point.load(), name=point.name)
