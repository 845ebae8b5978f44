"""A batch's file, line by line: what is wrong with it, and where each line is. Pure.

A line is a call, in JSON: ``{"custom_id", "method", "url", "body"}``. Of each one its ``custom_id`` is remembered,
and some forty bytes, never its body: a file of 200 MB takes a few.
"""

from array import array
from collections.abc import Callable, Sequence

import msgspec
import xxhash

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""What a line may ask."""
CUSTOM_ID_CHARACTERS_MAX = 512
SHOWN_CHARACTERS = 128
"""So much of what a client wrote is shown in an error."""
PREFIX_BYTES = (512, 4096)
"""Lines are kept together that begin with the same bytes: first by few of them, then by more."""


class Limits(msgspec.Struct, frozen=True):
    """Of one file."""

    lines_max: int = 50_000
    bytes_max: int = 200 * 2**20
    line_bytes_max: int = 8 * 2**20
    errors_max: int = 1000
    """More are counted and not told."""


BATCH_LIMITS = Limits(errors_max=100)
"""Of what a router runs: so many wrong lines are told of each."""


class LineError(msgspec.Struct, frozen=True):
    """What is wrong, in OpenAI's words."""

    code: str
    message: str
    line: int | None = None
    """From 1; None: it is of the whole file."""
    param: str | None = None


_ABSENT = msgspec.Raw(b"null")


class _Body(msgspec.Struct):
    model: str
    stream: bool | None = None
    background: bool | None = None
    metadata: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    instructions: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: _Body


class _Metadata(msgspec.Struct):
    trace_id: str | None = None


class _Names(msgspec.Struct):
    metadata: _Metadata | None = None
    prompt_cache_key: str | None = None
    previous_response_id: str | None = None


class Call(msgspec.Struct, frozen=True):
    """What of a line is sent."""

    custom_id: str
    url: str
    body: msgspec.Raw


PROMPTS = {
    "/v1/chat/completions": ("messages",),
    "/v1/completions": ("prompt",),
    "/v1/responses": ("instructions", "input"),
}
"""Where a body has what its prompt begins with."""

_decode_line = msgspec.json.Decoder(_Line).decode
_decode_metadata = msgspec.json.Decoder(_Metadata).decode
_decode_call = msgspec.json.Decoder(Call).decode
_decode_names = msgspec.json.Decoder(_Names).decode


def call_of(line: bytes) -> Call:
    """The call of a line that was found right."""
    return _decode_call(line)


def is_alone(call: Call) -> bool:
    """It names no trace, nor what it shares or continues: nothing follows it."""
    try:
        names = _decode_names(call.body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False  # its endpoint says what is wrong with it
    return not (names.prompt_cache_key or names.previous_response_id or (names.metadata and names.metadata.trace_id))


class Table:
    """Where each line is, and whom it belongs together with. Lines count from 0, and blank ones do not count."""

    def __init__(self) -> None:
        self._offsets = array("Q")
        self._lengths = array("L")
        self._keys = array("Q")
        self._traces = array("l")
        """Which trace each is a step of; -1: none."""
        self.index: dict[str, int] = {}
        """By ``custom_id``."""

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, custom_id: str, offset: int, length: int, key: int, trace: int) -> None:
        """One more line. ``key``: of what its prompt begins with."""
        self.index[custom_id] = len(self._offsets)
        self._offsets.append(offset)
        self._lengths.append(length)
        self._keys.append(key)
        self._traces.append(trace)

    def place(self, line: int) -> tuple[int, int]:
        """Its first byte's offset in the file, and its length."""
        return self._offsets[line], self._lengths[line]

    def chains(self) -> list[Sequence[int]]:
        """The lines in the order in which they are best run: each chain is the steps of one trace, one after the other,
        or a line alone; chains that begin alike follow each other."""
        steps: dict[int, array[int]] = {}
        chains: list[Sequence[int]] = []
        for line, trace in enumerate(self._traces):
            if trace < 0:
                chains.append(range(line, line + 1))
            elif trace in steps:
                steps[trace].append(line)
            else:
                steps[trace] = array("L", (line,))
                chains.append(steps[trace])
        chains.sort(key=lambda chain: (self._keys[chain[0]], chain[0]))
        return chains


