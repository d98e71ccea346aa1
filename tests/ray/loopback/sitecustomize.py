"""On the path of the test's Ray processes only. A replica of Serve (2.60) has a gRPC server for other deployments that
listens on all addresses, and no setting moves it; a test must not open a port to the network."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MODULE = "ray._common.tls_utils"


class _OnLoopback(importlib.abc.MetaPathFinder):
    """Wraps the one function by which Ray opens such ports, when its module is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _patching(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _patching(exec_module: Any) -> Any:
    def patched(module: Any) -> None:
        exec_module(module)
        opened = module.add_port_to_grpc_server
        module.add_port_to_grpc_server = lambda server, address: opened(server, address.replace("[::]", "127.0.0.1"))

    return patched


sys.meta_path.insert(0, _OnLoopback())
