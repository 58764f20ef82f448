"""A tutorial that is downloaded from the site runs, and prints what the page shows.

All are executed when the site is built; the shortest one is executed again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from tests.docs.test_site import SITE

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

NOTEBOOK = SITE / "tutorials" / "linear_regression.ipynb"
NUMBER = r"-?\d+\.?\d*(?:e[-+]?\d+)?"
# In another process: the driver of the browser and Jupyter's client each need an event loop.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=240).execute()
nbformat.write(notebook, sys.argv[2])
"""


def printed(path: Path) -> tuple[list[list[str]], list[float]]:
    """Returns the words that each cell prints, and all the numbers."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    texts = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    numbers = [float(number) for text in texts for number in re.findall(NUMBER, text)]
    return [re.sub(NUMBER, "", text).split() for text in texts], numbers


def test_a_downloaded_notebook_prints_what_its_page_shows(tmp_path: Path) -> None:
    # One device, as on the page, and none of the tests' compiled programs.
    hidden = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    executed = tmp_path / "executed.ipynb"
    command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(executed)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    texts, numbers = printed(executed)
    expected_texts, expected_numbers = printed(NOTEBOOK)
    assert texts == expected_texts
    # Each process may compile sums in another order. The pages themselves compare with PyTorch.
    np.testing.assert_allclose(numbers, expected_numbers, rtol=0.05, atol=0.05)
