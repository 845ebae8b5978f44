"""From a body's bytes to the type that a dialect gives it. Pure."""

import re
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from router.calls.errors import invalid

T = TypeVar("T", bound=msgspec.Struct)

ModelName = Annotated[str, Meta(description="Left out or empty: the first model that is served.")]

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
INVALID_JSON = "invalid_json"


def parse(body: bytes, kind: type[T]) -> T:
    """The request in a body.

    Raises:
        CallFailed: it is no JSON, or not of that type; names the field.
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
            raise invalid(f"missing required parameter: '{param}'", param, "missing_required_parameter") from None
        where = f" for '{path}'" if path else ""
        raise invalid(f"invalid value{where}: {message}", path or None, "invalid_type") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise invalid(f"the body could not be parsed as JSON: {error}", code=INVALID_JSON) from None
    except RecursionError:
        raise invalid("the body is nested too deeply", code=INVALID_JSON) from None
