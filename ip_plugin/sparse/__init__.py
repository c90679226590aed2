"""Running sparse networks fast on a CPU. Needs numba (the extra ``sparse``)."""

try:
    import numba  # noqa: F401
except ImportError as error:
    raise ImportError(f"sparse networks need numba ({error}); run: pip install 'ip-plugin[sparse]'") from error

from .network import Run, SparseNetwork
from .preparation import prepare

__all__ = ["Run", "SparseNetwork", "prepare"]
