"""Grammars that answers must match: compiled for a vocabulary, and the place of one answer in one of them.

Compiling follows what strangers wrote, so it has limits in work and memory, runs on a thread of its own (with a stack
for deep grammars: the library recurses), and includes the first mask, which is where a hostile grammar explodes.
"""

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from blake3 import blake3
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from tracehaul.engine.base import Guide, Mask
from tracehaul.model.source import SourceError
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint

K = TypeVar("K")
T = TypeVar("T")

COMPILE_TIMEOUT_S = 10.0
"""For a grammar to be compiled, those before it in line included."""
COMPILED_MAX = 64
"""Compiled grammars that are kept for the next step that needs the same (a common one has about a megabyte)."""
SOURCES_CHARACTERS_MAX = 2**22
"""Of their sources: compiled, a large one has about a hundred bytes for each."""
CHECKED_MAX = 1024
"""Verdicts on grammars that are kept."""
WHITESPACE_MAX = 32
"""Characters between two tokens of JSON: a model that has lost its way would otherwise go on with these for ever."""
STACK_BYTES = 256 * 2**20
"""Virtual until touched. Chains of rules as long as a source may be take about a tenth."""
_MESSAGE_CHARACTERS_MAX = 500


def _limits() -> LLParserLimits:
    """Some ten milliseconds of work for a mask at worst, and some ten megabytes for a grammar."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=65_000,  # what has more symbols than fit sixteen bits ends in a panic of the library
        verbose_errors=False,
    )


class _Kept(Generic[K, T]):
    """What was used last: at most so many, of at most that size together (but always one)."""

    def __init__(self, count_max: int, size_max: int = 0) -> None:
        self._count_max = count_max
        self._size_max = size_max
        self._size = 0
        self._items: OrderedDict[K, tuple[T, int]] = OrderedDict()

    def get(self, key: K) -> T | None:
        found = self._items.get(key)
        if found is None:
            return None
        self._items.move_to_end(key)
        return found[0]

    def put(self, key: K, item: T, size: int = 0) -> None:
        self._items[key] = (item, size)
        self._size += size
        while len(self._items) > self._count_max or (self._size > self._size_max and len(self._items) > 1):
            self._size -= self._items.popitem(last=False)[1][1]


class GrammarGuide:
    """Implements :class:`tracehaul.engine.base.Guide`. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    @property
    def error(self) -> str:
        return self._matcher.get_error()[:_MESSAGE_CHARACTERS_MAX]

    def mask(self) -> Mask | None:
        mask = np.zeros(self._words, dtype=np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return None if self._matcher.is_error() else mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


class Grammars:
    """Compiles for one vocabulary; keeps what was compiled last. ``vocabulary`` is called once, on its thread."""

    def __init__(self, vocabulary: Callable[[], LLTokenizer]) -> None:
        self._vocabulary = vocabulary
        self._loaded: LLTokenizer | None = None
        self._compiled: _Kept[Constraint, LLMatcher] = _Kept(COMPILED_MAX, SOURCES_CHARACTERS_MAX)
        self._thread = _Thread("grammar")

    async def guide(self, constraint: Constraint, output: Sequence[int]) -> GrammarGuide:
        """The place after ``output``, the tokens of the answer so far.

        Raises:
            InvalidRequest: the grammar is none, is too complex, or does not allow ``output``.
        """
        return await self._thread.run(lambda: self.guide_now(constraint, output))

    def close(self) -> None:
        """Start nothing more."""
        self._thread.close()

    def guide_now(self, constraint: Constraint, output: Sequence[int]) -> GrammarGuide:
        """The same on the caller's thread."""
        compiled = self._compiled.get(constraint)
        if compiled is None:
            compiled = self._compile(constraint)
            self._compiled.put(constraint, compiled, len(constraint.source))
        matcher = compiled.deep_copy()
        if output and not matcher.consume_tokens(list(output)):
            raise InvalidRequest(f"the output so far does not match its grammar: {_short(matcher.get_error())}")
        assert self._loaded is not None
        return GrammarGuide(matcher, self._loaded.vocab_size)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        if self._loaded is None:
            try:
                self._loaded = self._vocabulary()
            except (ValueError, SourceError) as error:
                raise InvalidRequest(f"this model's tokenizer cannot follow a grammar: {error}") from error
        source = _serialized(constraint, self._loaded)
        matcher = LLMatcher(self._loaded, source, log_level=0, limits=_limits())
        if not matcher.is_error():
            first = matcher.deep_copy()
            first.compute_bitmask()
            if not first.is_error():
                return matcher
            matcher = first
        raise InvalidRequest(_refusal(constraint, matcher.get_error()))


class GrammarCheck:
    """Tells whether a grammar is one, without a vocabulary: what names tokens is checked where there is one."""

    def __init__(self) -> None:
        self._verdicts: _Kept[bytes, str] = _Kept(CHECKED_MAX)
        """By a digest of the constraint."""
        self._found: _Kept[bytes, Constraint] = _Kept(COMPILED_MAX, SOURCES_CHARACTERS_MAX)
        self._thread = _Thread("grammar-check")

    async def find(self, named: object, search: Callable[[Callable[[Constraint], str]], Constraint]) -> Constraint:
        """What ``search`` finds, which is given what tells why a constraint is no grammar (empty: it is one).

        Args:
            named: tells it from all other searches: what was found is kept for the next of that name.
            search: runs on a thread of its own.

        Raises:
            InvalidRequest: it takes too long.
        """
        return await self._thread.run(lambda: self._search(named, search))

    async def check(self, constraint: Constraint) -> None:
        """Raises InvalidRequest with the library's message if the grammar is none or too complex."""
        if verdict := await self._thread.run(lambda: self._verdict(constraint)):
            raise InvalidRequest(verdict)

    def _search(self, named: object, search: Callable[[Callable[[Constraint], str]], Constraint]) -> Constraint:
        name = _digest(named)
        found = self._found.get(name)
        if found is None:
            found = search(self._verdict)
            self._found.put(name, found, len(found.source))
        return found

    def _verdict(self, constraint: Constraint) -> str:
        name = _digest(constraint)
        verdict = self._verdicts.get(name)
        if verdict is None:
            verdict = _verdict(constraint)
            self._verdicts.put(name, verdict)
        return verdict


def _digest(named: object) -> bytes:
    return blake3(msgspec.json.encode(named)).digest()


def _verdict(constraint: Constraint) -> str:
    """Empty if it is a grammar; else why not."""
    try:
        source = _serialized(constraint, None)
    except InvalidRequest as error:
        return str(error)
    wrong, messages = LLMatcher.validate_grammar_with_warnings(source, None, limits=_limits())
    return _refusal(constraint, messages[0]) if wrong else ""


class Masker:
    """Computes masks beside the model's forward pass: they depend on the tokens so far alone."""

    def __init__(self) -> None:
        self._thread = _Thread("masks")

    def start(self, guides: Sequence[Guide | None]) -> Callable[[], list[Mask | None]]:
        """Begin; what it returns waits for the mask of each guide: None where there is none, or it has an error."""
        if not any(guides):
            return lambda: [None] * len(guides)
        return self._thread.submit(lambda: [None if guide is None else guide.mask() for guide in guides]).result

    def close(self) -> None:
        """Start nothing more."""
        self._thread.close()


def vocabulary(tokenizer: str, end_tokens: Sequence[int], size: int) -> LLTokenizer:
    """A model's vocabulary as grammars see it, from its ``tokenizer.json``; takes about a quarter of a second.

    Raises:
        ValueError: it is of an unknown kind, or has no end token, without which nothing could end.
    """
    if not end_tokens:
        raise ValueError("it has no end token")
    return LLTokenizer(tokenizer, n_vocab=size, eos_token=list(end_tokens))


class _Bytes:
    """A vocabulary in which token ``i`` is byte ``i``, as the library reads one."""

    def __init__(self, size: int) -> None:
        self.tokens = [bytes([i]) for i in range(size)]
        self.eos_token_id = size - 1
        self.bos_token_id = None
        self.special_token_ids = [size - 1]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def byte_vocabulary(size: int) -> LLTokenizer:
    """One token a byte, for ``size`` up to 256 of them; the last one ends the text."""
    assert size <= 256
    return LLTokenizer(TokenizerWrapper(_Bytes(size)), eos_token=size - 1)


# --- sources ------------------------------------------------------------------------------------------------


def inline_json(schema: Any, *, lenient: bool) -> str:
    """In a grammar, what stands for JSON that matches ``schema``."""
    return f"%json {json.dumps(_with_options(schema, lenient), ensure_ascii=False)}"


def _serialized(constraint: Constraint, tokens: LLTokenizer | None) -> str:
    """As the library reads it. Raises InvalidRequest where a source is not of its kind."""
    answer = _grammar(constraint)
    if constraint.thinking == "none":
        return json.dumps({"grammars": [answer]})
    thinking = {"lark_grammar": _thinking(constraint.thinking == "may", tokens)}
    return json.dumps({"grammars": [thinking, {**answer, "name": "answer"}]})


def _grammar(constraint: Constraint) -> dict[str, Any]:
    match constraint.kind:
        case "regex":
            return json.loads(LLMatcher.grammar_from_regex(constraint.source))["grammars"][0]
        case "grammar":
            return {"lark_grammar": _lark(constraint.source)}
        case "json_schema":
            try:
                schema = json.loads(constraint.source)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"the schema is no JSON: {error}") from error
            return {"json_schema": _with_options(schema, constraint.lenient)}


