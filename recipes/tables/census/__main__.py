"""Run the census: `python -m hf_sketch.recipes.tables.census`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch.recipes.tables.census.judge import Verdict
from hf_sketch.recipes.tables.census.page import page
from hf_sketch.recipes.tables.census.pool import judged
from hf_sketch.recipes.tables.census.tasks import TASKS, Case, cases


@dataclass
class CensusArguments:
    """Every class of Transformers' auto mappings, trained while tiny."""

    output_dir: str = field(
        default="out/census",
        metadata={"help": "Folder of census.jsonl; a run resumes from what is there."},
    )
    page: str = field(
        default="", metadata={"help": "File for the page; output_dir/models.md if ''."}
    )
    task: list[str] = field(
        default_factory=list[str],
        metadata={"help": f"Tasks to run, of {', '.join(TASKS)}; all by default."},
    )
    only: list[str] = field(
        default_factory=list[str],
        metadata={"help": "Classes or model types to judge again and print."},
    )
    workers: int = field(default=1, metadata={"help": "Processes at a time."})
    limit: float = field(default=120, metadata={"help": "Seconds per class."})


def run_census(arguments: CensusArguments) -> list[Verdict]:
    """Judge the classes that lack a verdict, write the page, return all verdicts."""
    path = Path(arguments.output_dir) / "census.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = saved_verdicts(path)
    chosen = [case for case in cases() if _is_chosen(case, arguments)]
    if not arguments.only:
        chosen = [case for case in chosen if case.name not in known]
    with path.open("a") as file:
        found = judged(chosen, arguments.workers, arguments.limit)
        for verdict in tqdm(found, total=len(chosen), desc="Classes"):
            print(json.dumps(asdict(verdict)), file=file, flush=True)
            known[verdict.name] = verdict
            if arguments.only:
                print(json.dumps(asdict(verdict), indent=1))
    written = Path(arguments.page or path.with_name("models.md"))
    written.write_text(page(known.values()))
    print("saved", written)
    return list(known.values())


def saved_verdicts(path: Path) -> dict[str, Verdict]:
    """Return the newest verdict of each class, by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    verdicts = [Verdict(**json.loads(line)) for line in lines]
    return {verdict.name: verdict for verdict in verdicts}


def _is_chosen(case: Case, arguments: CensusArguments) -> bool:
    """Return whether the arguments ask for a case."""
    if arguments.task and case.task not in arguments.task:
        return False
    return not arguments.only or bool({case.name, case.kind} & set(arguments.only))


if __name__ == "__main__":
    run_census(*HfArgumentParser(CensusArguments).parse_args_into_dataclasses())
