"""What the pages that tamis writes and serves have in common."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader


def environment(package: str) -> Environment:
    """The templates of a package, which may include the style sheets of all pages: `base.css` and,
    for those with a dark side, `dark.css`. Each page holds its styles itself, so that it needs
    nobody else."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("tamis")]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
