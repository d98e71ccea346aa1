"""Renews our pacts from the consumer tests, and the table of provider states in docs/pacts.md from their handlers.

python tools/pacts.py --write    write both
python tools/pacts.py            write nothing; prints what is stale, exit 1 when something is
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PACT_DO_NOT_TRACK"] = "true"

from tests.pact.states import described

ROOT = Path(__file__).resolve().parents[1]
CONSUMERS = {"llama-orch-cli": "test_consumer.py", "openai-client": "test_openai_consumer.py"}
PAGE = ROOT / "docs" / "pacts.md"
BEGIN, END = "<!-- states: tools/pacts.py -->\n", "<!-- end of states -->\n"


def pact(tests: str) -> bytes:
    """What the consumer tests write into an empty folder; in a file that is there, a renamed interaction would stay."""
    with tempfile.TemporaryDirectory(prefix="llorch-pacts-") as folder:
        path = str(ROOT / "tests" / "pact" / tests)
        command = [sys.executable, "-m", "pytest", path, "-n", "0", "-q", "--pacts-to", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"the consumer tests fail, so there is nothing to write:\n{done.stdout}{done.stderr}")
        (written,) = Path(folder).iterdir()
        return written.read_bytes() + b"\n"


def page(old: str) -> str:
    """The page with the states as they are."""
    head, _, rest = old.partition(BEGIN)
    _, _, tail = rest.partition(END)
    rows = "".join(f"| `{one.name}` | {one.parameters} | {one.meaning} |\n" for one in described())
    return f"{head}{BEGIN}| state | parameters | meaning |\n| --- | --- | --- |\n{rows}{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the files")
    is_to_write = parser.parse_args().write
    is_stale = False
    files = {ROOT / "pacts" / f"{name}--llama-orch.json": pact(tests) for name, tests in CONSUMERS.items()}
    for path, content in (*files.items(), (PAGE, page(PAGE.read_text()).encode())):
        if not path.exists() or path.read_bytes() != content:
            is_stale = True
            print(f"{'wrote' if is_to_write else 'stale:'} {path.relative_to(ROOT)}")
            if is_to_write:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
    return 1 if is_stale and not is_to_write else 0


if __name__ == "__main__":
    sys.exit(main())
