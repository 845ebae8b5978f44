"""What is said to a database of traces: statements, whose parameters begin with ``b_``."""

from sqlalchemy import (
    ColumnElement,
    Table,
    TextClause,
    and_,
    bindparam,
    delete,
    insert,
    or_,
    select,
    text,
    tuple_,
    update,
)

from records.schema import router_lives as lives
from records.schema import trace_changes as changes
from records.schema import trace_heads as heads

_SCOPE, _ROUTER, _LIFE = bindparam("b_scope"), bindparam("b_router"), bindparam("b_life")
_TENANT, _TRACE = bindparam("b_tenant"), bindparam("b_trace")
_NAMES = bindparam("b_names", expanding=True)
_TENANTS, _TRACES = bindparam("b_tenants", expanding=True), bindparam("b_traces", expanding=True)


def _any_of(table: Table) -> ColumnElement[bool]:
    """Those of the given names. Pair by pair alone PostgreSQL may walk all rows; by columns it walks the index."""
    tenant, trace = table.c.tenant, table.c.trace
    return and_(tuple_(tenant, trace).in_(_NAMES), tenant.in_(_TENANTS), trace.in_(_TRACES))


_ROWS_OF = and_(changes.c.scope == _SCOPE, changes.c.tenant == _TENANT, changes.c.trace == _TRACE)
_HEAD_OF = and_(heads.c.scope == _SCOPE, heads.c.tenant == _TENANT, heads.c.trace == _TRACE)
_MINE = and_(heads.c.scope == _SCOPE, heads.c.router == _ROUTER, heads.c.life == _LIFE)
_CLAIMED = (heads.c.tenant, heads.c.trace, heads.c.fence)

_ORDER = (changes.c.tenant, changes.c.trace, changes.c.number)

_NOW_SQLITE = text("SELECT (julianday('now') - 2440587.5) * 86400.0")
_NOW = text("SELECT extract(epoch FROM clock_timestamp())::float8")


def now(*, sqlite: bool) -> TextClause:
    """The database's clock, in Unix time."""
    return _NOW_SQLITE if sqlite else _NOW


# --- rows -------------------------------------------------------------------------------------------------------

INSERT = insert(changes)
ERASE = delete(changes).where(_ROWS_OF)
SUPERSEDE = delete(changes).where(_ROWS_OF, changes.c.number < bindparam("b_number"))
ROWS = (
    select(changes.c.tenant, changes.c.trace, changes.c.number, changes.c.version, changes.c.body)
    .where(changes.c.scope == _SCOPE, _any_of(changes))
    .order_by(*_ORDER)
    .limit(bindparam("b_limit"))
)
ROWS_AFTER = ROWS.where(tuple_(*_ORDER) > tuple_(_TENANT, _TRACE, bindparam("b_number")))
ERASE_ROWS = delete(changes).where(changes.c.scope == _SCOPE, changes.c.tenant == _TENANT)

# --- who writes -------------------------------------------------------------------------------------------------

NEW = text(
    "INSERT INTO trace_heads (scope, tenant, trace, router, life, fence, tip, answer, heard) "
    "VALUES (:b_scope, :b_tenant, :b_trace, :b_router, :b_life, 1, :b_tip, '', '') "
    "ON CONFLICT (scope, tenant, trace) DO NOTHING"
).bindparams(bindparam("b_tip", value=b"", type_=heads.c.tip.type))
HELD = select(*_CLAIMED).where(_MINE, _any_of(heads)).with_for_update()
MARK = (
    update(heads)
    .where(_HEAD_OF)
    .values(tip=bindparam("b_tip"), answer=bindparam("b_answer"), heard=bindparam("b_heard"))
)
MINE = select(*_CLAIMED).where(_MINE)
_TAKEN = {"router": _ROUTER, "life": _LIFE, "fence": heads.c.fence + 1}
CLAIM = update(heads).where(_HEAD_OF).values(_TAKEN).returning(heads.c.fence)
LIVING = select(lives.c.router).where(lives.c.scope == _SCOPE, lives.c.until_s > bindparam("b_now_s"))
ADOPT_MINE = (
    update(heads)
    .where(heads.c.scope == _SCOPE, heads.c.router == _ROUTER, heads.c.life != _LIFE)
    .values(_TAKEN)
    .returning(*_CLAIMED)
)
ADOPT_OTHERS = (
    update(heads)
    .where(heads.c.scope == _SCOPE, heads.c.router != _ROUTER, heads.c.router.not_in(LIVING))
    .values(_TAKEN)
    .returning(*_CLAIMED)
)
ERASE_HEAD = delete(heads).where(_HEAD_OF)
ERASE_HEADS = delete(heads).where(heads.c.scope == _SCOPE, heads.c.tenant == _TENANT)

# --- who is found -----------------------------------------------------------------------------------------------

LIVE = text(
    "INSERT INTO router_lives (scope, router, life, address, until_s) "
    "VALUES (:b_scope, :b_router, :b_life, :b_address, :b_until_s) ON CONFLICT (scope, router) "
    "DO UPDATE SET life = excluded.life, address = excluded.address, until_s = excluded.until_s"
)
OTHERS = select(lives.c.router, lives.c.address).where(
    lives.c.scope == _SCOPE, lives.c.router != _ROUTER, lives.c.until_s > bindparam("b_now_s")
)
_FOUND = (
    select(heads.c.trace, heads.c.router, heads.c.tip, lives.c.address, lives.c.until_s)
    .outerjoin_from(heads, lives, and_(lives.c.scope == heads.c.scope, lives.c.router == heads.c.router))
    .where(heads.c.scope == _SCOPE, heads.c.tenant == _TENANT)
)
BY_NAME = _FOUND.where(heads.c.trace == _TRACE)
BY_TIP = _FOUND.where(heads.c.tip.in_(bindparam("b_tips", expanding=True)))
BY_ANSWER = _FOUND.where(or_(heads.c.answer == bindparam("b_answer"), heads.c.heard == bindparam("b_answer")))