def _with_options(schema: Any, lenient: bool) -> Any:
    """The library takes options from inside the schema; clients do not set them."""
    if not isinstance(schema, dict):
        return schema
    return {**schema, "x-guidance": {"lenient": lenient, "whitespace_pattern": rf"[ \t\r\n]{{1,{WHITESPACE_MAX}}}"}}


def _lark(source: str) -> str:
    """GBNF, which has rules with ``::=``, as Lark; Lark as it is."""
    if "::=" not in source:
        return source
    try:
        return any_to_lark(source)
    except Exception as error:  # the converter raises bare Exception
        raise InvalidRequest(f"this grammar cannot be used: {_short(str(error))}") from error


def _thinking(may: bool, tokens: LLTokenizer | None) -> str:
    """Free text up to ``</think>``, then the grammar named ``answer``."""
    begin, end = _marker("<think>", tokens), _marker("</think>", tokens)
    # No text can look like a special token; of plain text the first match ends it.
    special, plain = f"thought: /(?s:.*)/ {end}", r"thought[lazy]: /(?s:.*)<\/think>/"
    thought = special if end.startswith("<") else plain
    start = f"({begin} thought gap)? @answer" if may else "thought gap @answer"
    return f"%llguidance {{}}\nstart: {start}\n{thought}\ngap: /[ \\n]{{0,4}}/\n"


