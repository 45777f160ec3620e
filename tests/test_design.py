"""The rules of the house: who may import whom, who opens what, and how long things may be."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
ROOMS = {room: sorted((ROOT / room).rglob("*.py")) for room in ("wan", "utils", "tests", "benchmarks", "nano")}
MODULES = ROOMS["wan"] + ROOMS["utils"]
SOURCES = SCRIPTS + MODULES
EVERYTHING = SOURCES + ROOMS["tests"] + ROOMS["benchmarks"] + ROOMS["nano"]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, with the names taken from it: "torch", "torch.nn", ..."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with what is called as it is written."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def importers_of(package: str, paths: list[Path]) -> set[str]:
    return {label(path) for path in paths if any(f"{name}.".startswith(f"{package}.") for name in imports(path))}


# ----------------------------------------------------------------------------------------------------------- floors

# From the ground up: an import goes to one's own wing or to one further down this list, or to wan/.
WINGS = ("common", "diffusion", "media", "data", "storage", "adapters", "setup", "encoding", "training", "runs")
WITHOUT_WAN = ("common", "diffusion")


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def import_graph(paths: list[Path]) -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, a package's __init__ among them."""
    names = {module_name(path) for path in paths}
    graph = {}
    for path in paths:
        found = [name for name in imports(path) if name.split(".")[0] in {n.split(".")[0] for n in names}]
        targets = {name if name in names else name.rpartition(".")[0] for name in found}
        graph[module_name(path)] = {target for target in targets if target in names} - {module_name(path)}
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Every module that an import of `start` brings along."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def floor(module: str) -> int:
    """How high a module stands: wan on the ground, then the wings in their order, then scripts and everything else."""
    room, _, rest = module.partition(".")
    if room == "wan":
        return 0
    return 1 + WINGS.index(rest.split(".")[0]) if room == "utils" and rest else 1 + len(WINGS)


def faults(graph: dict[str, set[str]]) -> list[str]:
    """Imports, direct or through others, that point up, go round in a circle, or reach what a wing must not know."""
    found = []
    for module in graph:
        for target in reachable(graph, module):
            if target == module:
                found.append(f"{module} imports itself in a circle")
            elif floor(target) > floor(module):
                found.append(f"{module} reaches up to {target}")
            elif target.startswith("wan.") and module.startswith(tuple(f"utils.{wing}." for wing in WITHOUT_WAN)):
                found.append(f"{module} must not know {target}")
    return found


def test_the_rooms_are_found():
    assert {"train_wan_lora.py", "test_wan_control_lora.py", "convert_lora_to_comfy.py"} <= {label(p) for p in SCRIPTS}
    assert len(ROOMS["wan"]) > 8 and len(ROOMS["utils"]) > 15 and len(ROOMS["nano"]) > 8
    assert {path.parent.name for path in ROOMS["utils"]} == {*WINGS, "utils"}


def test_imports_point_down_the_list_of_wings_and_never_in_a_circle():
    assert faults(import_graph(SOURCES)) == []


@pytest.mark.parametrize(
    ("module", "target", "fault"),
    [
        ("utils.common.files", "utils.data.scan", "utils.common.files reaches up to utils.data.scan"),
        ("utils.data.buckets", "utils.encoding.text", "utils.data.scan reaches up to utils.encoding.text"),
        ("wan.modules.model", "utils.common.errors", "wan.modules.model reaches up to utils.common.errors"),
        ("utils.diffusion.flow", "wan.modules.model", "utils.diffusion.objectives must not know wan.modules.model"),
        ("utils.common.errors", "utils.common.files", "utils.common.errors imports itself in a circle"),
        ("utils.runs.state", "train_wan_lora", "utils.runs.run reaches up to train_wan_lora"),
    ],
)
def test_a_planted_import_is_found_also_through_other_modules(module, target, fault):
    graph = import_graph(SOURCES)
    graph[module] = graph[module] | {target}
    assert fault in faults(graph)


def test_wan_knows_nothing_of_training():
    for package in ("utils", "tests", "benchmarks", "nano", "peft"):
        assert not importers_of(package, ROOMS["wan"])


