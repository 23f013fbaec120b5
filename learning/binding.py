"""Arguments of a live query, as text that asyncpg sends for the same parameter of a probe.

Drivers send the same value in different ways: psycopg ``5`` as text, asyncpg four bytes.  A probe must bind
exactly the value that the client bound, whatever its type, and a value must never become part of SQL text.
Therefore:

- every parameter is bound as *text*: asyncpg's own conversions are replaced by "take the string as it is"
  (`set_type_codec`); types of extensions (``vector``) are text in asyncpg anyway;
- a binary value whose type `learning.values` knows becomes text here; any other type is turned into text by
  the server itself, whose output function knows best: the bytes go there unchanged, ``SELECT
  $1::type::text``;
- arrays are taken apart into lists of such texts, which is what asyncpg takes for them;
- LIMIT becomes LIMIT + OFFSET and OFFSET becomes 0: the index has to find the rows before the offset as well.

Formats: PostgreSQL documentation, "Formats and Format Codes", and ``array_send`` in ``arrayfuncs.c``.
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import numpy as np

from learning.records import SlotRole, Template, Trajectory, Value
from learning.values import INT2, INT4, INT8, canonical

Bound = str | list[str | None] | None
"""What asyncpg is given for one parameter: text, the texts of an array's elements, or None for NULL."""

_CACHED = 4096
_INTEGER_BY_LENGTH = {2: INT2, 4: INT4, 8: INT8}


class BindingError(Exception):
    """A value cannot be bound to the probe; the message says which type, never the value."""


@dataclass(frozen=True, slots=True)
class ParameterType:
    """The type of one parameter of a probe, as the server resolved it."""

    oid: int
    name: str  # of the element for an array
    schema: str
    array: bool = False


def parameter_types(statement: Any) -> tuple[ParameterType, ...]:
    """Return the types of an asyncpg prepared statement's parameters.

    Raises
    ------
    BindingError
        A parameter is of a kind that has no plain text form in asyncpg (composite, range, domain over an
        array).
    """
    found = []
    for kind in statement.get_parameters():
        if kind.kind not in ("scalar", "array"):
            raise BindingError(f"parameters of the {kind.kind} type {kind.name} cannot be measured yet")
        array = kind.kind == "array"
        found.append(
            ParameterType(kind.oid, kind.name.removesuffix("[]") if array else kind.name, kind.schema, array)
        )
    return tuple(found)


