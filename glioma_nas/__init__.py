"""glioma_nas: plugin-based AutoML for glioma MRI on top of Microsoft NNI 3.0.

Importing this package imports neither torch nor NNI; the sub-packages do so when they are used.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the component folders (search_spaces, strategies, evaluators, plugins) lie beside this package rather
# than inside it; an installed wheel holds them inside. Extending the package's own search path, and nothing else's,
# makes `glioma_nas.plugins` importable from a checkout without putting a generic name on sys.path.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "search_spaces" / "__init__.py").is_file():
    __path__.append(str(_checkout))
