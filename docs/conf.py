"""Sphinx configuration: ``make docs`` builds ``docs/_build/html``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flask_bgjobs import __version__

project = "flask-bgjobs"
author = "The flask-bgjobs authors"
project_copyright = "The flask-bgjobs authors"
version = release = __version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build", "_performance"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"flask-bgjobs {version}"
html_static_path = ["_static"]
html_copy_source = False
pygments_style = "default"
