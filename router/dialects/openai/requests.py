"""What clients send, and what of it is honoured: everything is checked here, before any work."""

import re
from typing import Any, Literal, TypeVar

import msgspec

from router.api.errors import ApiError, bad_request, unsupported
from router.api.identity import TraceFields
from router.api.structured import ResponseFormat, StructuredOutputs

STOPS_MAX = 4
STOP_CHARACTERS_MAX = 1024
STOP_TOKENS_MAX = 128
TOP_LOGPROBS_MAX = 20
LOGIT_BIAS_MAX = 1024
SALT_CHARACTERS_MAX = 256
INTEGER_MAX = 2**31 - 1


class StreamOptions(msgspec.Struct, frozen=True):
    """OpenAI's ``stream_options``."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Part(msgspec.Struct, frozen=True):
    """One part of a message's content; only text can be honoured."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """What the assistant called, in an earlier turn."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct, frozen=True):
    """A call in an earlier turn."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both endpoints share. Unknown ones are ignored."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    previous_response_id: str | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # What structured_outputs was called before.
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: dict[str, float] | None = None
    # What cannot be honoured yet: values that change nothing are accepted (see _NO_OPS).
    best_of: int | None = None
    use_beam_search: bool | None = None
    prompt_logprobs: int | bool | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None

    @property
    def trace_fields(self) -> TraceFields:
        """What the body says about its trace."""
        return TraceFields(self.metadata, self.prompt_cache_key, self.previous_response_id)


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | bool | None = None
    echo: bool | None = None
    suffix: str | None = None


class Options(msgspec.Struct, frozen=True):
    """A call's options, checked and with their defaults."""

    stream: bool
    include_usage: bool
    continuous_usage: bool
    max_tokens: int | None
    """None: the rest of the window. 0: nothing but the echo of the prompt."""
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    logprobs: int | None
    """How many of the likeliest tokens to tell beside each token's own logprob; None: tell neither."""
    echo: bool
    seed: int | None
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    min_tokens: int
    ignore_eos: bool
    n: int
    return_token_ids: bool
    salt: str


_NO_OPS: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "prompt_logprobs": (False,),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "suffix": ("",),
}
"""Fields that cannot be honoured yet, and the values of each that ask for nothing; null always does."""

T = TypeVar("T", bound=msgspec.Struct)

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


