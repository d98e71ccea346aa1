"""Puts the defect that LLORCH_DEFECT names into a test run, and into the services that it starts:

LLORCH_DEFECT=any_host pytest -p tests.contract.mutants.plugin tests/api
"""

from __future__ import annotations

import os

from tests import live_service
from tests.contract.mutants.defects import DEFECTS
from tests.contract.mutants.program import program

if name := os.environ.get("LLORCH_DEFECT"):
    DEFECTS[name].apply()
    live_service.PROGRAM[:] = program(name)
