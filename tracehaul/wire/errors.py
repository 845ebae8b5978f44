"""Everything the world can do to a call, as exceptions with a decided answer.

Bugs are asserted; these are raised. Each has a stable ``code`` that crosses the wire and a ``retriable`` flag
that says whether the same call elsewhere, or later, can succeed.
"""

from typing import ClassVar


class ClusterError(Exception):
    """Base of all errors that cross a process border."""

    code: ClassVar[str] = "internal"
    retriable: ClassVar[bool] = False


class InvalidRequest(ClusterError):
    """The caller is wrong: do not repeat the call."""

    code = "invalid_request"


class ContextTooLong(InvalidRequest):
    """The prompt does not fit the model's window or the worker's KV memory."""

    code = "context_length_exceeded"


class TraceDeleted(InvalidRequest):
    """The client has deleted the trace while this step of it ran."""

    code = "trace_deleted"


class Unavailable(ClusterError):
    """No node can do this now: answer 503 with Retry-After."""

    code = "unavailable"
    retriable = True


class Overloaded(Unavailable):
    """A queue is at its limit: try later or elsewhere."""

    code = "overloaded"


class CannotContinue(Unavailable):
    """The worker of a step is lost, and what it had begun to say cannot be gone on with as it would have: ask anew."""

    code = "cannot_continue"


class PeerLost(ClusterError):
    """The connection to a peer broke, or could not be made: try another node."""

    code = "peer_lost"
    retriable = True


class Untrusted(PeerLost):
    """One end does not take the other for who it says it is: a certificate, a token or a name is wrong."""

    code = "untrusted"


class TimedOut(ClusterError):
    """A peer did not answer in time (slow, frozen, or cut off): try another node."""

    code = "timed_out"
    retriable = True


class DeadlineExceeded(ClusterError):
    """The step's own deadline has passed: nobody may do anything more for it."""

    code = "deadline_exceeded"


class BudgetExceeded(ClusterError):
    """What a trace may cost has been spent: nobody may do anything more for it."""

    code = "budget_exceeded"


class WrongNode(ClusterError):
    """The peer is not what the caller takes it for (other role, other generation): refresh membership."""

    code = "wrong_node"
    retriable = True


class JoinRefused(InvalidRequest):
    """The node cannot be a member as it is: its operator has to mend that."""

    code = "join_refused"


class WrongPool(JoinRefused):
    """The node does not fit the pool that it wants to join."""

    code = "wrong_pool"


class WrongCluster(JoinRefused):
    """The node belongs to another cluster than the router."""

    code = "wrong_cluster"


class WrongVersion(JoinRefused):
    """The node and the router do not understand each other's messages."""

    code = "wrong_version"


class NameTaken(JoinRefused):
    """Another life of that name is a member, and heard: it may fall silent, so try again for a while."""

    code = "name_taken"
    retriable = True


class Fenced(ClusterError):
    """A later life has the node's name: this one must end, and not come back."""

    code = "fenced"


class ProtocolError(ClusterError):
    """A peer sent what no peer of this version sends: drop the connection."""

    code = "protocol"


class TransferError(ClusterError):
    """A data-plane copy did not happen; the destination's bytes are undefined."""

    code = "transfer"
    retriable = True


class TransferLost(TransferError):
    """The peer of a copy is gone."""

    code = "transfer_lost"


_BY_CODE: dict[str, type[ClusterError]] = {
    cls.code: cls
    for cls in (
        ClusterError,
        InvalidRequest,
        ContextTooLong,
        TraceDeleted,
        Unavailable,
        Overloaded,
        CannotContinue,
        PeerLost,
        Untrusted,
        TimedOut,
        DeadlineExceeded,
        BudgetExceeded,
        WrongNode,
        JoinRefused,
        WrongPool,
        WrongCluster,
        WrongVersion,
        NameTaken,
        Fenced,
        ProtocolError,
        TransferError,
        TransferLost,
    )
}


def error_from_code(code: str, message: str) -> ClusterError:
    """The exception that a remote failure stands for; an unknown code becomes a plain ClusterError."""
    return _BY_CODE.get(code, ClusterError)(message)
