"""What an answer says, as chat completions' messages and deltas have it. Pure.

``older``: to a client that speaks of functions, which knows one call of one function.
"""

import msgspec
from msgspec import UNSET

from router.calls.events import Said, SaidCall
from router.dialects.chat.responses import (
    AnswerMessage,
    CalledCustom,
    CalledFunction,
    ChatFinishReason,
    Delta,
    ToolCall,
)
from tracehaul.wire.steps import FinishReason


def message(said: Said, *, older: bool = False) -> AnswerMessage:
    """A whole answer."""
    content = None if said.calls and not said.content else said.content
    reasoning = said.reasoning or UNSET
    if older:
        called = _function(said.calls[0]) if said.calls else UNSET
        return AnswerMessage(content, reasoning_content=reasoning, function_call=called)
    calls = [_call(call) for call in said.calls]
    return AnswerMessage(content, reasoning_content=reasoning, tool_calls=calls or UNSET)


def deltas(said: Said, *, older: bool = False) -> list[Delta]:
    """What a piece of an answer adds, in order; nothing if it adds nothing."""
    found: list[Delta] = []
    if said.reasoning:
        found.append(Delta(reasoning_content=said.reasoning))
    if said.content:
        found.append(Delta(content=said.content))
    if said.calls and older:
        found += [Delta(function_call=_function(call)) for call in said.calls]
    elif said.calls:
        found.append(Delta(tool_calls=[_piece(call) for call in said.calls]))
    return found


def finish_reason(reason: FinishReason, *, called: bool, older: bool = False) -> ChatFinishReason:
    """An answer that ended by itself with complete calls waits for their results."""
    if not called or reason != "stop":
        return reason
    return "function_call" if older else "tool_calls"


def _call(call: SaidCall) -> ToolCall:
    return msgspec.structs.replace(_piece(call), index=UNSET)


def _piece(call: SaidCall) -> ToolCall:
    known = UNSET if call.id is None else call.id
    if not call.custom:
        return ToolCall(_function(call), id=known, type="function" if known else UNSET, index=call.index)
    custom = CalledCustom(UNSET if call.name is None else call.name, call.arguments)
    return ToolCall(custom=custom, id=known, type="custom" if known else UNSET, index=call.index)


def _function(call: SaidCall) -> CalledFunction:
    return CalledFunction(UNSET if call.name is None else call.name, call.arguments)
