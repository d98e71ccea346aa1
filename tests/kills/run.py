"""Kills the service at random moments while clients write, starts it again on the same home folder, and checks that
every answered write is there, that everything is whole, and that nothing is left over (HP-CTL-5).

python tests/kills/run.py --kills 300 --seed 7    the same moments each time, as far as the machine is as fast

There are three kinds of moments, in turn: while all write; while a file comes in, of which a part is on the disk; and
while the service starts.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hub import Hub, a_hub
from tests.kills.service import LIMIT_S, Home, Life
from tests.kills.writers import MODELS, Artifacts, Fetched, Models, Stop, Writer
from tests.live.client import until

KINDS = ("writing", "fetching", "writing", "starting")
WRITING_S, SLOW_LIMIT_S, STARTING_S = 0.8, 3.0, 2.5  # the latest moment of each kind
NOTED_BYTES = 32 << 20  # a fetch notes this much as being on the disk
CONTENT_BYTES, FAST_BYTES = NOTED_BYTES + (2 << 20), NOTED_BYTES + (1 << 19)
FILES = 4


class World:
    """Everything that outlives the service."""

    def __init__(self, folder: Path, hub: Hub, seed: int) -> None:
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._hub = hub
        roots = folder / "roots"
        roots.mkdir()
        files = {}
        for number in range(FILES):
            path = roots / f"{number}.gguf"
            path.write_bytes(self.dice.randbytes(1 << (10 + 4 * number)))
            files[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        content = hashlib.sha256(hub.content).hexdigest()
        self.fetched = Fetched("fetched", self.counts, content, len(hub.content))
        self.writers: list[Writer] = [Artifacts(name, self.counts) for name in ("a", "b")]
        self.writers += [Models(name, self.counts, files) for name in ("m", "n")]
        self.writers += [self.fetched]
        self.home = Home(folder, configuration(roots), {"HF_ENDPOINT": hub.url})
        self._parts: dict[str, int] = {}  # partial files at the last kill
        self._asked = 0  # of the hub, by then

    # -- one life --------------------------------------------------------------------------------------------------

    def live(self, kind: str) -> None:
        """A life of the service, and what must be true after its end."""
        life = Life(self.home)
        try:
            if life.listens(self.dice.uniform(0, STARTING_S) if kind == "starting" else LIMIT_S):
                self.check(life)
                self._write_until_killed(life, kind)
            life.kill()
        finally:
            life.process.kill()
            life.process.wait()
        self.counts["kills"] += 1
        self.counts[f"kills while {kind}"] += 1
        self.home.check({self.fetched.name: self.fetched.content})
        self._parts, self._asked = self.home.parts(), len(self._hub.asked_for())

    def _write_until_killed(self, life: Life, kind: str) -> None:
        self._hub.is_slow.clear()
        problems: list[BaseException] = []
        seeds = [self.dice.randrange(1 << 32) for _ in self.writers]
        threads = [
            threading.Thread(target=_write, args=(life, writer, seed, problems))
            for writer, seed in zip(self.writers, seeds, strict=True)
        ]
        moment_s = self.dice.uniform(0, WRITING_S)
        for thread in threads:
            thread.start()
        if kind == "fetching":
            self._hub.is_slow.wait(SLOW_LIMIT_S)
        threading.Event().wait(moment_s)
        life.process.kill()
        for thread in threads:
            thread.join(LIMIT_S)
        if problems:
            raise problems[0]

    # -- what must be true of it -------------------------------------------------------------------------------------

    def check(self, life: Life) -> None:
        with life.client() as client:
            artifacts, models = listed(client, "/v1/artifacts"), listed(client, MODELS)
            for writer in self.writers:
                writer.check(client, models if isinstance(writer, Models | Fetched) else artifacts)
            known = {name for writer in self.writers for name in writer.things}
            assert not (unknown := (artifacts.keys() | models.keys()) - known), f"nobody made {unknown}"
            until(lambda: self.home.files("artifacts") == artifacts.keys(), LIMIT_S)
            self._check_models(client, models)

    def _check_models(self, client: httpx.Client, models: Mapping[str, Any]) -> None:
        """Whole files of those that are there, parts of those that are to come, and nothing else; what was noted is
        taken up."""
        coming = [one for one in models.values() if one["fetch"] and one["fetch"]["state"] != "done"]
        done = [one["id"] for one in models.values() if one["fetch"] and one["fetch"]["state"] == "done"]
        for name in self.home.files("models"):
            is_part = name.endswith((".part", ".json", ".new"))
            assert coming if is_part else name.startswith((*done, *(one["id"] for one in coming))), name
        noted = max(self._parts.values(), default=0)
        if noted and any(one["fetch"]["state"] == "running" for one in coming):
            until(lambda: len(self._hub.asked_for()) > self._asked, LIMIT_S)
            assert self._hub.asked_for()[self._asked] == f"bytes={noted}-", "it was not taken up where it ended"
            self.counts["fetches taken up"] += 1

    def last_check(self) -> None:
        """In the end a life in peace: all that was asked for is done, and SIGTERM ends it in order."""
        life = Life(self.home)
        try:
            assert life.listens()
            self.check(life)
            self._hub.go_on.set()
            with life.client() as client:
                until(lambda: all(is_done(one) for one in listed(client, MODELS).values()), LIMIT_S)
            self.check(life)
            life.end()
        finally:
            life.process.kill()
            life.process.wait()
        self.home.check({self.fetched.name: self.fetched.content})


def _write(life: Life, writer: Writer, seed: int, problems: list[BaseException]) -> None:
    dice = random.Random(seed)
    with life.client() as client:
        try:
            while True:
                writer.step(client, dice)
        except Stop:
            return
        except BaseException as error:  # noqa: BLE001  # raised again where it counts
            problems.append(error)


def is_done(model: Mapping[str, Any]) -> bool:
    is_fetched = model["fetch"] is None or model["fetch"]["state"] in ("done", "none")
    return is_fetched and model["verification"]["state"] in ("done", "unverified")


def listed(client: httpx.Client, path: str) -> dict[str, Any]:
    """All pages."""
    found: dict[str, Any] = {}
    cursor: str | None = None
    while True:
        page = client.get(path, params={"limit": 50} | ({"cursor": cursor} if cursor else {})).json()
        found |= {one["id"]: one for one in page["items"]}
        if (cursor := page["next_cursor"]) is None:
            return found


def configuration(roots: Path) -> dict[str, Any]:
    """No worker is needed to store things: the pool's is a simulated one."""
    return {
        "devices": [{"id": "gpu0", "backend": "simulated", "vram_bytes": 1 << 34}],
        "pools": [{"id": "default", "engine": "simulated", "slots": 1}],
        "catalog": {"file_roots": [str(roots)]},
        "policy": {"outbound": {"allow_private_addresses": True}},
    }


def run(kills: int, seed: int, folder: Path) -> Counter[str]:
    """What was done. Raises AssertionError."""
    with a_hub(random.Random(seed).randbytes(CONTENT_BYTES), slow_after=FAST_BYTES) as hub:
        world = World(folder, hub, seed)
        for number in range(kills):
            try:
                world.live(KINDS[number % len(KINDS)])
            except BaseException as error:
                tail = world.home.log.read_text(errors="replace")[-3000:]
                error.add_note(f"at kill {number} of seed {seed}; the service's last words:\n{tail}")
                raise
        world.last_check()
    return world.counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llorch-kills-") as folder:
        counts = run(given.kills, given.seed, Path(folder))
    for what, count in sorted(counts.items()):
        print(f"{count:7} {what}")
    print(f"nothing was lost, and everything is whole ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
