"""Fast inference of sparse networks on a CPU. Needs numba (the extra ``sparse``)."""

try:
    import numba  # noqa: F401
except ImportError as error:
    raise ImportError(f"sparse networks need numba ({error}); run: pip install 'ip-plugin[sparse]'") from error

from .network import SparseNetwork
from .preparation import prepare
from .steps import Run

__all__ = ["Run", "SparseNetwork", "prepare"]
