"""What is kept by a name."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0001"


def upgrade() -> None:
    """Make it."""
    op.create_table(
        "documents",
        sa.Column("scope", sa.String, primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("at_us", sa.BigInteger, nullable=False),
        sa.Column("tags", sa.String, nullable=False),
        sa.Column("nbytes", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_index("documents_in_order", "documents", ["scope", "kind", "tenant", "at_us", "name", "nbytes"])
