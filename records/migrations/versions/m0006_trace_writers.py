"""Traces are their cluster's, no longer one router's: who writes each, and which routers live."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

NAME = ("scope", "tenant", "trace")


def upgrade() -> None:
    """Rows of before stay; of a trace that two routers wrote, those of one of them."""
    op.drop_index("trace_changes_of", "trace_changes")
    op.rename_table("trace_changes", "trace_changes_1")
    op.create_table(
        "trace_changes",
        *(sa.Column(name, sa.String, nullable=False) for name in NAME),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint(*NAME, "number", name="trace_changes_2_pkey"),
    )
    op.create_table(
        "trace_heads",
        *(sa.Column(name, sa.String, primary_key=True) for name in NAME),
        sa.Column("router", sa.String, nullable=False),
        sa.Column("life", sa.String, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("tip", sa.LargeBinary, nullable=False),
        sa.Column("answer", sa.String, nullable=False),
        sa.Column("heard", sa.String, nullable=False),
    )
    op.create_table(
        "router_lives",
        sa.Column("scope", sa.String, primary_key=True),
        sa.Column("router", sa.String, primary_key=True),
        sa.Column("life", sa.String, nullable=False),
        sa.Column("address", sa.String, nullable=False),
        sa.Column("until_s", sa.Float, nullable=False),
    )
    op.create_index("trace_heads_of_router", "trace_heads", ["scope", "router"])
    for name, column in (("tip", "tip"), ("answer", "answer"), ("heard", "heard")):
        op.create_index(f"trace_heads_by_{name}", "trace_heads", ["scope", "tenant", column])
    _take()
    op.drop_table("trace_changes_1")


def _take() -> None:
    # ``cluster/router``, or a router's name alone where the file is its own.
    connection = op.get_bind()
    end = "strpos(router, '/')" if connection.dialect.name == "postgresql" else "instr(router, '/')"
    scope = f"CASE WHEN {end} > 0 THEN substr(router, 1, {end} - 1) ELSE router END"
    old = f"(SELECT {scope} AS scope, tenant, trace, router, number, version, body FROM trace_changes_1)"  # noqa: S608
    same = "m.scope = o.scope AND m.tenant = o.tenant AND m.trace = o.trace"
    connection.exec_driver_sql(
        "INSERT INTO trace_changes SELECT o.scope, o.tenant, o.trace, o.number, o.version, o.body "  # noqa: S608
        f"FROM {old} o WHERE o.router = (SELECT max(m.router) FROM {old} m WHERE {same})"
    )
    empty = "''::bytea" if connection.dialect.name == "postgresql" else "x''"
    connection.exec_driver_sql(
        "INSERT INTO trace_heads (scope, tenant, trace, router, life, fence, tip, answer, heard) "  # noqa: S608
        f"SELECT DISTINCT scope, tenant, trace, '', '', 0, {empty}, '', '' FROM trace_changes"
    )