def test_nothing_imports_a_script():
    for script in SCRIPTS:
        assert not importers_of(script.stem, MODULES + SCRIPTS + ROOMS["nano"])


def test_what_training_is_knows_no_tests_no_benchmarks_and_no_small_model():
    for package in ("tests", "benchmarks", "nano"):
        assert not importers_of(package, SOURCES)
    for package in ("tests", "benchmarks"):
        assert not importers_of(package, ROOMS["nano"])


# Modules without a test file of their own name, and the file that tests them.
TESTED_ELSEWHERE = {
    "utils/common/errors.py": "tests/utils/common/test_options.py",
    "wan/checkpoints/errors.py": "tests/wan/checkpoints/test_find.py",
    "wan/configs/grid.py": "tests/wan/configs/test_family.py",
}


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "__init__"], ids=label)
def test_every_module_has_a_test_file_of_its_name_or_one_that_is_named_here(path):
    own = ROOT / "tests" / path.relative_to(ROOT).with_name(f"test_{path.name}")
    other = TESTED_ELSEWHERE.get(label(path))
    assert own.exists() != (other is not None), "either a test file of its name, or a row above"
    if other is not None:
        assert module_name(path) in import_graph([*MODULES, *SCRIPTS, ROOT / other])[module_name(ROOT / other)]


def test_the_command_line_and_toml_are_each_read_in_one_place():
    shipped = SOURCES + ROOMS["nano"]
    assert importers_of("argparse", shipped) == {"utils/common/options.py"}
    assert importers_of("tomllib", shipped) == {"utils/common/toml.py"}


def test_adapters_come_from_one_place():
    assert importers_of("peft", SOURCES + ROOMS["nano"]) == {"utils/adapters/peft.py"}


# ------------------------------------------------------------------------------------------------------------ safety


def test_weights_are_opened_in_one_place_of_wan():
    openers = {"torch.load", "safe_open", "load_file", "torch.jit.load"}
    found = {label(path) for path in ROOMS["wan"] for name, _ in calls(path) if name in openers}
    assert found == {"wan/checkpoints/tensors.py"}
    assert importers_of("safetensors", ROOMS["wan"]) == {"wan/checkpoints/tensors.py"}


def test_nothing_is_unpickled():
    unpicklers = {"pickle", "dill", "joblib", "shelve", "marshal"}
    for path in SOURCES + ROOMS["nano"]:
        used = {name for name in imports(path) if name.split(".")[0] in unpicklers}
        assert used <= {"pickle.UnpicklingError"}, label(path)  # the name of an error, nothing that acts


def test_torch_load_reads_only_weights():
    for path in SOURCES + ROOMS["nano"]:
        for name, call in calls(path):
            if name.endswith("torch.load"):
                settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert settings.get("weights_only") == "True", f"{label(path)}:{call.lineno}"


def test_nothing_is_evaluated_and_no_shell_is_called():
    forbidden = {"eval", "exec", "os.system", "os.popen", "__import__"}
    for path in SOURCES + ROOMS["nano"]:
        assert not [f"{label(path)}:{call.lineno}" for name, call in calls(path) if name in forbidden]


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("path", EVERYTHING, ids=label)
def test_files_and_functions_stay_within_their_budgets(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{node.name} is too long"


def test_scripts_hold_no_nested_function():
    for path in SCRIPTS:
        for function in ast.walk(parse(path)):
            if isinstance(function, ast.FunctionDef):
                nested = [node.name for node in ast.walk(function) if isinstance(node, ast.FunctionDef)][1:]
                assert not nested, f"{label(path)}: {nested}"


# -------------------------------------------------------------------------------------------------------- everywhere


def test_every_module_imports_without_a_gpu_and_without_decord():
    names = [
        label(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in MODULES + ROOMS["nano"]
    ]
    code = (
        "import importlib, sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "sys.modules['decord'] = None\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_text_names_a_place_on_one_machine():
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = [f"/{place}/" for place in ("home", "root", "work")]
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        assert not [place for place in places if place in text], name
