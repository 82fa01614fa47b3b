"""Floor 4: the folder of a run as one static page of HTML, with its curves, tables, samples, card and ROC curves.

write([read("out/train")], Path("out/train/index.html"))
"""

from .contents import Chart, Curve, Folder, Picture, Table
from .folder import read
from .page import render, write

__all__ = ["Chart", "Curve", "Folder", "Picture", "Table", "read", "render", "write"]
