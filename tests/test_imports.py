"""The layers of the package: imports run one way and can be seen, and only the six runtime packages are needed."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "k2mini"
# A module may import from its own layer's folder and from earlier layers.
LAYERS = [
    {"architectures", "config", "errors", "files", "page", "sizes"},
    {"dtypes", "hub", "model_config"},
    {"config_file", "cpu", "distributed", "gpu"},
    {"nn"},
    {"corpus"},
    {"data"},
    {"weights"},
    {"build"},
    {"training", "inference"},
    {"evaluation", "audit"},
    {"demo", "serving"},
    {"doctor"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
RUNTIME = {"torch", "sentencepiece", "safetensors", "numpy", "yaml", "tqdm"}
# Extras are imported where they are used, never at module level.
EXTRAS = {"matplotlib", "tensorboard", "wandb", "gguf", "triton", "uvicorn", "tokenizers", "jinja2", "huggingface_hub"}
EXTRAS |= {"transformers", "lxml", "pypdfium2", "ftfy", "py3langid"}


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
            no_torch = {"corpus", "errors", "files", "page", "sizes"}
            assert own != "corpus" or other in no_torch, f"{path} imports {module}"


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_circles():
    """Between modules, those that a function imports included."""
    known = {module_name(path) for path in PACKAGE.rglob("*.py")}
    graph = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        graph[module_name(path)] = needed = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                needed.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names} & known
                needed.update(names or {node.module})
        needed &= known
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_module_is_named_by_a_string():
    """An import that a reader, or the tests above, would not find."""
    hidden = {"importlib", "import_module", "__import__", "runpy", "pkgutil"}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {node.module, *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Name):
                names = {node.id}
            else:
                names = {node.attr} if isinstance(node, ast.Attribute) else set()
            assert not names & hidden, f"{path}, line {node.lineno}: {names & hidden}"


def test_only_runtime_packages_at_module_level():
    for path in sorted(PACKAGE.rglob("*.py")):
        for module, top in imports(path):
            name = module.split(".")[0]
            allowed = RUNTIME | set(sys.stdlib_module_names) | {"k2mini"} | (set() if top else EXTRAS)
            assert name in allowed, f"{path} imports {module}"


def test_packages_reexport_nothing():
    assert all(path.read_text() == "" for path in PACKAGE.rglob("__init__.py"))


def in_a_new_process(code):
    """What it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_answer_needs_neither_the_compiler_nor_what_shards():
    """They take longer to import than a small model to load. And the garbage collector works again."""
    code = (
        "import argparse, gc, sys\n"
        "from k2mini.commands.inference import generate_arguments\n"
        "generate_arguments(argparse.ArgumentParser())\n"
        "assert gc.isenabled() and gc.get_freeze_count()\n"
        "import k2mini.build, k2mini.evaluation.evaluate, k2mini.inference.answers\n"
        "late = {'torch._dynamo', 'torch._inductor', 'torch.distributed.tensor', 'torch.distributed.fsdp', 'sympy'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)\n"
    )
    in_a_new_process(code)


def test_help_imports_nothing_heavy():
    """Nor does the import of any file of `commands`, since all of them are imported first."""
    code = (
        "import sys\nfrom k2mini.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"heavy = {RUNTIME | EXTRAS} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import pkgutil, k2mini.commands\n"
        "known = {f'k2mini.commands.{module.name}' for module in pkgutil.iter_modules(k2mini.commands.__path__)}\n"
        "assert known <= set(sys.modules), known - set(sys.modules)\n"
    )
    assert "generate" in in_a_new_process(code)
