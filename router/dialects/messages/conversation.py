"""Messages and tools of Anthropic's form, as calls have them. Pure."""

from collections.abc import Sequence
from typing import Any

import msgspec

from router.calls import call
from router.calls.call import Conversation
from router.calls.errors import CallFailed, invalid, unsupported
from router.calls.tools import Tools
from router.dialects.messages.requests import Asked, Block, Message, Tool, ToolChoice
from router.dialects.openai.tools import names_of, tools_of

_encode = msgspec.json.Encoder().encode
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def conversation_of(asked: Asked) -> Conversation:
    """The prompt. A last message of the assistant's goes on.

    Raises:
        CallFailed: there are no messages, or one has content that cannot be honoured.
    """
    if not asked.messages:
        raise invalid("messages: at least one message is required", "messages")
    system = _text(asked.system, "system")
    messages = [call.Message("system", system)] if system else []
    for at, message in enumerate(asked.messages):
        messages += _messages(message, f"messages[{at}]")
    last = messages[-1] if messages else None
    goes_on = last is not None and last.role == "assistant" and not last.tool_calls
    return Conversation(
        tuple(messages),
        names_of(_chat_tools(asked.tools)),
        variables=_variables(asked),
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
    )


def keep_s(asked: Asked) -> float:
    """For how long the longest of its marks wants a context to be kept; 0: there is none."""
    marks = [asked.cache_control, *(tool.cache_control for tool in asked.tools or ())]
    contents = [asked.system, *(message.content for message in asked.messages)]
    for blocks in (content for content in contents if not isinstance(content, str) and content is not None):
        marks += [block.cache_control for block in blocks]
    return max((mark.keep_s for mark in marks if mark is not None), default=0.0)


def tools_asked(asked: Asked) -> Tools | None:
    """The tools of a call; None if it has none or must not use them.

    Raises:
        CallFailed: one can be run by a service only, or what is chosen is not among them.
    """
    for at, tool in enumerate(asked.tools or ()):
        if tool.type not in (None, "custom"):
            raise unsupported(f"tools[{at}].type", f"a tool of type {tool.type[:64]!r}")
        if tool.input_schema is None:
            raise _missing(f"tools[{at}].input_schema")
    choice = asked.tool_choice
    parallel = choice is None or not choice.disable_parallel_tool_use
    return tools_of(_chat_tools(asked.tools), _choice(choice), parallel)


def _choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.type != "tool":
        return CHOICES[choice.type]
    if choice.name is None:
        raise _missing("tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _chat_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    return None if tools is None else [{"type": "function", "function": _function(tool)} for tool in tools]


def _function(tool: Tool) -> dict[str, Any]:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {key: value for key, value in {**fields, "strict": tool.strict}.items() if value is not None}


def _variables(asked: Asked) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    if asked.thinking is not None and asked.thinking.type != "adaptive":
        found["enable_thinking"] = asked.thinking.type != "disabled"
    if asked.output_config is not None and asked.output_config.effort is not None:
        found["reasoning_effort"] = asked.output_config.effort
    return found or None


def _messages(message: Message, where: str) -> list[call.Message]:
    content, where = message.content, f"{where}.content"
    if isinstance(content, str):
        return [call.Message(message.role, content)]
    if message.role == "assistant":
        return [_answer(content, where)]
    if message.role == "system":
        return [call.Message("system", _text(content, where))]
    return _said(content, where)


def _said(blocks: Sequence[Block], where: str) -> list[call.Message]:
    """The user's: results of tools are messages of their own, texts that follow each other are one."""
    messages: list[call.Message] = []
    texts: list[str] = []

    def close() -> None:
        if texts:
            messages.append(call.Message("user", "".join(texts)))
            texts.clear()

    for at, block in enumerate(blocks):
        if block.type != "tool_result":
            texts.append(_plain(block, f"{where}[{at}]"))
            continue
        close()
        if block.tool_use_id is None:
            raise _missing(f"{where}[{at}].tool_use_id")
        text = _text(block.content, f"{where}[{at}].content")
        messages.append(call.Message("tool", text, tool_call_id=block.tool_use_id))
    close()
    return messages


def _answer(blocks: Sequence[Block], where: str) -> call.Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[call.ToolCall] = []
    for at, block in enumerate(blocks):
        match block:
            case Block("thinking", thinking=str(thinking)):
                thoughts.append(thinking)
            case Block("thinking"):
                raise _missing(f"{where}[{at}].thinking")
            case Block("redacted_thinking"):
                pass  # nobody here can read it
            case Block("tool_use", id=str(id), name=str(name), input=dict(arguments)):
                calls.append(call.ToolCall(id, name, _encode(arguments).decode()))
            case Block("tool_use", id=id, name=name):
                field = "id" if id is None else "name" if name is None else "input"
                raise _missing(f"{where}[{at}].{field}")
            case _:
                texts.append(_plain(block, f"{where}[{at}]"))
    reasoning = "".join(thoughts) if thoughts else None
    return call.Message("assistant", "".join(texts), reasoning=reasoning, tool_calls=tuple(calls))


def _text(content: str | Sequence[Block] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_plain(block, f"{where}[{at}]") for at, block in enumerate(content or ()))


def _plain(block: Block, where: str) -> str:
    if block.type != "text":
        raise unsupported(where, f"content of type {block.type[:64]!r}")
    if block.text is None:
        raise _missing(f"{where}.text")
    return block.text


def _missing(name: str) -> CallFailed:
    return invalid(f"{name}: Field required", name, "missing_required_parameter")
