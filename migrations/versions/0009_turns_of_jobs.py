"""Fairness: the keys by which jobs take turns, and room for turns between two priorities.

Revision ID: 0009
Revises: 0008
Create Date: 2026-11-29 18:00:00.000000

"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

# revision identifiers, used by Alembic.
revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TIME = (
    sa.DateTime()
    .with_variant(mysql.DATETIME(fsp=6), "mariadb")
    .with_variant(mysql.DATETIME(fsp=6), "mysql")
)
TABLE_OPTIONS = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}
RANKS_PER_PRIORITY = 2**32


def upgrade():
    op.create_table(
        "bgjobs_fair_queue",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("queue", sa.String(length=64), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("turn", sa.Double(), nullable=False),
        sa.Column("last", sa.Double(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        **TABLE_OPTIONS,
    )
    op.create_table(
        "bgjobs_fair_key",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("fair_queue_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("following", sa.Double(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("used_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        **TABLE_OPTIONS,
    )
    op.create_index(
        op.f("ix_bgjobs_fair_key_queue"), "bgjobs_fair_key", ["fair_queue_id", "following", "id"]
    )
    op.create_table(
        "bgjobs_weight",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("overridden_at", TIME, nullable=False),
        sa.Column("overridden_by", sa.String(length=255), nullable=True),
        sa.Column("overridden_code", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        **TABLE_OPTIONS,
    )
    op.add_column("bgjobs_job", sa.Column("fair_key", sa.String(length=255), nullable=True))
    op.execute(
        f"UPDATE bgjobs_job SET claim_rank = -priority * {RANKS_PER_PRIORITY} "
        f"WHERE status IN ('scheduled', 'waiting', 'pending', 'running', 'retrying')"
    )
    op.execute(f"UPDATE bgjobs_seat SET claim_rank = claim_rank * {RANKS_PER_PRIORITY}")


def downgrade():
    # Seats keep the order of priorities: a worker gives a job another seat if it finds none.
    op.execute("DELETE FROM bgjobs_seat")
    op.execute("UPDATE bgjobs_job SET claim_rank = -priority")
    op.drop_column("bgjobs_job", "fair_key")
    for table in ("weight", "fair_key", "fair_queue"):
        op.drop_table(f"bgjobs_{table}")
