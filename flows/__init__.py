"""In what order: Prefect flows with their progress and artifacts."""
