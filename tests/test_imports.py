"""The layers of the package: imports run one way, and only the six runtime packages are needed."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "k2mini"
# A module may import from its own layer's folder and from earlier layers.
LAYERS = [
    {"config", "errors", "files", "sizes"},
    {"dtypes", "model_config"},
    {"config_file", "distributed"},
    {"nn"},
    {"data"},
    {"weights"},
    {"build"},
    {"training", "inference"},
    {"evaluation", "audit"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
RUNTIME = {"torch", "sentencepiece", "safetensors", "numpy", "yaml", "tqdm"}
# Extras are imported where they are used, never at module level.
EXTRAS = {"matplotlib", "tensorboard", "gguf"}


def imports(path):
    """(module, at module level) of every import in a file; TYPE_CHECKING blocks count too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"k2mini.{alias.name}" if node.module == "k2mini" else node.module
                yield name, id(node) not in inside


def test_imports_run_one_way():
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for module, _ in imports(path):
            if module.split(".")[0] != "k2mini":
                continue
            other = module.split(".")[1]
            assert other == own or RANK[other] < RANK[own], f"{path} imports {module}"
            assert not (own == "data" and other == "nn"), f"{path}: data never imports the model"


def test_only_runtime_packages_at_module_level():
    for path in sorted(PACKAGE.rglob("*.py")):
        for module, top in imports(path):
            name = module.split(".")[0]
            allowed = RUNTIME | set(sys.stdlib_module_names) | {"k2mini"} | (set() if top else EXTRAS)
            assert name in allowed, f"{path} imports {module}"


def test_packages_reexport_nothing():
    assert all(path.read_text() == "" for path in PACKAGE.rglob("__init__.py"))


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom k2mini.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'sentencepiece', 'safetensors', 'yaml', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
