"""The search box: words and ``field:value`` terms, read into what they ask for.

::

    receipt                       anywhere in what is shown of a job
    job:shop.jobs error:"timed out"   both
    queue:mail,reports            either
    parameters.order.id:7         a value within the parameters
    id:100..200                   a range of ids

Nothing here knows a table; :mod:`.listing` turns terms into conditions.
"""

from __future__ import annotations

import dataclasses
import re

from ...job.records import MAX_ID

FIELDS = ("job", "queue", "tag", "owner", "worker", "id", "error", "parameters")
_MAX_TERMS = 20
_SHOWN_CHARACTERS = 40
"""Of what cannot be read, in the error."""
# Possessive, so that no text makes it try a second way: the time is linear in the length.
_TERM = re.compile(
    r"""
    (?:(?P<field>[A-Za-z_]++)(?P<path>(?:\.[^\s:",]++)?):)?
    (?P<values>(?:"[^"]*+"|[^\s",]++)(?:,(?:"[^"]*+"|[^\s",]++))*+)
    (?=\s|$)
    """,
    re.VERBOSE,
)
_FIELD_ALONE = re.compile(r'[A-Za-z_]++(?:\.[^\s:",]++)?:')
_VALUE = re.compile(r'"([^"]*)"|([^\s",]+)')


class InvalidSearch(ValueError):
    """The text of a search cannot be read; says where and why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """One thing that a job must fulfil."""

    field: str | None
    """One of :data:`FIELDS`; ``None``: anywhere in what is shown."""
    path: tuple[str, ...]
    """Keys and positions within the parameters."""
    values: tuple[str, ...]
    """Any of these."""

    @property
    def ids(self) -> list[range]:
        """The ids that an ``id`` term names."""
        return [_ids(value) for value in self.values]


def parse(text: str) -> tuple[Term, ...]:
    """The terms of ``text``, all of which a job must fulfil.

    :raises InvalidSearch: when it cannot be read.
    """
    terms = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        found = _TERM.match(text, position)
        if found is None:
            raise InvalidSearch(_what_is_wrong(text[position:]))
        terms.append(_term(found))
        position = found.end()
    if len(terms) > _MAX_TERMS:
        raise InvalidSearch(f"a search has {_MAX_TERMS} terms at most, and this one {len(terms)}")
    return tuple(terms)


def _term(found: re.Match[str]) -> Term:
    if found["field"] is None and _FIELD_ALONE.fullmatch(found["values"]):
        raise InvalidSearch(_what_is_wrong(found["values"]))
    field, path = found["field"], tuple(filter(None, (found["path"] or "").split(".")))
    if field is not None and field not in FIELDS:
        # A word with a colon, such as an address, is text like any other when it is quoted.
        raise InvalidSearch(
            f'there is no field "{field[:_SHOWN_CHARACTERS]}"; there are {", ".join(FIELDS)}. '
            'Put text that holds a colon into quotes: "…"'
        )
    if field == "parameters" and not path:
        raise InvalidSearch("parameters needs a path: parameters.order_id:7, or parameters.0:7")
    if field != "parameters" and path:
        raise InvalidSearch(f'{field} takes no path: write "{field}:value"')
    values = tuple(quoted if quoted else bare for quoted, bare in _VALUE.findall(found["values"]))
    if not all(values):
        raise InvalidSearch('"" is empty: there is nothing to look for')
    term = Term(field, path, values)
    if field == "id":
        # For its errors.
        _ = term.ids
    return term


def _ids(value: str) -> range:
    found = re.fullmatch(r"#?([0-9]{1,19})(?:\.\.([0-9]{1,19}))?", value)
    if found is None:
        shown = value[:_SHOWN_CHARACTERS]
        raise InvalidSearch(f"id:{shown} is neither a number nor a range such as 100..200")
    first, last = int(found[1]), int(found[2] or found[1])
    return range(min(first, MAX_ID), min(last, MAX_ID - 1) + 1)


def _what_is_wrong(rest: str) -> str:
    word = rest.split(maxsplit=1)[0]
    beginning = word[:_SHOWN_CHARACTERS]
    if rest.count('"') % 2:
        return f"a quote is not closed: {rest[:_SHOWN_CHARACTERS]}"
    if word.endswith(":"):
        return f"{beginning} has no value: write it behind the colon, without a blank"
    if word.startswith(",") or word.endswith(","):
        return f'"{beginning}": a comma stands between two values'
    return f'"{beginning}" cannot be read; put it into quotes to look for it as it is'
