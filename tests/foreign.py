"""Other people's packages with the names of Diptych's folders."""

from pathlib import Path

FOLDERS = ("pipelines", "transforms", "models")


def write_foreign_packages(folder: Path) -> None:
    """Writes packages that raise when they are imported."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('a foreign {name} was imported')\n")
