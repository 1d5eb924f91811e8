import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    return subprocess.run(
        [str(word) for word in command],
        check=True,
        capture_output=True,
        text=True,
        **options,
    ).stdout


def test_every_folder_of_code_is_listed_as_a_package():
    """An editable install finds the others as well; a wheel leaves them out."""
    (listed,) = re.findall(
        r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    folders = [
        path.parent.relative_to(ROOT)
        for top in ("hf_sketch", "callbacks", "recipes")
        for path in (ROOT / top).rglob("*.py")
    ]
    names = {".".join(folder.parts) for folder in folders}
    names = {n if n.startswith("hf_sketch") else f"hf_sketch.{n}" for n in names}
    assert set(re.findall(r'"(.*)"', listed)) == names


def test_every_file_beside_the_code_is_listed_as_data_of_its_package():
    """A wheel leaves out what no pattern of the package data matches."""
    (block,) = re.findall(
        r"^\[tool\.setuptools\.package-data\]\n(.*?)\n\n",
        (ROOT / "pyproject.toml").read_text(),
        re.M | re.S,
    )
    listed = set()
    for name, patterns in re.findall(r'^"(.*?)" = \[(.*)\]$', block, re.M):
        folder = ROOT.joinpath(*name.removeprefix("hf_sketch.").split("."))
        folder = folder if folder.is_dir() else ROOT.joinpath(*name.split("."))
        for pattern in re.findall(r'"(.*?)"', patterns):
            listed |= set(folder.glob(pattern))
    tops = ("hf_sketch", "callbacks", "recipes")
    names = run("git", "ls-files", "-co", "--exclude-standard", *tops, cwd=ROOT)
    data = [ROOT / name for name in names.splitlines() if not name.endswith(".py")]
    assert {path for path in data if path.exists()} <= listed
    assert ROOT / "recipes" / "data" / "scenes.json" in listed


def test_all_bundled_data_is_our_own():
    """The notice says so of each file by name: whoever adds one must look there."""
    folder = ROOT / "recipes" / "data"
    notice = (folder / "NOTICE").read_text()
    names = {path.name for path in folder.iterdir()} - {"NOTICE"}
    assert names == set(re.findall(r"\w+\.(?:jsonl|json|csv)\b", notice))
    assert "All files of this folder were written for this project" in notice


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    # A copy, because a build leaves folders behind in its source tree.
    source = directory / "source"
    names = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", directory, source)
    return next(directory.glob("*.whl"))


@pytest.mark.full
def test_the_wheel_holds_code_data_and_licences_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "hf_sketch/callbacks/gradient.py",
        "hf_sketch/recipes/demo.py",
        "hf_sketch/recipes/data/NOTICE",
        "hf_sketch/recipes/data/scenes.json",
        "hf_sketch/recipes/metrics/accuracy/accuracy.py",
        "hf_sketch/recipes/metrics/rouge/rouge.py",
        "hf_sketch/sketches/affd.py",
    } <= names
    assert {name.split("/")[0] for name in names} == {
        "hf_sketch",
        "hf_sketch-0.1.0.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.full
def test_the_installed_wheel_imports_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # The dependencies are those of this environment, without its editable install:
    # a path in a .pth file is searched, but the .pth files there are not run.
    packages = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    dependencies = sysconfig.get_path("purelib")
    (packages / "dependencies.pth").write_text(dependencies + "\n")
    script = (
        "import hf_sketch, hf_sketch.callbacks, hf_sketch.recipes.demo\n"
        "from hf_sketch.recipes.texts.entailment import load_pairs\n"
        "from hf_sketch.recipes.dimension.metric_scripts import load_metric\n"
        "assert load_metric('rouge').name == 'rouge'\n"
        "print(len(load_pairs('train')), hf_sketch.callbacks.__file__)\n"
    )
    rows, file = run(python, "-c", script, cwd=tmp_path).split()
    assert rows == "2000"
    assert Path(file).is_relative_to(packages)
    command = tmp_path / "env" / "bin" / "hf-sketch"
    assert "--output_dir" in run(command, "demo", "--help", cwd=tmp_path)
