"""The tables, as the newest migration leaves them."""

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table

metadata = MetaData()

trace_changes = Table(
    "trace_changes",
    metadata,
    Column("router", String, primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("trace", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("trace_changes_of", "router", "tenant", "trace", "number"),
)
"""How traces came to be what they are: the bodies are ``router/traces/changes.py``'s."""

HEAD = "0001"
"""The newest migration."""
