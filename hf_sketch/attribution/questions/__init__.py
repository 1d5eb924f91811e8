"""Questions about a whole run, answered by its rows without a query."""
