"""A picture of a score that is divided among tokens; needs the extra `plot`."""

from collections.abc import Sequence

from hf_sketch.attribution.questions.tokens import TokenScores
from hf_sketch.report.plots import Figure


def plot_token_scores(
    found: TokenScores, example: Sequence[str], query: Sequence[str]
) -> Figure:
    """A score's parts by token of the example (lines) and of the query (columns).

    Args:
        found: result of `GradientRows.token_scores`.
        example: the text of each of the example's tokens, also of those without a loss.
        query: the same of the query.
    """
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    largest = float(found.scores.abs().max()) or 1.0
    image = axes.imshow(found.scores.numpy(), cmap="RdBu", aspect="auto")
    image.set_clim(-largest, largest)
    lines = [example[place] for place in found.example_places]
    columns = [query[place] for place in found.query_places]
    axes.set_yticks(range(len(lines)), lines, fontsize=7)
    axes.set_xticks(range(len(columns)), columns, rotation=60, fontsize=7)
    axes.set(xlabel="tokens of the query", ylabel="tokens of the example")
    figure.colorbar(image, label="part of the score; blue for proponents")
    return figure
