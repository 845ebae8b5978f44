"""Who may be a member under a name: who proves it by a certificate, or knows the join token."""

import hmac
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tracehaul.rpc.base import CallContext, Service
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.cluster import Heartbeat, Join
from tracehaul.wire.errors import Untrusted
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Reply, Request

_seldom = Seldom(Log(__name__))


class Gate:
    """Stands before the router's rpc ``service``. Without ``tokens`` no token is asked for.

    A certificate, where the control plane has them, must be of the node that is named: a good one of another node is
    refused, also with a Join or a heartbeat that was that node's once. A node's own engine observes as ``NODE+what``.
    """

    def __init__(self, service: Service, tokens: Sequence[str] = ()) -> None:
        self._service = service
        self._tokens = [token.encode() for token in tokens]

    async def call(self, request: Request, context: CallContext) -> Reply:
        if isinstance(request, Heartbeat):
            self._check_name(request.node, context)
        return await self._service.call(request, context)

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if isinstance(request, Join):
            self._check_name(request.info.node, context)
            if "+" in request.info.node and request.info.role != "observer":
                self._refuse(request.info.node, context, f"it would be a {request.info.role} under another's name")
            self._check_token(request, context)
        async with aclosing(self._service.stream(request, context)) as replies:
            async for reply in replies:
                yield reply

    def disconnected(self, peer: str) -> None:
        self._service.disconnected(peer)

    def _check_name(self, node: NodeId, context: CallContext) -> None:
        if context.names is not None and node.partition("+")[0] not in context.names:
            self._refuse(node, context, f"its certificate is of {', '.join(sorted(context.names)) or 'nobody'}")

    def _check_token(self, join: Join, context: CallContext) -> None:
        if self._tokens and not self._known(join.token):
            self._refuse(join.info.node, context, "its join token is wrong" if join.token else "it has no join token")

    def _known(self, token: str) -> bool:
        said = token.encode(errors="replace")
        # Each is compared, in a time that tells nothing.
        return sum(hmac.compare_digest(said, known) for known in self._tokens) > 0

    def _refuse(self, node: str, context: CallContext, why: str) -> None:
        _seldom.warning("refused a node", about=f"{node} {why}", node=node, why=why, peer=context.peer)
        raise Untrusted(f"the router refuses {node}: {why}")
