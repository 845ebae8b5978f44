"""The tests that OpenAI's and Anthropic's Python clients bring along, against a cluster of a small model.

    python tests/clients/sdk_suites.py openai --python .clients/bin/python

The environment needs the client (``openai[aiohttp]``) and what its tests need: pytest with its plugins ``timeout``,
``asyncio`` and ``xdist``, hypothesis, inline-snapshot, rich, ``http-snapshot[httpx]``, respx.

Fetches the client's source of the release that ``--python`` has, starts a cluster whose pools serve the names that its
tests ask for, runs the tests of what a text model can do, and holds what fails against ``EXCEPTIONS``: each has its
reason and words of its error, and one that passes or fails in other words is told, too. Ends with 1 where any differs.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"

FILES = {
    "openai": (
        *("api_resources/chat", "api_resources/test_completions.py", "api_resources/test_models.py"),
        *("api_resources/test_responses.py", "api_resources/responses", "api_resources/test_files.py"),
        *("api_resources/test_batches.py", "api_resources/test_webhooks.py", "api_resources/webhooks"),
        *("lib/test_webhooks.py", "lib/test_webhook_signature.py"),
    ),
    "anthropic": ("api_resources/test_messages.py",),
}
NAMES = {"openai": ("gpt-6-astra", "gpt-3.5-turbo-instruct"), "anthropic": ("claude-opus-5-5",)}

OPERATOR = "who is told of events is the operator's to say, in the config"
NO_PAGE = ("asks for a page of nothing, where OpenAI's own rule is one at least", "400 - limit must be")
NO_INPUT = "gives no input, and names no response to go on from"
MISSING = "400 - missing required parameter: 'input'"
CONVERSATION = "names a conversation that the server keeps, and it keeps none"
EXCEPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "openai": {
        "chat.test_completions.*::test_method_create_with_all_params_overload_[12][[]*": (
            "asks for sound, which a model of text does not make",
            "400 - audio=",
        ),
        "chat.test_completions.*::test_method_list_with_all_params[[]*": NO_PAGE,
        "chat.completions.test_messages.*::test_method_list_with_all_params[[]*": NO_PAGE,
        "test_files.*::test_method_list_with_all_params[[]*": NO_PAGE,
        "test_batches.*::test_method_list_with_all_params[[]*": NO_PAGE,
        "test_webhooks.*::test_[mrs]*": (OPERATOR, "/v1/webhook_endpoints"),
        "webhooks.test_event_types.*::test_[mrs]*_list*": (OPERATOR, "404 - GET /v1/webhook_event_types"),
        "test_completions.*::test_method_create_with_all_params_overload_1[[]*": (
            "has options of a stream for what is none, where OpenAI's own rule is that only streams have them",
            "400 - stream_options needs stream to be true",
        ),
        "test_completions.*::test_method_create_with_all_params_overload_2[[]*": (
            "gives a bias to a token named foo, where OpenAI's own rule is that tokens go by their ids",
            "400 - logit_bias goes by token ids, and 'foo' is none",
        ),
        "test_models.*::test_[mrs]*_delete[[]*": ("models are not deleted over the API", "405 - DELETE /v1/models/"),
        "test_responses.*::test_method_create_with_all_params_overload_[12][[]*": (
            CONVERSATION,
            "400 - a conversation",
        ),
        "test_responses.*::test_[mrs]*_create_overload_[12][[]*": (NO_INPUT, MISSING),
        "test_responses.*::test_[mrs]*_compact*": ("responses are not compacted", "405 - POST /v1/responses/compact"),
        "responses.test_input_items.*::test_method_list_with_all_params[[]*": NO_PAGE,
        "responses.test_input_tokens.*::test_[mrs]*_count[[]*": (NO_INPUT, MISSING),
        "responses.test_input_tokens.*::test_method_count_with_all_params[[]*": (CONVERSATION, "400 - a conversation"),
    },
    "anthropic": {
        "test_messages.*::test_method_create_with_all_params_overload_[12][[]*": (
            "has a strict tool whose properties are words instead of schemas",
            "the parameters of the tool 'name' cannot be used",
        ),
        "test_messages.*::test_deprecated_model_warning[[]*": (
            "asks for each model that was ever withdrawn, by its name, and none of them is served",
            "404 - {'error': {'type': 'not_found_error', 'message': \"the model ",
        ),
    },
}
"""What fails, by a pattern of ``module.Class::test``: why, and words of its error. The first that fits counts."""


def fetch(suite: str, python: str, folder: Path) -> Path:
    """The unpacked source of the installed release."""
    asked = f"import importlib.metadata as m; print(m.version({suite!r}))"
    version = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()
    pip = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", suite, "--dest", str(folder)]
    subprocess.run([*pip, f"{suite}=={version}"], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"{suite}-{version}"


def pools(names: tuple[str, ...], port: int) -> str:
    """A cluster's configuration: one decode worker for each name. Little KV memory keeps endless answers short."""
    text = f"port = {port}\nkv_tokens = 512\n"
    for at, name in enumerate(names):
        text += f'[pools.name{at}]\nmodel = "{MODEL}"\nserves = "{name}"\nprefill = 0\ndecode = 1\n'
    return text


