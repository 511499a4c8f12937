"What every commit must keep: notebooks clean, package in sync, README fresh, pins equal, layers respected."
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readability import figures, is_template
from readme import readme

root = Path(__file__).parent.parent
notebooks = sorted((root / "nbs").glob("*.ipynb"))
modules = sorted(p for p in (root / "moevo_nb").glob("*.py") if not p.name.startswith("_"))
cells = {n.stem: json.loads(n.read_text())["cells"] for n in notebooks}
settings = configparser.ConfigParser(delimiters=["="])
settings.read(root / "settings.ini")
cfg = settings["DEFAULT"]


def copy_of_the_project(folder):
    for name in ("nbs", "moevo_nb", "settings.ini", "setup.py", "pyproject.toml"):
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, folder / name)
    return folder


def run(command, folder):
    done = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def differences(folder, pattern):
    return [str(f.relative_to(folder)) for f in sorted(folder.glob(pattern))
            if not (root / f.relative_to(folder)).exists() or f.read_bytes() != (root / f.relative_to(folder)).read_bytes()]


def test_notebooks_are_clean(tmp_path):
    run(["nbdev_clean"], copy_of_the_project(tmp_path))
    assert not differences(tmp_path, "nbs/*.ipynb"), "run nbdev_clean"


def test_package_is_in_sync(tmp_path):
    copy_of_the_project(tmp_path)
    for module in (tmp_path / "moevo_nb").glob("*.py"): module.unlink()
    (tmp_path / "moevo_nb" / "__init__.py").write_text("")
    run(["nbdev_export"], tmp_path)
    assert not differences(tmp_path, "moevo_nb/*.py"), "run nbdev_export"
    assert {m.name for m in modules} == {p.name for p in (tmp_path / "moevo_nb").glob("[!_]*.py")}


def test_readme_is_the_index():
    assert (root / "README.md").read_text() == readme(), "run python tests/readme.py"


def test_ci_runs_the_command_of_the_readme():
    command = (root / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert command.replace(" -q", "") in (root / "README.md").read_text()


def test_environment_pins_what_settings_pins():
    pins = re.findall(r'^      - "(.+)"$', (root / "environment.yml").read_text(), re.M)
    assert pins == f"{cfg['requirements']} {cfg['dev_requirements']}".split() and cfg["cluster_requirements"] in pins
    dry = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *pins], capture_output=True, text=True)
    assert dry.returncode == 0 and "Would install" not in dry.stdout, dry.stdout + dry.stderr


def test_a_source_distribution_can_be_installed(tmp_path):
    "Built, installed without the network, and imported with its figures' style, away from the checkout."
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "moevo_nb", tmp_path / "moevo_nb")
    run(["python", "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')"], tmp_path)
    built, = (tmp_path / "dist").glob("*.tar.gz")
    run(["pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target", "site", str(built)], tmp_path)
    used = "import moevo_nb.system, matplotlib.style, sys; matplotlib.style.use('moevo_nb.figures'); sys.exit('site' not in moevo_nb.__file__)"
    run(["python", "-c", f"import sys; sys.path.insert(0, 'site'); {used}"], tmp_path)


layers = {   # module: what it may import, besides system, which every module may use
    "system": "", "rendering": "", "registry": "", "data": "rendering registry", "backbone": "data", "encoding": "", "head": "encoding",
    "robustness": "", "calibration": "", "pareto": "", "store": "pareto", "evaluation": "encoding head robustness pareto store",
    "operators": "encoding head", "surrogate": "pareto", "evolution": "operators surrogate evaluation pareto store",
    "explain": "backbone encoding head operators pareto", "ensemble": "robustness",
    "baselines": "encoding head evaluation pareto store", "statistics": "",
    "selection": "pareto ensemble statistics", "corruption": "data backbone robustness",
    "deploy": "data backbone encoding head robustness ensemble store", "predict": "",
}


def imported(path):
    "The modules of the package that a file imports."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1: yield node.module
        if isinstance(node, ast.ImportFrom) and node.module == "moevo_nb": yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moevo_nb."): yield node.module.split(".")[1]
        elif isinstance(node, ast.Import): yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("moevo_nb."))


@pytest.mark.parametrize("module", modules, ids=lambda p: p.stem)
def test_layers(module):
    others = {m.stem for m in modules} - {"study"}
    allowed = set(layers[module.stem].split()) | {"system"} if module.stem != "study" else others
    assert set(imported(module)) <= allowed


