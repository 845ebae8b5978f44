"""From what was raised to what a client is told."""

from router.calls.errors import CallFailed, invalid, unavailable
from router.dispatch.gate import NotAdmitted
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import BudgetExceeded, ClusterError, DeadlineExceeded, InvalidRequest

log = Log(__name__)


def translate(error: Exception) -> CallFailed:
    """The answer to any failure. What is not the caller's or the cluster's doing is a bug: logged, told no details."""
    match error:
        case CallFailed():
            return error
        case InvalidRequest():
            return invalid(str(error), code=error.code)
        case DeadlineExceeded():
            return CallFailed("late", str(error) or error.code, code=error.code)
        case BudgetExceeded():
            return CallFailed("spent", str(error) or error.code, code=error.code)
        case NotAdmitted():
            retry_s, begins_s = error.retry_after_s, error.begins_s
            return CallFailed("limited", str(error), code=error.code, retry_after_s=retry_s, begins_s=begins_s)
        case ClusterError() if error.retriable:
            return unavailable(str(error) or error.code, error.code)
        case ClusterError():
            return CallFailed("failed", str(error) or error.code, code=error.code)
        case _:
            log.error("a call failed unexpectedly", error=error)
            return CallFailed("failed", "internal error", code="internal")
