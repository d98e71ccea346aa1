"""Holds a pact against the service: one run of the verifier for a whole file, and what came out of each interaction."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pact import Verifier
from tests.pact.exchange import PROVIDER
from tests.pact.stage import Stage
from tests.pact.states import HANDLERS, an_idle_pool

REQUEST_LIMIT_MS = 60_000
PROBLEM_LENGTH_MAX = 3000  # a stream's text and pattern are long

log = logging.getLogger(__name__)

Interaction = dict[str, Any]


class UnknownState(Exception):
    """A pact names states that nobody can set up."""


def interactions_of(pact: Path) -> list[Interaction]:
    found: list[Interaction] = json.loads(pact.read_text())["interactions"]
    return found


def states_of(interaction: Interaction) -> list[tuple[str, dict[str, Any]]]:
    """Names and parameters. Old versions of the format have one name and no parameters."""
    if interaction.get("providerState"):
        return [(interaction["providerState"], {})]
    return [(one["name"], one.get("params") or {}) for one in interaction.get("providerStates") or []]


def check_states(pact: Path) -> None:
    """The verifier itself would try a state that fails again and again, for a minute."""
    named = {name for interaction in interactions_of(pact) for name, _ in states_of(interaction)}
    if unknown := sorted(named - HANDLERS.keys()):
        raise UnknownState(f"{pact.name} names {unknown}; docs/pacts.md has the states that there are")


@dataclass
class StateKeeper:
    """Sets states up and takes them down. It never raises, since the verifier would try again and again: what fails is
    kept, and belongs to the interactions that have the state."""

    stage: Stage
    problems: dict[str, str] = field(default_factory=dict)  # by state and parameters

    def __call__(self, state: str, action: Literal["setup", "teardown"], parameters: dict[str, Any] | None) -> None:
        try:
            if action == "teardown":
                self.stage.clear()
            elif state:
                HANDLERS[state](self.stage, **(parameters or {}))
            else:  # an interaction that names none
                an_idle_pool(self.stage)
        except Exception as error:
            log.exception("%s of %r", action, state)
            self.problems[_key(state, parameters)] = f"{action} of the state {state!r} failed: {error}"

    def problems_of(self, interaction: Interaction) -> list[str]:
        keys = [_key(*one) for one in states_of(interaction)] or [_key("", None)]
        return [self.problems[key] for key in keys if key in self.problems]


def _key(state: str, parameters: dict[str, Any] | None) -> str:
    return json.dumps([state, parameters or {}], sort_keys=True)


def verify(pact: Path, stage: Stage) -> list[str]:
    """What is wrong with each interaction of the file, in its order; empty where nothing is."""
    check_states(pact)
    keeper = StateKeeper(stage)
    verifier = (
        Verifier(PROVIDER, host="127.0.0.1")
        .add_transport(url=str(stage.http.base_url))
        .add_source(pact)
        .state_handler(keeper.__call__, teardown=True)
        .set_request_timeout(REQUEST_LIMIT_MS)
        .set_coloured_output(enabled=False)
    )
    failure = ""
    try:
        verifier.verify()
    except RuntimeError as error:
        failure = str(error)
    results: list[dict[str, Any]] = verifier.results["interactionResults"]
    interactions = interactions_of(pact)
    if [one["description"] for one in results] != [one["description"] for one in interactions]:
        return [f"not verified: {failure}\n{verifier.output(strip_ansi=True)}"] * len(interactions)
    return [
        "\n".join(keeper.problems_of(interaction) + _mismatches(result))
        for interaction, result in zip(interactions, results, strict=True)
    ]


def _mismatches(result: dict[str, Any]) -> list[str]:
    if result["result"] == "OK":
        return []
    found = result.get("mismatch", {})
    mismatches = [one for one in found.get("mismatches", []) if "mismatch" in one]
    if not mismatches:
        return [json.dumps(found or result, indent=1)[:PROBLEM_LENGTH_MAX]]
    return [f"{_place(one)}: {one['mismatch'][:PROBLEM_LENGTH_MAX]}" for one in mismatches]


def _place(mismatch: dict[str, Any]) -> str:
    return " ".join(str(mismatch[key]) for key in ("type", "key", "path") if mismatch.get(key))
