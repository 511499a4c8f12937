"README.md is nbs/index.ipynb without its code: `python tests/readme.py` writes it, a test compares it."
import re
from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent


def readme() -> str:
    "The text that README.md must have; links, relative to nbs/ in the notebook, are made relative to the root."
    text, _ = MarkdownExporter(exclude_input=True).from_filename(str(root / "nbs" / "index.ipynb"))
    text = re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", text).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__": (root / "README.md").write_text(readme(), encoding="utf-8")
