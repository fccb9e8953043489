"""Limits: their rows and keys, the places of jobs, and notices of changes.

Revision ID: 0008
Revises: 0007
Create Date: 2026-11-29 15:30:00.000000

"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

# revision identifiers, used by Alembic.
revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TIME = (
    sa.DateTime()
    .with_variant(mysql.DATETIME(fsp=6), "mariadb")
    .with_variant(mysql.DATETIME(fsp=6), "mysql")
)
LONG_TEXT = (
    sa.Text().with_variant(mysql.LONGTEXT(), "mariadb").with_variant(mysql.LONGTEXT(), "mysql")
)
NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLE_OPTIONS = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}
WAITS_FOR_ANYTHING = "waits_for IS NOT NULL"
WAITS_FOR_OTHERS = "waits_for = 'code' OR waits_for = 'queue'"


def upgrade():
    op.create_table(
        "bgjobs_limit",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("definition", sa.Text(), nullable=False),
        sa.Column("defined_at", TIME, nullable=False),
        sa.Column("override", sa.Text(), nullable=True),
        sa.Column("overridden_at", TIME, nullable=True),
        sa.Column("overridden_by", sa.String(length=255), nullable=True),
        sa.Column("overridden_code", sa.Text(), nullable=True),
        sa.Column("paused_at", TIME, nullable=True),
        sa.Column("paused_by", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        **TABLE_OPTIONS,
    )
    op.create_table(
        "bgjobs_limit_key",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("limit_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("arrival", sa.BigInteger(), nullable=True),
        sa.Column("starts", LONG_TEXT, nullable=True),
        sa.Column("due_at", TIME, nullable=True),
        sa.Column("used_at", TIME, nullable=False),
        sa.Column("paused_at", TIME, nullable=True),
        sa.Column("paused_by", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        **TABLE_OPTIONS,
    )
    op.create_index(
        op.f("ix_bgjobs_limit_key_name"), "bgjobs_limit_key", ["limit_id", "name", "id"]
    )
    op.create_index(
        op.f("ix_bgjobs_limit_key_due"),
        "bgjobs_limit_key",
        ["due_at", "id"],
        sqlite_where=sa.text("due_at IS NOT NULL"),
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_table(
        "bgjobs_seat",
        sa.Column("key_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("claim_rank", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("run_at", TIME, nullable=False),
        sa.Column("job_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("position", sa.SmallInteger(), nullable=False),
        sa.Column("further", sa.SmallInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "state", "claim_rank", "run_at", "job_id"),
        **TABLE_OPTIONS,
    )
    op.create_index(op.f("ix_bgjobs_seat_job"), "bgjobs_seat", ["state", "job_id"])
    op.create_table(
        "bgjobs_notice",
        sa.Column("id", NUMBER, nullable=False),
        sa.Column("key_id", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=True),
        sa.Column("starts", LONG_TEXT, nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    op.create_index(op.f("ix_bgjobs_notice_key"), "bgjobs_notice", ["key_id", "id"])
    op.add_column("bgjobs_job", sa.Column("limits", sa.Text(), nullable=True))
    op.add_column("bgjobs_job", sa.Column("limit_key_id", sa.BigInteger(), nullable=True))
    replace_index_of_waiting_jobs(WAITS_FOR_OTHERS)


def downgrade():
    replace_index_of_waiting_jobs(WAITS_FOR_ANYTHING)
    op.drop_column("bgjobs_job", "limit_key_id")
    op.drop_column("bgjobs_job", "limits")
    for table in ("notice", "seat", "limit_key", "limit"):
        op.drop_table(f"bgjobs_{table}")


def replace_index_of_waiting_jobs(condition):
    """Create the index of waiting jobs with another condition, where it is partial."""
    if op.get_bind().dialect.name in ("mysql", "mariadb"):
        return
    op.drop_index(op.f("ix_bgjobs_job_waits"), table_name="bgjobs_job")
    op.create_index(
        op.f("ix_bgjobs_job_waits"),
        "bgjobs_job",
        ["waits_for", "queue", "waiting_on", "waiting_since", "id"],
        sqlite_where=sa.text(condition),
        postgresql_where=sa.text(condition),
    )
