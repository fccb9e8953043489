"""Masking secrets in parameters and error messages."""

from __future__ import annotations

import inspect
import json
import textwrap
from typing import Any

import pytest

from flask_bgjobs.config import DEFAULT_REDACT
from flask_bgjobs.job.redact import MASK, Redactor

redactor = Redactor(DEFAULT_REDACT)


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "PASSWORD",
        "user_password",
        "passwordRepeat",
        "X-Api-Key",
        "apiKeyOld",
        "API KEY",
        "api.key",
        "access-token",
        "csrfToken",
        "Authorization",
        "proxy_authorization",
        "Set-Cookie",
        "client_secret",
        "secrets",
        "privateKey",
        "creditCard",
        "card-number",
    ],
)
def test_secret_key_is_masked(key: str) -> None:
    """A key is secret if it contains a secret word, regardless of case and punctuation."""
    assert redactor.is_secret(key)
    assert redactor.mask({key: "hunter2"}) == {key: MASK}


@pytest.mark.parametrize("key", ["", "user", "pass", "key", "order_id", "api", "keyboard", "-_"])
def test_other_key_is_shown(key: str) -> None:
    """Other keys are not masked."""
    assert not redactor.is_secret(key)
    assert redactor.mask({key: "hunter2"}) == {key: "hunter2"}


def test_configured_words() -> None:
    """The host app can set its own words; without words, no parameter is masked."""
    assert Redactor(["Pin-Code"]).is_secret("customer_PINCODE")
    assert not Redactor(["pin"]).is_secret("password")
    assert Redactor([]).mask({"password": "x"}) == {"password": "x"}


def test_nested_secrets() -> None:
    """Secrets are masked at every depth of dicts, lists, tuples and sets."""
    value = {
        "user": {"name": "Ann", "password": "p1", "keys": [{"api_key": "k1"}, {"id": 1}]},
        "pairs": ({"token": ["t1", "t2"]}, "x"),
        "cookie": {"session": {"id": 5}},
        "words": {"one"},
    }
    assert redactor.mask(value) == {
        "user": {"name": "Ann", "password": MASK, "keys": [{"api_key": MASK}, {"id": 1}]},
        "pairs": [{"token": MASK}, "x"],
        "cookie": MASK,
        "words": ["one"],
    }


def test_mask_returns_copy() -> None:
    """Masking returns a copy and does not change the job's parameters."""
    value = {"a": [{"password": "p"}]}
    redactor.mask(value)
    assert value == {"a": [{"password": "p"}]}


def login(user: str, password: str = "", *rest: str, token: str = "", **options: str) -> None: ...


def store_tokens(user: str, *tokens: str) -> None: ...


def positional_only(password: str, /, user: str) -> None: ...


@pytest.mark.parametrize(
    ("target", "parameters", "masked"),
    [
        (login, [], []),
        (login, ["ann"], ["ann"]),
        (login, ["ann", "hunter2"], ["ann", MASK]),
        (login, ["ann", "hunter2", "x", "y"], ["ann", MASK, "x", "y"]),
        (store_tokens, ["ann", "t1", "t2"], ["ann", MASK, MASK]),
        (positional_only, ["hunter2", "ann"], [MASK, "ann"]),
        (login, [{"api_key": "k", "a": 1}], [{"api_key": MASK, "a": 1}]),
        (login, ("ann", "hunter2"), ["ann", MASK]),
        (login, {"user": "ann", "password": "p"}, {"user": "ann", "password": MASK}),
        (login, {"user": "ann", "secret_extra": "p"}, {"user": "ann", "secret_extra": MASK}),
    ],
)
def test_parameters_are_masked_by_name(target: Any, parameters: Any, masked: Any) -> None:
    """Positional values are masked by the signature's names, keyword values by their own."""
    assert redactor.parameters(parameters, target) == masked


@pytest.mark.parametrize(
    ("target", "parameters"),
    [(None, ["ann", 5, {"a": "b"}]), (positional_only, ["a", "b", "c"])],
)
def test_unknown_names_mask_all_values(target: Any, parameters: list[Any]) -> None:
    """If the names are unknown or too few, every positional value is masked."""
    assert redactor.parameters(parameters, target) == [MASK] * len(parameters)


def test_keyword_parameters_need_no_target() -> None:
    """Keyword parameters have their own names, so no target is needed."""
    assert redactor.parameters({"user": "a", "token": "t"}, None) == {"user": "a", "token": MASK}


def test_secret_in_error_text() -> None:
    """A masked value is also masked at any position of an error text."""
    text = "ValueError: ann could not log in with hunter2 (tried 'hunter2', not hunter)"
    masked = "ValueError: ann could not log in with *** (tried '***', not hunter)"
    assert redactor.text(text, ["ann", "hunter2"], login) == masked
    assert redactor.text(text, {"user": "ann", "password": "hunter2"}, login) == masked


def test_nested_secrets_in_error_text() -> None:
    """Each part of a secret list or dict is masked in an error text, including numbers."""
    parameters = {"token": ["alpha", {"x": "beta", "pin": 123456}], "note": "gamma"}
    assert redactor.text("alpha beta gamma 123456", parameters, None) == "*** *** gamma ***"


def test_overlapping_secrets_in_error_text() -> None:
    """The longest secret is masked first, so that no part of it remains."""
    parameters = {"token": ["abc", "abcdef"]}
    assert redactor.text("abcdef abc", parameters, None) == "*** ***"


