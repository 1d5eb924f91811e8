"""The page of a run: what it says, and that it works in a browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch

from hf_sketch import DimensionSearch, ModelSketch, Stage, load_sketches
from hf_sketch.attribution.record import FILE, load_attribution, record_attribution
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.report.page import write_report
from hf_sketch.report.training import examples_table
from hf_sketch.spectra.files import save_spectrum
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter
from hf_sketch.subspace.search import save_dimension_search
from tests.helpers.spectra import VALUES, made_of
from tests.helpers.trained.training import tiny_trainer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-quic"
FLAGS += " --disable-background-networking --disable-component-update --disable-sync"
TEXTS = [f"training text <{i}> & more" for i in range(22)]

browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output_dir of a run with everything in it."""
    directory = tmp_path_factory.mktemp("run")
    tiny_trainer(directory, GradientSketchCallback(64, layout="blocked")).train()
    store = load_sketches(directory)
    queries = store.where(step=1, micro_step=0)
    texts = [f"query {i}" for i in range(len(queries.dataset))]
    tokens = [[["▁Hel", 0.0], ["lo", 2.5], ["Ġworld", 5.0]]] * len(texts)
    record_attribution(
        store,
        queries,
        texts,
        top_k=4,
        bottom_k=3,
        method="tracin",
        train_texts=TEXTS,
        tokens=tokens,
    ).save(directory / FILE)
    save_spectrum(directory / "curvature", made_of(VALUES))
    path = (Stage(0, 16, 0.3, "start"), Stage(20, 16, 0.31, "double"))
    search = DimensionSearch(0.5, "eval_accuracy", 64, path=path)
    save_dimension_search(directory, search)
    return directory


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text()


def test_a_record_keeps_the_scores_of_the_store(run):
    store, record = load_sketches(run), load_attribution(run / FILE)
    queries = store.where(step=1, micro_step=0)
    sums = store.scores(queries, "tracin", groups="example_id")
    assert len(record.queries) == len(sums)
    for scores, query in zip(sums, record.queries, strict=True):
        assert [line["rank"] for line in query.lines] == [0, 1, 2, 3, -3, -2, -1]
        for line, row in zip(query.lines, query.contributions, strict=True):
            assert line["text"] == TEXTS[line["example_id"]]
            assert line["score"] == pytest.approx(float(scores[line["example_id"]]))
            assert sum(row) == pytest.approx(line["score"], rel=1e-4, abs=1e-9)
            assert sum(map(bool, row)) == line["rows"]


def test_the_page_shows_all_that_is_there(run, page):
    store, record = load_sketches(run), load_attribution(run / FILE)
    text = html.unescape(page)
    assert f"{store.model_sketch.coverage().elements:,} elements" in text
    assert str(store.measured_error) in text
    for line in record.queries[0].lines:
        name = line["example_id"]
        assert f"#{name}</a> · {line['score']:+.3g}" in text
        assert f'href="#example-{name}"' in page
        assert page.count(f'<tr id="example-{name}">') == 1
    assert "training text &lt;" in page  # texts are no markup
    assert " Hello" in re.sub(r"<[^>]+>", "", page)  # tokens read as text
    for name in ("recorded", "queries", "spectra", "dimension"):
        assert f'<section id="{name}">' in page
        assert f'href="#{name}"' in page
    assert f"{float(made_of(VALUES).eigenvalues[-1]):.4g}" in page
    assert "not found" in page


def test_the_table_holds_the_worst_examples_and_those_that_answer(run, page):
    store, record = load_sketches(run), load_attribution(run / FILE)
    met = zip(*(store.dataset[name][:] for name in ("example_id", "loss")), strict=True)
    last = dict(met)  # rows come in the order of training
    table = re.findall(
        r'<tr id="example-(\d+)">.*?data-value="[^"]*">.*?data-value="([^"]*)"', page
    )
    assert {int(name): float(loss) for name, loss in table} == pytest.approx(last)
    losses = [float(loss) for _, loss in table]
    assert losses == sorted(losses, reverse=True)
    answering = {line["example_id"] for line in record.queries[0].lines}
    assert answering <= {row["example_id"] for row in examples_table(store, {})}


def test_the_page_lets_only_its_own_script_run(page):
    policy = html.unescape(
        re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    )
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def test_control_and_bidi_characters_are_spelled_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / FILE
    path.write_text(path.read_text().replace("query 0", "query \\u202e\\u001b[2J"))
    page = write_report(tmp_path / "run").read_text()
    assert "query \\u202e\\x1b[2J" in page
    assert not re.search(r"[\x00-\x08\x0e-\x1f\u202a-\u202e\u2066-\u2069]", page)


def test_the_page_needs_no_network(page):
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]+)"', page)
    assert outside == []
    assert "@import" not in page


def test_sections_of_what_is_not_there_are_left_out(run, tmp_path):
    shutil.copytree(run / "curvature", tmp_path / "curvature")
    page = write_report(tmp_path, tmp_path / "page.html").read_text()
    assert '<section id="spectra">' in page
    assert not re.search(r'id="(recorded|queries|dimension|find)"', page)
    with pytest.raises(FileNotFoundError, match="holds no rows, no spectra and no sea"):
        write_report(tmp_path / "curvature")


