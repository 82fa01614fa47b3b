"""The command line `hf-xent`, one file for each subject. Heavy imports are inside the commands, for a fast `--help`."""

from ..recipes import RECIPES
from .app import app, main
from .attack import attack
from .bench import bench, report
from .check import check, losses
from .classify import CONFIGURATION as CLASSES
from .classify import classify
from .data import data
from .detect import detect
from .distill import app as distill
from .extended import extended
from .generate import generate
from .grouped import Whole
from .ln_free import app as ln_free
from .plan import plan
from .publish import publish
from .recipes import register
from .scaling import app as scaling
from .search import search
from .show import show
from .train import train

__all__ = ["app", "main"]

for recipe in RECIPES:
    if recipe != "ln-free":
        register(recipe)
app.command(cls=extended(CLASSES))(classify)
for command in (train, search, plan, check, losses, generate, detect, attack, show, publish, bench, report):
    app.command()(command)
register("ln-free", ln_free, "train")
app.add_typer(ln_free, name="ln-free", cls=Whole)
app.add_typer(distill, name="distill", cls=Whole)
app.add_typer(data, cls=Whole)
app.add_typer(scaling, name="scaling", cls=Whole)
