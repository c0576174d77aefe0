"""The first tables of the library."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "file",
        sa.Column("path", sa.LargeBinary, primary_key=True),
        sa.Column("names", sa.JSON, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("mtime_ns", sa.Integer, nullable=False),
        sa.Column("place", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("family", sa.String, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.Column("sidecar", sa.JSON, nullable=False),
        sa.Column("trouble", sa.String, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("missing", sa.Boolean, nullable=False),
        sa.Column("added", sa.DateTime, nullable=False),
    )
    op.create_index("ix_file_sha256", "file", ["sha256"])
    op.create_table(
        "about",
        sa.Column("sha256", sa.String, primary_key=True),
        sa.Column("title", sa.String, nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("notes", sa.String, nullable=False),
        sa.Column("trigger_words", sa.JSON, nullable=False),
        sa.Column("negative", sa.String, nullable=False),
        sa.Column("weight", sa.Float, nullable=True),
        sa.Column("base", sa.String, nullable=False),
        sa.Column("use", sa.String, nullable=False),
        sa.Column("source", sa.String, nullable=False),
    )
