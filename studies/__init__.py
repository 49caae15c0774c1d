"""Studies of the methods, run by hand; seeds, cohorts and budgets are fixed before the first run."""
