"""The tables of schedules and their ticks.

Revision ID: 0004
Revises: 0003
Create Date: 2026-11-29 08:52:53.911409

"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

# revision identifiers, used by Alembic.
revision = "0004"
down_revision = "0003"
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
TABLE_OPTIONS = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}


def upgrade():
    op.create_table(
        "bgjobs_schedule",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("definition", LONG_TEXT, nullable=False),
        sa.Column("defined_at", TIME, nullable=False),
        sa.Column("registered_at", TIME, nullable=True),
        sa.Column("override", LONG_TEXT, nullable=True),
        sa.Column("overridden_at", TIME, nullable=True),
        sa.Column("overridden_by", sa.String(length=255), nullable=True),
        sa.Column("overridden_code", LONG_TEXT, nullable=True),
        sa.Column("paused_at", TIME, nullable=True),
        sa.Column("paused_by", sa.String(length=255), nullable=True),
        sa.Column("retired_at", TIME, nullable=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("next_tick_at", TIME, nullable=False),
        sa.Column("due_at", TIME, nullable=True),
        sa.Column("held_at", TIME, nullable=True),
        sa.Column("last_tick_at", TIME, nullable=True),
        sa.Column("last_job_id", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bgjobs_schedule")),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    op.create_index(op.f("uq_bgjobs_schedule_name"), "bgjobs_schedule", ["name"], unique=True)
    op.create_index(op.f("ix_bgjobs_schedule_due"), "bgjobs_schedule", ["due_at", "id"])
    op.create_table(
        "bgjobs_schedule_tick",
        sa.Column("schedule_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tick_at", TIME, nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(length=255), nullable=True),
        sa.Column("job_id", sa.BigInteger(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("schedule_id", "tick_at", name=op.f("pk_bgjobs_schedule_tick")),
        **TABLE_OPTIONS,
    )
    op.add_column("bgjobs_worker", sa.Column("schedules", LONG_TEXT, nullable=True))


def downgrade():
    op.drop_column("bgjobs_worker", "schedules")
    op.drop_table("bgjobs_schedule_tick")
    op.drop_table("bgjobs_schedule")
