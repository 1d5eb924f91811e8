import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Files that are read leave nothing in the home directory."""
    directory = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", directory)
