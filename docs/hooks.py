"""Shows RESULTS.md, which lies at the root of the repository, as a page of the site."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add the page results.md, whose links begin where those of the other pages do."""
    text = (Path(config.config_file_path).parent / "RESULTS.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "results.md", content=text.replace("](docs/", "](")))
    return files