def parse(body: bytes, kind: type[T]) -> T:
    """The request in a body.

    Raises:
        ApiError: it is no JSON, or not what the API defines; names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        found = _PATH.search(message)
        path = found.group(1) if found else ""
        message = message[: found.start()] if found else message
        if missing := _MISSING.search(message):
            param = f"{path}.{missing.group(1)}" if path else missing.group(1)
            raise bad_request(f"missing required parameter: '{param}'", param, "missing_required_parameter") from None
        where = f" for '{path}'" if path else ""
        raise bad_request(f"invalid value{where}: {message}", path or None, "invalid_type") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise bad_request(f"the body could not be parsed as JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None


def options(request: ChatRequest | CompletionRequest) -> Options:
    """The request's options.

    Raises:
        ApiError: a value is out of range, a combination makes no sense, or a field cannot be honoured.
    """
    _check_supported(request)
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    usage = request.stream_options or StreamOptions()
    max_tokens = _max_tokens(request)
    min_tokens = _integer("min_tokens", request.min_tokens, 0, INTEGER_MAX, 0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise bad_request("min_tokens must not be greater than max_tokens", "min_tokens")
    top_p = _number("top_p", request.top_p, 0.0, 1.0, 1.0)
    temperature = _number("temperature", request.temperature, 0.0, 2.0, 1.0)
    if request.cache_salt is not None and not 0 < len(request.cache_salt) <= SALT_CHARACTERS_MAX:
        raise bad_request(f"cache_salt must have 1 to {SALT_CHARACTERS_MAX} characters", "cache_salt")
    return Options(
        stream=bool(request.stream),
        include_usage=bool(usage.include_usage),
        continuous_usage=bool(usage.include_usage and usage.continuous_usage_stats),
        max_tokens=max_tokens,
        # A top_p of 0 leaves the likeliest token only.
        temperature=temperature if top_p > 0 else 0.0,
        top_p=top_p if top_p > 0 else 1.0,
        top_k=max(_integer("top_k", request.top_k, -1, INTEGER_MAX, 0), 0),
        min_p=_number("min_p", request.min_p, 0.0, 1.0, 0.0),
        repetition_penalty=_number("repetition_penalty", request.repetition_penalty, 0.01, 100.0, 1.0),
        presence_penalty=_number("presence_penalty", request.presence_penalty, -2.0, 2.0, 0.0),
        frequency_penalty=_number("frequency_penalty", request.frequency_penalty, -2.0, 2.0, 0.0),
        logit_bias=_logit_bias(request.logit_bias),
        logprobs=_logprobs(request),
        echo=isinstance(request, CompletionRequest) and bool(request.echo),
        seed=None if request.seed is None else _integer("seed", request.seed, -(2**63), 2**63 - 1, 0),
        stops=_stops(request.stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        n=_integer("n", request.n, 1, 128, 1),
        return_token_ids=bool(request.return_token_ids),
        salt=request.cache_salt or "",
    )


def _check_supported(request: ChatRequest | CompletionRequest) -> None:
    for name, accepted in _NO_OPS.items():
        value = getattr(request, name, None)
        if value is not None and value not in accepted:
            raise unsupported(name, f"{name}={_short(value)}")
    if request.best_of not in (None, 1):
        raise unsupported("best_of", "choosing the best of several completions (ask for n of them instead)")
    if request.stop_token_ids is not None and len(request.stop_token_ids) > STOP_TOKENS_MAX:
        raise bad_request(f"at most {STOP_TOKENS_MAX} stop tokens are possible", "stop_token_ids")


def _max_tokens(request: ChatRequest | CompletionRequest) -> int | None:
    value, name = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        value, name = request.max_completion_tokens, "max_completion_tokens"
    lowest = 0 if isinstance(request, CompletionRequest) and request.echo else 1
    return None if value is None else _integer(name, value, lowest, INTEGER_MAX, 1)


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        if request.logprobs is None or request.logprobs is False:
            return None
        return _integer("logprobs", int(request.logprobs), 0, TOP_LOGPROBS_MAX, 0)
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    return _integer("top_logprobs", request.top_logprobs, 0, TOP_LOGPROBS_MAX, 0) if request.logprobs else None


def _logit_bias(wanted: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    if wanted is None:
        return ()
    if len(wanted) > LOGIT_BIAS_MAX:
        raise bad_request(f"at most {LOGIT_BIAS_MAX} tokens can have a bias", "logit_bias")
    bias: dict[int, float] = {}
    for key, value in wanted.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise bad_request(f"logit_bias goes by token ids, and {_short(key)!r} is none", "logit_bias")
        bias[int(key)] = _number("logit_bias", value, -100.0, 100.0, 0.0)
    return tuple(sorted(bias.items()))


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > STOPS_MAX:
        raise bad_request(f"at most {STOPS_MAX} stop strings are possible", "stop")
    if not all(0 < len(s) <= STOP_CHARACTERS_MAX for s in stops):
        raise bad_request(f"a stop string must have 1 to {STOP_CHARACTERS_MAX} characters", "stop")
    return stops


def _integer(name: str, value: int | None, low: int, high: int, default: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise _out_of_range(name, value, low, high)
    return value


def _number(name: str, value: float | None, low: float, high: float, default: float) -> float:
    if value is None:
        return default
    if not low <= value <= high:
        raise _out_of_range(name, value, low, high)
    return value


def _out_of_range(name: str, value: float, low: float, high: float) -> ApiError:
    return bad_request(f"{name} must be from {low} to {high}, and is {_short(value)}", name, "invalid_value")


def _short(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python prints
        return "too large"
    return text if len(text) <= 64 else text[:61] + "..."
