"""Detecting statements that only read."""

from __future__ import annotations

import pytest

from flask_bgjobs.enqueue.transactions import is_plain_select

READS = [
    "SELECT 1",
    "select 1",
    "SeLeCt 1",
    "SELECT\n*\nFROM orders",
    "SELECT*FROM orders",
    "SELECT(1)",
    "  SELECT 1",
    "\n\t SELECT 1",
    "(SELECT 1)",
    "((SELECT 1) UNION (SELECT 2))",
    "( /* a */ (SELECT 1))",
    "-- a comment\nSELECT 1",
    "--\nSELECT 1",
    "/* a comment */ SELECT 1",
    "/* two */ /* comments */\n-- and a third\nSELECT 1",
    "/* DELETE FROM orders; */ SELECT 1",
    "-- UPDATE orders\n SELECT 1",
    "/**/SELECT 1",
    "SELECT 'insertion' FROM orders",
    "SELECT updated_at, intoxicated, for_update FROM orders",
    "SELECT count(*) FROM orders WHERE status = 'update'",
    "SELECT * FROM orders ORDER BY id LIMIT 1",
]
WRITES = [
    "INSERT INTO orders VALUES (1)",
    "insert into orders values (1)",
    "UPDATE orders SET id = 1",
    "DELETE FROM orders",
    "REPLACE INTO orders VALUES (1)",
    "MERGE INTO orders USING x ON 1 = 1 WHEN MATCHED THEN DELETE",
    "TRUNCATE orders",
    "CREATE TABLE x (id int)",
    "DROP TABLE x",
    "CALL do_it()",
    "DO $$ BEGIN END $$",
    "EXPLAIN ANALYZE DELETE FROM orders",
    "COPY orders FROM STDIN",
    "LOCK TABLE orders",
    "SET LOCAL x = 1",
    "PRAGMA user_version = 5",
    "VACUUM",
    "VALUES (1)",
    "TABLE orders",
    "SHOW TABLES",
    "WITH x AS (SELECT 1) SELECT * FROM x",
    "WITH x AS (DELETE FROM orders RETURNING id) SELECT * FROM x",
    "with recursive x as (select 1) select * from x",
    "SELECT * FROM orders FOR UPDATE",
    "select * from orders for update",
    "SELECT * FROM orders FOR\n  UPDATE SKIP LOCKED",
    "SELECT * FROM orders FOR NO KEY UPDATE",
    "SELECT * FROM orders FOR SHARE",
    "SELECT * FROM orders LOCK IN SHARE MODE",
    "/*! DELETE FROM orders */",
    "SELECT * FROM orders FOR KEY SHARE NOWAIT",
    "SELECT * INTO copy FROM orders",
    "select id\ninto\tcopy from orders",
    "SELECT 1 INTO OUTFILE '/tmp/x'",
    "(SELECT * FROM orders FOR UPDATE)",
    "(INSERT INTO orders VALUES (1))",
    "-- SELECT\nDELETE FROM orders",
    "/* SELECT */ DELETE FROM orders",
    "/* SELECT 1 */",
    "-- SELECT 1",
    "/* not closed SELECT 1",
    "SELECTED",
    "SELECT_ALL()",
    "selection",
    "",
    " ",
    "(",
    ";",
    "nonsense",
]


@pytest.mark.parametrize("statement", READS)
def test_plain_select(statement: str) -> None:
    """A SELECT only reads, even after white space, comments or parentheses."""
    assert is_plain_select(statement) is True


@pytest.mark.parametrize("statement", WRITES)
def test_other_statements_may_write(statement: str) -> None:
    """Any other statement may write, including WITH, locks, INTO and unknown statements."""
    assert is_plain_select(statement) is False


@pytest.mark.parametrize("statement", [" " * 100_000, "(" * 100_000, "/*" * 50_000, "--\n" * 9_000])
def test_long_invalid_statement(statement: str) -> None:
    """A long invalid statement counts as a write, within the test timeout."""
    assert is_plain_select(statement) is False
    assert is_plain_select(statement + "DELETE") is False


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1; DELETE FROM orders",
        "SELECT 1 /* x */ ; INSERT INTO orders VALUES (1)",
    ],
)
def test_several_statements(statement: str) -> None:
    """Several statements in one string count as a write, even if the first is a SELECT."""
    assert is_plain_select(statement) is False


@pytest.mark.parametrize(
    "statement", ["SELECT * FROM orders FOR/**/UPDATE", "SELECT * FROM orders FOR -- x\nUPDATE"]
)
def test_comment_inside_lock_clause(statement: str) -> None:
    """A lock clause with a comment between its words is still detected."""
    assert is_plain_select(statement) is False


@pytest.mark.parametrize(
    ("repeated", "is_plain"),
    [("/*", True), ("/*/", True), ("*/", True), ("-- ", True), ("; ", False), ("for ", True),
     ("for no ", True), ("(", True), ("\n", True)],
)  # fmt: skip
def test_detection_time_is_linear(repeated: str, is_plain: bool) -> None:
    """Detection takes linear time for any statement."""
    assert is_plain_select("select 1 " + repeated * 300_000) == is_plain


@pytest.mark.parametrize(
    ("statement", "is_plain"),
    [
        ("select 1 /* a */ -- b", True),
        ("select '/* ' from t; delete from t", False),
        ("select 1 /* a */ from t /* for", True),
        ("select '*/'; /* a */ delete from t", False),
    ],
)
def test_unclosed_comment(statement: str, is_plain: bool) -> None:
    """An unclosed comment hides nothing, because it may be part of a string literal."""
    assert is_plain_select(statement) == is_plain
