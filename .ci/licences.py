"""What `pip install gsa-jax` and its extras bring along, and their licences, as a table: `python .ci/licences.py`.

Reads what is installed where it runs; docs/licences.md is what it printed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Asked = set[tuple[str, str]]
"""Packages, each with an extra of it, or with none."""


def licence(name: str) -> str:
    """What a package says of itself: an SPDX expression, or else its classifiers, or else its free text."""
    said = metadata(name)
    if expression := said.get("License-Expression"):
        return expression
    classifiers = [line.split(" :: ")[-1] for line in said.get_all("Classifier", []) if line.startswith("License ::")]
    return "; ".join(classifiers) or (said.get("License") or "says nothing").splitlines()[0][:60]


def brought_along(name: str, extra: str, found: Asked, missing: set[str]) -> Asked:
    """The package, and all that it requires here; `missing` gets those of them that are not installed."""
    name = canonicalize_name(name)
    if (name, extra) not in found:
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            missing.add(name)
            return found
        found.add((name, extra))
        for line in needed:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for asked in ("", *requirement.extras):
                    brought_along(requirement.name, asked, found, missing)
    return found


def main() -> None:
    """Prints what the docstring of this file says."""
    always = {name for name, _ in brought_along("gsa-jax", "", set(), set())}
    asked_by = {name: ["always"] for name in always}
    incomplete = []
    for extra in metadata("gsa-jax").get_all("Provides-Extra", []):
        missing: set[str] = set()
        for name in {name for name, _ in brought_along("gsa-jax", extra, set(), missing)} - always:
            asked_by.setdefault(name, []).append(extra)
        if missing:
            incomplete.append(f"{extra} ({', '.join(sorted(missing))})")
    del asked_by["gsa-jax"]
    print("| package | version when this was written | licence | comes with |\n|---|---|---|---|")
    for name, extras in sorted(asked_by.items()):
        # What comes with an extra for users, comes with those for tests as well.
        shown = [extra for extra in extras if not extra.startswith("test")] or ["tests"]
        print(f"| {name} | {metadata(name)['Version']} | {licence(name)} | {', '.join(shown)} |")
    if incomplete:
        print(f"\nNot installed where this was written, and so not in the table: {'; '.join(incomplete)}.")


if __name__ == "__main__":
    main()
