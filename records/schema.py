"""The tables, as the newest migration leaves them."""

from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table

metadata = MetaData()

trace_changes = Table(
    "trace_changes",
    metadata,
    Column("scope", String, primary_key=True),
    Column("tenant", String, primary_key=True),
    Column("trace", String, primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
"""How traces came to be what they are: the bodies are ``router/traces/changes.py``'s, packed."""

trace_heads = Table(
    "trace_heads",
    metadata,
    Column("scope", String, primary_key=True),
    Column("tenant", String, primary_key=True),
    Column("trace", String, primary_key=True),
    Column("router", String, nullable=False),
    Column("life", String, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("tip", LargeBinary, nullable=False),
    Column("answer", String, nullable=False),
    Column("heard", String, nullable=False),
    Index("trace_heads_of_router", "scope", "router"),
    Index("trace_heads_by_tip", "scope", "tenant", "tip"),
    Index("trace_heads_by_answer", "scope", "tenant", "answer"),
    Index("trace_heads_by_heard", "scope", "tenant", "heard"),
)
"""Who writes each trace, and by what it is found: see :class:`records.base.Marks`."""

router_lives = Table(
    "router_lives",
    metadata,
    Column("scope", String, primary_key=True),
    Column("router", String, primary_key=True),
    Column("life", String, nullable=False),
    Column("address", String, nullable=False),
    Column("until_s", Float, nullable=False),
)
"""Until when each router lives, by the database's clock (Unix time), unless it says so again."""

documents = Table(
    "documents",
    metadata,
    Column("scope", String, primary_key=True),
    Column("kind", String, primary_key=True),
    Column("tenant", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("at_us", BigInteger, nullable=False),
    Column("tags", String, nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("documents_in_order", "scope", "kind", "tenant", "at_us", "name", "nbytes"),
)
"""What is kept by a name: the bodies are whose kind it is; tags are JSON."""

HEAD = "0006"
"""The newest migration."""
