"""Numbers in units that suit them."""


def as_bytes(count: float) -> str:
    """A size in the unit that suits it, powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} PB"


def as_seconds(count: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("ms", 1e-3), ("s", 1.0), ("minutes", 60.0), ("hours", 3600.0)):
        limit = {"ms": 1.0, "s": 120.0, "minutes": 7200.0, "hours": 172800.0}[unit]
        if count < limit:
            return f"{count / size:.3g} {unit}"
    return f"{count / 86400:,.3g} days"
