"""What is imported when and under which names, and how the command answers."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hf_sketch
from hf_sketch.cli import _COMMANDS, console, main

HEAVY = ("datasets", "pandas", "peft", "torch._dynamo")
LIST_LOADED = (
    "; import sys"
    f"; loaded = [name for name in {HEAVY} if name in sys.modules]"
    "; sys.exit(f'loaded {loaded}' if loaded else 0)"
)


def assert_loads_nothing_heavy(code):
    """Run it in a new interpreter."""
    command = [sys.executable, "-c", code + LIST_LOADED]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_loads_nothing_heavy():
    assert_loads_nothing_heavy("import hf_sketch")


def test_the_help_of_each_command_loads_nothing_heavy():
    words = [["--help"], ["--version"], *([name, "--help"] for name in _COMMANDS)]
    code = (
        "from contextlib import suppress; from hf_sketch.cli import main\n"
        f"for words in {words}:\n    with suppress(SystemExit): main(words)\n0"
    )
    printed = assert_loads_nothing_heavy(code)
    assert printed.count("usage: hf-sketch") == 1 + len(_COMMANDS)
    assert f"hf-sketch {hf_sketch.__version__}" in printed


def test_the_config_alone_makes_the_method_known_to_peft():
    code = (
        "from hf_sketch import SubspaceConfig; from peft import mapping; "
        "assert 'SUBSPACE' in mapping.PEFT_TYPE_TO_TUNER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves_to_what_type_checkers_see():
    tree = ast.parse(Path(hf_sketch.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    names = {alias.name: node.module for node in checked.body for alias in node.names}
    assert list(hf_sketch._MODULES) == hf_sketch.__all__
    assert set(names) == set(hf_sketch.__all__)
    for name in hf_sketch.__all__:
        assert getattr(hf_sketch, name) is getattr(import_module(names[name]), name)
    assert set(hf_sketch.__all__) <= set(dir(hf_sketch))


@pytest.mark.parametrize(("old", "new"), hf_sketch._RENAMED.items())
def test_an_old_name_warns_and_gives_what_it_is_called_now(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} was renamed: use .*{new}"):
        found = getattr(hf_sketch, old)
    assert found is getattr(hf_sketch, new)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="'hf_sketch' has no attribute 'Rows'"):
        _ = hf_sketch.Rows


def test_an_expected_error_is_one_line_and_exit_status_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["hf-sketch", "info", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        console()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-sketch: No sketches at ")
    assert error.count("\n") == 1


def test_an_interrupted_command_says_so_in_a_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_sketch.cli.main", interrupted)
    with pytest.raises(SystemExit) as ended:
        console()
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == (
        "hf-sketch: interrupted; what was written is kept."
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "hf-sketch: the following arguments are required: command"),
        (["info"], "hf-sketch info: the following arguments are required: DIR"),
        (["hessian", "--task", "x"], "hf-sketch hessian: argument --task: .* 'x'"),
        (["info", "a", "--wrong"], "hf-sketch: unrecognized arguments: --wrong"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_status_2(words, error, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    printed = capsys.readouterr().err
    assert re.match(rf"{error}.*\. Run `hf-sketch.* --help` for", printed)
    assert printed.count("\n") == 1


def test_an_old_command_runs_under_its_new_name(capsys):
    with pytest.raises(SystemExit):
        main(["attribution", "--help"])
    printed = capsys.readouterr()
    assert "hf-sketch attribution is now hf-sketch wikitext." in printed.err
    assert "usage: hf-sketch wikitext" in printed.out
