"""The packages that `pip install gsa-jax` brings along, and their licences, as a table: `python .ci/licences.py`.

Reads what is installed where it runs; docs/licences.md is what it printed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def licence(name: str) -> str:
    """What a package says of itself: an SPDX expression, or else its classifiers, or else its free text."""
    said = metadata(name)
    if expression := said.get("License-Expression"):
        return expression
    classifiers = [line.split(" :: ")[-1] for line in said.get_all("Classifier", []) if line.startswith("License ::")]
    return "; ".join(classifiers) or (said.get("License") or "says nothing").splitlines()[0][:60]


def brought_along(name: str, found: set[str]) -> set[str]:
    """The package, and all that it requires here without an extra."""
    name = canonicalize_name(name)
    if name not in found:
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            return found
        found.add(name)
        for line in needed:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                brought_along(requirement.name, found)
    return found


def main() -> None:
    """Prints what the docstring of this file says."""
    print("| package | version when this was written | licence |\n|---|---|---|")
    for name in sorted(brought_along("gsa-jax", set()) - {"gsa-jax"}):
        print(f"| {name} | {metadata(name)['Version']} | {licence(name)} |")


if __name__ == "__main__":
    main()
