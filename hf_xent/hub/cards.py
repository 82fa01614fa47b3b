"""Cards: a front matter and a template of `templates/`, rendered; and a check that needs no connection.

Templates are Jinja; a value that a template names and the call lacks is an error, not a gap in the card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, ModelCard

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, head: Any, **values: Any) -> str:
    """Renders a card from a template.

    Args:
        template: The name of a file of `templates/`, without its suffix: 'model', 'dataset', 'ln_free', 'study'.
        head: The front matter, a `ModelCardData` or `DatasetCardData` of huggingface_hub.
        **values: The values that the template names.

    Returns:
        The text of a README.md.

    Raises:
        jinja2.UndefinedError: A value that the template names is missing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{template}.md").render(head=head.to_yaml(), **values)


def validate(folder: str | Path, repo_type: str = "model") -> ModelCard | DatasetCard:
    """Checks that the Hub and its readers can use the card of a folder; no connection is needed.

    Args:
        folder: The folder with the README.md.
        repo_type: 'model' or 'dataset'.

    Returns:
        The card, read by huggingface_hub.

    Raises:
        ValueError: With all faults: no README.md, a front matter that does not parse (`model-index` included),
            required keys that are missing or empty, text left over from a template, data files that do not exist.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise ValueError(f"{folder} has no README.md: write its card, with which it is published")
    card_class = DatasetCard if repo_type == "dataset" else ModelCard
    try:
        card = card_class(path.read_text(encoding="utf-8"))
    except Exception as error:  # an error of YAML, or an incomplete model-index
        raise ValueError(f"{path}: the front matter does not parse: {' '.join(str(error).split())}") from error
    if faults := _faults(card, Path(folder), repo_type):
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return card


def known(model: str | None) -> dict[str, Any]:
    """The front matter of a model's card.

    Args:
        model: A folder or repository, or None.

    Returns:
        The front matter; empty if there is no card, or none that can be read, or no connection.
    """
    if not model:
        return {}
    card = Path(model, "README.md")
    try:
        return dict(ModelCard.load(card if card.is_file() else model).data.to_dict())
    except Exception:  # no connection, no card, or a broken one: the front matter is not known
        return {}


def set_license(folder: str | Path, license: str) -> None:
    """Writes a license into the front matter of a folder's card.

    Args:
        folder: The folder with the README.md.
        license: The Hub's name of the license, such as 'apache-2.0'.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    card.data.license = license
    card.save(path)


REQUIRED = {"model": ("license", "library_name", "pipeline_tag", "tags"), "dataset": ("license", "configs")}
"""Type of repository -> required keys of the front matter."""
LEFTOVERS = ("[More Information Needed]", "[optional]", "{{", "{%")


def _faults(card: Any, folder: Path, repo_type: str) -> list[str]:
    data = card.data.to_dict()
    faults = [f"{key} is missing" for key in REQUIRED[repo_type] if data.get(key) in (None, "", [])]
    if data.get("license") == "unknown" and repo_type == "model":
        faults.append("license is 'unknown': say which it is")
    if "licence" in data:
        faults.append("'licence' is not a key of the Hub: write 'license'")
    faults += [f"the text has {mark!r} left from a template" for mark in LEFTOVERS if mark in card.content]
    for config in data.get("configs") or []:
        for entry in config["data_files"]:
            if not any(folder.glob(entry["path"])):
                faults.append(f"split {entry['split']} has no file {entry['path']}")
    return faults
