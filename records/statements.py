"""What is said to a database of traces: statements, whose parameters begin with ``b_``."""

from sqlalchemy import (
    Executable,
    String,
    TextClause,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    text,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from records.schema import router_lives as lives
from records.schema import trace_changes as changes
from records.schema import trace_heads as heads

_SCOPE, _ROUTER, _LIFE = bindparam("b_scope"), bindparam("b_router"), bindparam("b_life")
_TENANT, _TRACE = bindparam("b_tenant"), bindparam("b_trace")
_TRACES, _LIMIT = bindparam("b_traces", expanding=True), bindparam("b_limit")
# One after the other: where its statistics are older than a scope PostgreSQL may rather walk all rows of that.
_NAMES = func.unnest(bindparam("b_traces", type_=ARRAY(String))).table_valued("trace").render_derived()

_ROWS_OF = and_(changes.c.scope == _SCOPE, changes.c.tenant == _TENANT, changes.c.trace == _TRACE)
_HEAD_OF = and_(heads.c.scope == _SCOPE, heads.c.tenant == _TENANT, heads.c.trace == _TRACE)
_MINE = and_(heads.c.scope == _SCOPE, heads.c.router == _ROUTER, heads.c.life == _LIFE)
_CLAIMED = (heads.c.tenant, heads.c.trace, heads.c.fence)

_ORDER = (changes.c.trace, changes.c.number)

_NOW_SQLITE = text("SELECT (julianday('now') - 2440587.5) * 86400.0")
_NOW = text("SELECT extract(epoch FROM clock_timestamp())::float8")


def now(*, sqlite: bool) -> TextClause:
    """The database's clock, in Unix time."""
    return _NOW_SQLITE if sqlite else _NOW


# --- rows -------------------------------------------------------------------------------------------------------

INSERT = insert(changes)
ERASE = delete(changes).where(_ROWS_OF)
SUPERSEDE = delete(changes).where(_ROWS_OF, changes.c.number < bindparam("b_number"))
_IN_ORDER = (changes.c.tenant, *_ORDER, changes.c.version, changes.c.body)


def rows(*, sqlite: bool, after: bool) -> Executable:
    """Of the given traces of a tenant, the first of them; ``after``: that row of that trace."""
    where = and_(changes.c.scope == _SCOPE, changes.c.tenant == _TENANT)
    if after:
        where = and_(where, tuple_(*_ORDER) > tuple_(_TRACE, bindparam("b_number")))
    if sqlite:
        return select(*_IN_ORDER).where(where, changes.c.trace.in_(_TRACES)).order_by(*_ORDER).limit(_LIMIT)
    each = select(*_IN_ORDER).where(where, changes.c.trace == _NAMES.c.trace).order_by(changes.c.number).limit(_LIMIT)
    some = each.lateral()
    found = select(some).select_from(_NAMES.join(some, true()))
    return found.order_by(some.c.trace, some.c.number).limit(_LIMIT)


ERASE_ROWS = delete(changes).where(changes.c.scope == _SCOPE, changes.c.tenant == _TENANT)

# --- who writes -------------------------------------------------------------------------------------------------

NEW = text(
    "INSERT INTO trace_heads (scope, tenant, trace, router, life, fence, tip, answer, heard) "
    "VALUES (:b_scope, :b_tenant, :b_trace, :b_router, :b_life, 1, :b_tip, '', '') "
    "ON CONFLICT (scope, tenant, trace) DO NOTHING"
).bindparams(bindparam("b_tip", value=b"", type_=heads.c.tip.type))


def held(*, sqlite: bool) -> Executable:
    """Those of the given traces of a tenant that are this life's, locked."""
    mine = select(*_CLAIMED).where(_MINE, heads.c.tenant == _TENANT)
    if sqlite:
        return mine.where(heads.c.trace.in_(_TRACES))
    each = mine.where(heads.c.trace == _NAMES.c.trace).limit(1).with_for_update().lateral()
    return select(each).select_from(_NAMES.join(each, true()))


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
