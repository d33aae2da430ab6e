"""Every test runs with shapes and types checked, of the first calls of each function and of some of the others."""

from jaxtyping import install_import_hook

import strict  # its decorator takes the place of jaxtyping's

install_import_hook("equilibria", "strict.jaxtyped")

import os  # noqa: E402
from pathlib import Path  # noqa: E402

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers and one thread, whatever ran before, and shapes that are checked from the first call."""
    strict.TESTS[0] += 1
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _not_yet_advised():
    """Each test hears the advice of a warning, whichever test has heard it before."""
    from equilibria.core import failure

    failure.ADVISED.clear()


@pytest.fixture
def unhooked():
    """Users run without the shape checks of the tests, and then the library's own sentence is all they get."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def one_figure(monkeypatch):
    """A training ends with a report, and drawing takes longer than some trainings: here only its first figure."""
    from equilibria.lm.report import figures

    monkeypatch.setattr(figures, "FIGURES", figures.FIGURES[:1])


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with the public corpora."""
    folder = os.environ.get("EQUILIBRIA_DATA")
    if not folder:
        pytest.skip("EQUILIBRIA_DATA is unset: give the folder that holds ptb/, wikitext-2/ and tinyshakespeare/")
    return Path(folder)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
