"""Clients that write until the service is gone, and remember what it has answered.

Each has things of its own, and one request at a time, so that for each thing there is what must be there and, while a
request about it was not answered, what may be there instead.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

MODELS = "/v1/catalog/models"
ARTIFACTS_MAX, MODELS_MAX = 20, 12  # of each writer; beyond that it deletes its oldest
POLL_S = 0.05
GONE = None


@dataclass
class Thing:
    """`must`: its state as it was answered. `may`: what an unanswered request would make of it."""

    must: Any = GONE
    may: Any = GONE
    is_open: bool = False

    def allows(self, state: Any) -> bool:
        return state == self.must or (self.is_open and state == self.may)

    def settle(self, state: Any) -> None:
        self.must, self.may, self.is_open = state, GONE, False


class Stop(Exception):
    """The service is gone."""


class Writer(Protocol):
    """`things` by name; `counts` of what was answered."""

    things: dict[str, Thing]

    def step(self, client: httpx.Client, dice: random.Random) -> None:
        """A request or two."""

    def check(self, client: httpx.Client, listed: dict[str, Any]) -> None:
        """Each of its things is as it must or may be. `listed`: what the service's lists have, by name."""


class Asking:
    """Sends one request about one thing."""

    def __init__(self, counts: Counter[str]) -> None:
        self.things: dict[str, Thing] = {}
        self._counts = counts

    def ask(self, client: httpx.Client, what: str, thing: Thing, becomes: Any, *request: Any, **more: Any) -> None:
        thing.may, thing.is_open = becomes, True
        answer = send(client, *request, **more)
        assert answer.is_success, f"{what}: {answer.status_code} {answer.text}"
        thing.settle(becomes)
        self._counts[what] += 1

    def forget_gone(self) -> None:
        self.things = {name: thing for name, thing in self.things.items() if thing.must is not GONE or thing.is_open}


def send(client: httpx.Client, method: str, path: str, **more: Any) -> httpx.Response:
    try:
        return client.request(method, path, **more)
    except httpx.TransportError as error:
        raise Stop from error


