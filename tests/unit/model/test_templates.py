"""What chat templates take, and what is done where they do not. The templates are small ones of each kind."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracehaul.model.adapting import Needs, adapted, short_id
from tracehaul.model.templates import ChatTemplate
from tracehaul.wire.errors import InvalidRequest

HEAD = "{% for m in messages %}"
CALLS = "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
SAID = "[{{ m.role }}]{{ m.content }}" + CALLS
TOLD = SAID + "{% endfor %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
PLAIN = HEAD + TOLD
ONE_CALL = HEAD + "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}" + TOLD
SHORT_IDS = (
    HEAD
    + "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    + "{{ c.id }}{% endfor %}{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}"
    + TOLD
)
TURNS = (
    "{% set n = namespace(at=0) %}"
    + HEAD
    + "{% if m.role in ('user', 'assistant') and not m.tool_calls %}{% if (m.role == 'user') != (n.at % 2 == 0) %}"
    + "{{ raise_exception('turns') }}{% endif %}{% set n.at = n.at + 1 %}{% endif %}"
    + TOLD
)
ONE_SYSTEM = HEAD + "{% if m.role != 'system' or loop.first %}" + SAID + "{% endif %}{% endfor %}"
NO_CALLS = HEAD + "[{{ m.role }}]{{ m.content }}{% endfor %}{{ xml_tools }}"
EACH = "{% for t in tools %}{{ t.function.name + ': ' + t.function.description }}{% endfor %}"
OWN_TOOLS = EACH + HEAD + SAID + "{% endfor %}"
ASKED = "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('no user') }}{% endif %}"
WORDS = (
    HEAD
    + "{% if m.role == 'assistant' and not (m.content or m.tool_calls) %}{{ raise_exception('no words') }}{% endif %}"
    + TOLD
)
STRICT = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    + "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    + "{% set n = namespace(at=0) %}{% for m in rest %}"
    + "{% if m.role in ('user', 'assistant') and not m.tool_calls %}{% if (m.role == 'user') != (n.at % 2 == 0) %}"
    + "{{ raise_exception('conversation roles must alternate') }}{% endif %}{% set n.at = n.at + 1 %}{% endif %}"
    + "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('length 9') }}{% endif %}"
    + "{{ c.function.name }}{{ c.id }}{% endfor %}"
    + "{% if m.role == 'system' %}{{ raise_exception('only user, assistant and tool') }}{% endif %}"
    + "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}[{{ m.role }}]"
    + "{{ first if loop.last and m.role == 'user' }}{{ m.content }}{% endfor %}"
    + "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
)
"""As Mistral's are: whoever speaks takes turns, the system speaks once, ids have nine letters."""


def call(name: str, at: int) -> dict[str, Any]:
    return {"id": f"call_{at}", "type": "function", "function": {"name": name, "arguments": {}}}


def result(at: int) -> dict[str, Any]:
    return {"role": "tool", "content": f"r{at}", "tool_call_id": f"call_{at}"}


USER = {"role": "user", "content": "u"}
TWICE = [USER, {"role": "assistant", "content": "a", "tool_calls": [call("f", 1), call("g", 2)]}, result(1), result(2)]


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        (PLAIN, Needs()),
        (ONE_CALL, Needs(one_call=True)),
        (SHORT_IDS, Needs(short_ids=True)),
        (TURNS, Needs(turns=True)),
        (ONE_SYSTEM, Needs(one_system=True, tools_unseen=True)),
        (NO_CALLS, Needs(calls_as_text=True, tools_as="xml_tools")),
        (OWN_TOOLS, Needs()),
        (ASKED + PLAIN, Needs(user=True)),
        (WORDS, Needs(words=True)),
        (STRICT, Needs(short_ids=True, turns=True, one_system=True, user=True)),
    ],
)
def test_what_a_template_needs(source: str, needs: Needs) -> None:
    assert ChatTemplate(source, {}).needs == needs


def test_several_calls_are_several_answers_each_with_its_result() -> None:
    mixed = [*TWICE[:2], result(2), result(1), USER]
    told = "[user]u[assistant]a<f {}>[tool]r1[assistant]<g {}>[tool]r2[user]u"
    assert ChatTemplate(ONE_CALL, {}).render(mixed) == told


def test_foreign_ids_are_mapped_one_to_one() -> None:
    rendered = ChatTemplate(SHORT_IDS, {}).render(TWICE)
    one, two = short_id("call_1"), short_id("call_2")
    assert rendered.count(one) == rendered.count(two) == 2
    assert short_id("abcDEF123") == "abcDEF123"


@given(st.lists(st.text(), unique=True, max_size=20))
def test_short_ids_are_short_and_differ(ids: list[str]) -> None:
    made = [short_id(given) for given in ids]
    assert all(len(one) == 9 and one.isascii() and one.isalnum() for one in made)
    assert len(set(made)) == len(made)


def test_who_speaks_twice_speaks_once_longer() -> None:
    template = ChatTemplate(TURNS, {})
    assert template.render([USER, {"role": "user", "content": "v"}]) == "[user]u\n\nv"
    assert template.render([*TWICE, USER]) == "[user]u[assistant]a<f {}><g {}>[tool]r1[tool]r2[assistant][user]u"
    assert template.render([{"role": "assistant", "content": "a"}, USER]) == "[user][assistant]a[user]u"


