"""``tracehaul bench``: added to the command by its entry point, as nothing below may know of it."""

import typer

from bench.replay.command import replay_command

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure a running cluster, or any server of OpenAI's form.",
)


@app.callback()
def bench() -> None:
    """Measure a running cluster, or any server of OpenAI's form."""


app.command("replay")(replay_command)
