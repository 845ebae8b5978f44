"""Options that several commands about hosts have."""

from pathlib import Path
from typing import Annotated

import typer

CONFIG_FILE = Path("cluster.toml")

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="TRACEHAUL_CONFIG", help="The cluster's file, with its [[hosts]].")
]
