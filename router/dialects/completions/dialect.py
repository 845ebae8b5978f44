"""``/v1/completions``: texts or token ids in, what follows them out."""

from router.calls.call import Call, Ids, Plain
from router.dialects.base import Models
from router.dialects.body import parse
from router.dialects.completions.infill import infilled
from router.dialects.completions.requests import CompletionRequest, split
from router.dialects.completions.teller import TextTeller
from router.dialects.openai.errors import OpenAIErrors
from router.dialects.openai.requests import options
from router.dialects.openai.response import Head, Told, fingerprint, priority_told
from router.dialects.openai.structured import wanted_of


class Completions(OpenAIErrors):
    """The dialect."""

    def read(self, body: bytes, fresh: str, created: int, models: Models) -> tuple[Call, TextTeller]:
        request = parse(body, CompletionRequest)
        opts = options(request)
        model = models.named(request.model)
        text = models.text(model)
        prompts = infilled(split(request.prompt), request, text)
        call = Call(
            id=f"cmpl-{fresh}",
            model=model,
            wanted=wanted_of(request),
            prompts=tuple(Plain(prompt) if isinstance(prompt, str) else Ids(prompt) for prompt in prompts),
            where="prompt",
            options=opts,
            trace=request.trace_fields,
            priority=request.priority,
            tenant=request.tenant,
            nbytes=len(body),
        )
        told = Told(priority=priority_told(request.priority))
        return call, TextTeller(Head(call.id, created, call.model, fingerprint(text), told), opts, text)
