"""YAML without what makes a file mean something else than it shows, or costs more than it weighs.

Aliases, merge keys, repeated keys, deep nesting and tags that build objects are refused.
"""

from __future__ import annotations

from typing import Any

import yaml

DEPTH_MAX = 32
_MERGE_TAG = "tag:yaml.org,2002:merge"

# libyaml where PyYAML was built with it.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class StrictYamlError(ValueError):
    """The text is refused. `line` counts from 1 and is None where it is not known."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> Any:
    """The one document of `text`; an empty text is None."""
    try:
        _refuse_aliases_and_depth(text)
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise StrictYamlError(error.problem or error.context or "is not valid YAML", line) from error
    except StrictYamlError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that Python cannot hold
        raise StrictYamlError(f"is not valid YAML: {error}", None) from error


class _StrictLoader(_SafeLoader):  # type: ignore[misc]  # its base is chosen at run time
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE_TAG:
                raise StrictYamlError("merge keys (<<) are not taken", line)
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise StrictYamlError(f"the key {key.value!r} repeats", line)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _refuse_aliases_and_depth(text: str) -> None:
    """Read the events alone first: aliases can grow, and nesting can exhaust the stack, while nodes are built."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        line = None if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise StrictYamlError("anchors and aliases are not taken", line)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_MAX:
            raise StrictYamlError("the file is nested too deeply", line)