class Checked(msgspec.Struct, frozen=True):
    """What a file holds."""

    table: Table
    errors: tuple[LineError, ...]
    """The first of them; empty: it is right."""
    wrong: int
    """How many there are."""


class Reader:
    """Reads a file in chunks of any size: :meth:`feed`, then :meth:`end` once."""

    def __init__(
        self,
        endpoint: str | None = None,
        refuse: Callable[[str], LineError | None] = lambda model: None,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
    ) -> None:
        """
        Args:
            endpoint: the one that every line asks; None: any.
            refuse: what is wrong with a model's name, if anything; the line's number is filled in.
            limits: of the file.
        """
        self._endpoint = endpoint
        self._refuse = refuse
        self._limits = limits
        self._table = Table()
        self._errors: list[LineError] = []
        self._wrong = 0
        self._traces: dict[str, int] = {}
        self._numbers = array("L")
        """Of each line of the table its number in the file."""
        self._number = 0
        self._offset = 0
        """Of the line that has begun."""
        self._parts: list[bytes] = []
        self._pending = 0
        self._over = False

    def feed(self, data: bytes) -> None:
        """The file's next bytes."""
        head, *rest = data.split(b"\n")
        self._begin(head)
        for piece in rest:
            self._finish()
            self._begin(piece)

    def end(self) -> Checked:
        """The file is over."""
        self._finish(newline=0)
        if not len(self._table) and not self._wrong:
            self._wrong_with(LineError("empty_file", "The file has no lines: it must hold one call a line, in JSON."))
        return Checked(self._table, tuple(self._errors), self._wrong)

    def _begin(self, piece: bytes) -> None:
        self._pending += len(piece)
        if self._pending <= self._limits.line_bytes_max:
            self._parts.append(piece)

    def _finish(self, newline: int = 1) -> None:
        length, offset = self._pending, self._offset
        line = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._pending = 0
        self._offset += length + newline
        self._number += 1
        if self._over:
            return
        if self._offset > self._limits.bytes_max + 1:
            self._over = True
            self._wrong_with(LineError("file_too_large", f"The file is longer than {self._limits.bytes_max} bytes."))
        elif length > self._limits.line_bytes_max:
            message = f"The line is longer than {self._limits.line_bytes_max} bytes."
            self._wrong_with(LineError("line_too_long", message, self._number))
        elif line and not line.isspace() and (error := self._take(line, offset, length)) is not None:
            self._wrong_with(msgspec.structs.replace(error, line=self._number))

    def _wrong_with(self, error: LineError) -> None:
        self._wrong += 1
        if len(self._errors) < self._limits.errors_max:
            self._errors.append(error)

    def _take(self, data: bytes, offset: int, length: int) -> LineError | None:
        if len(self._table) >= self._limits.lines_max:
            self._over = True
            return LineError("too_many_tasks", f"The file has more than {self._limits.lines_max} lines.")
        try:
            line = _decode_line(data)
            _check_text(data)
        except msgspec.ValidationError as error:
            return _ill_formed(str(error))
        except (msgspec.DecodeError, UnicodeError):
            return LineError("invalid_json_line", "This line is not parseable as valid JSON.")
        except RecursionError:
            return LineError("invalid_json_line", "This line is nested too deeply.")
        if (error := self._error_of(line)) is not None:
            return error
        trace = -1
        if _is_there(line.body.metadata):
            try:
                name = _decode_metadata(line.body.metadata).trace_id
            except msgspec.ValidationError as error:
                return LineError("invalid_request", f"body.metadata: {error}", param="body.metadata")
            if name:
                trace = self._traces.setdefault(name, len(self._traces))
        self._table.add(line.custom_id, offset, length, _key(line), trace)
        self._numbers.append(self._number)
        return None

    def _error_of(self, line: _Line) -> LineError | None:
        if not 1 <= len(line.custom_id) <= CUSTOM_ID_CHARACTERS_MAX:
            message = f"custom_id must have from 1 to {CUSTOM_ID_CHARACTERS_MAX} characters."
            return LineError("invalid_custom_id", message, param="custom_id")
        if (before := self._table.index.get(line.custom_id)) is not None:
            shown = line.custom_id[:SHOWN_CHARACTERS]
            message = f"The custom_id {shown!r} is that of line {self._numbers[before]} already."
            return LineError("duplicate_custom_id", message, param="custom_id")
        if line.method != "POST":
            message = f"The method must be POST, not {line.method[:SHOWN_CHARACTERS]!r}."
            return LineError("invalid_method", message, param="method")
        if line.url not in ENDPOINTS:
            return _not_served(line.url)
        if self._endpoint is not None and line.url != self._endpoint:
            message = f"The url is {line.url}, and the batch's endpoint {self._endpoint}."
            return LineError("url_mismatch", message, param="url")
        if line.body.stream:
            return LineError("invalid_request", "Nobody reads a batch's streams.", param="body.stream")
        if line.body.background:
            message = "A batch runs in the background itself."
            return LineError("invalid_request", message, param="body.background")
        if not any(_is_there(getattr(line.body, field)) for field in PROMPTS[line.url]):
            field = PROMPTS[line.url][-1]
            message = f"The body has no {field}."
            return LineError("missing_required_parameter", message, param=f"body.{field}")
        return self._refuse(line.body.model)


