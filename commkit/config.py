"""YAML or JSON -> parts: strict, with the dotted path of whatever is wrong.

Unknown fields, duplicate keys, wrong types and values out of range all raise :class:`ConfigError`, which
says where (``scheme.rank``), what it found, and what would do.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pydantic
import yaml

from .outer import AdaptiveRank, GossipSchedule, Penalty, PushRule, SyncOptions
from .outer.topologies import Topology
from .policy import Policy
from .reducer import Reducer
from .registry import Kind, did_you_mean, lookup
from .straggler import CodeFamily, CoordinationOptions
from .types import Aggregator, Compressor, Feedback

_PART_KINDS: dict[Any, Kind] = {
    Compressor: "compressor",
    Feedback: "feedback",
    Aggregator: "aggregator",
    Reducer: "scheme",
    Topology: "topology",
    PushRule: "push_rule",
    CodeFamily: "code",
}
# Given as a mapping of their fields, without a name.
_PLAIN = (AdaptiveRank, CoordinationOptions, GossipSchedule, Penalty, Policy, SyncOptions)
Model = TypeVar("Model", bound=pydantic.BaseModel)


class ConfigError(ValueError):
    """A configuration is wrong; the message names the dotted path, the value, the rule and the remedy."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-3 as a number (YAML 1.1 says it is text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"field {key!r} is given twice (line {line}); remove one of them")
            seen.add(key)
        return cast(dict[Any, Any], super().construct_mapping(node, deep=deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of fields, not {type(data).__name__}")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` with each ``"a.b=c"`` applied; the values are read as YAML.

    Raises:
        ConfigError: an override without ``=``, or a path through something that is not a mapping.
    """
    result = _copy(data)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not all(dotted.split(".")):
            raise ConfigError(f"override {override!r} must look like a.b=value")
        *parents, last = dotted.split(".")
        at = result
        for name in parents:
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                raise ConfigError(
                    f"override {override!r}: {name!r} is a value, not a group of fields"
                )
        at[last] = yaml.load(text, Loader=_Loader)
    return result


def validate(model: type[Model], data: Mapping[str, Any], source: str) -> Model:
    """``data`` as a pydantic model.

    Raises:
        ConfigError: with every fault, each with its dotted path; ``source`` begins the message.
    """
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        faults = [_describe(fault, model) for fault in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from None


def build(kind: Kind, block: Any, path: str) -> Any:
    """Build the part that ``block`` describes.

    Args:
        kind: which registry its name is looked up in.
        block: a name, or a mapping ``{name: NAME, field: value, ...}``.
        path: where the block stands, e.g. ``"scheme"``; begins every message.

    Raises:
        ConfigError: unknown name or field (with the nearest known one), a wrong type, a value out of range.
        TypeError: parts that cannot go together.
    """
    if isinstance(block, str):
        block = {"name": block}
    if not isinstance(block, Mapping) or not isinstance(block.get("name"), str):
        raise ConfigError(f"{path} must be a name or a mapping with a 'name', got {block!r}")
    try:
        factory = lookup(kind, block["name"])
    except ValueError as error:
        raise ConfigError(f"{path}.name: {error}") from None
    fields = {name: value for name, value in block.items() if name != "name"}
    return _call(factory, fields, path)


def arguments(
    factory: Any, fields: Mapping[str, Any], path: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """``fields`` as arguments of ``factory``, checked against its signature.

    Args:
        factory: a class or function with type hints.
        fields: what a configuration says.
        path: where it says so; begins every message.
        given: parameters that come from elsewhere, which ``fields`` must not set.

    Raises:
        ConfigError: an unknown or missing field, or a wrong type.
    """
    every = inspect.signature(factory).parameters
    parameters = {name: p for name, p in every.items() if name not in given}
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    for name in fields:
        if name not in parameters:
            hint = did_you_mean(str(name), list(parameters))
            known = ", ".join(parameters) or "none"
            raise ConfigError(f"{path}.{name}: unknown field{hint}; known: {known}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in fields:
            raise ConfigError(f"{path}.{name} is missing; give it a value")
    return {name: _value(hints[name], v, f"{path}.{name}") for name, v in fields.items()}


def _call(factory: Any, fields: Mapping[str, Any], path: str) -> Any:
    """Call ``factory`` with ``fields`` checked against its signature."""
    values = arguments(factory, fields, path)
    try:
        return factory(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from None


def _value(hint: Any, value: Any, path: str) -> Any:
    if value is None and any(option in _PART_KINDS for option in _options(hint)):
        if type(None) in _options(hint):
            return None
        raise ConfigError(f"{path} is null; give it a name or a block")
    for option in _options(hint):
        if option in _PART_KINDS:
            part = build(_PART_KINDS[option], value, path)
            if option is Reducer and not isinstance(
                part, tuple(o for o in _options(hint) if isinstance(o, type))
            ):
                raise ConfigError(
                    f"{path}={value!r} is a {type(part).__name__}, which cannot go here; give a scheme that "
                    "reduces what it is given, such as int8 or powersgd"
                )
            return part
        if option in _PLAIN and isinstance(value, Mapping):
            return _call(option, value, path)
    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(hint)
        if isinstance(value, list) and any(isinstance(item, list) for item in value):
            # YAML knows no tuples; what reads JSON takes lists for them, and is as strict otherwise.
            return adapter.validate_json(json.dumps(value), strict=True)
        return adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}={value!r}: {error.errors()[0]['msg'].lower()}") from None


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _describe(fault: Any, model: type[pydantic.BaseModel]) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        hint = did_you_mean(str(fault["loc"][-1]), known)
        return f"{path}: unknown field{hint}; known: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{path} is missing; give it a value"
    return f"{path}={fault['input']!r}: {fault['msg']}"


def _fields_at(model: type[pydantic.BaseModel], path: Sequence[Any]) -> list[str]:
    at: Any = model
    for name in path:
        field = at.model_fields.get(name) if hasattr(at, "model_fields") else None
        if field is None:
            return []
        at = next((o for o in _options(field.annotation) if hasattr(o, "model_fields")), None)
    return list(at.model_fields) if hasattr(at, "model_fields") else []


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in data.items()}
