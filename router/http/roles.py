"""``/cluster/{id}/role``: an operator changes what a worker is there for; ``/cluster/{id}/changes``: what was changed
of the router's own accord."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.adapt.story import Noted
from router.calls.errors import CallFailed
from router.calls.identity import ID_CHARACTERS_MAX
from router.dialects.body import parse
from router.dispatch.steps import Dispatcher
from router.http.access import caller_of
from router.http.asgi import body_of
from router.http.pages import json_response
from tracehaul.runtime import clock
from tracehaul.wire.cluster import WorkerRole
from tracehaul.wire.ids import NodeId

BODY_BYTES_MAX = 1024
BODY_TIMEOUT_S = 10.0


class RoleBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /cluster/{id}/role``."""

    role: WorkerRole


class Changes(msgspec.Struct, frozen=True):
    """``GET /cluster/{id}/changes``."""

    node: NodeId
    now_s: float
    """Unix time, by the router's clock."""
    changes: list[Noted]


class RolePages:
    """The endpoints."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def change(self, request: Request) -> Response:
        """Answers when the worker has the role, or keeps the one that it had."""
        caller_of(request.scope).steer("/cluster")
        body = parse(await body_of(request, bytes_max=BODY_BYTES_MAX, timeout_s=BODY_TIMEOUT_S), RoleBody)
        node = self._node(request)
        outcome = await self._dispatcher.flip(node, body.role)
        if not outcome.flipped:
            raise CallFailed("conflict", outcome.why, param="role", code="role_not_changed")
        return json_response(outcome)

    async def changes(self, request: Request) -> Response:
        """What this router changed at a node of its own accord, and what came of it."""
        caller_of(request.scope).steer("/cluster")
        node = self._node(request)
        return json_response(Changes(node, clock.wall_s(), list(self._dispatcher.changes(node))))

    def _node(self, request: Request) -> NodeId:
        node = NodeId(request.path_params["id"])
        if all(status.info.node != node for status in self._dispatcher.nodes()):
            raise CallFailed("not_found", f"no node {node[:ID_CHARACTERS_MAX]!r} is known", code="node_not_found")
        return node
