"""Grammars on a vocabulary of bytes: what may come next, where an answer ends, and what is refused."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from tracehaul.engine.grammar import GrammarCheck, Grammars, Guide, Mask, byte_vocabulary
from tracehaul.runtime import clock
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint

END = 255
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def with_grammars(test: Callable[[Grammars], Awaitable[None]]) -> None:
    async def main() -> None:
        grammars = Grammars(lambda: byte_vocabulary(256))
        try:
            await test(grammars)
        finally:
            grammars.close()

    asyncio.run(main())


def allowed(mask: Mask | None) -> list[int]:
    assert mask is not None
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def follows(guide: Guide, text: str) -> bool:
    """Whether ``text`` may come next, byte by byte; it then has."""
    for byte in text.encode():
        if byte not in allowed(guide.mask()):
            return False
        guide.accept(byte)
    return True


def refused(constraint: Constraint, output: bytes = b"") -> str:
    """Why: by the check without a vocabulary, or else by the one with it."""

    async def test(grammars: Grammars) -> None:
        try:
            await GrammarCheck().check(constraint)
            await grammars.guide(constraint, list(output))
        except InvalidRequest as error:
            messages.append(str(error))

    messages: list[str] = []
    with_grammars(test)
    return messages[0]


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Constraint("json_schema", PERSON), '{"name": "Ada", "age": 36}', '{"age'),
        (Constraint("json_schema", '{"type": "object"}'), '{"a": [1, {}]}', "[1]"),
        (Constraint("regex", "[a-c]{2}x?"), "abx", "aba"),
        (Constraint("grammar", 'start: "yes" | "né"\n'), "né", "no"),
        (Constraint("grammar", 'root ::= "a" b\nb ::= [0-9]+ "!"\n'), "a12!", "ab"),
        (Constraint("regex", "a+b", thinking="opened"), "so: aab</think>\nab", "aab</think>x"),
        (Constraint("regex", "a+b", thinking="may"), "<think>c</think>aab", "c"),
        (Constraint("regex", "a+b", thinking="may"), "aab", "<thought"),
        (Constraint("json_schema", '{"uniqueItems": true, "type": "array"}', lenient=True), "[1, 1]", "{"),
        # Options in a schema are ours alone.
        (Constraint("json_schema", '{"type": "array", "x-guidance": {"whitespace_pattern": "x"}}'), "[ 1]", "[x"),
    ],
)
def test_only_what_matches_can_come_and_then_only_the_end(constraint: Constraint, good: str, bad: str) -> None:
    async def test(grammars: Grammars) -> None:
        await GrammarCheck().check(constraint)
        guide = await grammars.guide(constraint, [])
        assert follows(guide, good)
        assert END in allowed(guide.mask())
        guide.accept(END)
        assert guide.error == ""
        assert not follows(await grammars.guide(constraint, []), bad)

    with_grammars(test)


def test_nothing_but_the_end_follows_a_complete_answer() -> None:
    async def test(grammars: Grammars) -> None:
        guide = await grammars.guide(Constraint("json_schema", PERSON), list(b'{"name":"A","age":1}'))
        assert allowed(guide.mask()) == [END]

    with_grammars(test)


def test_a_place_is_found_again_from_the_output_so_far() -> None:
    async def test(grammars: Grammars) -> None:
        constraint = Constraint("json_schema", PERSON)
        generator = random.Random(3)
        guide, output = await grammars.guide(constraint, []), list[int]()
        for _ in range(60):
            here = allowed(guide.mask())
            again = await grammars.guide(constraint, output)
            assert allowed(again.mask()) == here
            if here == [END]:
                break
            output.append(generator.choice([token for token in here if token != END]))
            guide.accept(output[-1])

    with_grammars(test)


def test_white_space_between_tokens_of_json_ends() -> None:
    async def test(grammars: Grammars) -> None:
        guide = await grammars.guide(Constraint("json_schema", '{"type": "object"}'), [])
        assert follows(guide, "{" + "\n" * 32)
        assert ord("\n") not in allowed(guide.mask())

    with_grammars(test)


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Constraint("json_schema", "false"), "schema"),
        (Constraint("json_schema", '{"$ref": "http://example.com/schema"}'), "example.com"),
        (Constraint("json_schema", "{"), "JSON"),
        (Constraint("regex", "(a"), "unclosed"),
        (Constraint("regex", "(?=a)b"), "look-around"),
        (Constraint("grammar", "start: missing"), "missing"),
        (Constraint("grammar", 'root ::= "a'), "grammar"),
        (Constraint("grammar", "start: <|nobody|>"), "cannot be used"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_librarys_message(constraint: Constraint, says: str) -> None:
    assert says in refused(constraint)


def chained(rules: int) -> str:
    return "start: a0\n" + "".join(f"a{at}: a{at + 1}\n" for at in range(rules)) + f'a{rules}: "x"\n'


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "(a{1000}){1000}"),
        Constraint("regex", "(" * 20_000 + "a" + ")" * 20_000),
        Constraint("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        Constraint("grammar", 'start: "a"{1000000}'),
        Constraint("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
        Constraint("json_schema", '{"$ref": "#"}'),
        Constraint(
            "json_schema",
            json.dumps(
                {"allOf": [{"anyOf": [{"required": [f"p{at}"]}, {"required": [f"q{at}"]}]} for at in range(20)]}
            ),
        ),
    ],
)
def test_hostile_grammars_are_refused_or_harmless(constraint: Constraint) -> None:
    async def test(grammars: Grammars) -> None:
        try:
            await GrammarCheck().check(constraint)
            guide = await grammars.guide(constraint, [])
        except InvalidRequest:
            return
        for _ in range(100):
            began_s = clock.now_s()
            mask = guide.mask()
            assert clock.now_s() - began_s < 2.0
            if mask is None:
                assert guide.error
                return
            guide.accept(allowed(mask)[0])

    with_grammars(test)


def test_the_deepest_grammar_that_fits_does_not_overflow_the_stack() -> None:
    async def test(grammars: Grammars) -> None:
        constraint = Constraint("grammar", chained(4500))
        assert len(constraint.source) < 65_536
        await GrammarCheck().check(constraint)
        guide = await grammars.guide(constraint, [])
        assert allowed(guide.mask()) == [ord("x")]

    with_grammars(test)


def test_an_output_that_never_matched_is_refused() -> None:
    assert "does not match" in refused(Constraint("regex", "[a-c]+"), b"abx")