def test_unknown_target_in_error_text() -> None:
    """If every positional value is masked, all of them are masked in an error text too."""
    assert redactor.text("bad: ann, hunter2", ["ann", "hunter2"], None) == "bad: ***, ***"


@pytest.mark.parametrize("secret", ["", "a", "ab", None, True])
def test_short_secret_is_not_masked_in_text(secret: object) -> None:
    """A secret that is too short is not masked in text, which would become unreadable."""
    text = "a cab took None and True aboard"
    assert redactor.text(text, {"password": secret}, None) == text


def test_secret_with_line_break_in_repr() -> None:
    """A secret that an error shows by ``repr`` is masked too."""
    secret = "-----BEGIN KEY-----\nMIIC'x\n-----END KEY-----"
    text = f"ValueError: cannot read {secret!r}"
    assert "MIIC" not in redactor.text(text, {"private_key": secret}, None)


def test_signature_of_wrapper() -> None:
    """The names come from ``inspect.signature``, so a wrapper can provide them."""

    def wrapper(*args: object) -> None: ...

    wrapper.__signature__ = inspect.signature(login)  # type: ignore[attr-defined]
    assert redactor.parameters(["ann", "hunter2"], wrapper) == ["ann", MASK]


@pytest.mark.parametrize("parameters", [5, None, True, "hunter2"])
def test_invalid_parameters_are_masked(parameters: Any) -> None:
    """Parameters that are neither a list nor a dict, as in an edited row, are masked entirely."""
    assert redactor.parameters(parameters, None) == MASK
    assert "hunter2" not in redactor.text(f"{parameters} failed", "hunter2", None)


KEY = "\n".join(
    ["-----BEGIN PRIVATE KEY-----"]
    + [f"{number:02}" + "MIIC'x" * 10 for number in range(57)]
    + ["-----END PRIVATE KEY-----"]
)


@pytest.mark.parametrize(
    "text",
    [
        f"cannot read {KEY}",
        f"cannot read {KEY!r}",
        f"cannot read {json.dumps(KEY)}",
        "cannot read\n" + textwrap.indent(KEY, "    "),
        "cannot read\n" + textwrap.indent(KEY, "E   > "),
        "cannot read " + KEY.replace("\n", " "),
        "cannot read " + KEY.splitlines()[7],
    ],
    ids=["raw", "repr", "json", "indented", "prefixed", "joined", "one line"],
)
def test_multiline_secret(text: str) -> None:
    """A secret of several lines is masked even if its lines are indented or prefixed."""
    assert "MIIC" not in redactor.text(text, {"private_key": KEY}, None)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("token=abc123", "token=***"),
        ("GET /x?access_token=abc&page=2", "GET /x?access_token=***&page=2"),
        ("password: hunter2, user: ann", "password: ***, user: ann"),
        ("PASSWORD = 'two words', x", "PASSWORD = '***', x"),
        ('{"api_key": "abc", "id": 7}', '{"api_key": "***", "id": 7}'),
        ("{'X-Api-Key': b'abc', 'id': 7}", "{'X-Api-Key': b'***', 'id': 7}"),
        ("Client(client_secret='abc')", "Client(client_secret='***')"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("{'Authorization': 'Bearer abc.def', 'Accept': '*/*'}",
         "{'Authorization': '***', 'Accept': '*/*'}"),
        ("sent Bearer abcdef.ghijkl and failed", "sent Bearer *** and failed"),
        ("curl -H 'Basic dXNlcjpwYXNz'", "curl -H 'Basic ***'"),
        ("Set-Cookie: session=abc; Path=/", "Set-Cookie: ***; Path=/"),
        ("postgresql://ann:hunter2@db:5432/shop", "postgresql://ann:***@db:5432/shop"),
        ("redis://:hunter2@cache/0 refused", "redis://:***@cache/0 refused"),
        ("https://example.org:8080/a@b?page=1", "https://example.org:8080/a@b?page=1"),
        ("KeyError: 'token'", "KeyError: 'token'"),
        ("the token has expired", "the token has expired"),
        ("keyboard=de user=ann", "keyboard=de user=ann"),
        ("password:\n  File 'x'", "password:\n  File 'x'"),
        ("token=", "token="),
    ],
)  # fmt: skip
def test_secret_patterns(text: str, masked: str) -> None:
    """Text that looks like a secret is masked in any error, even without parameters."""
    assert redactor.text(text, [], None) == masked
    assert redactor.text(masked, [], None) == masked
    assert Redactor([]).text(text, [], None) == text


@pytest.mark.parametrize(
    "repeated",
    ["password", "password=", "token: ", "://", "://a", "://:", "Bearer ", "a", "-", "a=", "='",
     " ", "Basic ", 'token="', "token=Bearer ", "a:b@"],
)  # fmt: skip
def test_masking_time_is_linear(repeated: str) -> None:
    """Masking takes linear time; a quadratic pattern would exceed the test timeout."""
    redactor.text(repeated * 200_000, [], None)


def test_many_secrets() -> None:
    """Masking a long text with 100,000 secrets finishes within the test timeout."""
    secrets = {"tokens": [f"secret number {number}" for number in range(100_000)]}
    text = "x" * 60_000 + " secret number 777 and " + "y" * 1_000
    assert "777" not in redactor.text(text, secrets, None)
