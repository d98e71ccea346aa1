"""The classes of attacks that the service is held against; `@pytest.mark.attack(number)` says what a test is one of."""

from __future__ import annotations

CLASSES = {
    1: "the token: missing, wrong, oversized, in the query; never in logs, command lines, metrics, errors",
    2: "every route with every method, without a token",
    3: "names and pages of others: Host, Origin, preflights, simple requests of a browser",
    4: "a bind beyond this machine with a weak token",
    5: "traversal in identifiers and references",
    6: "requests that the service is talked into",
    7: "arguments and environment of workers",
    8: "hostile model files",
    9: "hostile JSON and bodies",
    10: "headers and logs: line ends, escapes, length",
    11: "exhaustion: queues, streams, slow readers, label values",
    12: "the engine's output as the attacker",
    13: "races",
    14: "expressions, grammars and schemas that explode",
    15: "models whose content is not what was declared",
    16: "secrets in files; modes and owners",
    17: "the machine itself: clock, full disks, descriptors, lost cards",
    18: "what is installed",
}