SYSTEM = {"role": "system", "content": "s1"}
ANSWER = {"role": "assistant", "content": "a1"}
RESULT = {"role": "tool", "content": "r1", "tool_call_id": "call_0fypS1hVX8aa"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [call("look", 1) | {"id": "call_0fypS1hVX8aa"}]}
V, W = {"role": "user", "content": "v"}, {"role": "user", "content": "w"}


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ([V, W], ["v", "w"]),
        ([V, CALLED, RESULT, W], ["v", "look", "r1", "w"]),
        ([SYSTEM, SYSTEM | {"content": "s2"}, V], ["s1", "s2", "v"]),
        ([SYSTEM, ANSWER, W], ["a1", "s1", "w"]),
        ([V, ANSWER, SYSTEM, W], ["v", "a1", "s1", "w"]),
    ],
    ids=["user, user", "user after tool", "system, developer", "system, assistant", "system in the middle"],
)
def test_whoever_speaks_a_strict_template_takes_it(messages: list[dict[str, Any]], shown: list[str]) -> None:
    rendered = ChatTemplate(STRICT, {}).render(messages)
    places = [rendered.find(text) for text in shown]
    assert -1 not in places
    assert places == sorted(places)
    assert rendered.count(short_id("call_0fypS1hVX8aa")) == (2 if CALLED in messages else 0)


def test_where_nobody_asks_a_user_says_nothing() -> None:
    template = ChatTemplate(ASKED + PLAIN, {})
    assert template.render([SYSTEM]) == "[system]s1[user]"
    assert template.render([SYSTEM, ANSWER]) == "[system]s1[user][assistant]a1"
    assert template.render([ANSWER, V]) == "[assistant]a1[user]v"


def test_an_answer_without_words_is_a_space_where_it_has_to_say_something() -> None:
    silent = {"role": "assistant", "content": ""}
    assert ChatTemplate(WORDS, {}).render([V, silent, W]) == "[user]v[assistant] [user]w"
    assert ChatTemplate(PLAIN, {}).render([V, silent, W]) == "[user]v[assistant][user]w"


def test_what_the_system_says_later_is_the_users() -> None:
    rule = {"role": "system", "content": "s"}
    assert ChatTemplate(ONE_SYSTEM, {}).render([rule, rule, USER, rule]) == "[system]s\n\ns[user]u[user]s"


def test_calls_that_a_template_leaves_out_are_text() -> None:
    rendered = ChatTemplate(NO_CALLS, {}).render(TWICE)
    assert rendered.startswith('[user]u[assistant]a\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')


def test_tools_are_given_where_they_are_read() -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    assert "look" in ChatTemplate(NO_CALLS, {}).render([USER], [tool])
    assert "look: " in ChatTemplate(OWN_TOOLS, {}).render([USER], [tool]), "with a description where one is needed"
    assert ChatTemplate(PLAIN, {}).render([USER], [tool]) == '[user]u{"type": "function", "function": {"name": "look"}}'


def test_tools_that_a_template_never_shows_are_told_by_the_system() -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    template = ChatTemplate(ONE_SYSTEM, {})
    shown = template.render([USER], [tool])
    assert shown.startswith('[system]You can call these tools:\n<tools>\n{"type": "function", "function": {"name"')
    assert shown.endswith("</tool_call>[user]u")
    assert template.render([{"role": "system", "content": "s"}, USER], [tool]).startswith("[system]s\n\nYou can call")
    assert template.render([USER]) == "[user]u"
    assert "never shows tools" in template.needs.note
    assert ChatTemplate(PLAIN, {}).needs.note == ""


def test_variables_are_passed_on_and_take_nothing_over() -> None:
    source = "{{ bos_token }}{{ mood }}" + PLAIN + "{% if add_generation_prompt %}!{% endif %}"
    variables = {"mood": "calm", "messages": [], "bos_token": "<b>", "tools": [1], "add_generation_prompt": False}
    assert ChatTemplate(source, {"bos_token": "<s>"}).render([USER], variables=variables) == "<s>calm[user]u!"


def test_the_date_is_that_of_the_trace() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}", {})
    assert template.render([USER], now_s=0.0) in ("1969", "1970")
    assert template.render([USER], now_s=1.7e9) == "2023"


def test_what_cannot_be_mended_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="never"):
        ChatTemplate("{{ raise_exception('never') }}", {}).render([USER])


MESSAGES = st.lists(
    st.sampled_from(["user", "system", "assistant", "called", "tool"]).map(
        lambda kind: {
            "called": {"role": "assistant", "content": "", "tool_calls": [call("f", 1), call("g", 2)]},
            "tool": result(1),
        }.get(kind, {"role": kind, "content": kind})
    ),
    min_size=1,
    max_size=9,
)


@given(MESSAGES, st.builds(Needs, *[st.booleans()] * 5, user=st.booleans(), words=st.booleans()))
def test_nothing_is_lost(messages: list[dict[str, Any]], needs: Needs) -> None:
    made = adapted(messages, needs)
    for kind in ("user", "system", "assistant", "r1"):
        before = sum(message["content"].count(kind) for message in messages)
        assert sum(message["content"].count(kind) for message in made) == before
    if not needs.calls_as_text:
        calls = [c["function"]["name"] for message in messages for c in message.get("tool_calls", ())]
        assert [c["function"]["name"] for message in made for c in message.get("tool_calls", ())] == calls


@given(MESSAGES)
def test_turns_are_taken(messages: list[dict[str, Any]]) -> None:
    made = adapted(messages, Needs(turns=True))
    speakers = [m["role"] for m in made if m["role"] in ("user", "assistant") and not m.get("tool_calls")]
    assert speakers == [("user", "assistant")[at % 2] for at in range(len(speakers))]