class Artifacts(Asking):
    """Puts with tags and parents, and deletes. A thing's state is its number, its name the digest."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        super().__init__(counts)
        self._name = name
        self._number = 0

    def content(self, number: int) -> dict[str, Any]:
        return {"number": number, "text": "x" * (number * 7919 % 60_000), "writer": self._name}

    def step(self, client: httpx.Client, dice: random.Random) -> None:
        self._number += 1
        content = self.content(self._number)
        digest = hashlib.sha256(json.dumps(content, separators=(",", ":"), sort_keys=True).encode()).hexdigest()
        thing = self.things[digest] = Thing()
        there = [name for name, one in self.things.items() if one.must is not GONE]
        body = {"kind": "other", "content": content, "tags": [self._name, f"{self._name}-{self._number}"]}
        if there and dice.random() < 0.3:
            body["parent"] = dice.choice(there)
        self.ask(client, "artifacts put", thing, self._number, "POST", "/v1/artifacts", json=body)
        if len(there) >= ARTIFACTS_MAX:
            oldest = self.things[there[0]]
            self.ask(client, "artifacts deleted", oldest, GONE, "DELETE", f"/v1/artifacts/{there[0]}")
            self.forget_gone()

    def check(self, client: httpx.Client, listed: dict[str, Any]) -> None:
        for digest, thing in self.things.items():
            state = self._seen(client, digest)
            assert thing.allows(state), f"artifact {digest} of {self._name}: {state}, not {thing}"
            assert (digest in listed) == (state is not GONE), f"artifact {digest} is {state}, and listed otherwise"
            thing.settle(state)
        self.forget_gone()

    def _seen(self, client: httpx.Client, digest: str) -> int | None:
        answer = client.get(f"/v1/artifacts/{digest}")
        if answer.status_code == 404:
            return GONE
        number: int = answer.json()["content"]["number"]
        assert answer.json()["content"] == self.content(number)
        tagged = client.get("/v1/artifacts", params={"tag": f"{self._name}-{number}"}).json()["items"]
        assert [one["id"] for one in tagged] == [digest]
        return number


class Models(Asking):
    """Enters files of this machine, verifies, retires and deletes. A thing's state is the model's."""

    def __init__(self, name: str, counts: Counter[str], files: dict[Path, str]) -> None:
        super().__init__(counts)
        self._name = name
        self._files = files
        self._number = 0
        self._asked: dict[str, bool] = {}  # whether it is what was declared, of those whose verification was answered

    def step(self, client: httpx.Client, dice: random.Random) -> None:
        there = [name for name, thing in self.things.items() if thing.must is not GONE]
        if len(there) >= MODELS_MAX:
            self.ask(client, "models deleted", self.things[there[0]], GONE, "DELETE", f"{MODELS}/{there[0]}")
            self._asked.pop(there[0], None)
            self.forget_gone()
            return
        if there and dice.random() < 0.5:
            name, state = dice.choice(there), dice.choice(("Active", "Retired"))
            body = {"state": state}
            self.ask(client, "states put", self.things[name], state, "POST", f"{MODELS}/{name}/state", json=body)
            return
        self._number += 1
        name, path = f"{self._name}-{self._number}", dice.choice(list(self._files))
        is_true = dice.random() < 0.5
        digest = f"sha256:{self._files[path] if is_true else '0' * 64}"
        thing = self.things[name] = Thing()
        body = {"id": name, "source_url": f"file:{path}", "digest": digest, "tags": [self._name]}
        self.ask(client, "models entered", thing, "Active", "POST", MODELS, json=body)
        if dice.random() < 0.5:
            self.ask(client, "verifications begun", thing, "Active", "POST", f"{MODELS}/{name}/verify")
            self._asked[name] = is_true

    def check(self, client: httpx.Client, listed: dict[str, Any]) -> None:
        for name, thing in self.things.items():
            model = listed.get(name)
            state = None if model is None else model["state"]
            assert thing.allows(state), f"model {name}: {state}, not {thing}"
            thing.settle(state)
            if model is not None and model["verification"]["state"] == "done":
                assert model["verification"]["outcome"] == ("passed" if self._is_true(model) else "failed"), name
            elif name in self._asked and model is not None:
                assert model["verification"]["state"] in ("queued", "running"), f"the verification of {name} is lost"
        self.forget_gone()

    def _is_true(self, model: dict[str, Any]) -> bool:
        return model["digest"] in {f"sha256:{digest}" for digest in self._files.values()}


class Fetched(Asking):
    """Enters a model from elsewhere, has it fetched, however many lives that takes, and deletes it. A thing's state is
    whether the fetch was asked for."""

    def __init__(self, name: str, counts: Counter[str], content: str, size: int) -> None:
        super().__init__(counts)
        self.name = name
        self.content = content  # the digest of all files
        self._size = size
        self._number = 0
        self._pause = threading.Event()

    def step(self, client: httpx.Client, dice: random.Random) -> None:
        name = next((name for name, thing in self.things.items() if thing.must is not GONE), None)
        if name is None:
            self._number += 1
            name = f"{self.name}-{self._number}"
            self.things = {name: Thing()}
            body = {"id": name, "source_url": f"hf:org/repo/{name}.gguf"}
            body |= {"digest": f"sha256:{self.content}"} if dice.random() < 0.5 else {}
            self.ask(client, "models from elsewhere entered", self.things[name], "entered", "POST", MODELS, json=body)
        thing = self.things[name]
        if thing.must == "entered":
            self.ask(client, "fetches begun", thing, "asked", "POST", f"{MODELS}/{name}/fetch")
        fetch = send(client, "GET", f"{MODELS}/{name}").json()["fetch"]
        assert fetch["state"] in ("queued", "running", "done"), fetch
        if fetch["state"] == "done":
            assert fetch["received_bytes"] == self._size
            self._counts["fetches done"] += 1
            self.ask(client, "fetched models deleted", thing, GONE, "DELETE", f"{MODELS}/{name}")
            self.forget_gone()
        else:
            self._pause.wait(POLL_S)

    def check(self, client: httpx.Client, listed: dict[str, Any]) -> None:
        for name, thing in self.things.items():
            model = listed.get(name)
            state = GONE if model is None else "entered" if model["fetch"]["state"] == "none" else "asked"
            assert thing.allows(state), f"model {name}: {state}, not {thing}"
            thing.settle(state)
        self.forget_gone()
