"""Clients that agents are built of, each against a served script: texts, streams, tool loops, forced calls, forms.

`./scripts/clients` installs them; where one is missing, its tests are skipped.
"""

# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pydantic
import pytest

MODEL = "org/fake"
HELLO = "héllo 🙂"
SUNNY = "It is sunny in Paris."
ASKED: Any = [{"role": "user", "content": "What is the weather?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


def needs(module: str) -> Any:
    return pytest.importorskip(
        module, reason=f"{module} is not installed here: ./scripts/clients does", exc_type=ImportError
    )


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client looks anywhere but where it is pointed."""
    told = {"OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    for name, value in (told | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "MSWEA_SILENT_STARTUP": "1"}).items():
        monkeypatch.setenv(name, value)


class City(pydantic.BaseModel):
    """What an answer is asked to be."""

    city: str
    country: str


# --- litellm --------------------------------------------------------------------------------------------------


def ask_litellm(url: str, messages: Any, **fields: Any) -> Any:
    litellm = needs("litellm")
    said = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none", "timeout": 20, "num_retries": 0}
    return litellm.completion(messages=messages, **said, **fields)


def test_litellm_texts(url: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert ask_litellm(url, messages).choices[0].message.content == HELLO
    chunks = list(ask_litellm(url, messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == HELLO
    assert chunks[-1].usage.completion_tokens > 0


def test_litellm_sends_a_call_back(url: str) -> None:
    choice = ask_litellm(url, ASKED, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*ASKED, choice.message.model_dump(exclude_none=True), result]
    assert ask_litellm(url, messages, tools=[WEATHER]).choices[0].message.content == SUNNY


def test_litellm_knows_an_overflow(url: str) -> None:
    litellm = needs("litellm")
    with pytest.raises(litellm.ContextWindowExceededError):
        ask_litellm(url, [{"role": "user", "content": "x " * 600_000}])


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_speaks_messages(url: str, stream: bool) -> None:
    litellm = needs("litellm")
    said = {"model": f"anthropic/{MODEL}", "api_base": url, "api_key": "none", "max_tokens": 50, "timeout": 20}
    answer = litellm.completion(messages=[{"role": "user", "content": "hi"}], stream=stream, **said)
    if stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == HELLO
    else:
        assert answer.choices[0].message.content == HELLO


# --- openai-agents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("choice", [None, "required", "get_weather"])
@pytest.mark.parametrize("streamed", [False, True])
def test_openai_agents_loop(url: str, api: str, choice: str | None, streamed: bool) -> None:
    agents = needs("agents")
    openai = needs("openai")
    told: list[str] = []

    def get_weather(city: str) -> str:
        told.append(city)
        return "sunny"

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
            kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
            agent = agents.Agent(
                name="guide",
                instructions="Be brief.",
                model=kind(model=MODEL, openai_client=client),
                tools=[agents.function_tool(get_weather)],
                model_settings=agents.ModelSettings(tool_choice=choice),
            )
            if not streamed:
                return (await agents.Runner.run(agent, "What is the weather?")).final_output
            result = agents.Runner.run_streamed(agent, "What is the weather?")
            async for _ in result.stream_events():
                pass
            return result.final_output

    assert asyncio.run(run()) == SUNNY
    assert told == ["Paris"]


# --- langchain ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_openai(url: str, responses: bool) -> None:
    needs("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    base = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 20}
    model = ChatOpenAI(model=MODEL, use_responses_api=responses, **base)
    assert model.invoke("hi").text == HELLO
    assert "".join(chunk.text for chunk in model.stream("hi")) == HELLO

    asked = HumanMessage("What is the weather?")
    bound = model.bind_tools([WEATHER])
    for forced in (bound, model.bind_tools([WEATHER], tool_choice="get_weather")):
        answer: Any = forced.invoke([asked])
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
        result = ToolMessage("sunny", tool_call_id=call["id"])
        assert bound.invoke([asked, answer, result]).text == SUNNY

    assert model.with_structured_output(City).invoke("capital?") == City(city="Paris", country="France")


# --- pydantic-ai ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_pydantic_ai(url: str, api: str) -> None:
    needs("pydantic_ai")
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    model: Any
    if api == "messages":
        model = AnthropicModel(MODEL, provider=AnthropicProvider(base_url=url, api_key="none"))
    else:
        kind = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
        model = kind(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))

    told: list[str] = []

    def get_weather(city: str) -> str:
        told.append(city)
        return "sunny"

    async def run() -> None:
        agent = Agent(model, tools=[get_weather])
        assert (await agent.run("hi")).output == HELLO
        assert (await agent.run("What is the weather?")).output == SUNNY
        async with agent.run_stream("What is the weather?") as streamed:
            assert await streamed.get_output() == SUNNY
        if api != "messages":  # it knows by a model's name whether Anthropic's takes a form
            formed = Agent(model, output_type=NativeOutput(City))
            assert (await formed.run("capital?")).output == City(city="Paris", country="France")

    asyncio.run(run())
    assert told == ["Paris", "Paris"]


# --- anthropic ------------------------------------------------------------------------------------------------


def test_anthropic(url: str) -> None:
    anthropic = needs("anthropic")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
        said: Any = {"model": MODEL, "max_tokens": 200}
        answer = client.messages.create(messages=[{"role": "user", "content": "hi"}], **said)
        assert [block.text for block in answer.content] == [HELLO]
        counted = client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "hi"}])
        assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)

        tools = [{"name": "get_weather", "input_schema": PARAMETERS}]
        for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}):
            with client.messages.stream(messages=ASKED, tools=tools, tool_choice=choice, **said) as stream:
                answer = stream.get_final_message()
            assert answer.stop_reason == "tool_use"
            (call,) = [block for block in answer.content if block.type == "tool_use"]
            assert call.input == {"city": "Paris"}
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
            history = [*ASKED, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
            answer = client.messages.create(messages=history, tools=tools, **said)
            assert [block.text for block in answer.content] == [SUNNY]


# --- mini-swe-agent -------------------------------------------------------------------------------------------


def test_mini_swe_agent(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSWEA_GLOBAL_CONFIG_DIR", str(tmp_path / "config"))
    needs("minisweagent")
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.environments.local import LocalEnvironment
    from minisweagent.models.litellm_model import LitellmModel

    work = tmp_path / "work"
    work.mkdir()
    to = {"api_base": f"{url}/v1", "api_key": "none", "timeout": 20, "num_retries": 0}
    model = LitellmModel(model_name=f"openai/{MODEL}", model_kwargs=to, cost_tracking="ignore_errors")
    environment = LocalEnvironment(cwd=str(work), env={"PATH": os.environ["PATH"]})
    agent = DefaultAgent(
        model, environment, system_template="You are an agent.", instance_template="{{ task }}", step_limit=5
    )
    ended = agent.run("look around")
    assert (ended["exit_status"], ended["submission"].strip()) == ("Submitted", "seen")
    assert (work / "notes").read_text() == "seen\n"
