"""Sends what schemathesis makes of an OpenAPI document, and looks at each answer: see ``scripts/fuzz``.

Without ``--spec`` the document is the one that the server serves. Another one (OpenAI's, Anthropic's) is cut to what is
served here: its operations keep what they say of bodies and of answers of 200; other statuses, and events, are ours.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import yaml

from tests.served import served

HERE = Path(__file__).parent
METHODS = ("get", "post", "delete")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
PARAMETERS = {
    "models": ("name", "model", "model_id"),
    "responses": ("id", "response_id"),
    "traces": ("id",),
}
"""How paths call what they name; those of one kind begin with its name."""
KEPT = 20
"""Responses and traces that are there to be asked for."""


def main() -> int:
    """The exit status of schemathesis: 0 if nothing was found."""
    options = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    options.add_argument("--examples", type=int, default=500, help="cases of each operation (default: 500)")
    options.add_argument("--spec", type=Path, help="an OpenAPI document, JSON or YAML, instead of the served one")
    options.add_argument("--url", help="a running cluster; without it a fake is started")
    options.add_argument(
        "--timeout", type=float, default=10.0, help="seconds after which an answer hangs (default: 10)"
    )
    options.add_argument("--max-tokens", type=int, help="the most that a call may ask for, to be done sooner")
    arguments, more = options.parse_known_args()
    with at(arguments.url) as url, tempfile.TemporaryDirectory(prefix="tracehaul-fuzz-") as folder:
        document = json.loads(asked(f"{url}/openapi.json"))
        if arguments.spec is not None:
            document = cut(yaml.safe_load(arguments.spec.read_text()), document)
        settled(document)
        models = [model["id"] for model in json.loads(asked(f"{url}/v1/models"))["data"]]
        spec, config = Path(folder, "openapi.json"), Path(folder, "schemathesis.toml")
        spec.write_text(json.dumps(document, default=str))  # YAML knows dates
        config.write_text(configured(models, *kept(url, models[0])))
        command = [str(Path(sys.executable).with_name("st")), "--config-file", str(config), "run", str(spec)]
        command += ["--url", url, "--checks", ",".join(CHECKS), "--max-examples", str(arguments.examples)]
        command += ["--request-timeout", str(arguments.timeout), "--workers", "1", "--continue-on-failure", *more]
        counts = Path(folder, "counts.json")
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(HERE)}
        environment |= {"FUZZ_COUNTS": str(counts), "FUZZ_MODEL": models[0]}
        if arguments.max_tokens is not None:
            environment["FUZZ_MAX_TOKENS"] = str(arguments.max_tokens)
        status = subprocess.run(command, env=environment, cwd=folder, check=False).returncode
        told(json.loads(counts.read_text()))
        return status


def at(url: str | None) -> AbstractContextManager[str]:
    """Where the server is, without a slash at the end."""
    return served(HERE / "server.py") if url is None else nullcontext(url.rstrip("/"))


def asked(url: str, body: Any = None) -> bytes:
    """What is answered there."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"content-type": "application/json"}), timeout=60) as answer:
        return answer.read()


def kept(url: str, model: str) -> tuple[list[str], list[str]]:
    """Names of responses and of traces that exist."""
    responses: list[str] = []
    for at in range(KEPT):
        body = {"model": model, "input": f"say {at}", "max_output_tokens": 16, "prompt_cache_key": f"fuzz-{at}"}
        responses.append(json.loads(asked(f"{url}/v1/responses", body))["id"])
    return responses, [trace["id"] for trace in json.loads(asked(f"{url}/v1/traces?limit={KEPT}"))["data"]]


def told(counts: dict[str, int]) -> None:
    """What was answered, by operation."""
    operations: dict[str, list[str]] = {}
    for name, count in sorted(counts.items()):
        operation, _, status = name.rpartition(" ")
        operations.setdefault(operation, []).append(f"{status}: {count}")
    lines = [f"  {operation:44} {', '.join(statuses)}\n" for operation, statuses in operations.items()]
    sys.stdout.writelines(["\nAnswers:\n", *lines])


def cut(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What of their document is served here. Its operations get our statuses, beside what they say of 200."""
    base = urlsplit(theirs.get("servers", [{"url": ""}])[0]["url"]).path.rstrip("/")
    known = {plain(path): methods for path, methods in ours["paths"].items()}
    paths: dict[str, Any] = {}
    for path, methods in theirs["paths"].items():
        own = known.get(plain(base + path), {})
        for method in METHODS:
            if method in methods and "200" in own.get(method, {}).get("responses", {}):
                statuses = {status: {"description": ""} for status in own[method]["responses"]}
                good = methods[method]["responses"]["200"]
                whole = {kind: told for kind, told in good.get("content", {}).items() if "stream" not in kind}
                good = good | {"content": own[method]["responses"]["200"]["content"] | whole}
                told = methods[method] | {"responses": statuses | {"200": good}}
                paths.setdefault(base + path, {k: v for k, v in methods.items() if k not in METHODS})[method] = told
    assert paths, "nothing of it is served here"
    return undiscriminated(
        {
            "openapi": theirs["openapi"],
            "info": theirs["info"],
            "paths": paths,
            "components": {"schemas": ours["components"]["schemas"] | theirs["components"]["schemas"]},
        }
    )


def undiscriminated(told: Any) -> Any:
    """Without what says how to choose among schemas: several of OpenAI's have the same value there."""
    if isinstance(told, list):
        return [undiscriminated(each) for each in told]
    if not isinstance(told, dict):
        return told
    hints = told.get("discriminator")
    drop = isinstance(hints, dict) and isinstance(hints.get("propertyName"), str)
    return {key: undiscriminated(value) for key, value in told.items() if not (drop and key == "discriminator")}


def plain(path: str) -> str:
    """Whatever its parameters are called."""
    return re.sub(r"\{[^}]*\}", "{}", path)


def settled(document: dict[str, Any]) -> None:
    """What deletes comes last, so that the others find what there is."""
    document["paths"] = dict(sorted(document["paths"].items(), key=lambda each: "delete" in each[1]))


def configured(models: list[str], responses: list[str], traces: list[str]) -> str:
    """Its configuration: names in most requests are of what exists."""
    lines: list[str] = []
    for name, values in (("models", models), ("responses", responses), ("traces", traces)):
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(values)}"]
    lines += ["[parameters]", '"body.previous_response_id" = { dictionary = "responses", probability = 0.5 }']
    for name, parameters in PARAMETERS.items():
        chosen = f'{{ dictionary = "{name}", probability = 0.7 }}'
        lines += ["[[operations]]", f'include-path-regex = "^/v1/{name}/"', "[operations.parameters]"]
        lines += [f'"path.{parameter}" = {chosen}' for parameter in parameters]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
