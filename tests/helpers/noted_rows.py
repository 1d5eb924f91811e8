"""Stands in for the store's writer, where a test looks at rows on their way to it."""


class NotedRows:
    """Keeps the rows that it is given."""

    measured_error = None

    def __init__(self):
        self.rows = []

    def append(self, kind, columns):
        self.rows.append((kind, columns))

    def end_step(self):
        """A writer would start to write."""

    def flush(self):
        """A writer would write."""

    def close(self):
        """A writer would end its threads."""
