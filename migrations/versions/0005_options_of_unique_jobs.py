"""The options of unique jobs.

Revision ID: 0005
Revises: 0004
Create Date: 2026-11-29 09:25:00.000000

"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

# revision identifiers, used by Alembic.
revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIME = (
    sa.DateTime()
    .with_variant(mysql.DATETIME(fsp=6), "mariadb")
    .with_variant(mysql.DATETIME(fsp=6), "mysql")
)


def upgrade():
    op.add_column("bgjobs_job", sa.Column("unique_until_start", sa.Boolean(), nullable=True))
    op.add_column("bgjobs_job", sa.Column("unique_expires_at", TIME, nullable=True))
    op.add_column("bgjobs_job", sa.Column("debounce_until", TIME, nullable=True))


def downgrade():
    op.drop_column("bgjobs_job", "debounce_until")
    op.drop_column("bgjobs_job", "unique_expires_at")
    op.drop_column("bgjobs_job", "unique_until_start")
