import pytest

from tests.helpers.trained.guarded_training import (
    BAD_STEP,
    guard_of,
    guarded_trainer,
    recorder,
    run,
)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The bad batch, without any callback."""
    return run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def warned(tmp_path_factory):
    directory = tmp_path_factory.mktemp("warned")
    trainer = guarded_trainer(directory, recorder(), guard_of())
    with pytest.warns(UserWarning, match=f"Step {BAD_STEP} stands out: .*loss") as seen:
        trainer.train()
    return trainer, directory, [str(warning.message) for warning in seen]
