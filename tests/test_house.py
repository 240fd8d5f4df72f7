"""Imports go down only: the core knows nothing around it, and generating loads no other command."""

import ast
import subprocess
import sys
from pathlib import Path

import mlx_redrafter
from mlx_redrafter.commands.main import build_parser
from mlx_redrafter.options import DecodingOptions, ModelOptions, PromptOptions

ROOT = Path(mlx_redrafter.__file__).parent
ABOVE = ("stream", "model", "calibrate", "batch_generator", "train", "benchmark", "convert", "backend", "cli")


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports anywhere in it, by their place below the package."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            found |= {base} if node.module else {".".join(filter(None, [base, a.name])) for a in node.names}
    return found


def test_the_common_core_imports_only_itself():
    for path in (ROOT / "decoding").glob("*.py"):
        assert all(name.split(".")[0] == "decoding" for name in imports(path)), path


def test_the_engine_imports_nothing_above_it():
    for path in (ROOT / "engine").glob("*.py"):
        rooms = {name.split(".")[0] for name in imports(path)}
        assert rooms <= {"decoding", "engine", "models"}, path
        assert rooms.isdisjoint(ABOVE), path


def test_only_commands_know_argparse_and_no_command_imports_another():
    for path in ROOT.rglob("*.py"):
        used = imports(path)
        if path.parent.name != "commands":
            named = {name for node in ast.walk(ast.parse(path.read_text("utf-8"))) for name in absolute(node)}
            assert "argparse" not in named, path
            assert not any(name.startswith("commands") for name in used) or path.name == "__main__.py", path
        else:
            others = {name for name in used if name.startswith("commands")}
            assert others <= {"commands.arguments"}, path


def absolute(node: ast.AST) -> list[str]:
    """The names that a node imports from outside of the package."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [str(node.module).split(".")[0]] if isinstance(node, ast.ImportFrom) and not node.level else []


def test_generating_loads_no_other_command():
    code = (
        "import sys, mlx_redrafter.commands.main as cli; "
        "cli.build_parser('generate').parse_args(['generate']); "
        "print(*(name for name in sys.modules if name.startswith('mlx_redrafter')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("mlx_redrafter.") for name in done.stdout.split()}
    assert "commands.generate" in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("train", "benchmark")}
    assert {name for name in loaded if name.startswith("commands.")} == {
        "commands.main",
        "commands.arguments",
        "commands.generate",
    }
    sometimes = ("gguf", "prompt_cache", "convert", "convert_base")
    assert loaded.isdisjoint({"conversations", *(f"loading.{name}" for name in sometimes)})


def test_options_are_flags_of_generate_with_the_same_defaults():
    args = vars(build_parser("generate").parse_args(["generate"]))
    for options in (ModelOptions(), PromptOptions(), DecodingOptions()):
        for name, usual in vars(options).items():
            assert args[name] == ([] if usual == () else usual), name