def run_tests(suite: str, source: Path, python: str, url: str, report: Path) -> None:
    """Writes JUnit's XML to ``report``."""
    files = [f"tests/{name}" for name in FILES[suite]]
    options = [
        "-q",
        "--tb=line",
        "-o",
        "addopts=",
        "-n",
        "4",
        "-p",
        "no:logging",
        "--timeout",
        "120",
        f"--junitxml={report}",
    ]
    base = f"{url}/v1" if suite == "openai" else url
    if suite == "openai":
        options += ["-p", "sdk_objects"]
    subprocess.run(
        [python, "-m", "pytest", *options, *files],
        cwd=source,
        env=os.environ | {"TEST_API_BASE_URL": base, "PYTHONPATH": str(Path(__file__).parent)},
        check=False,
    )


def judge(suite: str, report: Path) -> int:
    """Prints what passed and failed, each exception with its reason. Returns how many differ from the list."""
    passed: Counter[str] = Counter()
    excused: Counter[str] = Counter()
    differ: list[str] = []
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    assert len(cases) > 40, "hardly any test was found"
    for case in cases:
        module = case.attrib["classname"].removeprefix("tests.").removeprefix("api_resources.")
        name = f"{module}::{case.attrib['name']}"
        if case.find("skipped") is not None:
            continue
        broken = case.find("failure") if case.find("failure") is not None else case.find("error")
        pattern = next((p for p in EXCEPTIONS[suite] if fnmatch.fnmatchcase(name, p)), None)
        if broken is None:
            passed[module] += 1
            if pattern is not None:
                differ.append(f"passes, though it is excused: {name}")
            continue
        message = broken.attrib.get("message", "")
        if pattern is not None and EXCEPTIONS[suite][pattern][1] in message:
            excused[pattern] += 1
        else:
            differ.append(f"FAILED {name}: {message[:300]}")
    for module, count in sorted(passed.items()):
        print(f"{count:4} passed   {module}")  # noqa: T201 - the report
    for pattern, count in excused.items():
        print(f"{count:4} excused  {pattern}: {EXCEPTIONS[suite][pattern][0]}")  # noqa: T201 - the report
    unused = [pattern for pattern in EXCEPTIONS[suite] if pattern not in excused]
    differ += [f"excuses nothing: {pattern}" for pattern in unused]
    total = f"{passed.total()} passed, {excused.total()} excused, {len(differ)} differ"
    print("\n".join([*differ, total]))  # noqa: T201 - the report
    return len(differ)


def main() -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suite", choices=sorted(FILES))
    parser.add_argument("--python", required=True, help="a Python that has the client and what its tests need")
    parser.add_argument("--port", type=int, default=8499)
    parser.add_argument("--url", help="a cluster that runs already and serves the names")
    given = parser.parse_args()
    python = os.path.abspath(given.python)
    with tempfile.TemporaryDirectory() as folder:
        source = fetch(given.suite, python, Path(folder))
        report = Path(folder) / "report.xml"
        if given.url:
            run_tests(given.suite, source, python, given.url, report)
            return min(1, judge(given.suite, report))
        config = Path(folder) / "cluster.toml"
        config.write_text(pools(NAMES[given.suite], given.port))
        command = [sys.executable, "-m", "cluster.cli"]
        place = ["--run-dir", str(Path(folder) / "run")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*command, "up", "--config", str(config), *place], check=True, env=environment)
        try:
            run_tests(given.suite, source, python, f"http://127.0.0.1:{given.port}", report)
        finally:
            subprocess.run([*command, "down", *place], check=True, env=environment)
        return min(1, judge(given.suite, report))


if __name__ == "__main__":
    sys.exit(main())
