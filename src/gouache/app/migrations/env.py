"""Run by alembic: upgrades the database of the connection that it receives."""

from alembic import context

from gouache.app.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
