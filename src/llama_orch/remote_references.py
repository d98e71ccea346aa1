"""How a model of a server elsewhere is named: `openai:SERVER/MODEL`, with the name that the configuration gives the
server, and the model's ID as the server has it, slashes and all."""

from __future__ import annotations

SCHEME = "openai:"


def split_reference(reference: str) -> tuple[str, str]:
    """The server's name and the model's ID; either may be empty in what is no such reference."""
    name, _, model = reference.removeprefix(SCHEME).partition("/")
    return name, model
