"""The options of each command, in modules that import nothing heavy."""
