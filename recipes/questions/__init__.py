"""Commands that ask about a whole run."""
