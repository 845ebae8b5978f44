"""A step given to a simulated router's dispatch itself, for tests of what lies below its HTTP surface."""

import asyncio
from contextlib import aclosing

from router.dispatch.steps import Finished, Output, StepRequest
from sim.shape import ROUTER
from sim.world import World
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.ids import NodeId


def ask(
    world: World, request: StepRequest, router: NodeId = ROUTER
) -> "asyncio.Queue[Output | Finished | ClusterError | None]":
    """What comes of it, in the router's process; None at the end, unless it is an error."""
    life = world.lives[router]
    dispatch = life.dispatch
    assert dispatch is not None
    answer: asyncio.Queue[Output | Finished | ClusterError | None] = asyncio.Queue()

    async def serve() -> None:
        try:
            async with aclosing(dispatch.run(request)) as events:
                async for event in events:
                    answer.put_nowait(event)
            answer.put_nowait(None)
        except ClusterError as error:
            answer.put_nowait(error)
        finally:
            dispatch.book.answered(request.salt, request.trace, request.step, response=None)

    life.context().run(life.tasks.start, serve(), "step")
    return answer
