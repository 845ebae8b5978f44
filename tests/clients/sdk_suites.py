"""The tests that OpenAI's and Anthropic's Python clients bring along, against a cluster of a small model.

    python tests/clients/sdk_suites.py openai --python .clients/bin/python

Fetches the client's source of the release that ``--python`` has, starts a cluster whose pools serve the names that its
tests ask for, runs the tests of what a text model can do, and holds what fails against ``EXCEPTIONS``: each has its
reason, and one that passes is told, too. Ends with 1 where any differs.
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
    "openai": ("chat", "test_completions.py", "test_models.py", "test_responses.py", "responses"),
    "anthropic": ("test_messages.py",),
}
NAMES = {"openai": ("gpt-6-astra", "gpt-3.5-turbo-instruct"), "anthropic": ("claude-opus-5-5",)}

EXCEPTIONS: dict[str, dict[str, str]] = {
    "openai": {
        "chat.*::test_[mrs]*_create_with_all_params_*": "asks for sound (audio), which a text model does not make",
        "chat.completions.*::test_[mrs]*_list*": "chat completions are not kept, so their messages are not listed",
        "chat.test_completions.*::test_[mrs]*_list*": "chat completions are not kept: responses are",
        "chat.test_completions.*::test_[mrs]*_retrieve*": "chat completions are not kept: responses are",
        "chat.test_completions.*::test_[mrs]*_update*": "chat completions are not kept: responses are",
        "chat.test_completions.*::test_[mrs]*_delete*": "chat completions are not kept: responses are",
        "test_completions.*::test_[mrs]*_create_with_all_params_*": "asks for the best of zero answers (best_of)",
        "test_models.*::test_[mrs]*_delete*": "models are not deleted over the API",
        "*::test_[mrs]*_create_with_all_params_*": "names a conversation object, which the server does not keep",
        "test_responses.*::test_[mrs]*_create_*": "names no model",
        "test_responses.*::test_[mrs]*_compact*": "responses are not compacted",
        "test_responses.*::test_[mrs]*_cancel*": "asks for a response that the suite never made",
        "test_responses.*::test_[mrs]*_delete*": "asks for a response that the suite never made",
        "test_responses.*::test_[mrs]*_retrieve*": "asks for a response that the suite never made",
        "responses.test_input_items.*::test_[mrs]*_list*": "asks for a response that the suite never made",
        "responses.test_input_tokens.*::test_[mrs]*_count_with_all_params*": "names a conversation object",
        "responses.test_input_tokens.*::test_[mrs]*_count*": "names no model",
    },
    "anthropic": {
        "*::test_[mrs]*_create_with_all_params_*": "has a strict tool whose properties are words instead of schemas",
        "*::test_deprecated_model_warning*": "asks for every model that was ever withdrawn, by name",
    },
}
"""What fails and why, by a pattern of ``module.Class::test``. The first pattern that fits counts."""


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
    files = [f"tests/api_resources/{name}" for name in FILES[suite]]
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
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [python, "-m", "pytest", *options, *files],
        cwd=source,
        env=environment | {"TEST_API_BASE_URL": base},
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
        module = case.attrib["classname"].removeprefix("tests.api_resources.")
        name = f"{module}::{case.attrib['name']}"
        if case.find("skipped") is not None:
            continue
        broken = case.find("failure") if case.find("failure") is not None else case.find("error")
        pattern = next((p for p in EXCEPTIONS[suite] if fnmatch.fnmatchcase(name, p)), None)
        if broken is None:
            passed[module] += 1
            if pattern is not None:
                differ.append(f"passes, though it is excused: {name}")
        elif pattern is not None:
            excused[pattern] += 1
        else:
            differ.append(f"FAILED {name}: {broken.attrib.get('message', '')[:300]}")
    for module, count in sorted(passed.items()):
        print(f"{count:4} passed   {module}")  # noqa: T201 - the report
    for pattern, count in excused.items():
        print(f"{count:4} excused  {pattern}: {EXCEPTIONS[suite][pattern]}")  # noqa: T201 - the report
    print("\n".join(differ))  # noqa: T201 - the report
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
