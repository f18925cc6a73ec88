"""``python -m xformers.info``: which operators there are."""

from . import __version__
from .ops.common import OPERATORS_REGISTRY


def get_features_status() -> dict[str, str]:
    return {
        f"{operator.OPERATOR_CATEGORY}.{operator.NAME}": "available" if operator.is_available() else "unavailable"
        for operator in OPERATORS_REGISTRY
    }


def print_info() -> None:
    print(f"xFormers {__version__}")
    for name, status in get_features_status().items():
        print(f"{name + ':':<50} {status}")
