"""The experiments that come with the project: configs/ of the repository, which the wheel has in this package."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where the experiments are: in the repository beside the package, installed in it."""
    beside = _PACKAGE.parent / "configs"
    return beside if (beside / "own.py").is_file() and (beside / "shapes.py").is_file() else _PACKAGE / "configs"


def names() -> list[str]:
    """Of all experiments."""
    return sorted(file.stem for file in folder().glob("*.py"))


def find(name: str) -> Path | None:
    """The file of an experiment: a path, `shapes`, or configs/shapes.py from any folder; None: there is none."""
    path = Path(name)
    if path.is_file() and path.suffix:
        return path
    if name.removeprefix("configs/").removesuffix(".py") in names():  # a folder of data of such a name: ./shapes
        return folder() / f"{path.stem}.py"
    return None
