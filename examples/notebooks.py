"""Run the notebooks anew and keep what they show.

    pip install -e '.[notebooks,dev]'
    python examples/notebooks.py                         # all of them
    python examples/notebooks.py tour                    # one

Each runs in a kernel of its own in an empty folder. Kept are cells, outputs and the numbers of their execution; times,
versions and names of this machine's kernel are not. Figures have 128 colours, which is a third of their bytes.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS = 900
"""A cell may take so long."""


def executed(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The same notebook after all of its cells have run, in order, in a new kernel that starts in this folder.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    ran = nbformat.from_dict(notebook)
    NotebookClient(
        ran,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,  # a kernel may send a line in two parts
    ).execute()
    return ran


def kept(notebook: NotebookNode) -> NotebookNode:
    """What is stored of a notebook that has run."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).get("image/png")
            if figure:
                output.data["image/png"] = smaller(figure)
    return notebook


def smaller(figure: str) -> str:
    """A PNG in base64, with 128 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: Sequence[str]) -> None:
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        with TemporaryDirectory() as folder:
            nbformat.write(kept(executed(nbformat.read(path, 4), Path(folder))), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
