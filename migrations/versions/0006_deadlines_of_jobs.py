"""The rules for failures, the deadline and the retention of a job.

Revision ID: 0006
Revises: 0005
Create Date: 2026-11-29 09:48:00.000000

"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

# revision identifiers, used by Alembic.
revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIME = (
    sa.DateTime()
    .with_variant(mysql.DATETIME(fsp=6), "mariadb")
    .with_variant(mysql.DATETIME(fsp=6), "mysql")
)


def upgrade():
    op.add_column("bgjobs_job", sa.Column("failure_rules", sa.Text(), nullable=True))
    op.add_column("bgjobs_job", sa.Column("deadline_at", TIME, nullable=True))
    op.add_column("bgjobs_job", sa.Column("retention_seconds", sa.Double(), nullable=True))
    op.create_index(
        op.f("ix_bgjobs_job_deadline"),
        "bgjobs_job",
        ["deadline_at", "id"],
        unique=False,
        sqlite_where=sa.text("deadline_at IS NOT NULL"),
        postgresql_where=sa.text("deadline_at IS NOT NULL"),
    )


def downgrade():
    op.drop_index(op.f("ix_bgjobs_job_deadline"), table_name="bgjobs_job")
    op.drop_column("bgjobs_job", "retention_seconds")
    op.drop_column("bgjobs_job", "deadline_at")
    op.drop_column("bgjobs_job", "failure_rules")
