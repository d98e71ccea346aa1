"""Models on demand where time matters, on the simulated engine, in virtual time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llama_orch.contract.config import CatalogSettings
from llama_orch.core.fleet import QUARANTINE_S
from llama_orch.errors import PoolUnavailable
from llama_orch.testing.builders import a_task
from llama_orch.testing.loop import run
from llama_orch.testing.rehearsal import a_rehearsal, read_all, settings_for

from .frames import parse


@pytest.mark.spec("HP-PLC-7", "HP-PLC-8")
def test_a_model_that_failed_can_be_tried_again_after_its_quarantine(tmp_path: Path) -> None:
    """Newcomers are refused at once for a minute; the first one after it has the model loaded, which serves now."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"no matter what")

    async def main() -> None:
        settings = settings_for(catalog=CatalogSettings(file_roots=[str(tmp_path)]))
        async with a_rehearsal(settings) as stage:

            async def last_of(text: str) -> tuple[str, dict[str, object]]:
                admission = await stage.service.submit(a_task(model_ref=f"file:{model}", prompt=text, max_tokens=5))
                frame = parse(await read_all(stage.service.open_stream(admission.task_id, -1)))[-1]
                return frame.event, frame.data

            stage.engine.load_error = "bad magic"
            event, error = await last_of("One")
            assert (event, error["code"]) == ("error", "POOL_UNAVAILABLE")
            stage.engine.load_error = None
            await asyncio.sleep(QUARANTINE_S - 1)
            with pytest.raises(PoolUnavailable, match="bad magic"):
                await last_of("Two")
            await asyncio.sleep(2)
            assert (await last_of("Three"))[0] == "end"

    run(main())
