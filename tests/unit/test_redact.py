"""Masking secrets by key."""

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
def test_secret_keys(key: str) -> None:
    """A key is a secret's when it contains the word, whatever its case and punctuation."""
    assert redactor.is_secret(key)
    assert redactor.mask({key: "hunter2"}) == {key: MASK}


@pytest.mark.parametrize("key", ["", "user", "pass", "key", "order_id", "api", "keyboard", "-_"])
def test_other_keys(key: str) -> None:
    """Other keys are shown."""
    assert not redactor.is_secret(key)
    assert redactor.mask({key: "hunter2"}) == {key: "hunter2"}


def test_own_words() -> None:
    """The words are the host's; none masks nothing."""
    assert Redactor(["Pin-Code"]).is_secret("customer_PINCODE")
    assert not Redactor(["pin"]).is_secret("password")
    assert Redactor([]).mask({"password": "x"}) == {"password": "x"}


def test_nested() -> None:
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


def test_copy() -> None:
    """Masking makes a copy: what the job gets is not touched."""
    value = {"a": [{"password": "p"}]}
    redactor.mask(value)
    assert value == {"a": [{"password": "p"}]}


def login(user: str, password: str = "", *rest: str, token: str = "", **options: str) -> None: ...


def store_tokens(user: str, *tokens: str) -> None: ...


def positional_only(password: str, /, user: str) -> None: ...


@pytest.mark.parametrize(
    ("target", "given", "shown"),
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
def test_parameters(target: Any, given: Any, shown: Any) -> None:
    """Positional values are masked by the names of the signature, keyword ones by their own."""
    assert redactor.parameters(given, target) == shown


@pytest.mark.parametrize(
    ("target", "given"),
    [(None, ["ann", 5, {"a": "b"}]), (positional_only, ["a", "b", "c"])],
)
def test_unknown_names(target: Any, given: list[Any]) -> None:
    """Where the names are not known, or do not reach, every positional value is masked."""
    assert redactor.parameters(given, target) == [MASK] * len(given)


def test_unknown_target_with_keywords() -> None:
    """Keyword parameters bring their names along, so no target is needed."""
    assert redactor.parameters({"user": "a", "token": "t"}, None) == {"user": "a", "token": MASK}


def test_error_text() -> None:
    """A value that was masked is masked in error text as well, wherever it stands."""
    text = "ValueError: ann could not log in with hunter2 (tried 'hunter2', not hunter)"
    shown = "ValueError: ann could not log in with *** (tried '***', not hunter)"
    assert redactor.text(text, ["ann", "hunter2"], login) == shown
    assert redactor.text(text, {"user": "ann", "password": "hunter2"}, login) == shown


def test_error_text_of_nested_secrets() -> None:
    """The parts of a secret list or dict are masked one by one, numbers as well."""
    given = {"token": ["alpha", {"x": "beta", "pin": 123456}], "note": "gamma"}
    assert redactor.text("alpha beta gamma 123456", given, None) == "*** *** gamma ***"


def test_error_text_of_overlapping_secrets() -> None:
    """The longest secret goes first, so that no rest of it is left."""
    given = {"token": ["abc", "abcdef"]}
    assert redactor.text("abcdef abc", given, None) == "*** ***"


def test_error_text_of_unknown_target() -> None:
    """Where every positional value is masked, every one is masked in text as well."""
    assert redactor.text("bad: ann, hunter2", ["ann", "hunter2"], None) == "bad: ***, ***"


@pytest.mark.parametrize("secret", ["", "a", "ab", None, True])
def test_error_text_stays_readable(secret: object) -> None:
    """A secret too short to be one is not searched for, or text would be masked to bits."""
    text = "a cab took None and True aboard"
    assert redactor.text(text, {"password": secret}, None) == text


def test_secret_with_line_break() -> None:
    """A secret that an error shows by ``repr`` is masked there too."""
    secret = "-----BEGIN KEY-----\nMIIC'x\n-----END KEY-----"
    text = f"ValueError: cannot read {secret!r}"
    assert "MIIC" not in redactor.text(text, {"private_key": secret}, None)


def test_signature_is_what_inspect_says() -> None:
    """The names come from the signature, so a decorated function's wrapper may give them."""

    def wrapper(*args: object) -> None: ...

    wrapper.__signature__ = inspect.signature(login)  # type: ignore[attr-defined]
    assert redactor.parameters(["ann", "hunter2"], wrapper) == ["ann", MASK]


@pytest.mark.parametrize("parameters", [5, None, True, "hunter2"])
def test_parameters_that_are_no_parameters(parameters: Any) -> None:
    """What an edited row holds instead of a list or a dict is masked as a whole."""
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
def test_a_secret_of_several_lines(text: str) -> None:
    """It is masked also where its lines have something before them."""
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
def test_secrets_by_their_form(text: str, masked: str) -> None:
    """What looks like a secret is masked in any error, whatever the parameters are."""
    assert redactor.text(text, [], None) == masked
    assert redactor.text(masked, [], None) == masked
    assert Redactor([]).text(text, [], None) == text


@pytest.mark.parametrize(
    "repeated",
    ["password", "password=", "token: ", "://", "://a", "://:", "Bearer ", "a", "-", "a=", "='",
     " ", "Basic ", 'token="', "token=Bearer ", "a:b@"],
)  # fmt: skip
def test_long_texts_take_no_time(repeated: str) -> None:
    """The time is linear in the length: another pattern would need longer than a test may take."""
    redactor.text(repeated * 200_000, [], None)


def test_many_secrets_take_no_time() -> None:
    """Secrets that a text cannot hold are not searched for."""
    secrets = {"tokens": [f"secret number {number}" for number in range(100_000)]}
    text = "x" * 60_000 + " secret number 777 and " + "y" * 1_000
    assert "777" not in redactor.text(text, secrets, None)
