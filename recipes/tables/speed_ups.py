"""Table 8's costs as published, and Table 4's speed-ups, which follow from them."""

from collections.abc import Iterable, Mapping
from statistics import mean

# (algorithm, mode, mix); mix is what stands for H in the paper's equations.
Row = tuple[str, str, str]

# Schioppa 2024, Table 8: milliseconds and peak GB on one V100, then on one TPUv2 of 8
# cores; None where the compiler failed.
PUBLISHED: dict[Row, tuple[float, float, float | None, float | None]] = {
    ("fjl", "explicit", "hadamard"): (123, 6.9, 8997, 3.0),
    ("fjl", "explicit", "fft"): (85, 6.1, 9271, 4.4),
    ("fjl", "implicit", "hadamard"): (244, 6.7, 10958, 3.3),
    ("fjl", "implicit", "fft"): (164, 6.1, None, None),
    ("affd", "explicit", "hadamard"): (205, 3.2, 134, 2.8),
    ("affd", "explicit", "kronecker"): (142, 3.2, 134, 2.8),
    ("affd", "explicit", "fft"): (104, 4.2, 134, 2.8),
    ("affd", "implicit", "hadamard"): (454, 3.2, 278, 3.0),
    ("affd", "implicit", "kronecker"): (237, 3.2, 278, 3.0),
    ("affd", "implicit", "fft"): (126, 4.2, 278, 3.0),
    ("ffd", "explicit", "hadamard"): (197, 4.1, 8694, 4.3),
    ("ffd", "explicit", "fft"): (140, 5.6, None, None),
    ("ffd", "implicit", "hadamard"): (352, 4.2, 9600, 4.7),
    ("ffd", "implicit", "fft"): (239, 4.8, None, None),
    ("afjl", "explicit", "hadamard"): (116, 2.9, 89, 2.7),
    ("afjl", "explicit", "kronecker"): (81, 2.9, 89, 2.7),
    ("afjl", "explicit", "fft"): (71, 3.8, 89, 2.7),
    ("afjl", "implicit", "hadamard"): (231, 3.0, 149, 2.8),
    ("afjl", "implicit", "kronecker"): (121, 3.1, 149, 2.8),
    ("afjl", "implicit", "fft"): (88, 4.1, 149, 2.8),
    ("qk", "explicit", "kronecker"): (82, 1.7, 64, 1.1),
    ("qk", "implicit", "kronecker"): (116, 1.7, 157, 1.4),
}

# Table 4: (change, algorithm) -> speed-up on the V100 and on the TPUv2.
PUBLISHED_SPEED_UPS: dict[tuple[str, str], tuple[float, float]] = {
    ("implicit to explicit", "fjl"): (1.96, 1.20),
    ("implicit to explicit", "affd"): (1.81, 2.07),
    ("implicit to explicit", "ffd"): (1.76, 1.10),
    ("implicit to explicit", "afjl"): (1.64, 1.67),
    ("implicit to explicit", "qk"): (1.41, 2.45),
    ("hadamard to fft", "affd"): (1.98, 1.00),
    ("hadamard to fft", "afjl"): (1.64, 1.00),
    ("hadamard to kronecker", "affd"): (1.45, 1.00),
    ("hadamard to kronecker", "afjl"): (1.44, 1.00),
}


def is_in_table_3(row: Row) -> bool:
    """Whether a row of Table 8 is one of Table 3: explicit, each algorithm's plain mix.

    QK has no Hadamard transform; its one mix is its plain one.
    """
    algorithm, mode, mix = row
    return mode == "explicit" and (mix == "hadamard" or algorithm == "qk")


def speed_ups(times: Mapping[Row, float]) -> dict[tuple[str, str], float]:
    """Table 4 from the wall times of Table 8's rows, those that there are.

    From implicit to explicit it is the ratio of the means over an algorithm's mixes;
    from one mix to another the ratio of the explicit times.
    """
    ratios: dict[tuple[str, str], float] = {}
    algorithms = list(dict.fromkeys(algorithm for algorithm, _, _ in times))
    for algorithm in algorithms:
        implicit = _of(times, algorithm, "implicit")
        explicit = _of(times, algorithm, "explicit")
        if implicit and explicit:
            ratio = mean(implicit.values()) / mean(explicit.values())
            ratios["implicit to explicit", algorithm] = ratio
    for mix in ("fft", "kronecker"):
        for algorithm in algorithms:
            explicit = _of(times, algorithm, "explicit")
            if {"hadamard", mix} <= explicit.keys():
                ratio = explicit["hadamard"] / explicit[mix]
                ratios[f"hadamard to {mix}", algorithm] = ratio
    return ratios


def published_times(column: int) -> dict[Row, float]:
    """Table 8's milliseconds: 0 for the V100, 2 for the TPUv2."""
    figures: Iterable[tuple[Row, float | None]] = (
        (row, costs[column]) for row, costs in PUBLISHED.items()
    )
    return {row: time for row, time in figures if time is not None}


def _of(times: Mapping[Row, float], algorithm: str, mode: str) -> dict[str, float]:
    """One algorithm's times in one mode, by mix."""
    return {
        mix: time for (a, m, mix), time in times.items() if (a, m) == (algorithm, mode)
    }
