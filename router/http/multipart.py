"""A form that arrives in parts: its fields, and of its one file the bytes as they come."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from router.calls.errors import CallFailed, invalid

FIELD_BYTES_MAX = 4096
FIELDS_MAX = 32


class Form:
    """:meth:`feed` what arrives; then what of it is the file's is returned, and the fields before it are known."""

    def __init__(self, content_type: bytes, file: str) -> None:
        """
        Args:
            content_type: the request's.
            file: the field that is a file.

        Raises:
            CallFailed: it is no such form.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise CallFailed("unsupported_media", "a file is uploaded as multipart/form-data", code="not_multipart")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """Of the file, once it has begun."""
        self.ended = False
        self._file = file
        self._header = b""
        self._value = b""
        self._disposition = b""
        self._field: str | None = None
        self._field_data = b""
        self._data: list[bytes] = []
        self._parts = 0
        callbacks = {
            "on_part_begin": self._part_began,
            "on_part_data": self._part_data,
            "on_part_end": self._part_ended,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_ended,
            "on_headers_finished": self._headers_ended,
            "on_end": self._all_ended,
        }
        try:
            self._parser = MultipartParser(options[b"boundary"], callbacks)  # pyright: ignore[reportArgumentType]
        except FormParserError as error:
            raise invalid(f"the form cannot be read: {error}", code="invalid_multipart") from None

    def feed(self, data: bytes) -> list[bytes]:
        """The file's bytes among these.

        Raises:
            CallFailed: the form is broken, or has too much in its fields.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise invalid(f"the form cannot be read: {error}", code="invalid_multipart") from None
        taken, self._data = self._data, []
        return taken

    def _part_began(self) -> None:
        self._parts += 1
        if self._parts > FIELDS_MAX + 1:
            raise CallFailed("too_large", "the form has too much beside its file", code="body_too_large")
        self._disposition, self._field, self._field_data = b"", None, b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ended(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_ended(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        if self._field != self._file:
            return
        if self.filename is not None:
            raise invalid(f"the form has two files named {self._file}", self._file)
        self.filename = options.get(b"filename", b"").decode(errors="replace")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == self._file:
            self._data.append(data[start:end])
            return
        self._field_data += data[start:end]
        if len(self._field_data) > FIELD_BYTES_MAX:
            raise CallFailed("too_large", "the form has too much beside its file", code="body_too_large")

    def _part_ended(self) -> None:
        if self._field is not None and self._field != self._file:
            self.fields[self._field] = self._field_data.decode(errors="replace")

    def _all_ended(self) -> None:
        self.ended = True