def model_not_found(model: str) -> LineError:
    """Nobody serves it."""
    return LineError("model_not_found", f"The model {model[:SHOWN_CHARACTERS]!r} does not exist.", param="body.model")


def _check_text(data: bytes) -> None:
    """Raises UnicodeError: it is not UTF-8. JSON's decoder does not look into what it leaves as it is."""
    if not data.isascii():
        data.decode()


def _is_there(raw: msgspec.Raw) -> bool:
    return len(memoryview(raw)) != 4 or bytes(memoryview(raw)) != b"null"


def _not_served(url: str) -> LineError:
    served = ", ".join(ENDPOINTS)
    if url == "/v1/embeddings":
        message = f"/v1/embeddings is not served: models of text make none. What can be asked: {served}."
    else:
        message = f"The url {url[:SHOWN_CHARACTERS]!r} cannot be asked in a batch. What can be: {served}."
    return LineError("invalid_url", message, param="url")


def _ill_formed(said: str) -> LineError:
    """What msgspec says of a line of the wrong form. Its messages end with the path, where there is one, and name a
    field that is missing."""
    what, _, path = said.partition(" - at `$")
    where = path.rstrip("`").lstrip(".")
    if "missing required field" in what:
        field = what.split("`")[-2]
        where = f"{where}.{field}" if where else field
        return LineError("missing_required_parameter", f"The line has no {where}.", param=where)
    return LineError("invalid_request", f"{where}: {what}" if where else what, param=where or None)


def _key(line: _Line) -> int:
    """Of lines that begin alike in their first bytes it is near, and equal where they are alike for longer."""
    digest = xxhash.xxh3_64(f"{line.url}\0{line.body.model}\0".encode())
    key, taken = 0, 0
    fields = [getattr(line.body, field) for field in PROMPTS[line.url]]
    prompt = b"\0".join(bytes(memoryview(raw)[: PREFIX_BYTES[-1]]) for raw in fields if _is_there(raw))
    for end in PREFIX_BYTES:
        digest.update(prompt[taken:end])
        taken = end
        key = key << 32 | digest.intdigest() & 0xFFFFFFFF
    return key
