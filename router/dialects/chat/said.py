"""What an answer says, as chat completions' messages and deltas have it. Pure."""

from msgspec import UNSET

from router.calls.events import Said, SaidCall
from router.dialects.chat.responses import AnswerMessage, CalledFunction, ChatFinishReason, Delta, ToolCall
from tracehaul.wire.steps import FinishReason


def message(said: Said) -> AnswerMessage:
    """A whole answer."""
    return AnswerMessage(
        None if said.calls and not said.content else said.content,
        reasoning_content=said.reasoning or UNSET,
        tool_calls=[_call(call) for call in said.calls] or UNSET,
    )


def deltas(said: Said) -> list[Delta]:
    """What a piece of an answer adds, in order; nothing if it adds nothing."""
    found: list[Delta] = []
    if said.reasoning:
        found.append(Delta(reasoning_content=said.reasoning))
    if said.content:
        found.append(Delta(content=said.content))
    if said.calls:
        found.append(Delta(tool_calls=[_piece(call) for call in said.calls]))
    return found


def finish_reason(reason: FinishReason, *, called: bool) -> ChatFinishReason:
    """An answer that ended by itself with calls waits for their results."""
    return "tool_calls" if called and reason == "stop" else reason


def _call(call: SaidCall) -> ToolCall:
    return ToolCall(CalledFunction(call.name or "", call.arguments), call.id or "", "function")


def _piece(call: SaidCall) -> ToolCall:
    if call.id is None or call.name is None:
        return ToolCall(CalledFunction(arguments=call.arguments), index=call.index)
    return ToolCall(CalledFunction(call.name, call.arguments), call.id, "function", call.index)
