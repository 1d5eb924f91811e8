"""Stores whose files claim what they do not hold, with checksums that fit.

Run as a program, it opens, reads, repairs and resumes them in a process of each one's
own, and prints those that did anything but open or refuse:

    python -m tests.helpers.hostile_stores FIRST COUNT
"""

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from huggingface_hub import constants

from hf_sketch import load_sketches
from hf_sketch.store.blocks import row_blocks
from hf_sketch.store.compaction import compact
from hf_sketch.store.contents import describe
from hf_sketch.store.maintenance import find_problems, merge, repair, upgrade
from tests.helpers.hostile_changes import make_hostile
from tests.helpers.stores import GOLDEN, write_store

FLOOR_BYTES = 256 * 2**20
MOST_SECONDS = 2.0
KILLED_AFTER_SECONDS = 60


def use(store, action):
    """Do to a store what people do."""
    if action == "open":
        rows = load_sketches(store, verify=False)
        for dataset in (rows.dataset, rows.steps):
            for block in row_blocks(dataset):
                block.sketches.sum()
            dataset[:]
        describe(store)
    elif action == "url":
        len(load_sketches(f"file://{store}"))
    elif action == "verify":
        find_problems(store)
    elif action == "merge":
        merge([store], store.parent / "merged")
    elif action == "resume":
        write_store(store, (9,))
    else:
        {"repair": repair, "compact": compact, "upgrade": upgrade}[action](store)


ACTIONS = ("open", "open", "open", "url", "verify", "merge", "repair", "compact")


def attempt(store, action):
    """Return what went wrong when a store was used; nothing if it was refused."""
    try:
        use(store, action)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        named = str(store.parent) in text or constants.HF_HOME in text
        if "\n" in text or "\x1b" in text or not named:
            return f"unclear: {traceback.format_exc()[-1500:]}"
    except BaseException:
        return traceback.format_exc()[-1500:]
    return ""


def run(number, folder, originals):
    """Make a hostile store and use it in a process of its own; return what is wrong."""
    rng = random.Random(number)
    outside = folder / str(number)
    store = outside / "inside" / "sketches"
    shutil.copytree(rng.choice(originals), store)
    victims = [outside / "x", outside / "inside" / "x", store.parent / "x-0-1.arrow"]
    for victim in victims:
        victim.write_text("precious")
    make_hostile(store, rng)
    size = sum(path.stat().st_size for path in store.iterdir())
    action = rng.choice((*ACTIONS, "resume", "resume", "upgrade"))
    before = sorted(path.name for path in outside.iterdir())
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(KILLED_AFTER_SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        with os.fdopen(writes, "w") as said:
            said.write(attempt(store, action)[-3000:])
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as heard:
        wrong = heard.read()
    _, status, used = os.wait4(child, 0)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if status:
        wrong += f" ended by signal {status & 127}"
    if (seconds := used.ru_utime + used.ru_stime) > MOST_SECONDS:
        wrong += f" took {seconds:.1f} s"
    if 1024 * (used.ru_maxrss - base) > 4 * size + FLOOR_BYTES:
        wrong += f" took {(used.ru_maxrss - base) // 1024} MiB"
    same = all(victim.read_text() == "precious" for victim in victims)
    if not same or before != sorted(path.name for path in outside.iterdir()):
        wrong += " touched a file outside"
    shutil.rmtree(outside)
    return f"{number} {action}: {wrong}" if wrong else ""


def main(first, count):
    """Print what is wrong with some cases."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        constants.HF_HOME = str(folder / "home")  # of stores at a URL
        originals = [write_store(folder / "original"), GOLDEN[1], GOLDEN[2]]
        for number in range(first, first + count):
            if wrong := run(number, folder, originals):
                sys.stdout.write(wrong + "\n")
                sys.stdout.flush()  # else processes that are forked have it too
    sys.stdout.write(f"{count} cases\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
