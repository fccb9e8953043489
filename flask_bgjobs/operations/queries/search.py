"""The search language: parses words and ``field:value`` terms.

::

    receipt                       in any shown value of a job
    job:shop.jobs error:"timed out"   both terms
    queue:mail,reports            one of the values
    parameters.order.id:7         a value within the parameters
    id:100..200                   a range of ids

This module uses no table. :mod:`.conditions` turns terms into conditions for the database.
"""

from __future__ import annotations

import dataclasses
import re

from ...job.records import MAX_ID

FIELDS = ("job", "queue", "tag", "owner", "worker", "id", "error", "parameters")
_MAX_TERMS = 20
_SHOWN_CHARACTERS = 40
"""How many characters of an invalid term the error message shows."""
# Possessive quantifiers prevent backtracking, so that the time is linear in the length.
_TERM = re.compile(
    r"""
    (?:(?P<field>[A-Za-z_]++)(?P<path>(?:\.[^\s:",]++)?):)?
    (?P<values>(?:"[^"]*+"|[^\s",]++)(?:,(?:"[^"]*+"|[^\s",]++))*+)
    (?=\s|$)
    """,
    re.VERBOSE,
)
_FIELD_WITHOUT_VALUE = re.compile(r'[A-Za-z_]++(?:\.[^\s:",]++)?:')
_VALUE = re.compile(r'"([^"]*)"|([^\s",]+)')


class InvalidSearch(ValueError):
    """The text of a search is invalid. The message says where and why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """One term of a search, which a job must match."""

    field: str | None
    """One of :data:`FIELDS`; ``None``: any shown value of the job."""
    path: tuple[str, ...]
    """Keys and list positions that lead to a value in the parameters."""
    values: tuple[str, ...]
    """The job must have at least one of these values."""

    @property
    def ids(self) -> list[range]:
        """The ranges of ids of an ``id`` term.

        :raises InvalidSearch: when a value is neither an id nor a range.
        """
        return [_ids(value) for value in self.values]


def parse(text: str) -> tuple[Term, ...]:
    """Parse a search.

    :returns: the terms. A job must match all of them.
    :raises InvalidSearch: when ``text`` is not a valid search.
    """
    terms = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        match = _TERM.match(text, position)
        if match is None:
            raise InvalidSearch(_error_message(text[position:]))
        terms.append(_term(match))
        position = match.end()
    if len(terms) > _MAX_TERMS:
        raise InvalidSearch(
            f"a search can have at most {_MAX_TERMS} terms, but this one has {len(terms)}"
        )
    return tuple(terms)


def _term(match: re.Match[str]) -> Term:
    if match["field"] is None and _FIELD_WITHOUT_VALUE.fullmatch(match["values"]):
        raise InvalidSearch(_error_message(match["values"]))
    field, path = match["field"], tuple(filter(None, (match["path"] or "").split(".")))
    if field is not None and field not in FIELDS:
        # A word with a colon, such as a URL, can be searched for in quotes.
        raise InvalidSearch(
            f'there is no field "{field[:_SHOWN_CHARACTERS]}"; the fields are {", ".join(FIELDS)}. '
            'Put text that contains a colon in quotes: "…"'
        )
    if field == "parameters" and not path:
        raise InvalidSearch("parameters needs a path: parameters.order_id:7, or parameters.0:7")
    if field != "parameters" and path:
        raise InvalidSearch(f'{field} takes no path: write "{field}:value"')
    values = tuple(quoted if quoted else bare for quoted, bare in _VALUE.findall(match["values"]))
    if not all(values):
        raise InvalidSearch('"" is empty: there is nothing to search for')
    term = Term(field, path, values)
    if field == "id":
        # Raises an error if a value is invalid.
        _ = term.ids
    return term


def _ids(value: str) -> range:
    match = re.fullmatch(r"#?([0-9]{1,19})(?:\.\.([0-9]{1,19}))?", value)
    if match is None:
        shown = value[:_SHOWN_CHARACTERS]
        raise InvalidSearch(f"id:{shown} is neither a number nor a range such as 100..200")
    first, last = int(match[1]), int(match[2] or match[1])
    return range(min(first, MAX_ID), min(last, MAX_ID - 1) + 1)


def _error_message(rest: str) -> str:
    word = rest.split(maxsplit=1)[0]
    beginning = word[:_SHOWN_CHARACTERS]
    if rest.count('"') % 2:
        return f"a quote is not closed: {rest[:_SHOWN_CHARACTERS]}"
    if word.endswith(":"):
        return f"{beginning} has no value: write it directly after the colon, without a space"
    if word.startswith(",") or word.endswith(","):
        return f'"{beginning}": a comma must be between two values'
    return f'"{beginning}" is not a valid term: put it in quotes to search for this text'
