"""A package that looks like SGLang from where this plugin stands: the functions that it expects, and nothing else."""

from __future__ import annotations

from pathlib import Path

from eplb_sglang import signatures


def write_package(folder: Path) -> Path:
    """Write modules whose functions and methods have the parameters that are expected; return the package's folder."""
    for module, names in signatures.EXPECTED.items():
        *parents, leaf = module.split(".")
        place = folder.joinpath(*parents)
        place.mkdir(parents=True, exist_ok=True)
        for parent in (place, *place.parents):
            if parent != folder and folder in parent.parents:
                (parent / "__init__.py").touch()
        lines: list[str] = []
        if module == signatures.LOCATION:
            lines += ["import dataclasses", "@dataclasses.dataclass", "class ExpertLocationMetadata:"]
            lines += [f"    {field}: int" for field in signatures.FIELDS]
        for name, parameters in names.items():
            *owner, function = name.split(".")
            if owner and f"class {owner[0]}:" not in lines:
                lines.append(f"class {owner[0]}:")
            shown = ["**kwargs" if parameter == "kwargs" else parameter for parameter in parameters or ()]
            lines.append(f"{'    ' if owner else ''}def {function}({', '.join(shown)}): ...")
        file = place / leaf / "__init__.py" if (place / leaf).is_dir() else place / f"{leaf}.py"
        file.write_text("\n".join(lines) + "\n")
    return folder / "sglang"
