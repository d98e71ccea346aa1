"""`llama-orch` with one defect in it: python -P tests/contract/mutants/serve.py DEFECT serve …"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from llama_orch.cli.main import main
from tests.contract.mutants.defects import DEFECTS

if __name__ == "__main__":
    DEFECTS[sys.argv.pop(1)].apply()
    main()
