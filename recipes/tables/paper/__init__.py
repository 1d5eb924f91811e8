"""The paper's tables and figures, reproduced."""
