"""Masking of a job's values for display."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ...job import serialize
from ...job.redact import MASK
from ...job.text import storable
from ...models import Job
from ...state import AppState

_MAX_SHOWN = 64 * 1024
"""Highest number of characters of a JSON text."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """Masks the values of one job for display."""

    state: AppState
    target: str
    method: str | None
    values: Any
    """The parameters; ``None`` when they are not known."""
    is_known: bool
    """Whether the parameters are known. They tell which words in the job's other texts are secret,
    so without them such texts are not shown."""

    @classmethod
    def of(cls, state: AppState, target: str, method: str | None, parameters: str | None) -> Shown:
        """The masking for one job.

        :param parameters: the stored JSON; ``None`` when it is not loaded.
        """
        values = _read_parameters(parameters)
        return cls(state, target, method, values, values is not None)

    def parameters(self, *, indented: bool = False) -> str | None:
        """The masked parameters as JSON; ``None`` when they are not known.

        :param indented: whether to use several lines (default: one line).
        """
        if not self.is_known:
            return None
        masked = self.state.masked_parameters(self.target, self.method, self.values)
        return _json(masked, indented=indented)

    def value(self, text: str | None) -> str | None:
        """A stored result or meta as indented JSON; secret keys and secret values are masked."""
        if text is None:
            return None
        try:
            return _json(self._mask_leaves(self.state.redactor.mask(serialize.loads(text))))
        except ValueError:
            return "not readable"

    def text(self, text: str | None, *, instead: str | None = None) -> str | None:
        """``text``, in which the values that are secret in the parameters are masked.

        :param instead: returned when the parameters are not known.
        """
        if not text:
            return text
        if not self.is_known:
            return instead
        return self.state.masked_text(text, self.target, self.method, self.values)

    def _mask_leaves(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._mask_leaves(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return [self._mask_leaves(item) for item in value]
        if isinstance(value, str):
            return self.text(value, instead=MASK)
        if value is None or isinstance(value, bool):
            return value
        # Numbers and dates are compared as text, because they may equal a secret parameter.
        return value if self.text(str(value)) == str(value) else MASK


def _json(value: Any, *, indented: bool = True) -> str:
    text = serialize.dumps_plain(value)
    if indented:
        text = json.dumps(json.loads(text), ensure_ascii=False, indent=2)
    # JSON may contain lone surrogates as escapes, which cannot be encoded in UTF-8 for the page.
    return storable(text, _MAX_SHOWN)


def is_readable(job: Job) -> bool:
    """Whether the stored parameters of ``job`` can be decoded."""
    return _read_parameters(job.parameters_json) is not None


def _read_parameters(text: str | None) -> Any:
    try:
        values = None if text is None else serialize.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, list | tuple | dict) else None
