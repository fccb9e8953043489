"""Masking: what may be shown of a job's values."""

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


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """What may be shown of one job's values."""

    state: AppState
    target: str
    method: str | None
    values: Any
    is_known: bool
    """Without the parameters nobody knows which words of its other texts are secret."""

    @classmethod
    def of(cls, state: AppState, target: str, method: str | None, parameters: str | None) -> Shown:
        """For a job with these ``parameters``, as stored; ``None`` when they are not loaded."""
        values = _read_parameters(parameters)
        return cls(state, target, method, values, values is not None)

    def parameters(self, *, indented: bool = False) -> str | None:
        """The masked parameters as JSON; ``None`` when they are not known."""
        if not self.is_known:
            return None
        masked = self.state.masked_parameters(self.target, self.method, self.values)
        return _json(masked, indented=indented)

    def value(self, text: str | None) -> str | None:
        """A stored result or meta as indented JSON, with secret keys and values masked."""
        if text is None:
            return None
        try:
            return _json(self._mask_leaves(self.state.redactor.mask(serialize.loads(text))))
        except ValueError:
            return "not readable"

    def text(self, text: str | None, *, instead: str | None = None) -> str | None:
        """``text`` without the values that are masked in the parameters."""
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
        # A number or a date may be the secret itself.
        return value if self.text(str(value)) == str(value) else MASK


def _json(value: Any, *, indented: bool = True) -> str:
    text = serialize.dumps_plain(value)
    if indented:
        text = json.dumps(json.loads(text), ensure_ascii=False, indent=2)
    # JSON holds lone surrogates as escapes, which cannot be encoded into a page.
    return storable(text, _MAX_SHOWN)


def is_readable(job: Job) -> bool:
    """Whether the parameters of ``job`` can be read back."""
    return _read_parameters(job.parameters_json) is not None


def _read_parameters(text: str | None) -> Any:
    try:
        values = None if text is None else serialize.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, list | tuple | dict) else None