def test_damage_is_reported_on_the_page(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shard = next((tmp_path / "run" / "sketches").glob("per_example-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-9])
    page = write_report(tmp_path / "run").read_text()
    assert re.search(r"Left out \d+ rows", page)
    assert shard.name in page


def test_a_record_of_another_version_is_refused(tmp_path):
    path = tmp_path / FILE
    path.write_text(json.dumps({"format_version": 9, "method": "dot", "queries": []}))
    with pytest.raises(ValueError, match="format_version 1, got 9: make it again"):
        load_attribution(path)


def in_browser(path, script, profile):
    """What a script that runs in the loaded page leaves in `found`, and all errors."""
    page = path.read_text()
    before = "<script>const errors=[];onerror=m=>errors.push(m);</script>"
    after = (
        "<script>addEventListener('load',()=>{const found={};" + script + "found.errors"
        "=errors;const p=document.createElement('pre');p.id='found';p.textContent="
        "JSON.stringify(found);document.body.append(p)});</script>"
    )
    page = re.sub(r"<meta http-equiv[^>]*>", "", page)  # lets no other script run
    page = page.replace("<head>", "<head>" + before)
    test_page = path.with_name("tested.html")
    test_page.write_text(page.replace("</body>", after + "</body>"))
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--dump-dom", test_page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    answer = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    return json.loads(html.unescape(answer[1]))


@browser
def test_the_page_works_in_a_browser(run, page, tmp_path):
    script = """
    found.links = [...document.querySelectorAll('nav a')].map(
      a => document.querySelector(a.getAttribute('href')) !== null);
    const all = [...document.querySelectorAll('.query')];
    found.open = all.map(d => d.open);
    const second = all[1].querySelector('summary');
    second.focus();
    found.focused = document.activeElement === second;
    second.click();
    found.opened = all[1].open;
    const field = document.getElementById('find');
    field.value = 'QUERY 2';
    field.dispatchEvent(new Event('input'));
    found.shown = all.map(d => !d.hidden);
    found.count = document.getElementById('found').textContent;
    found.focusable = [...document.querySelectorAll('a, summary, input')].every(
      e => e.tabIndex === 0);
    const light = getComputedStyle(document.body);
    found.ground = light.backgroundColor; found.text = light.color;
    found.wide = document.documentElement.scrollWidth - innerWidth;
    const body = document.querySelector('#examples tbody');
    const values = () => [...body.rows].map(r => Number(r.cells[1].dataset.value));
    document.querySelectorAll('#examples th button')[1].click();
    found.sorted = values();
    document.querySelectorAll('#examples th button')[1].click();
    found.reversed = values();
    found.plots = [...document.querySelectorAll('figure svg')].map(
      s => s.getBoundingClientRect().height > 100);
    """
    found = in_browser(run / "report.html", script, tmp_path / "profile")
    assert found["errors"] == []
    assert found["links"] == [True] * 5
    assert found["sorted"] == sorted(found["sorted"], reverse=True)
    assert found["reversed"] == found["sorted"][::-1]
    assert found["open"] == [True, False, False, False]
    assert found["focused"]
    assert found["opened"]
    assert found["focusable"]
    assert found["shown"] == [False, False, True, False]
    assert found["count"] == "1 of 4"
    assert found["ground"] != found["text"]
    assert found["wide"] <= 0
    assert found["plots"] == [True] * 6


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store of 10,000 rows and the answers to 100 queries."""
    directory = tmp_path_factory.mktemp("large")
    width, rows, steps = 64, 10_000, 500
    writer = SketchWriter(
        directory / "sketches", Header(ModelSketch((("w", (width, 2)),), width))
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        count = rows // steps
        number = torch.full((count,), step)
        real = torch.ones(count, dtype=torch.float64)
        shared = {"epoch": number // 250, "step": number, "learning_rate": real}
        examples = {"micro_step": number, "rank": number, "weight": real}
        examples["example_id"] = torch.arange(count) + count * (step % 250)
        whole = {"loss": real, "gradient_norm": real, "finite": real.bool()}
        sketch = torch.randn(count, width, generator=generator)
        writer.append(PER_EXAMPLE, {**shared, **examples, **whole, "sketch": sketch})
        one = {name: column[:1] for name, column in {**shared, **whole}.items()}
        one |= {"clip_factor": real[:1], "sketch": sketch.mean(0, keepdim=True)}
        one.pop("loss")
        writer.append(PER_STEP, one)
        writer.end_step()
    writer.flush()
    writer.close()
    return directory


@pytest.mark.full
def test_a_store_of_10000_rows_stays_fast(large, tmp_path):
    store = load_sketches(large)
    assert len(store.dataset) == 10_000
    queries = store.where(step=range(1, 6))
    texts = ["a query of some length " * 5] * 100
    start = time.perf_counter()
    record = record_attribution(store, queries, texts, train_texts=texts * 50)
    record.save(large / FILE)
    path = write_report(large)
    seconds = time.perf_counter() - start
    assert seconds < 30
    assert path.stat().st_size < 3 * 2**20
    found_steps = np.asarray(record.queries[0].steps)
    assert len(found_steps) == 40
    if CHROMIUM is not None:
        script = "found.milliseconds = performance.now();"
        found = in_browser(path, script, tmp_path / "profile")
        assert found["errors"] == []
        assert found["milliseconds"] < 5000
