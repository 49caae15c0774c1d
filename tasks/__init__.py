"""What we do: thin Prefect tasks over pure functions."""
