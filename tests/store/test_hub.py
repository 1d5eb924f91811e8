"""The Hub is a folder here: what is sent to it comes back."""

import re
import shutil
from types import SimpleNamespace

import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi

from hf_sketch import GradientRows, load_sketches
from hf_sketch.store import locations
from tests.helpers.stores import SKETCH, write_store


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """Repositories as folders, and the calls that were made."""
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(("create", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, **options):
        calls.append(("upload", repo_id, options))
        target = tmp_path / "hub" / options["repo_type"] / repo_id / path_in_repo
        shutil.copytree(folder_path, target)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def file_exists(self, repo_id, filename, *, repo_type):
        return (tmp_path / "hub" / repo_type / repo_id / filename).is_file()

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, **options):
        target = tmp_path / "hub" / options["repo_type"] / repo_id / path_in_repo
        target.write_bytes(path_or_fileobj)

    def download(repo_id, *, repo_type, **options):
        calls.append(("download", repo_id, options))
        return str(tmp_path / "hub" / repo_type / repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "file_exists", file_exists)
    monkeypatch.setattr(HfApi, "upload_file", upload_file)
    monkeypatch.setattr(locations, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_store_goes_to_the_hub_and_comes_back(tmp_path, repositories):
    sketches = load_sketches(write_store(tmp_path / "sketches"))
    url = sketches.push_to_hub("somebody/rows", private=True)
    assert url == "https://hub/somebody/rows"
    again = load_sketches("somebody/rows", revision="main")
    assert again.dataset[:] == sketches.dataset[:]
    assert again.model_sketch == sketches.model_sketch
    assert [call[:2] for call in repositories] == [
        ("create", "somebody/rows"),
        ("upload", "somebody/rows"),
        ("download", "somebody/rows"),
    ]
    assert repositories[0][2]["private"] is True
    assert repositories[1][2]["repo_type"] == "dataset"
    assert repositories[2][2]["revision"] == "main"


def test_a_repository_gets_a_card_unless_it_has_one(tmp_path, repositories):
    sketches = load_sketches(write_store(tmp_path / "sketches"))
    folder = tmp_path / "hub" / "dataset" / "somebody" / "rows"
    sketches.push_to_hub("somebody/rows")
    card = DatasetCard.load(folder / "README.md")
    assert card.data.library_name == "hf_sketch"
    assert "training-data-attribution" in card.data.tags
    assert f"{len(sketches)} are of single examples" in card.text
    assert f"{SKETCH.out_size} numbers" in card.text
    assert "Measured error: not measured" in card.text
    (block,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert 'load_sketches("somebody/rows")' in block
    (folder / "README.md").write_text("# Mine")
    shutil.rmtree(folder / "sketches")
    sketches.push_to_hub("somebody/rows")
    assert (folder / "README.md").read_text() == "# Mine"


def test_what_a_trainer_pushed_is_opened(tmp_path, repositories):
    write_store(tmp_path / "hub" / "model" / "somebody" / "bert" / "sketches")
    store = load_sketches("somebody/bert", repo_type="model")
    assert len(store.dataset) == 6


def test_a_local_directory_comes_first(tmp_path, repositories):
    write_store(tmp_path / "some" / "run" / "sketches")
    assert len(load_sketches("some/run").dataset) == 6
    assert repositories == []


def test_sketches_in_memory_are_not_pushed():
    with pytest.raises(ValueError, match=r"in memory only\. Push those of load"):
        GradientRows(SKETCH, Dataset.from_dict({})).push_to_hub("somebody/rows")
