"""Policy and reference: loaded, adapted, and what the reference says of the rows."""