@pytest.mark.parametrize("name", cells)
def test_a_notebook_keeps_no_error_and_no_path_of_a_machine(name):
    text = json.dumps([c.get("outputs", []) for c in cells[name]] + [c["source"] for c in cells[name]])
    assert '"output_type": "error"' not in text and not re.search(r"(?<![\w.])/(home|root|tmp|Users|work)/", text)


@pytest.mark.parametrize("name", [n.stem for n in notebooks if is_template(n)])
def test_templates_have_one_parameters_cell_and_no_outputs(name):
    tagged = [c for c in cells[name] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and not any(c.get("outputs") for c in cells[name])
    lines = "".join(tagged[0]["source"]).splitlines()
    assert all(re.fullmatch(r"\w+ = .+  # .+", line) for line in lines)


def test_the_experiment_declares_the_parameters_that_are_checked():
    from moevo_nb.study import parameters
    cell, = [c for c in cells["experiment"] if "parameters" in c["metadata"].get("tags", [])]
    given = {}
    exec("".join(cell["source"]), given)
    del given["__builtins__"]
    assert given == {name: parameter.default for name, parameter in parameters.items()}
    comments = [line.split("  # ", 1)[1] for line in "".join(cell["source"]).splitlines()]
    assert comments == [parameter.meaning for parameter in parameters.values()]


def names_of(node, context):
    "Names that a piece of code reads or binds, comprehensions' own and functions' arguments left out."
    inside = [n for n in ast.walk(node) if isinstance(n, (ast.comprehension, ast.FunctionDef, ast.Lambda))]
    own = {n.id for part in inside if isinstance(part, ast.comprehension) for n in ast.walk(part.target) if isinstance(n, ast.Name)}
    own |= {a.arg for part in inside if not isinstance(part, ast.comprehension) for a in ast.walk(part.args) if isinstance(a, ast.arg)}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)} - own


def read_and_bound(source):
    "The names that a cell takes from other cells, and those that it binds."
    read, bound = set(), set()

    def visit(statements):
        for node in statements:
            bodies = [getattr(node, part) for part in ("body", "orelse") if isinstance(getattr(node, part, None), list)]
            if isinstance(node, (ast.FunctionDef, ast.Import, ast.ImportFrom)):
                read.update(names_of(node, ast.Load) - bound - names_of(node, ast.Store))
                bound.update([node.name] if isinstance(node, ast.FunctionDef) else [a.asname or a.name for a in node.names])
                continue
            heads = [node] if not bodies else [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.stmt)]
            for head in heads: read.update(names_of(head, ast.Load) - bound)
            for head in heads: bound.update(names_of(head, ast.Store))
            for body in bodies: visit(body)

    visit(ast.parse(source).body)
    return read, bound


def test_what_a_cell_reads_and_binds():
    assert read_and_bound("x = y\nfor a in x: z = a + b\nw = [c for c in z if d]") == ({"y", "b", "d"}, {"x", "a", "z", "w"})
    assert read_and_bound("n = n + 1\nwith f() as g: h = g")[0] == {"n", "f"}


def test_any_cell_of_the_experiment_can_be_run_again():
    "What a cell takes from others is bound by one of them alone, and no result has the name of a parameter."
    from moevo_nb.study import parameters
    code = [c for c in cells["experiment"] if c["cell_type"] == "code"]
    tagged = next(k for k, c in enumerate(code) if "parameters" in c["metadata"].get("tags", []))
    read, bound = zip(*(read_and_bound("".join(c["source"])) for c in code))
    for k in range(len(code)):
        assert k == tagged or not bound[k] & set(parameters)
        for name in read[k]: assert name not in bound[k] and sum(name in names for names in bound) <= 1, name


def test_what_is_public_is_documented():
    "Every public class, and every public function of more than three statements, says what it is."
    for module in modules:
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and len(node.body) > 3:
                assert ast.get_docstring(node), f"{module.name}: {node.name} has no docstring"


def test_the_notebooks_can_be_read():
    found = figures(notebooks)
    assert found["lines over 100 characters (%)"] <= 1 and found["lines over 120 characters"] == 0
    assert found["export cells with more than one definition (%)"] <= 8
    assert not found["cells of templates over 15 lines"]
