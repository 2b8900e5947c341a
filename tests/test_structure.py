"""The structure of the package, held by reading its imports."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import twostage
import twostage.kernels

PACKAGE = Path(twostage.__file__).parent
KERNELS = Path(twostage.kernels.__file__).parent
SOURCES = sorted({*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")})

# Each layer may import the layers after it, and itself; the shared modules serve all of them.
ORDER = [
    "cli",
    "demo",
    "experiment",
    "report",
    "facts",
    "saved_model",
    "api",
    "two_stage|fast|preparation",
    "recipe",
    "machine",
    "training",
    "model|data",
    "kernels",
]
SIDE_LAYERS = {"assets": {"cli", "demo"}, "augmentation": {"cli", "demo"}, "memory": {"cli"}}
SHARED = {"errors", "files", "model_folder", "printing", "progress"}


def layer_of(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(absolute module name, whether it is imported at the top of the module)."""
    if path.is_relative_to(KERNELS):
        package = ["twostage", "kernels"]
    else:
        package = ["twostage", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = node.module in (None, "twostage")
            names = [alias.name for alias in node.names] if whole else [node.module]
            base = ["twostage"] if node.module == "twostage" else base
            found += [(".".join([*base, name]), id(node) in top) for name in names]
    return found


def rank(layer: str) -> int:
    return next(i for i, names in enumerate(ORDER) if layer in names.split("|"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_run_downwards_only(path: Path) -> None:
    layer = layer_of(path)
    if layer in ("__init__", "__main__"):
        return  # the entry points
    for module, _ in imports_of(path):
        if not module.startswith("twostage."):
            continue
        target = module.split(".")[1]
        if target in SHARED or target == layer:
            continue
        if layer in SHARED:
            pytest.fail(f"{path} imports {module}: shared modules stand at the bottom")
        if target in SIDE_LAYERS:
            assert layer in SIDE_LAYERS[target], f"{path} imports {module}"
            continue
        if layer in SIDE_LAYERS:
            assert target == "data", f"{path} imports {module}"
            continue
        assert layer != "data", f"{path} imports {module}: data stand alone"
        if layer == "model":
            assert target == "kernels", f"{path} imports {module}"
        assert rank(target) > rank(layer), f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_only_the_five_packages_are_needed(path: Path) -> None:
    allowed = {"twostage", "torch", "tokenizers", "safetensors", "numpy", "httpx"}
    inside_functions = {"tqdm", "huggingface_hub", "matplotlib"}
    for module, at_top in imports_of(path):
        name = module.split(".")[0]
        if name in sys.stdlib_module_names or name in allowed:
            continue
        if name == "triton" and path == KERNELS / "__init__.py":
            continue  # the one place that looks whether it is there
        assert name in inside_functions, f"{path} imports {module}"
        assert not at_top, f"{path} imports {module} at the top of the module"


def test_kernels_import_torch_alone() -> None:
    for path in KERNELS.rglob("*.py"):
        for module, _ in imports_of(path):
            name = module.split(".")[0]
            assert name in {"torch", "triton"} | sys.stdlib_module_names or module.startswith(
                "twostage.kernels"
            ), f"{path} imports {module}"


def test_the_bare_name_kernels_is_not_ours() -> None:
    assert find_spec("kernels") is None


@pytest.mark.slow
def test_import_twostage_loads_nothing_heavy_and_the_parts_load_without_each_other() -> None:
    def modules_after(statement: str) -> set[str]:
        code = f"import sys\n{statement}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return set(out.stdout.split())

    heavy = {"tokenizers", "safetensors", "httpx", "huggingface_hub", "matplotlib"}
    assert not modules_after("import twostage") & (heavy | {"torch", "tqdm"})
    for part in ("twostage.model.bert", "twostage.training.losses", "twostage.kernels.attention"):
        assert not modules_after(f"import {part}") & heavy
    loaded = modules_after("import twostage.augmentation.folder")
    assert not loaded & {"torch", "tokenizers", "safetensors", "huggingface_hub", "matplotlib"}


def test_the_heart_stays_short() -> None:
    """What people come to read, in one sitting. The bound is raised for nothing."""
    heart = [PACKAGE / "two_stage.py", PACKAGE / "model" / "bert.py"]
    heart += [PACKAGE / "data" / "samplers.py", PACKAGE / "data" / "packing.py"]
    heart += (PACKAGE / "training").glob("*.py")
    # Blank lines do not count: what is spread out is not longer to read.
    lines = [line for path in heart for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= 900
