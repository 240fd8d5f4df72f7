"""Imports go down only: the core knows nothing around it, and generating loads no other command."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_redrafter
from mlx_redrafter.commands.main import build_parser
from mlx_redrafter.options import DecodingOptions, ModelOptions, PromptOptions

ROOT = Path(mlx_redrafter.__file__).parent
LEVELS = (  # from the bottom; a file may import its own level and those below
    ("decoding",),
    ("models", "loading"),
    ("engine",),
    (
        "text",
        "stop_texts",
        "session",
        "plain",
        "record",
        "batch_generator",
        "model",
        "options",
        "chat",
        "conversations",
    ),
    ("server", "train", "benchmark", "convert"),
    ("commands",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ANYWHERE = ("blas", "__init__", "__main__")  # before and after everything
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
}


def imports(path: Path) -> set[str]:
    """The package's files that a file imports anywhere in it, by their place below the package."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(filter(None, base))
            files = {".".join(filter(None, [base, alias.name])) for alias in node.names}
            found |= {file if file in FILES else base for file in files}
    return found - {""}


def room(name: str) -> str:
    """Where a file stands: a folder, or a file beside them."""
    return name.split(".")[0]


def test_every_room_has_a_level():
    assert {room(name) for name in FILES} <= {*LEVEL, *ANYWHERE}


@pytest.mark.parametrize("name", [name for name in FILES if room(name) not in ANYWHERE])
def test_imports_go_down(name):
    for used in imports(FILES[name]):
        assert used in FILES, used
        assert room(used) in ANYWHERE or LEVEL[room(used)] <= LEVEL[room(name)], f"{name} imports {used}"
        if "decoding" in (room(name), room(used)) and room(name) != room(used):
            assert room(name) != "decoding", f"{name} imports {used}"


def test_no_files_import_each_other_in_a_circle():
    """Not even inside of functions: whoever changes one of them would have to know them all."""
    TopologicalSorter({name: imports(path) for name, path in FILES.items()}).prepare()  # or a CycleError


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


def test_buffers_are_kept_single_by_the_engine_alone():
    """Elsewhere, who says ``del`` of a name holds what nobody should have given it."""
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "engine":
            assert not re.search(r"^\s*del \w+(, \w+)*\s*(#|$)", path.read_text("utf-8"), re.MULTILINE), path


def loaded_after(code: str) -> set[str]:
    """The package's files, and other packages, that a new process has loaded after it ran ``code``."""
    code += "; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.removeprefix("mlx_redrafter.") for name in done.stderr.splitlines()[-1].split()}


def test_importing_the_package_loads_almost_nothing():
    loaded = loaded_after("import mlx_redrafter")
    assert (loaded & FILES.keys()) - {"__main__"} == {"blas"}  # which is the new process itself
    assert loaded.isdisjoint({"mlx.core", "mlx_lm", "transformers"})


def test_generating_loads_no_other_command():
    loaded = loaded_after(
        "import mlx_redrafter.commands.main as cli; cli.build_parser('generate').parse_args(['generate'])"
    )
    assert {name for name in loaded if name.startswith("commands.")} == {
        "commands.main",
        "commands.arguments",
        "commands.generate",
    }
    assert {room(name) for name in loaded}.isdisjoint({"server", "train", "benchmark", "convert"})
    sometimes = ("gguf", "tokenizers", "prompt_cache", "adapters")
    assert loaded.isdisjoint({"conversations", "gguf", *(f"loading.{name}" for name in sometimes)})


def test_a_generation_loads_what_a_model_folder_needs(tmp_path):
    """No conversion, no training, no command but its own; and not the half of the package."""
    from bundles import make_folder

    folder = make_folder(tmp_path / "m")
    words = ["generate", "--model", str(folder), "--max-tokens", "2", "--verbose", "False"]
    loaded = loaded_after(f"from mlx_redrafter.commands.main import main; main({words!r})")
    assert {room(name) for name in loaded}.isdisjoint({"server", "train", "benchmark", "convert"})
    assert loaded.isdisjoint(
        {"conversations", "gguf", "loading.gguf", "loading.build_tokenizers", "models.save"}
    )
    assert loaded.isdisjoint({"llguidance", "engine.grammar", "engine.host"})
    assert loaded.isdisjoint({"models.memory", "models.stored"})
    lines = {name: len(FILES[name].read_text("utf-8").splitlines()) for name in loaded & FILES.keys()}
    for name in ("engine.stopwatch", "models.trial", "loading.files", "loading.search"):
        lines.pop(name, 0)  # loaded where step times, whether drafts are right, or drafters are not known yet
    assert sum(lines.values()) < 6800, lines


def test_options_are_flags_of_generate_with_the_same_defaults():
    args = vars(build_parser("generate").parse_args(["generate"]))
    for options in (ModelOptions(), PromptOptions(), DecodingOptions()):
        for name, usual in vars(options).items():
            assert args[name] == ([] if usual == () else usual), name
