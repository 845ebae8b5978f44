"""How the tables came to be what they are. Alembic's; only ever added to."""