def _marker(text: str, tokens: LLTokenizer | None) -> str:
    """A marker in a grammar: its text, or where the vocabulary has it as a special token, that token."""
    if tokens is not None:
        found = tokens.tokenize_str(text, parse_special=True)
        if len(found) == 1 and tokens.is_special_token(found[0]):
            return f"<[{found[0]}]>"
    return json.dumps(text)


def _refusal(constraint: Constraint, message: str) -> str:
    names = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}
    return f"this {names[constraint.kind]} cannot be used: {_short(message)}"


def _short(message: str) -> str:
    message = message.removesuffix("<non-verbose/>").split("\n<backtrace>")[0].strip()
    return message if len(message) <= _MESSAGE_CHARACTERS_MAX else message[: _MESSAGE_CHARACTERS_MAX - 3] + "..."


class _Thread:
    """One thread with a deep stack, started when it is first needed."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._started = False

    async def run(self, function: Callable[[], T]) -> T:
        """Raises InvalidRequest if it takes too long."""
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                return await asyncio.wrap_future(self.submit(function))
        except TimeoutError:
            raise InvalidRequest("the grammar takes too long to compile") from None

    def submit(self, function: Callable[[], T]) -> Future[T]:
        if self._started:
            return self._executor.submit(function)
        self._started = True
        before = threading.stack_size(STACK_BYTES)  # of threads that start from now on
        try:
            return self._executor.submit(function)
        finally:
            threading.stack_size(before)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
