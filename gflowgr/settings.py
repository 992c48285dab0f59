"""Settings as plain mappings: read from YAML, overridden by key=value, checked against what reads them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gflowgr.config import check_keys, check_kind

# YAML 1.1 wants a dot and a signed exponent in a float, so it reads the 1e-3 that everyone writes as text.
_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file holds an empty one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings file")
    settings = _parse(path.read_text(encoding="utf-8"), str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: needs keys with values, got {type(settings).__name__}")
    return settings


def override(settings: Mapping[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """A copy of `settings` with each `key=value` put in; dots lead into nested mappings, values are YAML.

    Raises:
        ValueError: a pair without "=", a key without name, a value that is not YAML, or a dot into what is
            not a mapping.
    """
    changed = _copy(settings)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise ValueError(f"override {pair!r} needs the form key=value or section.key=value")
        section = changed
        for depth, name in enumerate(names[:-1]):
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                raise ValueError(
                    f"override {pair!r}: {'.'.join(names[: depth + 1])} is {section!r}, not a section"
                )
        section[names[-1]] = _parse(text, f"override {pair!r}")
    return changed


def merge(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with `settings` laid over them, section by section."""
    merged = _copy(defaults)
    for key, value in settings.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of the mapping under `name`, empty if there is none; ValueError if it is something else."""
    value = settings.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} needs keys with values, got {value!r}")
    return dict(value)


def options_of(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that `function` takes by keyword."""
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in by_keyword]


def check_options(
    function: Callable[..., Any], settings: Mapping[str, Any], where: str, taken: Iterable[str]
) -> None:
    """Checks settings that `function` gets as arguments by keyword, but for what the caller has `taken`.

    Raises:
        TypeError: a value of another kind than the argument's.
        ValueError: a key that is no such argument, or a value that is none of its choices.
    """
    check_keys(settings, [name for name in options_of(function) if name not in set(taken)], where)
    parameters = inspect.signature(function).parameters
    for name, value in settings.items():
        annotation = parameters[name].annotation
        if isinstance(annotation, str) and value is not parameters[name].default:
            check_kind(f"{where}: {name}", value, annotation)


def to_yaml(settings: Mapping[str, Any]) -> str:
    """The text that `read_yaml` reads back."""
    import yaml

    return str(yaml.safe_dump(_copy(settings), sort_keys=False, allow_unicode=True))


def _parse(text: str, where: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("settings need PyYAML: pip install 'gflowgr[train]'") from error

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f" at line {line + 1}"
        raise ValueError(f"{where}: not YAML{at}: {getattr(error, 'problem', None) or error}") from error


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(inner) for inner in value]
    return value
