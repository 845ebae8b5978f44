"""``/v1/responses``: items in, items out."""

from collections.abc import Mapping
from typing import Any

import msgspec

from router.calls.call import Call, Conversation, Message, Wanted
from router.calls.errors import CallFailed, invalid, unsupported
from router.calls.structured import schema_constraint
from router.dialects.base import Models
from router.dialects.body import parse
from router.dialects.openai.errors import OpenAIErrors, error_body
from router.dialects.openai.requests import options
from router.dialects.openai.response import priority_told, tier_used
from router.dialects.openai.tools import names_of, tools_of
from router.dialects.responses.answers import Response
from router.dialects.responses.items import asked_items, messages_of
from router.dialects.responses.requests import ENCRYPTED, ResponsesRequest, TextFormat, check
from router.dialects.responses.teller import ResponseTeller, Shape
from router.dialects.responses.tools import chat_choice, chat_tools, custom_names, honoured

THINKS_NOT = ("none", "minimal")


class Responses(OpenAIErrors):
    """The dialect. What came before, where a request names a response, is added by whoever keeps it:
    :meth:`router.dialects.responses.teller.ResponseTeller.continued`."""

    def read(self, body: bytes, fresh: str, created: int, models: Models) -> tuple[Call, ResponseTeller]:
        request = parse(body, ResponsesRequest)
        check(request)
        opts = options(request)
        opts = msgspec.structs.replace(opts, n=1, return_token_ids=False, include_usage=False, continuous_usage=False)
        tools = honoured(request.tools)
        known = chat_tools(tools)
        instructions = _instructions(request)
        asked = asked_items(request.input)
        variables = _variables(request)
        baseline = request.prompt_cache_options.comparison_response_id if request.prompt_cache_options else None
        conversation = Conversation((*instructions, *messages_of(asked)), names_of(known), variables=variables)
        call = Call(
            id=f"resp_{fresh}",
            model=models.named(request.model),
            wanted=_wanted(request.text.format if request.text else None),
            tools=tools_of(known, chat_choice(request.tool_choice), request.parallel_tool_calls),
            prompts=(conversation,),
            where="input",
            options=opts,
            trace=msgspec.structs.replace(request.trace_fields, baseline=baseline),
            flex=request.service_tier == "flex",
            priority=request.priority,
            tenant=request.tenant,
            nbytes=len(body),
        )
        shape = Shape(
            custom=custom_names(tools),
            summarised=request.reasoning is not None and request.reasoning.summarised,
            sealed=ENCRYPTED in (request.include or ()),
        )
        begun = _begun(request, call, created, tools)
        teller = ResponseTeller(begun, shape, asked, instructions)
        if begun.background:
            teller.body = body
        return call, teller

    def broken(self, failure: CallFailed) -> bytes:
        """Before the response was begun; after that its teller says it."""
        error = error_body(failure).error
        data = {"type": "error", "sequence_number": 0, "code": error.code or error.type, "message": error.message}
        return b"event: error\ndata: " + msgspec.json.encode({**data, "param": error.param}) + b"\n\n"


def _instructions(request: ResponsesRequest) -> tuple[Message, ...]:
    if isinstance(request.instructions, str):
        return (Message("system", request.instructions),) if request.instructions else ()
    return messages_of(request.instructions or (), "instructions")


def _wanted(form: TextFormat | None) -> Wanted | None:
    match form:
        case None | TextFormat("text"):
            return None
        case TextFormat("json_object"):
            return Wanted(schema_constraint({"type": "object"}, "text.format"), "text.format")
        case TextFormat("json_schema", schema=schema, strict=strict) if schema is not None:
            # Without strict the schema is a wish: what of it cannot be enforced is left to the model.
            return Wanted(schema_constraint(schema, "text.format.schema", lenient=not strict), "text.format")
        case TextFormat("json_schema"):
            raise invalid("json_schema needs a schema", "text.format.schema")
        case TextFormat(kind):
            raise unsupported("text.format.type", f"a text format of type {kind[:64]!r}")


def _variables(request: ResponsesRequest) -> Mapping[str, Any] | None:
    effort = request.reasoning.effort if request.reasoning else None
    return None if effort is None else {"reasoning_effort": effort, "enable_thinking": effort not in THINKS_NOT}


def _said(value: str | None) -> str | msgspec.UnsetType:
    return msgspec.UNSET if value is None else value


def _begun(request: ResponsesRequest, call: Call, created: int, tools: list[dict[str, Any]] | None) -> Response:
    form = request.text.format if request.text else None
    reasoning = request.reasoning
    choice = request.tool_choice
    return Response(
        id=call.id,
        created_at=created,
        model=call.model,
        status="queued" if request.background else "in_progress",
        background=bool(request.background),
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        priority=priority_told(request.priority),
        prompt_cache_key=_said(request.prompt_cache_key),
        reasoning={
            "effort": reasoning.effort if reasoning else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning else None,
        },
        safety_identifier=_said(request.safety_identifier),
        service_tier=tier_used(request.service_tier),
        store=request.stored,
        temperature=1.0 if request.temperature is None else request.temperature,
        text={"format": {"type": "text"} if form is None else form},
        tool_choice="auto" if choice is None else choice,
        tools=tools or (),
        top_p=1.0 if request.top_p is None else request.top_p,
        user=_said(request.user),
    )
