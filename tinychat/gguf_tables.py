"""The tables of the `gguf` package: types, their sizes, what the numbers in a file mean.

The package itself brings YAML and readers along, which take longer to import than a small model to
load; its `constants.py` stands alone.
"""
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

NAME = "tinychat._gguf_constants"


def _constants():
    """The package's own module where a program has imported it, else a copy of ours."""
    if "gguf" in sys.modules:
        from gguf import constants
        return constants
    package = find_spec("gguf")
    if package is None:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
    folder = Path(package.submodule_search_locations[0])
    spec = spec_from_file_location(NAME, folder / "constants.py")
    sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


_module = _constants()
GGML_QUANT_SIZES, GGMLQuantizationType = _module.GGML_QUANT_SIZES, _module.GGMLQuantizationType
GGUFValueType, LlamaFileType = _module.GGUFValueType, _module.LlamaFileType
