"How the notebooks read, in figures: `python tests/readability.py` prints them, test_repository.py holds them to their limits."
import ast
import json
import re
import statistics
from pathlib import Path

root = Path(__file__).parent.parent
templates = ("experiment", "deploy", "paper", "benchmark")


def code_cells(notebook):
    "Of each code cell: its text, its outputs, whether it is exported, and whether it holds parameters."
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    for cell in cells:
        text = "".join(cell["source"])
        yield dict(text=text, outputs=cell["outputs"], exported="#| export" in text.split("\n", 1)[0],
                   parameters="parameters" in cell["metadata"].get("tags", []))


def is_template(notebook): return notebook.stem in templates or notebook.stem.startswith("study_")


def tree(text): return ast.parse(re.sub(r"(?m)^\s*[%!].*$", "pass", text))


def definitions(text):
    "The names of the functions and classes that a cell defines."
    return [node.name for node in tree(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def is_import(text):
    "Whether a cell only imports, and sets the style of figures."
    return all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Try, ast.Expr)) for node in tree(text).body) and "import" in text


def tuple_assignments(text):
    "Statements that assign several values to several names at once."
    assigned = [node for node in ast.walk(tree(text)) if isinstance(node, ast.Assign)]
    return sum(isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple) for node in assigned)


def figures(notebooks):
    "All figures, over some notebooks."
    lines, lengths, exports, shown, tuples, long_cells = [], [], [], [], 0, []
    named, public = 0, 0
    for notebook in notebooks:
        cells = [*code_cells(notebook)]
        for i, cell in enumerate(cells):
            text = cell["text"]
            lines += text.splitlines()
            lengths.append(len(text))
            tuples += tuple_assignments(text)
            if is_template(notebook):
                if not cell["parameters"] and len(text.splitlines()) > 15: long_cells.append(f"{notebook.stem}: {text[:60]!r}")
                continue
            if cell["exported"]:
                names = definitions(text)
                exports.append(len(names))
                examples = " ".join(c["text"] for c in cells[i + 1:i + 4] if not c["exported"])
                for name in names:
                    if name.startswith("_"): continue
                    public += 1
                    named += bool(re.search(rf"\b{name}\b", examples))
            elif not is_import(text) and "default_exp" not in text:
                shown.append(any(output["output_type"] in ("execute_result", "display_data") for output in cell["outputs"]))
    lengths.sort()
    return {
        "lines over 100 characters (%)": 100 * sum(len(line) > 100 for line in lines) / len(lines),
        "lines over 120 characters": sum(len(line) > 120 for line in lines),
        "export cells with more than one definition (%)": 100 * sum(n > 1 for n in exports) / max(1, len(exports)),
        "cells of templates over 15 lines": long_cells,
        "characters in a code cell, median": statistics.median(lengths),
        "characters in a code cell, p90": lengths[int(0.9 * (len(lengths) - 1))],
        "definitions used in an example within three cells (%)": 100 * named / max(1, public),
        "other cells that show a value or a picture (%)": 100 * sum(shown) / max(1, len(shown)),
        "tuple-to-tuple assignments per 100 lines": 100 * tuples / len(lines),
    }


if __name__ == "__main__":
    for name, value in figures(sorted((root / "nbs").glob("*.ipynb"))).items():
        print(f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value}")
