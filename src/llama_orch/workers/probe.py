"""Asks the installed llama.cpp which devices it can compute on. A process of its own: loading the library is heavy, and
with a broken driver it may crash. Prints one JSON list of names."""

from __future__ import annotations

import json


def main() -> None:
    import xllamacpp

    print(json.dumps([str(device["name"]) for device in xllamacpp.get_device_info()]))


if __name__ == "__main__":
    main()
