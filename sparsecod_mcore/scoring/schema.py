"""Typed JSON: dataclasses that say of each field what its axes are, checked on the way out and on the way in.

A field's axes name what its lists and dictionaries run over, outermost first: ``axes("layer", "head")`` is a list per
layer of a list per head. One declaration serves three: the file's shape is checked against it, lists of the same axis
have to agree in length, and a table takes its columns from it. In memory a figure that is not finite or was not
measured is NaN, in the file it is null.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsecod_mcore.errors import nearest

# Both count the model's layers.
_SAME_AXIS = {"other_layer": "layer"}


class Malformed(ValueError):
    """What is wrong with a value, and where."""


@dataclass(frozen=True)
class Axes:
    """What the lists and dictionaries of a field run over, and what its figures may be."""

    names: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    in_table: bool = True  # whether a table has rows of it


def axes(
    *names: str,
    low: float = -math.inf,
    high: float = math.inf,
    in_table: bool = True,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field whose lists and dictionaries run over `names`, with figures from `low` to `high`."""
    return dataclasses.field(default=default, metadata={"axes": Axes(names, low, high, in_table)})


def fraction(*names: str) -> Any:
    """A dataclass field of figures between 0 and 1."""
    return axes(*names, low=0.0, high=1.0)


@dataclass(frozen=True)
class Entry:
    """A number of a document: the fields that lead to it, and its place along their axes."""

    path: tuple[str, ...]
    place: Mapping[str, int | str]
    value: float | int

    def __str__(self) -> str:
        return ".".join(self.path) + "".join(f"[{axis} {index}]" for axis, index in self.place.items())


def entries(document: Any) -> Iterator[Entry]:
    """The numbers that a table has rows of, in the order of the fields."""
    yield from _entries(document, (), {}, ())


def _entries(
    value: Any, path: tuple[str, ...], place: Mapping[str, int | str], names: tuple[str, ...]
) -> Iterator[Entry]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            declared = _axes(field)
            if declared.in_table:
                yield from _entries(getattr(value, field.name), (*path, field.name), place, declared.names)
    elif isinstance(value, list | dict):
        axis, *inner = names or ("item",)
        for index, item in enumerate(value) if isinstance(value, list) else value.items():
            yield from _entries(item, path, {**place, axis: index}, tuple(inner))
    elif _is_number(value):
        yield Entry(path, place, value)


def _axes(field: "dataclasses.Field[Any]") -> Axes:
    return field.metadata.get("axes", Axes())


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _is_of_floats(value: Any) -> bool:
    """Such lists are gone through at once: matrices hold millions."""
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], float)


def check(document: Any, **known_lengths: int) -> None:
    """Raise `Malformed` unless figures keep to their bounds, and lists of the same axis are equally long.

    `known_lengths` says how long those of some axes have to be.
    """
    lengths = {axis: (length, f"the number of {axis}s") for axis, length in known_lengths.items()}
    _check(document, "", Axes(), lengths)


def _check(value: Any, where: str, declared: Axes, lengths: dict[str, tuple[int, str]]) -> None:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check(getattr(value, field.name), f"{where}.{field.name}".lstrip("."), _axes(field), lengths)
    elif isinstance(value, list | dict):
        axis, *inner = declared.names or ("item",)
        axis = _SAME_AXIS.get(axis, axis)
        if isinstance(value, list) and declared.names:
            length, first = lengths.setdefault(axis, (len(value), f"that of {where}"))
            if length != len(value):
                raise Malformed(f"{where} has a list of {len(value)} by {axis}, but {first} is {length}")
        if _is_of_floats(value) and (declared.low, declared.high) == (-math.inf, math.inf):
            return
        within = dataclasses.replace(declared, names=tuple(inner))
        for item in value if isinstance(value, list) else value.values():
            _check(item, where, within, lengths)
    elif _is_number(value) and not math.isnan(value) and not declared.low <= value <= declared.high:
        raise Malformed(f"{where} is {value}, not from {declared.low:g} to {declared.high:g}")


def decode[T](kind: type[T], content: Any) -> T:
    """Read a `kind` from parsed JSON. Raises `Malformed` where types are wrong, or entries missing or unknown."""
    return _decode(kind, content, "")


def _decode(kind: Any, content: Any, where: str) -> Any:
    if isinstance(kind, typing.TypeAliasType):
        kind = kind.__value__
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # of a type and None
        (present,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if content is None else _decode(present, content, where)
    if origin is typing.Literal:
        if content not in arguments:
            raise Malformed(f"{where} is {content!r}, not one of {', '.join(map(repr, arguments))}")
        return content
    if origin is list:
        _expect(isinstance(content, list), "a list", content, where)
        if arguments[0] is float and all(type(item) is float for item in content):
            return content
        return [_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(content)]
    if origin is dict:
        _expect(isinstance(content, dict), "an object", content, where)
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in content.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, content, where)
    if kind is float:
        if content is None:
            return math.nan
        _expect(_is_number(content), "a number", content, where)
        return float(content)
    assert kind in (int, str, bool), kind
    _expect(type(content) is kind, {int: "an integer", str: "a string", bool: "true or false"}[kind], content, where)
    return content


def _decode_fields(kind: Any, content: Any, where: str) -> Any:
    _expect(isinstance(content, dict), "an object", content, where)
    kinds = typing.get_type_hints(kind)
    for name in content:
        if name not in kinds:
            raise Malformed(f"{where or 'the file'} has an unknown entry {name!r}{nearest(name, kinds)}")
    for field in dataclasses.fields(kind):
        if field.name not in content and field.default is dataclasses.MISSING:
            raise Malformed(f"{where or 'the file'} lacks {field.name!r}")
    return kind(**{name: _decode(kinds[name], item, f"{where}.{name}".lstrip(".")) for name, item in content.items()})


def _expect(holds: bool, what: str, content: Any, where: str) -> None:
    if not holds:
        shown = repr(content)
        raise Malformed(f"{where or 'the file'} is {shown if len(shown) < 40 else type(content).__name__}, not {what}")


def encode(document: Any) -> bytes:
    """The document as JSON, lists of figures on one line. Equal documents give equal bytes; None is left out."""
    return (_encoded(document, "\n") + "\n").encode()


def _encoded(value: Any, line_break: str) -> str:
    within = line_break + " "
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _encoded({name: item for name, item in fields.items() if item is not None}, line_break)
    if isinstance(value, dict):
        items = [f"{_scalar(key)}: {_encoded(item, within)}" for key, item in value.items()]
        return f"{{{within}{f',{within}'.join(items)}{line_break}}}" if items else "{}"
    if isinstance(value, list):
        if _is_of_floats(value):
            return json.dumps([item if math.isfinite(item) else None for item in value], allow_nan=False)
        return f"[{within}{f',{within}'.join(_encoded(item, within) for item in value)}{line_break}]" if value else "[]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    is_missing = isinstance(value, float) and not math.isfinite(value)
    return json.dumps(None if is_missing else value, ensure_ascii=False)
