"""The fields that OpenAI's dialects share, and what of them is honoured: checked here, before any work. Pure."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from router.calls.call import Options, TraceFields
from router.calls.errors import CallFailed, invalid, unsupported
from router.calls.urgency import PRIORITY_MAX
from router.dialects.body import ModelName
from router.dialects.openai.agents import named_by
from router.dialects.openai.structured import Wishes

STOPS_MAX = 4
STOP_CHARACTERS_MAX = 1024
STOP_TOKENS_MAX = 128
TOP_LOGPROBS_MAX = 20
LOGIT_BIAS_MAX = 1024
SALT_CHARACTERS_MAX = 256
INTEGER_MAX = 2**31 - 1
LIMITS: Mapping[str, tuple[float, float]] = {
    "max_tokens": (0, INTEGER_MAX),
    "max_completion_tokens": (1, INTEGER_MAX),
    "max_output_tokens": (1, INTEGER_MAX),
    "min_tokens": (0, INTEGER_MAX),
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, INTEGER_MAX),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (-(2**63), 2**63 - 1),
    "n": (1, 128),
    "priority": (-PRIORITY_MAX, PRIORITY_MAX),
    "logprobs": (0, TOP_LOGPROBS_MAX),
    "top_logprobs": (0, TOP_LOGPROBS_MAX),
    "logit_bias": (-100.0, 100.0),
}
"""The least and the most that each number may be."""
TOLD_BIAS = Meta(extra_json_schema={"maxProperties": LOGIT_BIAS_MAX, "propertyNames": {"pattern": "^[0-9]{1,10}$"}})
Bias = Annotated[float, Meta(extra_json_schema=dict(zip(("minimum", "maximum"), LIMITS["logit_bias"], strict=True)))]
TOLD_SALT = Meta(extra_json_schema={"minLength": 1, "maxLength": SALT_CHARACTERS_MAX})
Stop = Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": STOP_CHARACTERS_MAX})]
Stops = Annotated[list[Stop], Meta(extra_json_schema={"maxItems": STOPS_MAX})]


class StreamOptions(msgspec.Struct, frozen=True):
    """OpenAI's ``stream_options``."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Wishes, frozen=True, kw_only=True):
    """The fields that the dialects share. Unknown ones are ignored."""

    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[int], Meta(extra_json_schema={"maxItems": STOP_TOKENS_MAX})] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    previous_response_id: str | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, TOLD_SALT] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: Annotated[dict[str, Bias], TOLD_BIAS] | None = None
    priority: int | None = None
    best_of: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    # Names of agents and sessions, in no settled form: see router.dialects.openai.agents.
    agentic_context: Any = None
    agent_hint: Any = None
    vllm_xargs: Any = None
    session_id: Any = None
    # What cannot be honoured yet: values that change nothing are accepted (see NO_OPS).
    use_beam_search: bool | None = None
    prompt_logprobs: int | bool | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None

    @property
    def trace_fields(self) -> TraceFields:
        """What the body says about its trace."""
        xargs = self.vllm_xargs if isinstance(self.vllm_xargs, dict) else {}
        contexts = (
            self.agentic_context,
            xargs.get("agentic_context"),
            self.agent_hint,
            {"session_id": self.session_id},
        )
        named = named_by(*contexts)
        return TraceFields(self.metadata, self.prompt_cache_key, self.previous_response_id, named.session, named.parent)

    @property
    def tenant(self) -> str:
        """Whose call it is."""
        return self.cache_salt or ""

    def output_limit(self) -> tuple[str, int | None, int]:
        """The field that limits the output, its value, and the least that it may be."""
        return "max_tokens", self.max_tokens, 1

    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to tell; None: tell no logprobs. Raises CallFailed."""
        return None

    def echoed(self) -> bool:
        """Whether each choice begins with its prompt."""
        return False


NO_OPS: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "prompt_logprobs": (False,),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "modalities": (["text"], []),
    "audio": (),
    "chat_template": (),
}
"""Fields that cannot be honoured yet, and the values of each that ask for nothing; null always does."""


def options(request: GenerationRequest) -> Options:
    """The request's options.

    Raises:
        CallFailed: a value is out of range, a combination makes no sense, or a field cannot be honoured.
    """
    _check_supported(request)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream to be true", "stream_options")
    usage = request.stream_options or StreamOptions()
    max_tokens = _max_tokens(request)
    min_tokens = integer("min_tokens", request.min_tokens, 0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid("min_tokens must not be greater than max_tokens", "min_tokens")
    top_p = _number("top_p", request.top_p, 1.0)
    temperature = _number("temperature", request.temperature, 1.0)
    if request.cache_salt is not None and not 0 < len(request.cache_salt) <= SALT_CHARACTERS_MAX:
        raise invalid(f"cache_salt must have 1 to {SALT_CHARACTERS_MAX} characters", "cache_salt")
    return Options(
        stream=bool(request.stream),
        include_usage=bool(usage.include_usage),
        continuous_usage=bool(usage.include_usage and usage.continuous_usage_stats),
        max_tokens=max_tokens,
        # A top_p of 0 leaves the likeliest token only.
        temperature=temperature if top_p > 0 else 0.0,
        top_p=top_p if top_p > 0 else 1.0,
        top_k=max(integer("top_k", request.top_k, 0), 0),
        min_p=_number("min_p", request.min_p, 0.0),
        repetition_penalty=_number("repetition_penalty", request.repetition_penalty, 1.0),
        presence_penalty=_number("presence_penalty", request.presence_penalty, 0.0),
        frequency_penalty=_number("frequency_penalty", request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request.logit_bias),
        logprobs=request.likeliest(),
        echo=request.echoed(),
        seed=None if request.seed is None else integer("seed", request.seed, 0),
        stops=_stops(request.stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stops=bool(request.include_stop_str_in_output),
        special_shown=request.skip_special_tokens is False,
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        n=integer("n", request.n, 1),
        return_token_ids=bool(request.return_token_ids),
    )


def _check_supported(request: GenerationRequest) -> None:
    for name, accepted in NO_OPS.items():
        value = getattr(request, name, None)
        if value is not None and value not in accepted:
            raise unsupported(name, f"{name}={_short(value)}")
    if request.best_of not in (None, 0, 1, request.n):
        raise unsupported("best_of", "choosing the best of several completions (ask for n of them instead)")
    integer("priority", request.priority, 0)
    if request.stop_token_ids is not None and len(request.stop_token_ids) > STOP_TOKENS_MAX:
        raise invalid(f"at most {STOP_TOKENS_MAX} stop tokens are possible", "stop_token_ids")


def _max_tokens(request: GenerationRequest) -> int | None:
    name, value, lowest = request.output_limit()
    return None if value is None else integer(name, value, 1, lowest)


def _logit_bias(wanted: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    if wanted is None:
        return ()
    if len(wanted) > LOGIT_BIAS_MAX:
        raise invalid(f"at most {LOGIT_BIAS_MAX} tokens can have a bias", "logit_bias")
    bias: dict[int, float] = {}
    for key, value in wanted.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid(f"logit_bias goes by token ids, and {_short(key)!r} is none", "logit_bias")
        bias[int(key)] = _number("logit_bias", value, 0.0)
    return tuple(sorted(bias.items()))


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > STOPS_MAX:
        raise invalid(f"at most {STOPS_MAX} stop strings are possible", "stop")
    if not all(0 < len(s) <= STOP_CHARACTERS_MAX for s in stops):
        raise invalid(f"a stop string must have 1 to {STOP_CHARACTERS_MAX} characters", "stop")
    return stops


def integer(name: str, value: int | None, default: int, lowest: int | None = None) -> int:
    """``value``, or ``default`` where there is none.

    Raises:
        CallFailed: it is not within its :data:`LIMITS`, or below ``lowest``, which is then the least.
    """
    if value is None:
        return default
    low, high = LIMITS[name]
    if not (low if lowest is None else lowest) <= value <= high:
        raise _out_of_range(name, value, low if lowest is None else lowest, high)
    return value


def _number(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    low, high = LIMITS[name]
    if not low <= value <= high:
        raise _out_of_range(name, value, low, high)
    return value


def _out_of_range(name: str, value: float, low: float, high: float) -> CallFailed:
    return invalid(f"{name} must be from {low} to {high}, and is {_short(value)}", name, "invalid_value")


def _short(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python prints
        return "too large"
    return text if len(text) <= 64 else text[:61] + "..."
