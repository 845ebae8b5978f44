"""What is said of what another router has, while some do not answer, or answer wrongly, or are gone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.http.outliving import Outliving
from tests.unit.router.http.test_erasing import ASK
from tests.unit.router.http.test_others import Wire, served, upload


def test_what_two_routers_tell_of_is_listed_once(tmp_path: Path) -> None:
    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        made = [await upload(at["two"]) for _ in range(3)]
        wire.apps["one"] = wire.apps["two"]  # it has taken them over
        found = (await at["three"].get("/v1/files", params={"limit": 3, "order": "asc"})).json()
        assert sorted(each["id"] for each in found["data"]) == sorted(made)
        assert not found["has_more"]

    served(tmp_path, use)


def test_who_has_it_is_heard_whatever_the_others_say(tmp_path: Path) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(status_code=500)(scope, receive, send)

    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        file = await upload(at["two"])
        wire.away = {"one"}
        assert (await at["three"].get(f"/v1/files/{file}")).status_code == 200
        wire.away, wire.apps["one"] = set(), refuse
        assert (await at["three"].get(f"/v1/files/{file}")).status_code == 200
        assert (await at["three"].get("/v1/files/file-none")).status_code == 500, "it may have it"

    served(tmp_path, use)


def test_a_response_that_nobody_has_taken_over_yet_is_not_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = list[Outliving]()

    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        said = (await at["one"].post("/v1/responses", json=ASK | {"background": True})).json()["id"]
        wire.lives = {"two", "three"}
        answer = await at["two"].get(f"/v1/responses/{said}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "router_unavailable")
        monkeypatch.setattr(held[0].documents, "lost", "away")
        answer = await at["two"].get(f"/v1/responses/{said}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "router_unavailable")
        monkeypatch.setattr(held[0].documents, "lost", None)

    make = Outliving.__init__

    def made(self: Outliving, *given: Any, **named: Any) -> None:
        held.append(self)
        make(self, *given, **named)

    monkeypatch.setattr(Outliving, "__init__", made)
    served(tmp_path, use)


def test_who_does_not_know_yet_who_lives_says_so(tmp_path: Path) -> None:
    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        own = await upload(at["two"])
        wire.unsure = True
        assert (await at["two"].get(f"/v1/files/{own}")).status_code == 200
        for method, path in (("GET", "/v1/files/file-none"), ("GET", "/v1/files"), ("DELETE", "/v1/data")):
            answer = await at["two"].request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "router_unavailable"), path
        wire.unsure = False
        assert (await at["two"].get("/v1/files/file-none")).status_code == 404

    served(tmp_path, use)