class Binder:
    """Turns the values of trajectories into arguments for the probes of one connection."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._text_types: set[tuple[str, str]] = set()
        self._converted: OrderedDict[tuple[int, bytes], str] = OrderedDict()

    async def declare(self, types: Sequence[ParameterType]) -> None:
        """Make parameters of these types text; must come before the statements that use them are prepared."""
        for kind in types:
            name = (kind.schema, kind.name)
            if name not in self._text_types:
                await self._codec(kind, "text")
                self._text_types.add(name)

    async def bind(
        self, template: Template, types: Sequence[ParameterType], trajectory: Trajectory
    ) -> tuple[Bound, ...]:
        """Return one argument per parameter of the template's probe.

        Raises
        ------
        BindingError
            The trajectory does not hold the values (an unknown vector), or a value cannot be turned into
            text.
        """
        arguments: list[Bound] = []
        for slot, kind in zip(template.probe_slots, types, strict=True):
            role = template.slots[slot].role
            if role is SlotRole.VECTOR:
                arguments.append(vector_text(trajectory.vector))
            elif role is SlotRole.LIMIT:
                arguments.append(str(trajectory.k + trajectory.offset))
            elif role is SlotRole.OFFSET:
                arguments.append("0")
            else:
                value = trajectory.values[slot] if slot < len(trajectory.values) else None
                if value is None:
                    raise BindingError(f"the value of slot {slot} was not recorded")
                arguments.append(await self._argument(kind, value))
        return tuple(arguments)

    async def _argument(self, kind: ParameterType, value: Value) -> Bound:
        if value.data is None:
            return None
        if not kind.array:
            return await self._text(kind, kind.oid, value.format, value.data)
        if value.format == 0:
            return split_array(value.data.decode())
        element_oid, elements = unpack_array(value.data)
        return [None if part is None else await self._text(kind, element_oid, 1, part) for part in elements]

    async def _text(self, kind: ParameterType, oid: int, format_code: int, data: bytes) -> str:
        """Return the text of one scalar value; `oid` is the element's for an array."""
        if format_code == 0:
            try:
                return data.decode()
            except UnicodeDecodeError as error:
                raise BindingError(f"a value of type {kind.name} is not valid UTF-8") from error
        text = canonical(oid, 1, data)
        if text is None and kind.name in ("int2", "int4", "int8") and len(data) in _INTEGER_BY_LENGTH:
            # A driver may declare a narrower integer than the server would have chosen.
            text = canonical(_INTEGER_BY_LENGTH[len(data)], 1, data)
        return await self._convert(kind, oid, data) if text is None else text

    async def _convert(self, kind: ParameterType, oid: int, data: bytes) -> str:
        key = (oid, data)
        if key not in self._converted:
            self._converted[key] = await self._ask_server(kind, data)
            while len(self._converted) > _CACHED:
                self._converted.popitem(last=False)
        return self._converted[key]

    async def _ask_server(self, kind: ParameterType, data: bytes) -> str:
        name = ".".join('"' + part.replace('"', '""') + '"' for part in (kind.schema, kind.name))
        try:
            await self._codec(kind, "binary")
            try:
                return str(await self._connection.fetchval(f"SELECT $1::{name}::pg_catalog.text", data))
            finally:
                await self._codec(kind, "text")
        except asyncpg.DataError as error:
            raise BindingError(f"a binary value of type {kind.name} cannot be read: {error}") from error

    async def _codec(self, kind: ParameterType, wire_format: str) -> None:
        """Hand values of this type through as they are: str in text format, bytes in binary format."""
        try:
            await self._connection.set_type_codec(
                kind.name, schema=kind.schema, encoder=_as_it_is, decoder=_as_it_is, format=wire_format
            )
        except (asyncpg.InterfaceError, ValueError) as error:
            raise BindingError(f"parameters of type {kind.name} cannot be measured yet: {error}") from error


def _as_it_is(value: Any) -> Any:
    return value


def vector_text(vector: bytes | None) -> str:
    """Return pgvector's text form of a float32 little-endian vector; `repr` keeps every bit of a float32.

    Raises
    ------
    BindingError
        The proxy could not decode the vector.
    """
    if vector is None:
        raise BindingError("the query vector was not recorded")
    return "[" + ",".join(map(repr, np.frombuffer(vector, dtype="<f4").tolist())) + "]"


def unpack_array(data: bytes) -> tuple[int, list[bytes | None]]:
    """Return the element type's OID and the elements of a one-dimensional array in binary format.

    Raises
    ------
    BindingError
        The bytes are no such array.
    """
    try:
        dimensions, _, oid = struct.unpack_from("!iiI", data)
        if dimensions == 0:
            return oid, []
        if dimensions != 1:
            raise BindingError("arrays of several dimensions cannot be measured yet")
        (count,) = struct.unpack_from("!i", data, 12)
        position, elements = 20, []
        for _ in range(count):
            (length,) = struct.unpack_from("!i", data, position)
            position += 4
            if length > len(data) - position:
                raise BindingError("an array is shorter than it says")
            elements.append(None if length < 0 else data[position : position + length])
            position += max(0, length)
    except struct.error as error:
        raise BindingError("an array is shorter than it says") from error
    return oid, elements


_ELEMENT = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|((?:[^",{}\\]|\\.)*))\s*([,}])', re.DOTALL)


def split_array(text: str) -> list[str | None]:
    """Return the elements of a one-dimensional array literal: ``{1,NULL,"a b"}``.

    Raises
    ------
    BindingError
        The text is no such array.
    """
    text = text.strip()
    if text == "{}":
        return []
    if not text.startswith("{") or not text.endswith("}"):
        raise BindingError("an array literal does not stand in braces")
    elements: list[str | None] = []
    position = 1
    while position < len(text):
        match = _ELEMENT.match(text, position)
        if match is None:
            raise BindingError("an array literal of several dimensions, or malformed")
        quoted, plain, _ = match.groups()
        if quoted is None and plain.strip().upper() == "NULL":
            elements.append(None)
        else:
            elements.append(
                re.sub(r"\\(.)", r"\1", plain.strip() if quoted is None else quoted, flags=re.DOTALL)
            )
        position = match.end()
    return elements
